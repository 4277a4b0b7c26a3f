"""The rules of the image index, on plain documents: what a header becomes, which version counts, what is counted.

Everything here is pure. ``apply`` changes a ``State`` (the documents one transaction works on), so that the result
depends on which instances were stored, never on the order or the number of times in which we heard of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

from libs.common.dicom.dicom_json import Json, first, level_json, search_fields
from libs.common.dicom.header import Header
from libs.common.dicom.levels import INSTANCE, PATIENT, SERIES, STUDY
from libs.common.dicom.uids import clean_uid
from libs.common.errors import Invalid
from libs.common.events import InstanceStored, ObjectReference

Document = dict[str, Any]
Collection = Literal["patients", "studies", "series", "instances"]
COLLECTIONS: tuple[Collection, ...] = ("patients", "studies", "series", "instances")

_ELSEWHERE = "the instance belongs to another study or series"
MOST_CONFLICTS = 200
"""Conflicts kept per study; a study with more is broken as a whole, and its document must stay small."""

# Attributes of a study that lawfully differ between its instances (age and weight at each acquisition).
_MAY_DIFFER = frozenset(
    ("00101010", "00101020", "00101022", "00101030", "00080201", "00102000", "001021B0", "00321032")
)


@dataclass(frozen=True)
class Found:
    """What one stored object says, by level. ``study`` holds the attributes of patient and study together."""

    event: InstanceStored
    stored_at: datetime
    issuer: str
    patient_id: str
    patient_key: str
    modality: str
    patient: Json
    study: Json
    series: Json
    instance: Json
    problems: tuple[str, ...] = ()


class NotLoaded(Exception):
    """A rule needs a document that was not read yet."""

    def __init__(self, collection: Collection, identity: str) -> None:
        self.collection = collection
        self.identity = identity


class HeaderNeeded(Exception):
    """A version that was stored earlier counts again, so its header has to be read again."""

    def __init__(self, event: InstanceStored) -> None:
        self.event = event


class State:
    """The documents one transaction has read, and what became of them. ``None`` stands for: is not there."""

    def __init__(self) -> None:
        self._documents: dict[tuple[Collection, str], Document | None] = {}
        self._before: dict[tuple[Collection, str], bool] = {}
        self.written: set[tuple[Collection, str]] = set()

    def load(self, collection: Collection, identity: str, document: Document | None) -> None:
        """Tell what the database has."""
        self._documents[collection, identity] = document
        self._before[collection, identity] = document is not None

    def get(self, collection: Collection, identity: str) -> Document | None:
        """The document as it is now. Raises NotLoaded when nobody looked."""
        try:
            return self._documents[collection, identity]
        except KeyError:
            raise NotLoaded(collection, identity) from None

    def put(self, collection: Collection, document: Document) -> None:
        identity = document["_id"]
        self.get(collection, identity)
        self._documents[collection, identity] = document
        self.written.add((collection, identity))

    def drop(self, collection: Collection, identity: str) -> None:
        self.get(collection, identity)
        self._documents[collection, identity] = None
        self.written.add((collection, identity))

    def changes(self, collection: Collection) -> tuple[list[Document], list[Document], list[str]]:
        """``(inserted, replaced, deleted)`` of one collection."""
        inserted: list[Document] = []
        replaced: list[Document] = []
        deleted: list[str] = []
        for where, identity in sorted(self.written):
            if where != collection:
                continue
            document, existed = self._documents[where, identity], self._before[where, identity]
            if document is None:
                deleted += [identity] * existed
            else:
                (replaced if existed else inserted).append(document)
        return inserted, replaced, deleted


@dataclass
class Outcome:
    """What one event did. ``indexed``: it has to be told; ``new``: no version of the instance was there before."""

    event: InstanceStored
    indexed: bool = False
    new: bool = False


@dataclass
class Verdict:
    """What a batch did: an outcome per event, and the studies that were announced as stable and have changed."""

    outcomes: list[Outcome] = field(default_factory=list)
    reopened: set[str] = field(default_factory=set)
    silent: bool = False
    """A rebuild: what is found was told long ago, so studies neither open nor wait to be announced."""


def whole_milliseconds(moment: datetime) -> datetime:
    """The moment as the database keeps it, so that comparisons come out the same before and after writing."""
    moment = moment.astimezone(UTC)
    return moment.replace(microsecond=moment.microsecond // 1000 * 1000)


def describe(event: InstanceStored, header: Header, site_issuer: str) -> Found:
    """The documents' content from a header. Raises Invalid when the header contradicts the event."""
    patient, study = level_json(header, PATIENT), level_json(header, STUDY)
    series, instance = level_json(header, SERIES), level_json(header, INSTANCE)
    for json, tag, told, what in (
        (study, "0020000D", event.study_instance_uid, "Study Instance UID"),
        (series, "0020000E", event.series_instance_uid, "Series Instance UID"),
        (instance, "00080018", event.sop_instance_uid, "SOP Instance UID"),
        (instance, "00080016", event.sop_class_uid, "SOP Class UID"),
    ):
        if clean_uid(first(json, tag)) != told:
            raise Invalid(f"the header's {what} is not the one the object was stored under")
    patient_id = str(first(patient, "00100020") or "")
    issuer = str(first(patient, "00100021") or "") or site_issuer
    # Without an id nothing says that two studies are of one person, so each gets a patient of its own.
    key = f"{issuer}|{patient_id}" if patient_id else f"{issuer}||{event.study_instance_uid}"
    return Found(
        event=event,
        stored_at=whole_milliseconds(event.time),
        issuer=issuer,
        patient_id=patient_id,
        patient_key=key,
        modality=str(first(series, "00080060") or ""),
        patient=patient,
        study=patient | study,
        series=series,
        instance=instance,
        problems=tuple(dict.fromkeys(header.problems)),
    )


