"""The four UIDs that place an instance, read from the head of its encoded dataset (PS3.5 section 7) without a parser.

This runs once per instance that arrives, so it looks at headers only, jumps over values and stops at the last UID.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

from libs.common.dicom.uids import clean_uid
from libs.common.errors import Invalid

SOP_CLASS_UID = 0x00080016
SOP_INSTANCE_UID = 0x00080018
STUDY_INSTANCE_UID = 0x0020000D
SERIES_INSTANCE_UID = 0x0020000E

_WANTED = frozenset((SOP_CLASS_UID, SOP_INSTANCE_UID, STUDY_INSTANCE_UID, SERIES_INSTANCE_UID))
_PIXELS = 0x7FE00000
_ITEM = 0xFFFEE000
_ITEM_END = 0xFFFEE00D
_SEQUENCE_END = 0xFFFEE0DD
_UNDEFINED = 0xFFFFFFFF
_MOST_LEVELS = 64

_LONG_FORM = frozenset((b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"))
"""The VRs with a reserved field and a length of 32 bits (PS3.5 7.1.2)."""

IMPLICIT_LITTLE_ENDIAN = frozenset(("1.2.840.10008.1.2", "1.2.840.10008.1.20", "1.2.840.113619.5.2"))
EXPLICIT_BIG_ENDIAN = frozenset(("1.2.840.10008.1.2.2",))
DEFLATED = frozenset(("1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.4.95", "1.2.840.10008.1.2.4.205"))

# By byte order: tag with 32-bit length, tag with VR and 16-bit length, a 32-bit length.
_LITTLE = (struct.Struct("<HHI"), struct.Struct("<HH2sH"), struct.Struct("<I"))
_BIG = (struct.Struct(">HHI"), struct.Struct(">HH2sH"), struct.Struct(">I"))


class NeedMore(Exception):
    """The head ends before the answer is known."""


@dataclass(frozen=True, slots=True)
class Identity:
    """The UIDs found in a dataset, without padding; empty when absent."""

    sop_class_uid: str
    sop_instance_uid: str
    study_instance_uid: str
    series_instance_uid: str


def scan(head: bytes, transfer_syntax_uid: str, *, complete: bool, max_inflated: int = 64 << 20) -> Identity:
    """The identity of the dataset that begins with ``head``; ``complete`` says that it is the whole dataset.

    Stops when all four are found or at the pixel data. The first of equal tags counts. Raises NeedMore when the head
    is too short, Invalid when the bytes are no dataset in that transfer syntax or end in the middle of an element.
    """
    if transfer_syntax_uid in DEFLATED:
        head, complete = _inflate(head, complete, max_inflated)
    found: dict[int, str] = {}
    explicit = transfer_syntax_uid not in IMPLICIT_LITTLE_ENDIAN
    try:
        done = _walk(head, explicit, transfer_syntax_uid not in EXPLICIT_BIG_ENDIAN, found)
    except (NeedMore, struct.error):
        if not complete:
            raise NeedMore from None
        raise Invalid("the dataset ends in the middle of an element") from None
    if not done and not complete:
        raise NeedMore
    return Identity(
        found.get(SOP_CLASS_UID, ""),
        found.get(SOP_INSTANCE_UID, ""),
        found.get(STUDY_INSTANCE_UID, ""),
        found.get(SERIES_INSTANCE_UID, ""),
    )


def _inflate(head: bytes, complete: bool, limit: int) -> tuple[bytes, bool]:
    """What the deflated head holds (PS3.5 A.5), at most ``limit`` bytes, and whether that is all."""
    stream = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        inflated = stream.decompress(head, limit)
    except zlib.error:
        raise Invalid("the dataset is not a deflated stream") from None
    return inflated, stream.eof or (complete and len(inflated) < limit)


def _walk(data: bytes, explicit: bool, little: bool, found: dict[int, str]) -> bool:
    """Fill ``found`` from the elements of the top level; false when the data ends where another could follow.

    Raises NeedMore or struct.error when it ends inside an element.
    """
    plain, typed, long_length = _LITTLE if little else _BIG
    offset, end, missing = 0, len(data), 4
    while offset < end:
        if explicit:
            group, element, vr, length = typed.unpack_from(data, offset)
            offset += 8
            if vr in _LONG_FORM:
                (length,) = long_length.unpack_from(data, offset)
                offset += 4
            elif not _is_vr(vr):
                raise Invalid("an element has no VR: the dataset is not in its transfer syntax")
        else:
            group, element, length = plain.unpack_from(data, offset)
            vr = b""
            offset += 8
        tag = group << 16 | element
        if tag >= _PIXELS:
            if group == 0xFFFE:
                raise Invalid("an item outside of a sequence: the dataset is not in its transfer syntax")
            return True
        if length == _UNDEFINED:
            offset = _skip_sequence(data, offset, explicit and vr != b"UN", little)
            continue
        if tag in _WANTED and tag not in found:
            if length > 1024:
                raise Invalid("a UID of more than 1024 bytes: the dataset is not in its transfer syntax")
            if offset + length > end:
                raise NeedMore
            found[tag] = clean_uid(data[offset : offset + length].decode("ascii", "replace"))
            missing -= 1
            if not missing:
                return True
        offset += length
    if offset > end:
        raise NeedMore
    return False


def _is_vr(vr: bytes) -> bool:
    return 0x41 <= vr[0] <= 0x5A and 0x41 <= vr[1] <= 0x5A


def _skip_sequence(data: bytes, offset: int, explicit: bool, little: bool) -> int:
    """The offset behind a sequence of undefined length (PS3.5 7.5) whose first item begins at ``offset``.

    The levels that are open are kept on a list, not on the interpreter's stack, and are bounded: depth is the
    sender's choice. Inside an UN of undefined length everything is Implicit VR Little Endian (PS3.5 6.2.2).
    """
    end = len(data)
    if data[offset : offset + 2] == b"\xfe\xff":
        little = True  # so also for an UN in a big endian dataset, whose inside is little endian
    levels = [(False, explicit, little)]
    while levels:
        inside_item, explicit, little = levels[-1]
        plain, typed, long_length = _LITTLE if little else _BIG
        group, element, length = plain.unpack_from(data, offset)
        tag = group << 16 | element
        if not inside_item:
            offset += 8
            if tag == _SEQUENCE_END:
                levels.pop()
            elif tag != _ITEM:
                raise Invalid("a sequence holds something that is no item: the dataset is not in its transfer syntax")
            elif length != _UNDEFINED:
                offset += length
            else:
                # Some write implicit items into explicit datasets; readers take them, so they are no reason to refuse.
                vr = data[offset + 4 : offset + 6]
                levels.append((True, explicit and len(vr) == 2 and _is_vr(vr), little))
            if offset > end:
                raise NeedMore
            continue
        if tag == _ITEM_END:
            offset += 8
            levels.pop()
            continue
        nested_explicit = explicit
        if explicit:
            _, _, vr, length = typed.unpack_from(data, offset)
            offset += 8
            if vr in _LONG_FORM:
                (length,) = long_length.unpack_from(data, offset)
                offset += 4
                nested_explicit = vr != b"UN"
            elif not _is_vr(vr):
                raise Invalid("an element has no VR: the dataset is not in its transfer syntax")
        else:
            offset += 8
        if length != _UNDEFINED:
            offset += length
            if offset > end:
                raise NeedMore
            continue
        if len(levels) >= _MOST_LEVELS:
            raise Invalid(f"sequences nested deeper than {_MOST_LEVELS // 2}")
        levels.append((False, nested_explicit, little or data[offset : offset + 2] == b"\xfe\xff"))
    return offset
