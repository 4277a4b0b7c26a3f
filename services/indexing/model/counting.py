"""One stored object taken into patient, study, series and instance, so that counts and sizes are always exact."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from libs.common.dicom.dicom_json import Json, search_fields
from services.indexing.model.conflicts import record_refusals, with_conflict, with_conflicts, with_refusals
from services.indexing.model.documents import Document, Found, HeaderNeeded, Outcome, State, Verdict
from services.indexing.model.versions import ELSEWHERE, event_of, last_stored, settle, version_of, with_version


def apply(state: State, found: Found, known: Mapping[str, Found], now: datetime, verdict: Verdict) -> None:
    """Take one stored object into the state. ``known`` has the headers in hand, by object key.

    Raises NotLoaded or HeaderNeeded when something has to be read first; the state is then to be thrown away.
    """
    event = found.event
    outcome = Outcome(event)
    verdict.outcomes.append(outcome)
    old = state.get("instances", event.sop_instance_uid)
    before = old["versions"] if old is not None else []
    versions, current = settle(with_version(before, version_of(found)))
    mine = next(v for v in versions if v["reference"]["key"] == event.reference.key)
    outcome.new = versions[0] is mine
    # The same event again is told again, since we may have died before telling; the same bytes sent again are not.
    heard = any(event.id in (v["event_id"], v["last_event_id"]) for v in before)
    was_current = old is not None and old["reference"]["key"] == event.reference.key
    outcome.indexed = mine["status"] == "current" and (heard or not was_current)
    if old is not None and versions == before:
        return
    if old is not None and old["reference"]["key"] == current["reference"]["key"]:
        state.put("instances", old | {"versions": versions, "stored_at": last_stored(current)})
        if any(version["reason"] == ELSEWHERE for version in versions):
            record_refusals(state, old, versions, now)
        return
    content = known.get(current["reference"]["key"])
    if content is None:
        raise HeaderNeeded(event_of(event.sop_instance_uid, current))
    if old is not None:
        _discount(state, old, now, verdict)
    _count(state, content, current, versions, now, verdict)


def _searchable(document: Document, json: Json) -> Document:
    names, times, date_times = search_fields(json)
    return document | {"json": json, "names": names, "times": times, "date_times": date_times}


def _filled(document: Document, json: Json) -> Document:
    """The document with the attributes it lacked; what was seen first stays."""
    known: Json = document["json"]
    missing = {
        tag: value for tag, value in json.items() if "Value" not in known.get(tag, {}) and value != known.get(tag)
    }
    return _searchable(document, known | missing) if missing else document


def _tally(pairs: list[list[Any]], value: str, step: int) -> list[list[Any]]:
    counts = {name: count for name, count in pairs}  # noqa: C416 (lists in the document, not tuples)
    counts[value] = counts.get(value, 0) + step
    return [[name, count] for name, count in sorted(counts.items()) if count > 0]


def _names_of(pairs: list[list[Any]]) -> list[str]:
    return [name for name, _ in pairs if name]


def _stepped(document: Document, step: int, size: int, sop_class: str, modality: str | None, now: datetime) -> Document:
    changed = document | {
        "instance_count": document["instance_count"] + step,
        "size": document["size"] + step * size,
        "sop_class_tally": _tally(document["sop_class_tally"], sop_class, step),
        "updated_at": max(now, document.get("updated_at", now)),
    }
    changed["sop_classes"] = _names_of(changed["sop_class_tally"])
    if modality is not None:
        changed["modality_tally"] = _tally(document["modality_tally"], modality, step)
        changed["modalities"] = _names_of(changed["modality_tally"])
    return changed


def _changed_study(study: Document, verdict: Verdict) -> Document:
    """A change of a study that was announced as stable opens it again, and has to be told."""
    study = study | {"changes": study["changes"] + 1}
    if study["stable"] and not verdict.silent:
        verdict.reopened.add(study["_id"])
        study |= {"stable": False, "change_untold": True}
    return study


def _count(
    state: State, found: Found, current: Document, versions: list[Document], now: datetime, verdict: Verdict
) -> None:
    event, size = found.event, found.event.reference.length
    study = state.get("studies", event.study_instance_uid)
    if study is None:
        _take_patient(state, found, now)
        study = _new_study(found, now, stable=verdict.silent)
    elif study["instance_count"] == 0:  # its only instance was replaced: nothing of what that one said is left
        _take_patient(state, found, now)
        kept = ("created_at", "series_count", "stable", "stable_revision", "changes", "change_untold", "sites")
        study = _new_study(found, now, stable=verdict.silent) | {key: study[key] for key in kept if key in study}
    else:
        study = _filled(with_conflicts(study, found), found.study)
    series = state.get("series", event.series_instance_uid)
    if series is None:
        series = _new_series(found, study["patient_key"])
        study = study | {"series_count": study["series_count"] + 1}
    elif series["instance_count"] == 0 and series["study_instance_uid"] == event.study_instance_uid:
        series = _new_series(found, study["patient_key"])
    else:
        if series["study_instance_uid"] != event.study_instance_uid:
            study = with_conflict(study, "0020000E", [event.series_instance_uid], event.sop_instance_uid)
        series = _filled(series, found.series)
    study = _stepped(study, 1, size, event.sop_class_uid, found.modality, now)
    if event.site and event.site not in study["sites"]:
        study |= {"sites": sorted([*study["sites"], event.site])}
    study = with_refusals(study, versions, event.sop_instance_uid)
    state.put("studies", _changed_study(study, verdict))
    state.put("series", _stepped(series, 1, size, event.sop_class_uid, None, now))
    document: Document = {
        "_id": event.sop_instance_uid,
        "study_instance_uid": event.study_instance_uid,
        "series_instance_uid": event.series_instance_uid,
        "patient_key": study["patient_key"],
        "sop_class_uid": event.sop_class_uid,
        "modality": found.modality,
        "reference": current["reference"],
        "stored_at": last_stored(current),
        "versions": versions,
        "site": event.site,
    }
    if found.problems:
        document["problems"] = list(found.problems)
    state.put("instances", _searchable(document, found.instance))


def _discount(state: State, instance: Document, now: datetime, verdict: Verdict) -> None:
    """Take what an instance added to its series and study away again; what is left without instances goes."""
    size, sop_class = instance["reference"]["length"], instance["sop_class_uid"]
    study = state.get("studies", instance["study_instance_uid"])
    series = state.get("series", instance["series_instance_uid"])
    assert study is not None and series is not None, "an instance has its study and series"
    series = _stepped(series, -1, size, sop_class, None, now)
    study = _stepped(study, -1, size, sop_class, instance["modality"], now)
    # They stay in the state when empty: the version that comes instead counts in the same place most of the time.
    state.put("series", series)
    state.put("studies", _changed_study(study, verdict))


def drop_empty(state: State) -> None:
    """Remove the series and studies from which the last instance moved away. To be called once, at the end."""
    for collection, identity in sorted(state.written):
        document = state.get(collection, identity)
        if collection == "series" and document is not None and document["instance_count"] == 0:
            state.drop("series", identity)
            study = state.get("studies", document["study_instance_uid"])
            if study is not None:
                state.put("studies", study | {"series_count": study["series_count"] - 1})
    for collection, identity in sorted(state.written):
        document = state.get(collection, identity)
        if collection == "studies" and document is not None and document["instance_count"] == 0:
            state.drop("studies", identity)


def _take_patient(state: State, found: Found, now: datetime) -> None:
    patient = state.get("patients", found.patient_key)
    if patient is None:
        patient = {"_id": found.patient_key, "issuer": found.issuer, "patient_id": found.patient_id, "updated_at": now}
        state.put("patients", _searchable(patient, found.patient))
        return
    filled = _filled(patient, found.patient)
    if filled is not patient:
        state.put("patients", filled | {"updated_at": now})


def _new_study(found: Found, now: datetime, *, stable: bool) -> Document:
    study: Document = {
        "_id": found.event.study_instance_uid,
        "patient_key": found.patient_key,
        "issuer": found.issuer,
        "patient_id": found.patient_id,
        "modalities": [],
        "modality_tally": [],
        "sop_classes": [],
        "sop_class_tally": [],
        "instance_count": 0,
        "series_count": 0,
        "size": 0,
        "sites": [],
        "conflicts": [],
        "created_at": now,
        "updated_at": now,
        "stable": stable,
        "stable_revision": int(stable),
        "changes": 0,
    }
    return _searchable(study, found.study)


def _new_series(found: Found, patient_key: str) -> Document:
    series: Document = {
        "_id": found.event.series_instance_uid,
        "study_instance_uid": found.event.study_instance_uid,
        "patient_key": patient_key,
        "modality": found.modality,
        "sop_classes": [],
        "sop_class_tally": [],
        "instance_count": 0,
        "size": 0,
    }
    return _searchable(series, found.series)
