"""The DICOM JSON model (PS3.18 Annex F) of header attributes, and the search fields made from it."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable
from typing import Any

from libs.common.dicom.charset import Charset, charset_of
from libs.common.dicom.header import PIXEL_REPRESENTATION, SPECIFIC_CHARACTER_SET, Element, Header
from libs.common.dicom.names import fold_groups, split_groups
from libs.common.dicom.times import date_time, normal_date, normal_time

Json = dict[str, Any]
"""Maps ``"GGGGEEEE"`` to ``{"vr": .., "Value": [..]}``; without ``Value`` when the attribute is empty."""

_BINARY = frozenset(("OB", "OD", "OF", "OL", "OV", "OW", "UN"))
_TEXT = frozenset(("LO", "SH", "UC"))
_LONG_TEXT = frozenset(("LT", "ST", "UT"))
_NUMBERS = {"US": "H", "SS": "h", "UL": "I", "SL": "i", "FL": "f", "FD": "d", "UV": "Q", "SV": "q"}
_US_OR_SS = frozenset((0x00280106, 0x00280107, 0x00280108, 0x00280109, 0x00280120, 0x00283002))
_SAFE_INTEGER = 1 << 53

DATE_TIME_PAIRS: dict[str, str] = {
    "00080020": "00080030",  # Study
    "00080021": "00080031",  # Series
    "00080022": "00080032",  # Acquisition
    "00080023": "00080033",  # Content
    "00080012": "00080013",  # Instance Creation
    "00100030": "00100032",  # Patient's Birth
    "00400244": "00400245",  # Performed Procedure Step Start
    "00400250": "00400251",  # Performed Procedure Step End
    "00700082": "00700083",  # Presentation Creation
    "30060008": "30060009",  # Structure Set
    "300A0006": "300A0007",  # RT Plan
    "300E0004": "300E0005",  # Review
}
"""Which TM belongs to which DA, for matching them as one moment (PS3.4 C.2.2.2.5.1)."""


class _Unreadable(Exception):
    """The value breaks its value representation so far that nothing can be made of it."""


def _integer(text: str) -> int:
    number = float(text) if not text.lstrip("+-").isdigit() else int(text)
    if number != int(number) or abs(number) > _SAFE_INTEGER:
        raise ValueError(text)
    return int(number)


def _decimal(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(text)
    return number


def _name(text: str) -> dict[str, str] | None:
    return split_groups(text) or None


def _ascii(raw: bytes) -> list[str]:
    text = raw.decode("latin-1")
    return text.split("\\") if "\\" in text else [text]


def _stripped(raw: bytes) -> list[Any]:
    return [text.strip(" \0") or None for text in _ascii(raw)]


def _dates(raw: bytes) -> list[Any]:
    return [normal_date(text) or text or None for text in (t.strip(" \0") for t in _ascii(raw))]


def _integers(raw: bytes) -> list[Any]:
    return [_integer(text) if text else None for text in (t.strip(" \0") for t in _ascii(raw))]


def _decimals(raw: bytes) -> list[Any]:
    return [_decimal(text) if text else None for text in (t.strip(" \0") for t in _ascii(raw))]


_FROM_ASCII: dict[str, Callable[[bytes], list[Any]]] = {
    **dict.fromkeys(("AE", "AS", "CS", "DT", "TM", "UI", "UR"), _stripped),
    "DA": _dates,
    "IS": _integers,
    "DS": _decimals,
}


def _binary_numbers(raw: bytes, code: str, big_endian: bool) -> list[Any]:
    width = struct.calcsize("<" + code)
    count, rest = divmod(len(raw), width)
    if rest:
        raise _Unreadable
    numbers = struct.unpack(f"{'>' if big_endian else '<'}{count}{code}", raw)
    if code in "fd" and not all(map(math.isfinite, numbers)):
        raise _Unreadable
    # PS3.18 F.2.3.1: what JavaScript cannot hold exactly is sent as text (BSON has no unsigned 64 bits either).
    return [str(n) if code in "qQ" and abs(n) > _SAFE_INTEGER else n for n in numbers]


class _Renderer:
    """Turns the elements of one dataset into DICOM JSON; problems go to the header's list, by tag only."""

    def __init__(self, header: Header) -> None:
        self.problems = header.problems
        self.big_endian = header.big_endian

    def element(self, tag: int, element: Element, charset: Charset, signed: bool) -> Json | None:
        vr, raw, items = element
        if items is not None:
            value = [self.dataset(item, charset) for item in items]
            return {"vr": "SQ", "Value": value} if value else {"vr": "SQ"}
        if vr in _BINARY:
            return None
        if not raw:
            return {"vr": vr}
        try:
            values = self.values(tag, vr, raw, charset, signed)
        except (ValueError, OverflowError, LookupError, struct.error, _Unreadable):
            self.problems.append(f"{tag:08X} has a value that is no {vr}")
            return None
        if len(values) == 1 and values[0] is None:
            return {"vr": vr}
        return {"vr": vr, "Value": values}

    def values(self, tag: int, vr: str, raw: bytes, charset: Charset, signed: bool) -> list[Any]:
        plain = _FROM_ASCII.get(vr)
        if plain is not None:
            return plain(raw)
        if vr == "PN":
            return [_name(text.strip(" \0")) for text in charset.values(raw, name=True)]
        if vr in _TEXT:
            return [text.strip(" \0") or None for text in charset.values(raw)]
        if vr in _LONG_TEXT:
            return [charset.text(raw).rstrip(" \0") or None]
        if vr == "AT":
            numbers = _binary_numbers(raw, "H", self.big_endian)
            return [f"{group:04X}{element:04X}" for group, element in zip(numbers[::2], numbers[1::2], strict=True)]
        if vr in _NUMBERS:
            code = "h" if signed and vr == "US" and tag in _US_OR_SS else _NUMBERS[vr]
            return _binary_numbers(raw, code, self.big_endian)
        raise _Unreadable

    def dataset(self, elements: dict[int, Element], charset: Charset, tags: Iterable[int] | None = None) -> Json:
        declared = elements.get(SPECIFIC_CHARACTER_SET)
        if declared is not None:
            charset = charset_of(declared.value)
        representation = elements.get(PIXEL_REPRESENTATION)
        signed = representation is not None and representation.value[:2] in (b"\1\0", b"\0\1")
        json: Json = {}
        for tag in sorted(elements if tags is None else tags):
            if tag == SPECIFIC_CHARACTER_SET:
                continue
            rendered = self.element(tag, elements[tag], charset, signed)
            if rendered is not None:
                json[f"{tag:08X}"] = rendered
        return json


