"""A dataset's bytes in another VR encoding or byte order; values are copied, never decoded (PS3.5 section 7)."""

from __future__ import annotations

import functools
import struct
from dataclasses import dataclass, field

import numpy as np
from pydicom.datadict import dictionary_VR, private_dictionary_VR

from libs.common.errors import Invalid

UNDEFINED = 0xFFFFFFFF
ITEM, ITEM_END, SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
PIXEL_DATA, PIXEL_REPRESENTATION, BITS_ALLOCATED = 0x7FE00010, 0x00280103, 0x00280100
_DEEPEST = 64

_LONG_FORM = frozenset((b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"))
_WIDTHS = {
    **dict.fromkeys((b"US", b"SS", b"OW", b"AT"), 2),
    **dict.fromkeys((b"UL", b"SL", b"FL", b"OF", b"OL"), 4),
    **dict.fromkeys((b"FD", b"OD", b"SV", b"UV", b"OV"), 8),
}


@dataclass(frozen=True)
class Encoding:
    """Explicit or implicit VR, and the byte order as ``struct`` names it."""

    explicit: bool
    order: str


EXPLICIT_LITTLE, IMPLICIT_LITTLE, EXPLICIT_BIG = Encoding(True, "<"), Encoding(False, "<"), Encoding(True, ">")


@dataclass
class _Scope:
    """What the meaning of an element without VR depends on: the dataset around it."""

    signed: bool = False
    bits: int = 16
    creators: dict[int, str] = field(default_factory=dict)


def elements(dataset: bytes, source: Encoding, target: Encoding) -> dict[int, bytes]:
    """The top-level elements by tag, each encoded anew, in their order; group lengths are dropped (PS3.5 7.2).

    Encapsulated pixel data is left out. Raises Invalid when the bytes cannot be followed to their end.
    """
    # Some senders declare one VR encoding and write the other: the first element tells.
    code = dataset[4:6]
    if source.order == "<" and len(code) == 2:
        source = Encoding(code.isalpha() and code.isupper(), "<")
    walk = _Walk(memoryview(dataset), target)
    found: dict[int, bytes] = {}
    try:
        walk.dataset(0, len(dataset), source, _Scope(), found, 0)
    except (struct.error, IndexError) as error:
        raise Invalid("the dataset ends inside an element") from error
    return found


class _Walk:
    def __init__(self, data: memoryview, target: Encoding) -> None:
        self._data = data
        self._target = target

    def dataset(
        self, offset: int, end: int, source: Encoding, scope: _Scope, found: dict[int, bytes], depth: int
    ) -> int:
        """Fill ``found`` from the elements up to ``end`` or an item delimiter; the offset behind them."""
        if depth > _DEEPEST:
            raise Invalid("sequences are nested too deep")
        while offset < end:
            group, number, length = struct.unpack_from(source.order + "HHL", self._data, offset)
            tag = group << 16 | number
            if tag == ITEM_END:
                return offset + 8
            offset, vr, length = self._header(offset, tag, length, source, scope)
            if length != UNDEFINED and offset + length > end:
                raise Invalid(f"the element {tag:08X} is longer than what holds it")
            inner = source
            if vr == b"UN":
                # A sequence of unknown VR is Implicit VR Little Endian inside, whatever is around it (PS3.5 6.2.2).
                inner = IMPLICIT_LITTLE
                if source.order != self._target.order:
                    # Bytes that change their order need a meaning; the dictionary has it for most.
                    vr = _implied_vr(tag, scope.signed, scope.creators.get(tag >> 8, ""))
            if vr == b"SQ" or length == UNDEFINED:
                if tag == PIXEL_DATA and length == UNDEFINED:
                    offset = self._skip_fragments(offset)
                    continue
                stop = end if length == UNDEFINED else offset + length
                offset, body = self._items(offset, stop, length, inner, scope, depth)
                found[tag] = self._head(tag, b"SQ", len(body) if length != UNDEFINED else UNDEFINED) + body
                if length == UNDEFINED:
                    found[tag] += self._bare(SEQUENCE_END, 0)
                continue
            value = self._data[offset : offset + length]
            offset += length
            if number == 0:
                continue
            self._note(tag, value, source, scope)
            found[tag] = self._head(tag, vr, length) + self._swapped(tag, vr, value, source, scope)
        return offset

    def _header(self, offset: int, tag: int, length: int, source: Encoding, scope: _Scope) -> tuple[int, bytes, int]:
        if not source.explicit:
            return offset + 8, _implied_vr(tag, scope.signed, scope.creators.get(tag >> 8, "")), length
        vr = bytes(self._data[offset + 4 : offset + 6])
        if vr in _LONG_FORM:
            (length,) = struct.unpack_from(source.order + "L", self._data, offset + 8)
            return offset + 12, vr, length
        if not (vr.isalpha() and vr.isupper()):
            raise Invalid(f"the element {tag:08X} has no value representation")
        (length,) = struct.unpack_from(source.order + "H", self._data, offset + 6)
        return offset + 8, vr, length

    def _items(
        self, offset: int, end: int, length: int, source: Encoding, scope: _Scope, depth: int
    ) -> tuple[int, bytes]:
        pieces: list[bytes] = []
        while offset < end:
            group, number, size = struct.unpack_from(source.order + "HHL", self._data, offset)
            tag = group << 16 | number
            offset += 8
            if tag == SEQUENCE_END:
                return offset, b"".join(pieces)
            if tag != ITEM:
                raise Invalid("a sequence holds something that is no item")
            stop = end if size == UNDEFINED else offset + size
            if stop > end:
                raise Invalid("an item is longer than its sequence")
            inner: dict[int, bytes] = {}
            offset = self.dataset(offset, stop, source, _Scope(scope.signed), inner, depth + 1)
            body = b"".join(inner.values())
            if size == UNDEFINED:
                pieces += (self._bare(ITEM, UNDEFINED), body, self._bare(ITEM_END, 0))
            else:
                pieces += (self._bare(ITEM, len(body)), body)
        if length == UNDEFINED:
            raise Invalid("a sequence has no end")
        return offset, b"".join(pieces)

    def _skip_fragments(self, offset: int) -> int:
        while True:
            group, number, size = struct.unpack_from("<HHL", self._data, offset)
            offset += 8 + size
            if group << 16 | number == SEQUENCE_END:
                return offset

    @staticmethod
    def _note(tag: int, value: memoryview, source: Encoding, scope: _Scope) -> None:
        if tag == PIXEL_REPRESENTATION and len(value) == 2:
            scope.signed = struct.unpack(source.order + "H", value)[0] == 1
        elif tag == BITS_ALLOCATED and len(value) == 2:
            (scope.bits,) = struct.unpack(source.order + "H", value)
        elif tag >> 16 & 1 and 0x10 <= tag & 0xFFFF <= 0xFF:
            creator = bytes(value).decode("latin-1").strip(" \0")
            scope.creators[(tag >> 16) << 8 | tag & 0xFF] = creator

    def _head(self, tag: int, vr: bytes, length: int) -> bytes:
        if not self._target.explicit:
            return self._bare(tag, length)
        if vr not in _LONG_FORM and length > 0xFFFF:
            vr = b"UN"  # too long for the length field of its own VR (PS3.5 6.2.2)
        order, group, number = self._target.order, tag >> 16, tag & 0xFFFF
        if vr in _LONG_FORM:
            return struct.pack(order + "HH2sHL", group, number, vr, 0, length)
        return struct.pack(order + "HH2sH", group, number, vr, length)

    def _bare(self, tag: int, length: int) -> bytes:
        return struct.pack(self._target.order + "HHL", tag >> 16, tag & 0xFFFF, length)

    def _swapped(self, tag: int, vr: bytes, value: memoryview, source: Encoding, scope: _Scope) -> bytes:
        width = _WIDTHS.get(vr, 1)
        if tag == PIXEL_DATA and vr == b"OW" and scope.bits in (32, 64):
            width = scope.bits // 8  # pixels that are longer than a word are swapped whole, as all readers expect
        if source.order == self._target.order or width == 1 or len(value) % width:
            return bytes(value)
        return np.frombuffer(value, dtype=f"u{width}").byteswap().tobytes()


@functools.lru_cache(maxsize=8192)
def _implied_vr(tag: int, signed: bool, creator: str) -> bytes:
    """The VR of an element written without one (PS3.5 Annex A.1, PS3.6)."""
    group, number = tag >> 16, tag & 0xFFFF
    if number == 0:
        return b"UL"
    try:
        if group & 1:
            if 0x10 <= number <= 0xFF:
                return b"LO"
            vr = private_dictionary_VR(tag, creator) if creator else "UN"
        else:
            vr = dictionary_VR(tag)
    except KeyError:
        return b"UN"
    if " or " in vr:
        # Implicit VR pixels, overlays and tables are words (PS3.5 A.1); the rest follows the pixels' sign.
        vr = "OW" if "OW" in vr else "SS" if signed else "US"
    return vr.encode("ascii")
