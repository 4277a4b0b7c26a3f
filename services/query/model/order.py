"""In which order matches are given: people read the newest study and the first image first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from services.query.model.answer import Record
from services.query.model.query import Level

_NUMBER: dict[Level, str] = {"SERIES": "00200011", "IMAGE": "00200013"}


def in_order(level: Level, records: Sequence[Record]) -> list[Record]:
    """Studies from the newest, series and images by their number, as far as the query's keys show it."""
    if level == "STUDY":
        return sorted(
            records,
            key=lambda record: (_first(record["STUDY"], "00080020"), _first(record["STUDY"], "00080030")),
            reverse=True,
        )
    if level in _NUMBER:
        tag = _NUMBER[level]
        return sorted(records, key=lambda record: _number(_first(record[level], tag)))
    return list(records)


def _first(document: Any, tag: str) -> str:
    values = document.get("json", {}).get(tag, {}).get("Value") or [""]
    return "" if values[0] is None else str(values[0])


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0
