"""What instances of one study say differently is recorded on the study, each value once."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Any

from libs.common.dicom.dicom_json import Json
from services.indexing.model.documents import Document, Found, State
from services.indexing.model.versions import ELSEWHERE

MOST_CONFLICTS = 200
"""Conflicts kept per study; a study with more is broken as a whole, and its document must stay small."""

# Attributes of a study that lawfully differ between its instances (age and weight at each acquisition).
_MAY_DIFFER = frozenset(("00101010", "00101020", "00101022", "00101030", "00080201", "00102000", "001021B0"))


def with_conflict(study: Document, tag: str, value: list[Any], sop_instance_uid: str) -> Document:
    known = study["conflicts"]
    if len(known) >= MOST_CONFLICTS or any(c["tag"] == tag and c["value"] == value for c in known):
        return study
    return study | {"conflicts": [*known, {"tag": tag, "value": value, "sop_instance_uid": sop_instance_uid}]}


def with_conflicts(study: Document, found: Found) -> Document:
    """The study with what this instance says otherwise about patient and study, each value once."""
    known: Json = study["json"]
    for tag, attribute in found.study.items():
        value = attribute.get("Value")
        there = known.get(tag, {}).get("Value")
        if value is not None and there is not None and value != there and tag not in _MAY_DIFFER:
            study = with_conflict(study, tag, value, found.event.sop_instance_uid)
    return study


def with_refusals(study: Document, versions: Iterable[Document], sop_instance_uid: str) -> Document:
    """The study with the other studies and series that refused versions of an instance claimed to belong to."""
    for version in versions:
        if version["reason"] == ELSEWHERE:
            for tag, value in (
                ("0020000D", version["study_instance_uid"]),
                ("0020000E", version["series_instance_uid"]),
            ):
                study = with_conflict(study, tag, [value], sop_instance_uid)
    return study


def record_refusals(state: State, instance: Document, versions: Iterable[Document], now: datetime) -> None:
    study = state.get("studies", instance["study_instance_uid"])
    if study is not None:
        changed = with_refusals(study, versions, instance["_id"])
        if changed is not study:
            state.put("studies", changed | {"updated_at": max(now, study["updated_at"])})