def _version(found: Found) -> Document:
    event = found.event
    return {
        "reference": event.reference.model_dump(),
        "stored_at": found.stored_at,
        "status": "current",
        "reason": "",
        "study_instance_uid": event.study_instance_uid,
        "series_instance_uid": event.series_instance_uid,
        "sop_class_uid": event.sop_class_uid,
        "on_conflict": event.on_conflict,
        "calling_ae_title": event.calling_ae_title,
        "source": event.source,
        "site": event.site,
        "event_id": event.id,
    }


def _with_version(versions: Iterable[Document], version: Document) -> list[Document]:
    """The versions with one more; the same bytes at the same place are one version, stored when they first were."""
    by_key = {known["reference"]["key"]: known for known in versions}
    key = version["reference"]["key"]
    known = by_key.get(key)
    if known is None or (version["stored_at"], version["event_id"]) < (known["stored_at"], known["event_id"]):
        by_key[key] = version
    return list(by_key.values())


def settle(versions: Iterable[Document]) -> tuple[list[Document], Document]:
    """Every version with its status, in the order in which they were stored, and the current one.

    The first stored decides the study and series; a later one from elsewhere is refused. A later one with the policy
    ``replace`` becomes current, with ``keep`` or ``reject`` it is refused.
    """
    ordered = sorted(versions, key=lambda v: (v["stored_at"], v["reference"]["key"]))
    current: Document | None = None
    settled: list[Document] = []
    for version in ordered:
        status, reason = "current", ""
        if current is not None:
            parents = (current["study_instance_uid"], current["series_instance_uid"])
            if (version["study_instance_uid"], version["series_instance_uid"]) != parents:
                status, reason = "refused", _ELSEWHERE
            elif version["on_conflict"] != "replace":
                status, reason = "refused", f"another version was stored before (policy {version['on_conflict']})"
            else:
                current["status"] = "replaced"
        changed = version | {"status": status, "reason": reason}
        settled.append(changed)
        if status == "current":
            current = changed
    assert current is not None, "an instance has at least one version"
    return settled, current


