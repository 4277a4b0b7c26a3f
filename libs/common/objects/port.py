"""The promise every object store keeps. Keys are relative paths of ASCII letters, digits and ``. _ - /``."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class ObjectStat:
    """Size in bytes, and when the object was written."""

    key: str
    size: int
    modified: datetime


Content = bytes | bytearray | memoryview | Sequence[bytes | bytearray | memoryview] | Path
"""What can be put: bytes, several pieces of bytes that follow each other, or a local file that is read once."""


class Objects(Protocol):
    """A flat space of immutable objects."""

    async def start(self) -> None:
        """Check that the store can be reached and its bucket or folder exists (made when absent)."""

    async def stop(self) -> None: ...

    async def put(self, key: str, content: Content, *, sha256: str | None = None) -> ObjectStat:
        """Store the content under the key; durable on return. Replaces atomically: readers see all or nothing.

        With ``sha256`` (hex) the bytes written are checked against it: on a difference Invalid is raised and no
        object is left. Raises Unavailable when the store is away or full.
        """

    async def get(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        """The bytes from ``offset``, at most ``length`` of them. Raises NotFound, Unavailable."""

    def stream(
        self, key: str, offset: int = 0, length: int | None = None, chunk: int = 1 << 20
    ) -> AsyncIterator[bytes]:
        """The same bytes in pieces of at most ``chunk`` bytes; memory stays flat. Raises NotFound, Unavailable."""

    async def stat(self, key: str) -> ObjectStat:
        """Raises NotFound, Unavailable."""

    async def delete(self, key: str) -> None:
        """Remove the object; no error when it is not there."""

    async def copy(self, source: str, target: str) -> ObjectStat:
        """Copy within the store, durable on return. Raises NotFound, Unavailable."""

    def list(self, prefix: str = "") -> AsyncIterator[ObjectStat]:
        """Every object under the prefix, in no promised order. For repair and rebuild: never on a working path."""

    async def free_bytes(self) -> int | None:
        """Bytes that can still be written, None when the store does not say."""
