"""A small image index for tests: documents made from datasets, and a catalog over them in memory."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pydicom.dataset import Dataset

from libs.common.dicom.dicom_json import first, level_json, search_fields
from libs.common.dicom.header import read_header
from libs.common.dicom.levels import INSTANCE, PATIENT, SERIES, STUDY
from libs.common.events import ObjectReference
from services.query.handlers.promises import StoredInstance
from services.query.model.answer import Record
from services.query.model.matching import (
    AnyOf,
    Between,
    Condition,
    Item,
    Moment,
    Name,
    Wildcard,
    name_to_regex,
    pattern_to_regex,
)
from services.query.model.query import DOCUMENTS, SEARCH_FIELDS, Level, Query

Document = dict[str, Any]
COLLECTIONS: dict[Level, str] = {"PATIENT": "patients", "STUDY": "studies", "SERIES": "series", "IMAGE": "instances"}


def create_index(datasets: Iterable[Dataset]) -> dict[str, list[Document]]:
    """The documents that the image index has of these datasets (with file meta), by collection."""
    found: dict[str, dict[str, Document]] = {name: {} for name in COLLECTIONS.values()}
    for dataset in datasets:
        buffer = io.BytesIO()
        dataset.save_as(buffer, enforce_file_format=True)
        _add(found, buffer.getvalue())
    for study in found["studies"].values():
        series = [doc for doc in found["series"].values() if doc["study_instance_uid"] == study["_id"]]
        study["series_count"] = len(series)
        study["modalities"] = sorted({doc["modality"] for doc in series})
        study["sop_classes"] = sorted({uid for doc in series for uid in doc["sop_classes"]})
    return {name: list(documents.values()) for name, documents in found.items()}


def _searchable(json: Any) -> Document:
    names, times, date_times = search_fields(json)
    return {"json": json, "names": names, "times": times, "date_times": date_times}


def _add(found: dict[str, dict[str, Document]], content: bytes) -> None:
    header = read_header(content)
    patient, study = level_json(header, PATIENT), level_json(header, STUDY)
    series, instance = level_json(header, SERIES), level_json(header, INSTANCE)
    patient_id = str(first(patient, "00100020") or "")
    issuer = str(first(patient, "00100021") or "") or "MAIN"
    key = f"{issuer}|{patient_id}"
    study_uid, series_uid = str(first(study, "0020000D")), str(first(series, "0020000E"))
    sop_uid, sop_class = str(first(instance, "00080018")), str(first(instance, "00080016"))
    own = {"issuer": issuer, "patient_id": patient_id}
    found["patients"].setdefault(key, {"_id": key, **own, **_searchable(patient)})
    study_document = found["studies"].setdefault(
        study_uid, {"_id": study_uid, "patient_key": key, **own, "instance_count": 0, **_searchable(patient | study)}
    )
    study_document["instance_count"] += 1
    links = {"study_instance_uid": study_uid, "patient_key": key}
    series_document = found["series"].setdefault(
        series_uid,
        {
            "_id": series_uid,
            **links,
            "modality": first(series, "00080060") or "",
            "sop_classes": [],
            "instance_count": 0,
            **_searchable(series),
        },
    )
    series_document["instance_count"] += 1
    series_document["sop_classes"] = sorted({*series_document["sop_classes"], sop_class})
    reference = ObjectReference(
        key=f"instances/{study_uid}/{series_uid}/{sop_uid}/0123456789abcdef.dcm",
        length=len(content),
        sha256="0" * 64,
        transfer_syntax_uid=header.meta.transfer_syntax_uid,
    )
    found["instances"][sop_uid] = {
        "_id": sop_uid,
        **links,
        "series_instance_uid": series_uid,
        "sop_class_uid": sop_class,
        "reference": reference.model_dump(),
        **_searchable(instance),
    }


class MemoryCatalog:
    """The Catalog over plain documents."""

    def __init__(self, index: Mapping[str, list[Document]]) -> None:
        self._documents = index
        self._by_id = {name: {doc["_id"]: doc for doc in docs} for name, docs in index.items()}

    async def find(self, query: Query, limit: int) -> list[Record]:
        return [self._counted(query.level, record) for record in self._matches(query)][:limit]

    async def stored(self, query: Query) -> list[StoredInstance]:
        wanted = [record[query.level] for record in self._matches(query)]
        keys: dict[Level, str] = {
            "PATIENT": "patient_key",
            "STUDY": "study_instance_uid",
            "SERIES": "series_instance_uid",
            "IMAGE": "_id",
        }
        ids = {doc["_id"] for doc in wanted}
        found = [doc for doc in self._documents["instances"] if doc[keys[query.level]] in ids]
        found.sort(key=lambda doc: (doc["series_instance_uid"], first(doc["json"], "00200013") or 0, doc["_id"]))
        return [
            StoredInstance(doc["_id"], doc["sop_class_uid"], ObjectReference.model_validate(doc["reference"]))
            for doc in found
        ]

    def _matches(self, query: Query) -> Iterator[Record]:
        for doc in self._documents[COLLECTIONS[query.level]]:
            record = self._record(query.level, doc)
            if all(
                matches(level, condition, record[level])
                for level, conditions in query.conditions.items()
                for condition in conditions
            ):
                yield record

    def _record(self, level: Level, doc: Document) -> dict[Level, Mapping[str, Any]]:
        record: dict[Level, Mapping[str, Any]] = {level: doc}
        for above in DOCUMENTS[level][1:]:
            link = {"STUDY": "study_instance_uid", "SERIES": "series_instance_uid"}[above]
            record[above] = self._by_id[COLLECTIONS[above]][doc[link]]
        return record

    def _counted(self, level: Level, record: Record) -> Record:
        if level != "PATIENT":
            return record
        doc = record["PATIENT"]
        studies = [study for study in self._documents["studies"] if study["patient_key"] == doc["_id"]]
        totals = Counter[str]()
        for study in studies:
            totals.update(series_count=study["series_count"], instance_count=study["instance_count"])
        return {"PATIENT": {**doc, "study_count": len(studies), **totals}}


def matches(level: Level, condition: Condition, doc: Mapping[str, Any]) -> bool:
    """Whether a document of the level fulfils the condition."""
    key = f"{condition.tag:08X}"
    match condition:
        case Name():
            names = doc["names"].get(key, [])
            return all(any(_fits(name_to_regex(p), name) for name in names) for p in condition.patterns)
        case Moment():
            return _within(doc["date_times"].get(key), condition)
        case Between(vr="TM"):
            return _within(doc["times"].get(key), condition)
        case AnyOf() | Wildcard() if condition.tag in SEARCH_FIELDS[level]:
            value = doc.get(SEARCH_FIELDS[level][condition.tag])
            return _some(condition, value if isinstance(value, list) else [value])
        case _:
            return _in_json(condition, doc["json"])


def _in_json(condition: Condition, json: Mapping[str, Any]) -> bool:
    values = json.get(f"{condition.tag:08X}", {}).get("Value", [])
    match condition:
        case AnyOf() | Wildcard():
            return _some(condition, values)
        case Between() | Moment():
            return any(_within(value, condition) for value in values)
        case Name():
            return all(
                any(_fits(name_to_regex(p), text, re.I) for name in values for text in name.values())
                for p in condition.patterns
            )
        case Item():
            return any(all(_in_json(inner, item) for inner in condition.conditions) for item in values)


def _some(condition: AnyOf | Wildcard, values: Iterable[Any]) -> bool:
    if isinstance(condition, Wildcard):
        return any(
            _fits(pattern_to_regex(p), value) for p in condition.patterns for value in values if isinstance(value, str)
        )
    for value in values:
        if isinstance(value, int | float):
            if any(re.fullmatch(r"[+-]?[\d.]+", text) and float(text) == value for text in condition.values):
                return True
        elif value in condition.values:
            return True
    return False


def _fits(pattern: str, text: str, flags: re.RegexFlag = re.NOFLAG) -> bool:
    return re.search(pattern, text, re.S | flags) is not None


def _within(value: Any, condition: Between | Moment) -> bool:
    if not isinstance(value, str):
        return False
    return (condition.low is None or condition.low <= value) and (condition.high is None or value <= condition.high)
