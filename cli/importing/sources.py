"""What an import finds: files in folders and members of zip archives, one after the other."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from libs.common.errors import Invalid

LARGEST_MEMBER = 8 << 30
"""Bytes that one member of a zip archive may unpack to."""
LARGEST_RATIO = 100
LEAST_LIMIT = 4 << 30
"""A zip archive may unpack to this many bytes in all, or to ``LARGEST_RATIO`` times its own size when that is more."""


@dataclass(frozen=True)
class Candidate:
    """Something that may be a DICOM instance. ``member`` is set when it is inside the zip archive ``path``."""

    path: Path
    size: int
    mtime_ns: int
    member: zipfile.ZipInfo | None = None
    refusal: str = ""
    archive: zipfile.ZipFile | None = field(default=None, compare=False, repr=False)

    @property
    def label(self) -> str:
        return f"{self.path}!{self.member.filename}" if self.member is not None else str(self.path)

    @property
    def identity(self) -> str:
        """What stays the same as long as the content does, as far as a file system can say."""
        position = f"!{self.member.header_offset}:{self.member.filename}" if self.member is not None else ""
        return f"{self.path.resolve()}{position}|{self.size}|{self.mtime_ns}"

    @contextlib.contextmanager
    def opened(self) -> Iterator[Path]:
        """A local file with the content, for the time of the block.

        A member is unpacked to a temporary file with a name of our own, whatever its own name is. Raises Invalid for
        an archive that is broken or encrypted, OSError for a file that cannot be read.
        """
        if self.member is None or self.archive is None:
            yield self.path
            return
        with tempfile.TemporaryDirectory(prefix="sagittal-import-") as folder:
            target = Path(folder) / "member"
            try:
                # Reading ends at the size that the directory of the archive states: that was checked against the limit.
                with self.archive.open(self.member) as source, target.open("wb") as out:
                    shutil.copyfileobj(source, out, 1 << 20)
            except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
                raise Invalid(f"cannot be unpacked: {error}") from error
            except Exception as error:  # zlib, lzma and bz2 each have their own
                if isinstance(error, OSError):
                    raise
                raise Invalid(f"cannot be unpacked: {type(error).__name__}") from error
            yield target


def find(paths: list[Path]) -> Iterator[Candidate]:
    """Every candidate under the paths in a fixed order; a DICOMDIR stands for the folder it describes.

    Raises Invalid when a named path does not exist. Links to folders are not followed, so no walk is endless.
    """
    for path in paths:
        if not path.exists():
            raise Invalid(f"{path} does not exist")
    seen: set[Path] = set()
    for path in paths:
        root = path.parent if path.name.upper() == "DICOMDIR" and path.is_file() else path
        for file in _files(root):
            resolved = file.resolve()
            if resolved not in seen:
                seen.add(resolved)
                yield from _candidates(file)


def _files(root: Path) -> Iterator[Path]:
    if not root.is_dir():
        yield root
        return
    for folder, folders, names in os.walk(root):
        folders.sort()
        for name in sorted(names):
            yield Path(folder) / name


def _candidates(path: Path) -> Iterator[Candidate]:
    try:
        status = path.stat()
        if not path.is_file():
            return
        with path.open("rb") as file:
            head = file.read(132)
    except OSError as error:
        yield Candidate(path, 0, 0, refusal=f"cannot be read: {error.strerror}")
        return
    if head[:2] != b"PK" or head[128:132] == b"DICM" or not zipfile.is_zipfile(path):
        yield Candidate(path, status.st_size, status.st_mtime_ns)
        return
    try:
        # Not closed here: its members are read later, and it closes itself with the last of them.
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        yield Candidate(
            path, status.st_size, status.st_mtime_ns, refusal=f"not a zip archive that can be read: {error}"
        )
        return
    yield from _members(path, status, archive)


def _members(path: Path, status: os.stat_result, archive: zipfile.ZipFile) -> Iterator[Candidate]:
    left = max(LEAST_LIMIT, LARGEST_RATIO * status.st_size)
    for member in archive.infolist():
        if member.is_dir():
            continue
        refusal = ""
        if member.flag_bits & 0x1:
            refusal = "is encrypted"
        elif member.file_size > min(left, LARGEST_MEMBER):
            refusal = "unpacks to more than an import takes; unpack it yourself if you trust it"
        else:
            left -= member.file_size
        yield Candidate(path, status.st_size, status.st_mtime_ns, member, refusal, archive)