def apply(state: State, found: Found, known: Mapping[str, Found], now: datetime, verdict: Verdict) -> None:
    """Take one stored object into the state. ``known`` has the headers in hand, by object key.

    Raises NotLoaded or HeaderNeeded when something has to be read first; the state is then to be thrown away.
    """
    event = found.event
    outcome = Outcome(event)
    verdict.outcomes.append(outcome)
    old = state.get("instances", event.sop_instance_uid)
    before = old["versions"] if old is not None else []
    versions, current = settle(_with_version(before, _version(found)))
    mine = next(v for v in versions if v["reference"]["key"] == event.reference.key)
    outcome.new = versions[0] is mine
    # The same event again is told again, since we may have died before telling; the same bytes sent again are not.
    outcome.indexed = mine["status"] == "current" and mine["event_id"] == event.id
    if old is not None and versions == before:
        return
    if old is not None and old["reference"]["key"] == current["reference"]["key"]:
        state.put("instances", old | {"versions": versions, "stored_at": current["stored_at"]})
        if any(version["reason"] == _ELSEWHERE for version in versions):
            _record_refusals(state, old, versions, now)
        return
    content = known.get(current["reference"]["key"])
    if content is None:
        raise HeaderNeeded(event_of(event.sop_instance_uid, current))
    if old is not None:
        _discount(state, old, now, verdict)
    _count(state, content, current, versions, now, verdict)


def event_of(sop_instance_uid: str, version: Document) -> InstanceStored:
    """The event that once told of a version."""
    return InstanceStored(
        id=version["event_id"],
        time=version["stored_at"],
        site=version["site"],
        study_instance_uid=version["study_instance_uid"],
        series_instance_uid=version["series_instance_uid"],
        sop_instance_uid=sop_instance_uid,
        sop_class_uid=version["sop_class_uid"],
        reference=ObjectReference.model_validate(version["reference"]),
        calling_ae_title=version["calling_ae_title"],
        source=version["source"],
        on_conflict=version["on_conflict"],
    )


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
        study = _filled(_with_conflicts(study, found), found.study)
    series = state.get("series", event.series_instance_uid)
    if series is None:
        series = _new_series(found, study["patient_key"])
        study = study | {"series_count": study["series_count"] + 1}
    elif series["instance_count"] == 0 and series["study_instance_uid"] == event.study_instance_uid:
        series = _new_series(found, study["patient_key"])
    else:
        if series["study_instance_uid"] != event.study_instance_uid:
            study = _conflict(study, "0020000E", [event.series_instance_uid], event.sop_instance_uid)
        series = _filled(series, found.series)
    study = _stepped(study, 1, size, event.sop_class_uid, found.modality, now)
    if event.site and event.site not in study["sites"]:
        study |= {"sites": sorted([*study["sites"], event.site])}
    study = _with_refusals(study, versions, event.sop_instance_uid)
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
        "stored_at": current["stored_at"],
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


def _conflict(study: Document, tag: str, value: list[Any], sop_instance_uid: str) -> Document:
    known = study["conflicts"]
    if len(known) >= MOST_CONFLICTS or any(c["tag"] == tag and c["value"] == value for c in known):
        return study
    return study | {"conflicts": [*known, {"tag": tag, "value": value, "sop_instance_uid": sop_instance_uid}]}


def _with_conflicts(study: Document, found: Found) -> Document:
    """The study with what this instance says otherwise about patient and study, each value once."""
    known: Json = study["json"]
    for tag, attribute in found.study.items():
        value = attribute.get("Value")
        there = known.get(tag, {}).get("Value")
        if value is not None and there is not None and value != there and tag not in _MAY_DIFFER:
            study = _conflict(study, tag, value, found.event.sop_instance_uid)
    return study


def _with_refusals(study: Document, versions: Iterable[Document], sop_instance_uid: str) -> Document:
    """The study with the other studies and series that refused versions of an instance claimed to belong to."""
    for version in versions:
        if version["reason"] == _ELSEWHERE:
            for tag, value in (
                ("0020000D", version["study_instance_uid"]),
                ("0020000E", version["series_instance_uid"]),
            ):
                study = _conflict(study, tag, [value], sop_instance_uid)
    return study


def _record_refusals(state: State, instance: Document, versions: Iterable[Document], now: datetime) -> None:
    study = state.get("studies", instance["study_instance_uid"])
    if study is not None:
        changed = _with_refusals(study, versions, instance["_id"])
        if changed is not study:
            state.put("studies", changed | {"updated_at": max(now, study["updated_at"])})
