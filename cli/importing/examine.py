"""What kind of instance a file holds and where its dataset begins; lenient about the wrapping only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from libs.common.dicom.part10 import FileMeta, Truncated, split_part10
from libs.common.dicom.uids import is_usable_uid
from libs.common.errors import Invalid
from services.ingest.model.scan import Identity, NeedMore, scan

MEDIA_STORAGE_DIRECTORY = "1.2.840.10008.1.3.10"

_EXPLICIT_LITTLE = "1.2.840.10008.1.2.1"
_IMPLICIT_LITTLE = "1.2.840.10008.1.2"
_EXPLICIT_BIG = "1.2.840.10008.1.2.2"
_DEFLATED = "1.2.840.10008.1.2.1.99"

_FIRST = 65536
_MOST = 64 << 20
_PREFIX = bytes(128) + b"DICM"
_FIRST_GROUPS = (b"\x08\x00", b"\x00\x08")


class NotDicom(Exception):
    """The file is something else (or a DICOMDIR), which is no failure of an import."""


@dataclass(frozen=True)
class Found:
    """An instance in a file: its UIDs, the syntax its bytes are in, and the offset in bytes of its dataset."""

    sop_class_uid: str
    sop_instance_uid: str
    transfer_syntax_uid: str
    offset: int


def examine(path: Path) -> Found:
    """Look at the head of a file.

    A file may lack its preamble or its file meta, or name a transfer syntax that it is not in: what the dataset
    itself shows counts. Raises NotDicom; Invalid for a DICOM file without usable UIDs; OSError.
    """
    with path.open("rb") as file:
        size = path.stat().st_size
        head = file.read(_FIRST)
        meta, offset, marked = _shell(head)
        if meta.sop_class_uid == MEDIA_STORAGE_DIRECTORY:
            raise NotDicom("a DICOMDIR")
        if not marked and head[:2] not in _FIRST_GROUPS:
            raise NotDicom("no DICOM file")
        for syntax in _guesses(meta.transfer_syntax_uid, head[offset:]):
            identity = _identity(file, offset, size, syntax)
            if identity is not None and is_usable_uid(identity.sop_class_uid):
                break
        else:
            if not marked:
                raise NotDicom("no DICOM file")
            # The archive refuses it with its reason and keeps it in quarantine, if it can be sent at all.
            identity, syntax = Identity("", "", "", ""), meta.transfer_syntax_uid
    sop_class_uid = identity.sop_class_uid or meta.sop_class_uid
    sop_instance_uid = identity.sop_instance_uid or meta.sop_instance_uid
    if not (is_usable_uid(sop_class_uid) and is_usable_uid(sop_instance_uid) and is_usable_uid(syntax)):
        raise Invalid("it has no SOP Class UID, SOP Instance UID or Transfer Syntax UID that could be sent")
    return Found(sop_class_uid, sop_instance_uid, syntax, offset)


def _shell(head: bytes) -> tuple[FileMeta, int, bool]:
    """File meta, offset of the dataset, and whether the file says itself that it is DICOM."""
    empty = FileMeta("", "", "")
    marked = head[128:132] == b"DICM"
    try:
        if marked:
            return *split_part10(head), True
        if head[:2] == b"\x02\x00":
            # File meta without the preamble before it.
            meta, offset = split_part10(_PREFIX + head)
            return meta, offset - len(_PREFIX), True
    except Truncated:
        if marked:
            raise Invalid("the file ends inside its file meta") from None
        return empty, 0, False
    except Invalid:
        # Group 2 in another encoding, or absent behind the prefix: the dataset is looked for where it should begin.
        return empty, len(_PREFIX) if marked else 0, marked
    return empty, 0, False


def _guesses(stated: str, start: bytes) -> list[str]:
    """The syntaxes to try: the stated one, then those that the first bytes of the dataset allow."""
    plain = [_EXPLICIT_LITTLE, _IMPLICIT_LITTLE, _EXPLICIT_BIG]
    if start[:1] == b"\0":
        plain = [_EXPLICIT_BIG]
    guesses = ([stated] if stated else []) + plain
    if stated and start[:2] not in _FIRST_GROUPS:
        guesses.append(_DEFLATED)
    return list(dict.fromkeys(guesses))


def _identity(file: BinaryIO, offset: int, size: int, syntax: str) -> Identity | None:
    length = _FIRST
    while True:
        file.seek(offset)
        head = file.read(length)
        complete = offset + len(head) >= size
        try:
            return scan(head, syntax, complete=complete, max_inflated=_MOST)
        except NeedMore:
            if complete or length >= _MOST:
                return None
            length *= 8
        except Invalid:
            return None
