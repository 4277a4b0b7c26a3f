"""Objects as files of one folder: written beside, flushed to the disk, then renamed, so that readers see all or
nothing and what was acknowledged survives a loss of power."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import os
import secrets
import shutil
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from stat import S_ISREG
from typing import TypeVar

from libs.common.errors import NotFound, Unavailable
from libs.common.objects.keys import check_digest, check_key, pieces
from libs.common.objects.port import Content, ObjectStat

T = TypeVar("T")
_THREADS = 16
_LISTED = 500
_ABANDONED = 3600.0  # seconds since the last byte


class FilesystemObjects:
    """Objects under ``root``; half-written files live in ``root/.incoming`` and are removed at the start."""

    def __init__(self, root: Path, threads: int = _THREADS) -> None:
        self._root = root.resolve()
        self._incoming = self._root / ".incoming"
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="objects")
        # Containers that share the folder have the same process ids: the token tells their files apart.
        self._name = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(6)}"
        self._number = itertools.count()
        self._known_folders: set[Path] = set()

    async def start(self) -> None:
        await self._run(self._prepare)

    def _prepare(self) -> None:
        self._incoming.mkdir(parents=True, exist_ok=True)
        for left in self._incoming.iterdir():
            # Other processes share the folder, perhaps from other machines: only what is old, or what a process of
            # this machine left that lives no more, is nobody's.
            host, _, rest = left.name.rpartition("-")[0].rpartition("-")[0].rpartition("-")
            with contextlib.suppress(FileNotFoundError):
                if left.stat().st_mtime < time.time() - _ABANDONED or (host == socket.gethostname() and _dead(rest)):
                    left.unlink()

    async def stop(self) -> None:
        self._pool.shutdown(wait=True)

    async def put(self, key: str, content: Content, *, sha256: str | None = None) -> ObjectStat:
        path = self._path(key)
        return await self._run(lambda: self._put(key, path, content, sha256))

    def _put(self, key: str, path: Path, content: Content, sha256: str | None) -> ObjectStat:
        temporary = self._incoming / f"{self._name}-{next(self._number)}"
        digest = hashlib.sha256() if sha256 is not None else None
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o640)
            try:
                for piece in pieces(content):
                    if digest is not None:
                        digest.update(piece)
                    view = memoryview(piece).cast("B")
                    while view:
                        view = view[os.write(descriptor, view) :]
                if digest is not None:
                    check_digest(sha256, digest.hexdigest())
                os.fsync(descriptor)
                status = os.fstat(descriptor)
            finally:
                os.close(descriptor)
            self._make_folder(path.parent)
            try:
                temporary.replace(path)
            except FileNotFoundError:  # the folder was removed from outside after we had seen it
                self._known_folders.discard(path.parent)
                self._make_folder(path.parent)
                temporary.replace(path)
            _sync_folder(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        return ObjectStat(key, status.st_size, datetime.fromtimestamp(status.st_mtime, UTC))

    def _make_folder(self, folder: Path) -> None:
        """Make the folder and flush each new name into its parent: a synced file in a lost folder is lost."""
        if folder in self._known_folders:
            return
        # Also folders that exist are flushed once: another thread or process may have made them and not got to it yet.
        unsure = []
        current = folder
        while current != self._root and current not in self._known_folders:
            unsure.append(current)
            current = current.parent
        folder.mkdir(parents=True, exist_ok=True)
        for made in reversed(unsure):
            _sync_folder(made.parent)
        if len(self._known_folders) > 50_000:
            self._known_folders.clear()
        self._known_folders.update(unsure)

    async def get(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        path = self._path(key)
        return await self._run(lambda: _read(path, offset, length))

    async def stream(
        self, key: str, offset: int = 0, length: int | None = None, chunk: int = 1 << 20
    ) -> AsyncIterator[bytes]:
        path = self._path(key)
        file = await self._run(lambda: path.open("rb"))
        try:
            await self._run(lambda: file.seek(offset))
            left = length
            while left is None or left > 0:
                wanted = chunk if left is None else min(chunk, left)
                data = await self._run(lambda wanted=wanted: file.read(wanted))  # type: ignore[misc]
                if not data:
                    return
                if left is not None:
                    left -= len(data)
                yield data
        finally:
            file.close()

    async def stat(self, key: str) -> ObjectStat:
        path = self._path(key)
        status = await self._run(path.stat)
        if not S_ISREG(status.st_mode):
            raise NotFound("no such object")
        return ObjectStat(key, status.st_size, datetime.fromtimestamp(status.st_mtime, UTC))

    async def delete(self, key: str) -> None:
        path = self._path(key)

        def remove() -> None:
            with contextlib.suppress(FileNotFoundError, IsADirectoryError, NotADirectoryError):
                path.unlink()
                _sync_folder(path.parent)

        await self._run(remove)

    async def copy(self, source: str, target: str) -> ObjectStat:
        origin, path = self._path(source), self._path(target)
        return await self._run(lambda: self._put(target, path, origin, None))

    async def list(self, prefix: str = "") -> AsyncIterator[ObjectStat]:
        walk = self._walk(prefix)
        while True:
            page = await self._run(lambda: list(itertools.islice(walk, _LISTED)))
            for found in page:
                yield found
            if len(page) < _LISTED:
                return

    def _walk(self, prefix: str) -> Iterator[ObjectStat]:
        folders = [self._root / prefix.rpartition("/")[0]]
        while folders:
            try:
                entries = list(os.scandir(folders.pop()))
            except FileNotFoundError:
                continue
            for entry in entries:
                key = os.path.relpath(entry.path, self._root)
                if entry.is_dir(follow_symlinks=False):
                    if not entry.name.startswith(".") and (key.startswith(prefix) or prefix.startswith(key)):
                        folders.append(Path(entry.path))
                elif key.startswith(prefix):
                    with contextlib.suppress(FileNotFoundError):
                        status = entry.stat()
                        yield ObjectStat(key, status.st_size, datetime.fromtimestamp(status.st_mtime, UTC))

    async def free_bytes(self) -> int | None:
        return await self._run(lambda: shutil.disk_usage(self._root).free)

    def _path(self, key: str) -> Path:
        return self._root / check_key(key)

    async def _run(self, work: Callable[[], T]) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, work)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
            raise NotFound("no such object") from error
        except OSError as error:
            raise Unavailable(f"the object folder cannot be used: {error.strerror}") from error


def _read(path: Path, offset: int, length: int | None) -> bytes:
    with path.open("rb", buffering=0) as file:
        if offset:
            file.seek(offset)
        return file.read() if length is None else file.read(length)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _dead(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except (PermissionError, ValueError):
        return False
    return False
