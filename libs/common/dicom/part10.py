"""The shell of a DICOM file (PS3.10 section 7): preamble, prefix and File Meta Information around a dataset."""

from __future__ import annotations

import functools
import struct
from dataclasses import dataclass

from libs.common.dicom.uids import clean_uid
from libs.common.errors import Invalid

IMPLEMENTATION_CLASS_UID = "2.25.151434187291020559089297029536204408544"
IMPLEMENTATION_VERSION_NAME = "SAGITTAL"

PREFIX_END = 132
_PREAMBLE = bytes(128) + b"DICM"
_LONG_FORM = frozenset((b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"))
_MEDIA_STORAGE_SOP_CLASS_UID = 0x0002
_MEDIA_STORAGE_SOP_INSTANCE_UID = 0x0003
_TRANSFER_SYNTAX_UID = 0x0010


class Truncated(Invalid):
    """The bytes end before what was asked for does; at least ``needed`` bytes of the object may help (0: unknown)."""

    def __init__(self, message: str, needed: int = 0) -> None:
        super().__init__(message)
        self.needed = needed


@dataclass(frozen=True)
class FileMeta:
    """What the File Meta Information says of the dataset behind it. Empty when the element is absent."""

    sop_class_uid: str
    sop_instance_uid: str
    transfer_syntax_uid: str


def _text(element: int, vr: bytes, value: str, pad: bytes) -> bytes:
    raw = value.encode("ascii")
    if len(raw) % 2:
        raw += pad
    return struct.pack("<HH2sH", 0x0002, element, vr, len(raw)) + raw


_IMPLEMENTATION = _text(0x0012, b"UI", IMPLEMENTATION_CLASS_UID, b"\0") + _text(
    0x0013, b"SH", IMPLEMENTATION_VERSION_NAME, b" "
)


@functools.lru_cache(maxsize=4096)
def _syntax_and_implementation(transfer_syntax_uid: str) -> bytes:
    return _text(_TRANSFER_SYNTAX_UID, b"UI", transfer_syntax_uid, b"\0") + _IMPLEMENTATION


def build_file_meta(sop_class_uid: str, sop_instance_uid: str, transfer_syntax_uid: str) -> bytes:
    """Preamble, prefix and group 2 to put before a dataset: the same arguments give the same bytes.

    The UIDs are plain ASCII without padding. Nothing of the sender or the moment goes in, so that equal datasets
    give equal files and equal digests. Raises Invalid when a UID is not ASCII or longer than 64 characters.
    """
    for uid in (sop_class_uid, sop_instance_uid, transfer_syntax_uid):
        if not uid.isascii() or not 0 < len(uid) <= 64:
            raise Invalid("a UID of the file meta is empty, not ASCII or longer than 64 characters")
    group = b"".join(
        (
            struct.pack("<HH2sHI", 0x0002, 0x0001, b"OB", 0, 2),
            b"\0\1",
            _text(_MEDIA_STORAGE_SOP_CLASS_UID, b"UI", sop_class_uid, b"\0"),
            _text(_MEDIA_STORAGE_SOP_INSTANCE_UID, b"UI", sop_instance_uid, b"\0"),
            _syntax_and_implementation(transfer_syntax_uid),
        )
    )
    return _PREAMBLE + struct.pack("<HH2sHI", 0x0002, 0x0000, b"UL", 4, len(group)) + group


def split_part10(content: bytes | memoryview) -> tuple[FileMeta, int]:
    """What the file meta says, and the offset in bytes at which the dataset begins.

    ``content`` is the start of a Part 10 file, or all of it. Group 2 is read element by element (PS3.10 7.1: always
    Explicit VR Little Endian), since its stated length is wrong in many files. Raises Truncated when the content
    ends inside group 2, Invalid when it is no Part 10 file.
    """
    if len(content) < PREFIX_END:
        raise Truncated("shorter than the preamble of a DICOM file")
    if bytes(content[128:PREFIX_END]) != b"DICM":
        raise Invalid("not a DICOM file: the prefix DICM is missing")
    found: dict[int, str] = {}
    offset = PREFIX_END
    # A file may end with its meta (an empty dataset); anything shorter than a tag is a torn file.
    while (head := bytes(content[offset : offset + 8])) and (len(head) < 2 or head[:2] == b"\x02\x00"):
        if len(head) < 8:
            raise Truncated("the file ends inside its file meta")
        element, vr, length = struct.unpack("<2xH2sH", head)
        start = offset + 8
        if vr in _LONG_FORM:
            size = bytes(content[start : start + 4])
            if len(size) < 4:
                raise Truncated("the file ends inside its file meta")
            (length,) = struct.unpack("<I", size)
            start += 4
        elif not (vr.isalpha() and vr.isupper()):
            raise Invalid("the file meta is not Explicit VR Little Endian")
        if start + length > len(content):
            raise Truncated("the file ends inside its file meta")
        if element in (_MEDIA_STORAGE_SOP_CLASS_UID, _MEDIA_STORAGE_SOP_INSTANCE_UID, _TRANSFER_SYNTAX_UID):
            found[element] = clean_uid(bytes(content[start : start + length]).decode("ascii", "replace"))
        offset = start + length
    meta = FileMeta(
        found.get(_MEDIA_STORAGE_SOP_CLASS_UID, ""),
        found.get(_MEDIA_STORAGE_SOP_INSTANCE_UID, ""),
        found.get(_TRANSFER_SYNTAX_UID, ""),
    )
    return meta, offset