def level_json(header: Header, tags: frozenset[int]) -> Json:
    """The DICOM JSON of those of ``tags`` that the header has (PS3.18 F.2), in the order of their tags.

    Names are objects of their groups, IS, DS and binary numbers are numbers, items are nested; binary values and
    private attributes inside items are left out. A value that breaks its VR is left out and noted in the header's
    ``problems``. Text is Unicode, so Specific Character Set is left out too.
    """
    return _Renderer(header).dataset(header.elements, charset_of(b""), tags & header.elements.keys())


def first(json: Json, tag: str) -> Any:
    """The first value of an attribute, None when it is absent or empty."""
    values = json.get(tag, {}).get("Value")
    return values[0] if values else None


def search_fields(json: Json) -> tuple[dict[str, list[str]], dict[str, str], dict[str, str]]:
    """``(names, times, date_times)`` of one level.

    ``names``: tag of each PN -> its groups, folded; ``times``: tag of each TM -> ``HHMMSS.ffffff``; ``date_times``:
    tag of each DA that has a TM beside it -> ``YYYYMMDDHHMMSS.ffffff`` (midnight when the time is unknown).
    """
    names: dict[str, list[str]] = {}
    times: dict[str, str] = {}
    for tag, attribute in json.items():
        vr = attribute["vr"]
        if vr == "PN":
            folded = [text for groups in attribute.get("Value", ()) if groups for text in fold_groups(groups)]
            if folded:
                names[tag] = list(dict.fromkeys(folded))
        elif vr == "TM":
            time = normal_time(first(json, tag))
            if time:
                times[tag] = time
    date_times = {}
    for date_tag, time_tag in DATE_TIME_PAIRS.items():
        if date_tag in json:
            moment = date_time(first(json, date_tag), times.get(time_tag))
            if moment:
                date_times[date_tag] = moment
    return names, times, date_times
