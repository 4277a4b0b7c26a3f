"""The identifier of a C-FIND response, encoded straight from the DICOM JSON of the index (PS3.5 section 7)."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian, ImplicitVRLittleEndian

from services.query.model.charset import TextEncoder, choose_encoder
from services.query.model.matching import NUMBERS
from services.query.model.query import (
    COUNT_FIELDS,
    INSTANCE_AVAILABILITY,
    QUERY_RETRIEVE_LEVEL,
    RETRIEVE_AE_TITLE,
    SEARCH_FIELDS,
    SPECIFIC_CHARACTER_SET,
    Key,
    Level,
    Query,
    home,
)

Document = Mapping[str, Any]
Record = Mapping[Level, Document]
"""One match: the document of its level, and of those above it that the query's keys need."""

Element = tuple[int, str, Sequence[Any]]
"""Tag, VR and values in the form of DICOM JSON; items of a sequence are lists of elements."""

_BINARY = {"US": "H", "SS": "h", "UL": "L", "SL": "l", "UV": "Q", "SV": "q", "FL": "f", "FD": "d"}
_CHARSET_VRS = frozenset(["SH", "LO", "ST", "LT", "UC", "UT", "PN"])
_LONG_FORM = frozenset(["OB", "OD", "OF", "OL", "OV", "OW", "SQ", "SV", "UC", "UN", "UR", "UT", "UV"])
_GROUPS = ("Alphabetic", "Ideographic", "Phonetic")


def answer(query: Query, record: Record, ae_title: str, transfer_syntax_uid: str) -> bytes:
    """The encoded identifier of one match: the requested keys and the unique ones, what is unknown at zero length."""
    elements = list(_pick(query, record, ae_title))
    encoder = choose_encoder(query.character_sets, _texts(elements))
    elements.append((SPECIFIC_CHARACTER_SET, "CS", encoder.terms))
    elements.sort(key=lambda element: element[0])
    explicit = transfer_syntax_uid != ImplicitVRLittleEndian
    order = ">" if transfer_syntax_uid == ExplicitVRBigEndian else "<"
    encoded = _Writer(encoder, explicit, order).dataset(elements)
    if transfer_syntax_uid == DeflatedExplicitVRLittleEndian:
        deflate = zlib.compressobj(wbits=-zlib.MAX_WBITS)
        encoded = deflate.compress(encoded) + deflate.flush()
        encoded += b"\0" * (len(encoded) % 2)
    return encoded


def _pick(query: Query, record: Record, ae_title: str) -> Iterator[Element]:
    for key in query.keys:
        tag = key.tag
        if tag == SPECIFIC_CHARACTER_SET:
            continue
        if tag == QUERY_RETRIEVE_LEVEL:
            yield tag, "CS", (query.level,)
        elif tag == RETRIEVE_AE_TITLE:
            yield tag, "AE", (ae_title,)
        elif tag == INSTANCE_AVAILABILITY:
            yield tag, "CS", ("ONLINE",)
        else:
            holder = home(query.level, tag)
            yield _from_document(key, holder, record.get(holder) if holder else None)


def _from_document(key: Key, level: Level | None, document: Document | None) -> Element:
    if level is None or document is None:
        return key.tag, key.vr, ()
    count = COUNT_FIELDS[level].get(key.tag)
    if count is not None:
        return key.tag, "IS", (document.get(count, 0),)
    stored = document.get("json", {}).get(f"{key.tag:08X}")
    if stored is not None and stored.get("Value"):
        return _project(key, stored)
    field = SEARCH_FIELDS[level].get(key.tag)
    value = document.get(field) if field else None
    if value:
        return key.tag, key.vr, tuple(value) if isinstance(value, list) else (value,)
    return key.tag, str(stored["vr"]) if stored else key.vr, ()


