"""The attributes before the pixels, found without decoding what nobody asked for.

pydicom builds an object for every element of a dataset, which costs more than all the rest of indexing. Here the
element headers are walked (PS3.5 section 7) and only the wanted values are kept, as bytes, until they are rendered.
"""

from __future__ import annotations

import functools
import struct
import zlib
from dataclasses import dataclass, field
from typing import NamedTuple

from pydicom.datadict import dictionary_VR

from libs.common.dicom.levels import ALL
from libs.common.dicom.part10 import FileMeta, Truncated, split_part10
from libs.common.errors import Invalid

IMPLICIT = "1.2.840.10008.1.2"
EXPLICIT_BIG_ENDIAN = "1.2.840.10008.1.2.2"
DEFLATED = "1.2.840.10008.1.2.1.99"
JPIP_DEFLATED = frozenset(("1.2.840.10008.1.2.4.95", "1.2.840.10008.1.2.4.205"))

SPECIFIC_CHARACTER_SET = 0x00080005
PIXEL_REPRESENTATION = 0x00280103
_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
_UNDEFINED = 0xFFFFFFFF
_LONG_FORM = frozenset((b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"))
_LONG_FORM_BY_NAME = frozenset(vr.decode() for vr in _LONG_FORM)
_MAX_DEPTH = 32
_MAX_INFLATED = 64 << 20
LARGEST_VALUE = 64 << 10
"""Bytes of a value that is still kept in a document; a longer one is noted and left in the object."""
LARGEST_SEQUENCE = 256 << 10
"""The same for all items of a sequence together."""


class Element(NamedTuple):
    """One attribute as found: its value as bytes, or as items when it is a sequence."""

    vr: str
    value: bytes
    items: list[dict[int, Element]] | None = None


@dataclass
class Header:
    """The wanted attributes of one dataset, undecoded, by tag. ``problems`` names what had to be left out and why.

    Problems name tags, never values.
    """

    meta: FileMeta
    elements: dict[int, Element] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    big_endian: bool = False


class _Ended(Exception):
    """The bytes end before the header does; ``needed`` counts from the start of the dataset."""

    def __init__(self, needed: int) -> None:
        self.needed = needed


class _Broken(Exception):
    """The bytes make no sense from here on."""


@functools.lru_cache(maxsize=8192)
def _dictionary_vr(tag: int) -> str:
    if tag & 0xFFFF == 0:
        return "UL"
    try:
        vr = dictionary_VR(tag)
    except KeyError:
        return "UN"
    return vr.split(" or ")[0] if " or " in vr else vr


class _Walk:
    """One pass over the elements of a dataset. ``total`` is its length in bytes, of which ``content`` is the start."""

    def __init__(self, content: bytes, total: int, big_endian: bool, header: Header) -> None:
        self.content = content
        self.total = total
        self.header = header
        order = ">" if big_endian else "<"
        self.explicit_head = struct.Struct(order + "HH2sH").unpack_from
        self.implicit_head = struct.Struct(order + "HHI").unpack_from
        self.long = struct.Struct(order + "I").unpack_from

    def elements(
        self, offset: int, end: int, explicit: bool, wanted: frozenset[int] | None, into: dict[int, Element] | None,
        last: int, depth: int,
    ) -> int:  # fmt: skip
        """Walk from ``offset`` to ``end``, or to the end of the item, or past the tag ``last``; give the offset there.

        ``wanted`` None keeps every public attribute; ``into`` None keeps nothing (a sequence that is skipped).
        """
        content, size = self.content, len(self.content)
        while offset < end:
            if offset + 8 > size:
                raise _Ended(offset + 8)
            if explicit:
                group, element, code, length = self.explicit_head(content, offset)
                start = offset + 8
                tag = group << 16 | element
                if tag > last:
                    return offset if tag != _ITEM_END else start
                if code in _LONG_FORM:
                    if start + 4 > size:
                        raise _Ended(start + 4)
                    (length,) = self.long(content, start)
                    start += 4
                elif not (code.isalpha() and code.isupper()):
                    raise _Broken
                vr = code.decode("ascii")
            else:
                group, element, length = self.implicit_head(content, offset)
                start = offset + 8
                tag = group << 16 | element
                if tag > last:
                    return offset if tag != _ITEM_END else start
                vr = ""
            keep = into is not None and (tag in wanted if wanted is not None else not group & 1)
            if length == _UNDEFINED:
                nested_explicit = explicit and vr != "UN"  # PS3.5 6.2.2 note: UN of undefined length is implicit
                items: list[dict[int, Element]] | None = [] if keep else None
                offset = self.items(start, self.total, nested_explicit, items, depth + 1)
                if into is not None and items is not None:
                    self._keep_sequence(tag, offset - start, items, into)
                continue
            offset = start + length
            if into is None or not keep:
                continue
            if vr == "UN" or not vr:
                vr = _dictionary_vr(tag)
                inner = False
            else:
                inner = explicit
            if offset > end:
                raise _Broken
            if vr == "SQ":
                if offset > size:
                    raise _Ended(offset)
                items = []
                try:
                    self.items(start, offset, inner, items, depth + 1)
                except (_Broken, _Ended):  # its length is known, so the rest of the header is not lost with it
                    self.header.problems.append(f"{tag:08X} is a sequence that cannot be read")
                    continue
                self._keep_sequence(tag, length, items, into)
            elif length > LARGEST_VALUE:
                self.header.problems.append(f"{tag:08X} is too long to be kept")
            else:
                if offset > size:
                    raise _Ended(offset)
                into[tag] = Element(vr, content[start:offset])
        return offset

    def items(self, offset: int, end: int, explicit: bool, into: list[dict[int, Element]] | None, depth: int) -> int:
        """Walk the items of a sequence to ``end`` or to its delimiter; give the offset behind it."""
        if depth > _MAX_DEPTH:
            raise _Broken
        while offset < end:
            if offset + 8 > len(self.content):
                raise _Ended(offset + 8)
            group, element, length = self.implicit_head(self.content, offset)
            tag = group << 16 | element
            offset += 8
            if tag == _SEQUENCE_END:
                return offset
            if tag != _ITEM:
                raise _Broken
            item: dict[int, Element] | None = None if into is None else {}
            if length == _UNDEFINED:
                offset = self.elements(offset, self.total, explicit, None, item, _ITEM, depth)
            elif item is None:
                offset += length
            else:
                offset = self.elements(offset, offset + length, explicit, None, item, 0xFFFFFFFF, depth)
            if into is not None and item is not None:
                into.append(item)
        return offset

    def _keep_sequence(self, tag: int, size: int, items: list[dict[int, Element]], into: dict[int, Element]) -> None:
        if size > LARGEST_SEQUENCE:
            self.header.problems.append(f"{tag:08X} is too long to be kept")
        else:
            into[tag] = Element("SQ", b"", items)


def _inflate(content: bytes, complete: bool) -> tuple[bytes, bool]:
    """The inflated start of a deflated dataset, and whether that is all of it."""
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        data = inflater.decompress(content, _MAX_INFLATED)
    except zlib.error as error:
        raise Invalid("the deflated dataset cannot be inflated") from error
    return data, inflater.eof or complete


def _is_explicit(dataset: bytes, declared: bool) -> bool:
    """Some senders declare the one and write the other: the first element tells (PS3.5 7.1)."""
    code = dataset[4:6]
    return declared if len(code) < 2 else code.isalpha() and code.isupper()


def read_header(content: bytes, total: int | None = None, wanted: frozenset[int] = ALL) -> Header:
    """The ``wanted`` attributes of a Part 10 object of ``total`` bytes, whose start is ``content`` (None: all of it).

    All transfer syntaxes are read; reading stops behind the last wanted tag, so pixels are never touched. A deflated
    dataset is inflated as far as it is there. Raises Truncated when more of the object is needed, with ``needed`` the
    number of bytes from its start to try next; Invalid when nothing of what is wanted can be read. A dataset that
    breaks later gives what stands before the break, with a problem.
    """
    total = len(content) if total is None else total
    complete = len(content) >= total
    try:
        meta, start = split_part10(content)
    except Truncated as error:
        if complete:
            raise Invalid("the object ends inside its file meta") from error
        raise Truncated(str(error), len(content) * 2) from error
    dataset, length = content[start:], max(0, total - start)
    deflated = meta.transfer_syntax_uid == DEFLATED or meta.transfer_syntax_uid in JPIP_DEFLATED
    if deflated:
        dataset, whole = _inflate(dataset, complete)
        length = len(dataset) if whole else len(dataset) + _MAX_INFLATED
        complete = whole
    header = Header(meta, big_endian=meta.transfer_syntax_uid == EXPLICIT_BIG_ENDIAN)
    explicit = _is_explicit(dataset, meta.transfer_syntax_uid != IMPLICIT)
    walk = _Walk(dataset, length, header.big_endian, header)
    keep = wanted | {SPECIFIC_CHARACTER_SET}
    try:
        walk.elements(0, length, explicit, keep, header.elements, max(keep), 0)
    except _Ended as ended:
        if not complete:
            needed = len(content) * 2 if deflated else start + ended.needed
            raise Truncated("the header goes on behind these bytes", max(needed, len(content) + 1)) from None
        header.problems.append("the dataset ends inside an attribute")
    except (_Broken, RecursionError):
        header.problems.append("the dataset cannot be read to its end")
    if not header.elements and header.problems:
        raise Invalid(header.problems[-1])
    return header
