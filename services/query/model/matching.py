"""Attribute matching (PS3.4 C.2.2.2): what a key of a query asks of an attribute, free of any database."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from libs.common.dicom.names import fold_name
from libs.common.errors import Invalid

NUMBERS = frozenset(("SL", "SS", "US", "UL", "SV", "UV", "FL", "FD", "DS", "IS"))
NOT_WILDCARD = NUMBERS | {"DA", "TM", "DT", "OB", "OD", "OF", "OL", "OV", "OW", "UN", "AT", "AS", "UI", "SQ"}
"""Value representations in which ``*`` and ``?`` mean nothing (PS3.4 C.2.2.2.4)."""


@dataclass(frozen=True)
class AnyOf:
    """Some value of the attribute equals one of these (single value and list of UID matching)."""

    tag: int
    vr: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Wildcard:
    """Some value fits one of the patterns, from its first to its last character, case counts."""

    tag: int
    vr: str
    patterns: tuple[str, ...]


@dataclass(frozen=True)
class Between:
    """Some value of a DA, TM or DT lies within both ends, which belong to it; None is open."""

    tag: int
    vr: str
    low: str | None
    high: str | None


@dataclass(frozen=True)
class Moment:
    """The date and time of a pair, taken together, lie within both ends; ``tag`` is the date's."""

    tag: int
    low: str | None
    high: str | None


@dataclass(frozen=True)
class Name:
    """Every pattern (folded by ``fold_name``) fits some component group of one of the attribute's names."""

    tag: int
    patterns: tuple[str, ...]


@dataclass(frozen=True)
class Item:
    """Some item of the sequence fulfils all of these."""

    tag: int
    conditions: tuple[Condition, ...]


Condition = AnyOf | Wildcard | Between | Moment | Name | Item


def pattern_to_regex(pattern: str) -> str:
    r"""An anchored regular expression of a wildcard pattern, everything but ``*`` and ``?`` escaped.

    A lone ``*`` at the end is left out, so that a prefix stays a prefix for an index. ``^*`` at the end of a name
    also stands for components that are not there: ``DOE^*`` finds a patient called ``DOE``.
    """
    return _regex(pattern, "")


def name_to_regex(pattern: str) -> str:
    """The same for a folded name."""
    short = re.sub(r"(\^\*?)*\^\*$", "", pattern)
    return _regex(short, r"(?:\^.*)?") if short != pattern and not short.endswith("*") else _regex(short, "")


def _regex(pattern: str, tail: str) -> str:
    open_end = pattern.endswith("*") and not tail
    pattern = re.sub(r"\*+", "*", pattern)
    body = "".join(".*" if c == "*" else "." if c == "?" else _escape(c) for c in pattern.removesuffix("*"))
    if pattern.endswith("*") and tail:
        body += ".*"
    return "^" + body + ("" if open_end else tail + "$")


def _escape(character: str) -> str:
    # Only what both Python's and MongoDB's (PCRE) syntax know as special; letters of any script stay as they are.
    return "\\" + character if character in r"\.^$|()[]{}*+?-#&~/ " else character


def conditions_of(tag: int, vr: str, values: Iterable[str]) -> tuple[Condition, ...]:
    """What the values of one key ask (no sequence). Empty for universal matching. Raises Invalid.

    Several values mean any of them, as for a list of UIDs; a value of only ``*`` matches everything, entities
    without the attribute included (PS3.4 C.2.2.2.3).
    """
    given = [text for text in (value.strip(" \0") for value in values) if text]
    if not given:
        return ()
    if vr == "PN":
        return _name(tag, given)
    if vr in ("DA", "TM", "DT"):
        if len(given) != 1:
            raise Invalid(f"the key ({tag >> 16:04X},{tag & 0xFFFF:04X}) takes one value or one range")
        return (_range(tag, vr, given[0]),)
    if vr not in NOT_WILDCARD and any("*" in value or "?" in value for value in given):
        if any(not value.strip("*") for value in given):
            return ()
        return (Wildcard(tag, vr, tuple(given)),)
    return (AnyOf(tag, vr, tuple(given)),)


def _name(tag: int, given: list[str]) -> tuple[Condition, ...]:
    if len(given) != 1:
        raise Invalid(f"the key ({tag >> 16:04X},{tag & 0xFFFF:04X}) takes one name")
    patterns = tuple(folded for group in given[0].split("=") if (folded := fold_name(group)).strip("*^"))
    return (Name(tag, patterns),) if patterns else ()


_DATE = re.compile(r"\d{8}")
_TIME = re.compile(r"\d{2}(?:\d{2}(?:\d{2}(?:\.\d{1,6})?)?)?")
_DATE_TIME = re.compile(r"(\d{4}(?:\d{2}){0,5}(?:\.\d{1,6})?)(?:[+-]\d{4})?")


def _range(tag: int, vr: str, text: str) -> Condition:
    low, high = split_range(tag, vr, text)
    if vr == "DA" and low is not None and low == high:
        return AnyOf(tag, vr, (low,))
    return Between(tag, vr, low, high)


def split_range(tag: int, vr: str, text: str) -> tuple[str | None, str | None]:
    """The ends of a DA, TM or DT key in comparable form; a single value spans what its precision leaves open.

    TM ends are ``HHMMSS.ffffff``: ``10`` is 10:00:00 to 10:59:59.999999. A DT end is as long as it was written, the
    upper one closed with ``~``, which sorts behind every digit; an offset from UTC is not regarded.
    """
    wrong = Invalid(f"the key ({tag >> 16:04X},{tag & 0xFFFF:04X}) is not a {vr} value or range")
    if vr == "DT":
        whole = _DATE_TIME.fullmatch(text)
        # 2024-0500 is a year with an offset, not a range up to the year 500 (PS3.4 C.2.2.2.5).
        offset = text[-5:-4] in ("-", "+") and text[-4:] <= "1400"
        if whole and ("-" not in text or offset):
            return whole[1], whole[1] + "~"
        ends = re.fullmatch(rf"({_DATE_TIME.pattern})?\s*-\s*({_DATE_TIME.pattern})?", text)
        if ends is None or not (ends[1] or ends[3]):
            raise wrong
        return ends[2], ends[4] + "~" if ends[4] else None
    # Dates of ACR-NEMA have dots, times have colons.
    text = text.replace("." if vr == "DA" else ":", "")
    shape = _DATE if vr == "DA" else _TIME
    start, dash, end = (part.strip() for part in text.partition("-"))
    if not dash:
        end = start
    if not (start or end) or any(part and not shape.fullmatch(part) for part in (start, end)):
        raise wrong
    if vr == "DA":
        return start or None, end or None
    return _time(start, "000000.000000") if start else None, _time(end, "595959.999999") if end else None


def _time(text: str, rest: str) -> str:
    return text + rest[len(text) :]


def moment(date_tag: int, date: tuple[str | None, str | None], time: tuple[str | None, str | None]) -> Moment:
    """The ends of a date key and a time key as one span (PS3.4 C.2.2.2.5.1, combined date-time matching)."""
    low = (date[0] or "00000000") + (time[0] or "000000.000000") if date[0] or time[0] else None
    high = (date[1] or "99999999") + (time[1] or "235959.999999") if date[1] or time[1] else None
    return Moment(date_tag, low, high)
