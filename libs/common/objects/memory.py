"""Objects in memory, for tests."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime

from libs.common.errors import NotFound
from libs.common.objects.keys import check_digest, check_key, digest_of, pieces
from libs.common.objects.port import Content, ObjectStat


class MemoryObjects:
    """Keeps the promise of ``Objects`` until the process ends."""

    def __init__(self) -> None:
        self._objects: dict[str, tuple[bytes, datetime]] = {}

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    async def put(self, key: str, content: Content, *, sha256: str | None = None) -> ObjectStat:
        check_key(key)
        check_digest(sha256, digest_of(content) if sha256 else "")
        self._objects[key] = (b"".join(bytes(piece) for piece in pieces(content)), datetime.now(UTC))
        return await self.stat(key)

    async def get(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        data = self._find(key)[0]
        return data[offset:] if length is None else data[offset : offset + length]

    async def stream(
        self, key: str, offset: int = 0, length: int | None = None, chunk: int = 1 << 20
    ) -> AsyncIterator[bytes]:
        data = await self.get(key, offset, length)
        for start in range(0, len(data), chunk):
            yield data[start : start + chunk]

    async def stat(self, key: str) -> ObjectStat:
        data, modified = self._find(key)
        return ObjectStat(key, len(data), modified)

    async def delete(self, key: str) -> None:
        self._objects.pop(check_key(key), None)

    async def copy(self, source: str, target: str) -> ObjectStat:
        check_key(target)
        return await self.put(target, self._find(source)[0])

    async def list(self, prefix: str = "") -> AsyncIterator[ObjectStat]:
        for key in list(self._objects):
            if key.startswith(prefix) and key in self._objects:
                yield await self.stat(key)

    async def free_bytes(self) -> int | None:
        return None

    def _find(self, key: str) -> tuple[bytes, datetime]:
        found = self._objects.get(check_key(key))
        if found is None:
            raise NotFound(f"no object {key}")
        return found
