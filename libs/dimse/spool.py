"""A dataset too large for memory, written to a file while it arrives."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from pathlib import Path
from typing import BinaryIO, cast

from libs.common.errors import Unavailable
from libs.dimse.model import Payload

Pieces = list[bytes | bytearray | memoryview]


class Spool:
    """One file in ``directory`` (None: the system's). A full disk is remembered and told by ``finish``."""

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory
        self._file: BinaryIO | None = None
        self._path: Path | None = None
        self._failure: OSError | None = None
        self._turn = asyncio.Lock()
        self._discarded = False

    async def add(self, pieces: Pieces) -> None:
        """Append, in a thread. The caller stops reading from the peer meanwhile, so that memory stays bounded."""
        async with self._turn:
            if self._failure is None and not self._discarded:
                await asyncio.to_thread(self._write, pieces)
        if self._discarded:
            self._remove()

    async def finish(self, payload: Payload) -> None:
        """Write what is left and give the payload its path. Raises Unavailable when the disk did not take it."""
        await self.add(payload.pieces)
        payload.pieces = []
        async with self._turn:
            if self._file is not None:
                await asyncio.to_thread(self._close)
        if self._failure is not None:
            self._remove()
            raise Unavailable("no room for a large instance in the spool folder") from self._failure
        payload.path = self._path

    def discard(self) -> None:
        """Forget the file, now or as soon as a write in hand ended."""
        self._discarded = True
        if not self._turn.locked():
            self._remove()

    def _write(self, pieces: Pieces) -> None:
        try:
            if self._file is None:
                self._file = cast(
                    BinaryIO,
                    tempfile.NamedTemporaryFile(  # noqa: SIM115 -- lives as long as the message
                        dir=self._directory, prefix="instance-", suffix=".part", delete=False
                    ),
                )
                self._path = Path(self._file.name)
            self._file.writelines(pieces)
        except OSError as error:
            self._failure = error

    def _close(self) -> None:
        try:
            if self._file is not None:
                self._file.close()
        except OSError as error:
            self._failure = self._failure or error
        self._file = None

    def _remove(self) -> None:
        with contextlib.suppress(OSError):
            if self._file is not None:
                self._file.close()
        self._file = None
        if self._path is not None:
            self._path.unlink(missing_ok=True)
