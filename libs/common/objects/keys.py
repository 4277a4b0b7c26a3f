"""What a key may look like, and pieces of content as every store needs them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

from libs.common.errors import Invalid
from libs.common.objects.port import Content

_KEY = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)*")
CHUNK = 1 << 20


def check_key(key: str) -> str:
    """The key itself. Raises Invalid when it could leave the store or is not portable."""
    if len(key) > 512 or _KEY.fullmatch(key) is None:
        raise Invalid("an object key is made of path parts of letters, digits and . _ - that do not start with a dot")
    return key


def pieces(content: Content) -> Iterator[bytes | bytearray | memoryview]:
    """The content piece by piece; a file is read in chunks."""
    if isinstance(content, Path):
        with content.open("rb") as file:
            while chunk := file.read(CHUNK):
                yield chunk
    elif isinstance(content, bytes | bytearray | memoryview):
        yield content
    else:
        yield from content


def size_of(content: Content) -> int:
    """Bytes in all."""
    if isinstance(content, Path):
        return content.stat().st_size
    if isinstance(content, bytes | bytearray | memoryview):
        return len(memoryview(content).cast("B"))
    return sum(len(memoryview(piece).cast("B")) for piece in content)


def digest_of(content: Content) -> str:
    """SHA-256 in hex."""
    digest = hashlib.sha256()
    for piece in pieces(content):
        digest.update(piece)
    return digest.hexdigest()


def check_digest(expected: str | None, found: str) -> None:
    """Raises Invalid when the bytes are not those that were promised."""
    if expected is not None and expected != found:
        raise Invalid("the bytes do not match their SHA-256: they were damaged on the way and nothing was stored")
