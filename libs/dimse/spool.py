"""Where arriving datasets wait: in memory within the process's budget, in files beyond it."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

from libs.dimse.model import Payload

_SMALLEST = 1 << 20
"""Datasets below this stay in memory even when the budget is spent: a file for each would cost more."""


class Budget:
    """Bytes of datasets that all associations of a process may hold in memory together."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0


def discard(payload: Payload | None) -> None:
    """Delete the file of a spooled dataset."""
    if payload is not None and payload.path is not None:
        with contextlib.suppress(OSError):
            payload.path.unlink(missing_ok=True)


class Spool:
    """The dataset that arrives on one association. Raises OSError when its file cannot be written."""

    def __init__(self, budget: Budget, threshold: int, folder: Path | None) -> None:
        self._budget = budget
        self._threshold = threshold
        self._folder = folder
        self._held = 0
        self._file: IO[bytes] | None = None

    def grow(self, payload: Payload, take: Callable[[], list[bytes | bytearray | memoryview]]) -> None:
        """Account for what arrived; ``take`` gives the pieces away when they have to go to the file."""
        if self._file is None:
            self._account(payload.size)
            crowded = self._budget.held > self._budget.limit and payload.size > _SMALLEST
            if payload.size <= self._threshold and not crowded:
                return
            self._file = tempfile.NamedTemporaryFile(  # noqa: SIM115 - lives until the dataset is complete
                dir=self._folder, suffix=".dataset", delete=False, buffering=_SMALLEST
            )
            payload.path = Path(self._file.name)
            self.release()
        self._file.writelines(take())

    def finish(self, payload: Payload | None) -> None:
        """The dataset is complete: it can be read from memory or from its file."""
        if payload is None:
            return
        if self._file is not None:
            self._file.writelines(payload.pieces)
            payload.pieces = []
            self._file.close()
            self._file = None
        else:
            self._account(payload.size)

    def _account(self, size: int) -> None:
        self._budget.held += size - self._held
        self._held = size

    def release(self) -> None:
        """Give back to the budget: the message was answered, spooled or dropped."""
        self._budget.held -= self._held
        self._held = 0

    def drop(self, payload: Payload | None) -> None:
        """The connection ended in the middle of a dataset."""
        self.release()
        if self._file is not None:
            self._file.close()
            self._file = None
        discard(payload)