def _project(key: Key, stored: Mapping[str, Any]) -> Element:
    vr, values = str(stored["vr"]), stored["Value"]
    if vr != "SQ":
        return key.tag, vr, values
    if key.items is None:
        return key.tag, vr, [_whole(item) for item in values]
    items = []
    for item in values:
        picked: list[Element] = []
        for inner in key.items:
            found = item.get(f"{inner.tag:08X}")
            picked.append(_project(inner, found) if found and found.get("Value") else (inner.tag, inner.vr, ()))
        items.append(picked)
    return key.tag, vr, items


def _whole(item: Mapping[str, Any]) -> list[Element]:
    elements = []
    for name, stored in sorted(item.items()):
        values = stored.get("Value") or ()
        if stored["vr"] == "SQ":
            values = [_whole(inner) for inner in values]
        elements.append((int(name, 16), str(stored["vr"]), values))
    return elements


def _texts(elements: Sequence[Element]) -> Iterator[str]:
    for _, vr, values in elements:
        if vr == "SQ":
            for item in values:
                yield from _texts(item)
        elif vr == "PN":
            for name in values:
                yield _name(name)
        elif vr in _CHARSET_VRS:
            yield from (text for text in values if isinstance(text, str))


def _name(groups: Any) -> str:
    if not groups:
        return ""
    if isinstance(groups, str):
        return groups
    return "=".join(str(groups.get(group, "")) for group in _GROUPS).rstrip("=")


def decimal_string(number: float) -> str:
    """A DS of at most 16 characters (PS3.5 6.2), as exact as they allow."""
    text = str(int(number)) if float(number).is_integer() and abs(number) < 1e15 else repr(float(number))
    digits = 15
    while len(text) > 16:
        text = f"{number:.{digits}g}"
        digits -= 1
    return text


class _Writer:
    """Encodes elements in one character set, explicit or implicit VR, in one byte order."""

    def __init__(self, encoder: TextEncoder, explicit: bool, order: str) -> None:
        self._encode = encoder.encode
        self._explicit = explicit
        self._order = order
        self._short = struct.Struct(order + "HH2sH")
        self._long = struct.Struct(order + "HH2sHL")
        self._implicit = struct.Struct(order + "HHL")

    def dataset(self, elements: Sequence[Element]) -> bytes:
        return b"".join(self._element(*element) for element in elements)

    def _element(self, tag: int, vr: str, values: Sequence[Any]) -> bytes:
        body = self._value(vr, values)
        group, element = tag >> 16, tag & 0xFFFF
        if not self._explicit:
            return self._implicit.pack(group, element, len(body)) + body
        if vr in _LONG_FORM:
            return self._long.pack(group, element, vr.encode("ascii"), 0, len(body)) + body
        if len(body) > 0xFFFE:
            # Too long for the length field of its VR: UN keeps it whole (PS3.5 6.2.2).
            return self._long.pack(group, element, b"UN", 0, len(body)) + body
        return self._short.pack(group, element, vr.encode("ascii"), len(body)) + body

    def _value(self, vr: str, values: Sequence[Any]) -> bytes:
        if not values:
            return b""
        if vr == "SQ":
            items = [self.dataset(item) for item in values]
            return b"".join(self._implicit.pack(0xFFFE, 0xE000, len(item)) + item for item in items)
        if vr in _BINARY:
            numbers = [float(v) if vr in ("FL", "FD") else int(v) for v in values if v is not None]
            return struct.pack(f"{self._order}{len(numbers)}{_BINARY[vr]}", *numbers)
        if vr == "AT":
            tags = [int(value, 16) for value in values if value]
            return b"".join(struct.pack(self._order + "HH", tag >> 16, tag & 0xFFFF) for tag in tags)
        if vr in _CHARSET_VRS:
            texts = map(_name, values) if vr == "PN" else ("" if text is None else str(text) for text in values)
            body = b"\\".join(self._encode(text) for text in texts)
        else:
            body = "\\".join(self._plain(vr, value) for value in values).encode("latin-1", "replace")
        if len(body) % 2:
            body += b"\0" if vr == "UI" else b" "
        return body

    @staticmethod
    def _plain(vr: str, value: Any) -> str:
        if value is None:
            return ""
        if vr in NUMBERS and isinstance(value, float):
            return decimal_string(value)
        return str(value)
