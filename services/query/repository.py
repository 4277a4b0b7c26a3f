"""The image index in MongoDB as query reads it: conditions become filters on what indexing wrote."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from bson.regex import Regex
from motor.motor_asyncio import AsyncIOMotorDatabase
from pymongo.errors import PyMongoError

from libs.common.errors import Unavailable
from libs.common.events import ObjectReference
from services.query.handlers.promises import StoredInstance
from services.query.model.answer import Record
from services.query.model.matching import (
    NUMBERS,
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
from services.query.model.query import (
    COUNT_FIELDS,
    DOCUMENTS,
    PATIENT_INSTANCES,
    PATIENT_SERIES,
    PATIENT_STUDIES,
    SEARCH_FIELDS,
    Level,
    Query,
    home,
)

Filter = dict[str, Any]
COLLECTIONS: dict[Level, str] = {
    "PATIENT": "patients",
    "STUDY": "studies",
    "SERIES": "series",
    "IMAGE": "instances",
}
_LINKS: dict[Level, str] = {"STUDY": "study_instance_uid", "SERIES": "series_instance_uid"}
_GROUPS = ("Alphabetic", "Ideographic", "Phonetic")
_CHUNK = 1000
"""Identifiers of a level above that one filter lists."""


def to_filter(level: Level, conditions: Iterable[Condition]) -> Filter:
    """The MongoDB filter of conditions on the documents of a level; every regular expression is anchored."""
    parts = [_part(level, condition) for condition in conditions]
    return {} if not parts else parts[0] if len(parts) == 1 else {"$and": parts}


def _part(level: Level, condition: Condition) -> Filter:
    key = f"{condition.tag:08X}"
    match condition:
        case Name():
            parts = [{f"names.{key}": _regex(name_to_regex(pattern))} for pattern in condition.patterns]
            return parts[0] if len(parts) == 1 else {"$and": parts}
        case Moment():
            return {f"date_times.{key}": _bounds(condition.low, condition.high)}
        case Between(vr="TM"):
            return {f"times.{key}": _bounds(condition.low, condition.high)}
        case AnyOf() | Wildcard() if condition.tag in SEARCH_FIELDS[level]:
            return {SEARCH_FIELDS[level][condition.tag]: _value(condition)}
        case _:
            return _in_json(f"json.{key}.Value", condition)


def _in_json(path: str, condition: Condition) -> Filter:
    match condition:
        case AnyOf() | Wildcard():
            return {path: _value(condition)}
        case Between() | Moment():
            return {path: {"$elemMatch": _bounds(condition.low, condition.high)}}
        case Name():
            # The index folds names at the top of a level only; in items case alone is not regarded.
            parts: list[Filter] = []
            for pattern in condition.patterns:
                regex = {"$regex": name_to_regex(pattern), "$options": "is"}
                parts.append({"$or": [{f"{path}.{group}": regex} for group in _GROUPS]})
            return {"$and": parts}
        case Item():
            nested = [_in_json(f"{inner.tag:08X}.Value", inner) for inner in condition.conditions]
            return {path: {"$elemMatch": {"$and": nested}}}


def _value(condition: AnyOf | Wildcard) -> Any:
    if isinstance(condition, Wildcard):
        if len(condition.patterns) == 1:
            return _regex(pattern_to_regex(condition.patterns[0]))
        # $in takes regular expressions, as objects.
        return {"$in": [Regex(pattern_to_regex(pattern), "s") for pattern in condition.patterns]}
    values: list[Any] = list(condition.values)
    if condition.vr in NUMBERS:
        values += [number for text in condition.values if (number := _number(text)) is not None]
    return values[0] if len(values) == 1 else {"$in": values}


def _number(text: str) -> float | None:
    with contextlib.suppress(ValueError):
        number = float(text)
        return int(number) if number.is_integer() else number
    return None


def _regex(pattern: str) -> Filter:
    return {"$regex": pattern, "$options": "s"}


def _bounds(low: str | None, high: str | None) -> Filter:
    bounds: Filter = {}
    if low is not None:
        bounds["$gte"] = low
    if high is not None:
        bounds["$lte"] = high
    return bounds


@contextlib.contextmanager
def _away() -> Iterator[None]:
    try:
        yield
    except PyMongoError as error:
        raise Unavailable("the image index cannot be reached") from error


class MongoCatalog:
    """The Catalog of this service over the collections of the image index."""

    def __init__(self, database: AsyncIOMotorDatabase[dict[str, Any]]) -> None:
        self._database = database

    async def find(self, query: Query, limit: int) -> list[Record]:
        """At most ``limit`` matches, each with the documents of the levels its keys need. Raises Unavailable."""
        with _away():
            found: list[dict[str, Any]] = []
            async for narrowed in self._narrowed(query):
                cursor = self._collection(query.level).find(narrowed, self._projection(query, query.level))
                found += await cursor.limit(limit - len(found)).to_list(None)
                if len(found) >= limit:
                    break
            if query.level == "PATIENT":
                await self._count_patients(query, found)
            return await self._with_parents(query, found)

    async def stored(self, query: Query) -> list[StoredInstance]:
        """Every instance of what the unique keys of a retrieval name, by series. Raises Unavailable."""
        with _away():
            found: list[dict[str, Any]] = []
            projection = {"series_instance_uid": 1, "sop_class_uid": 1, "reference": 1, "json.00200013.Value": 1}
            async for narrowed in self._instances(query):
                found += await self._collection("IMAGE").find(narrowed, projection).to_list(None)
        found.sort(key=lambda doc: (doc["series_instance_uid"], _instance_number(doc), doc["_id"]))
        return [
            StoredInstance(doc["_id"], doc["sop_class_uid"], ObjectReference.model_validate(doc["reference"]))
            for doc in found
        ]

    def _collection(self, level: Level) -> Any:
        return self._database[COLLECTIONS[level]]

    async def _narrowed(self, query: Query) -> AsyncIterator[Filter]:
        """Filters for the query's own level whose matches, together, also fulfil the conditions above it."""
        own = to_filter(query.level, query.conditions.get(query.level, ()))
        above = DOCUMENTS[query.level][1:]
        async for linked in self._linked(query, above):
            yield {"$and": [linked, own]} if linked and own else linked or own

    async def _linked(self, query: Query, above: Sequence[Level]) -> AsyncIterator[Filter]:
        """Filters on the link to the nearest level above that has conditions; one empty filter when none has."""
        for index, level in enumerate(above):
            conditions = query.conditions.get(level, ())
            if not conditions:
                continue
            own = to_filter(level, conditions)
            async for linked in self._linked(query, above[index + 1 :]):
                narrowed = {"$and": [linked, own]} if linked else own
                cursor = self._collection(level).find(narrowed, {"_id": 1})
                while chunk := await cursor.to_list(_CHUNK):
                    yield {_LINKS[level]: {"$in": [doc["_id"] for doc in chunk]}}
            return
        yield {}

    async def _instances(self, query: Query) -> AsyncIterator[Filter]:
        if query.level == "IMAGE":
            async for narrowed in self._narrowed(query):
                yield narrowed
        elif query.level == "SERIES":
            conditions = query.conditions.get("SERIES", ())
            async for linked in self._linked(query, ("STUDY",)):
                own = to_filter("SERIES", conditions)
                cursor = self._collection("SERIES").find({"$and": [linked, own]} if linked else own, {"_id": 1})
                while chunk := await cursor.to_list(_CHUNK):
                    yield {"series_instance_uid": {"$in": [doc["_id"] for doc in chunk]}}
        else:
            # A patient's unique keys are in the study documents as well.
            both = (*query.conditions.get("PATIENT", ()), *query.conditions.get("STUDY", ()))
            cursor = self._collection("STUDY").find(to_filter("STUDY", both), {"_id": 1})
            while chunk := await cursor.to_list(_CHUNK):
                yield {"study_instance_uid": {"$in": [doc["_id"] for doc in chunk]}}

    @staticmethod
    def _projection(query: Query, level: Level) -> dict[str, int]:
        wanted = {"study_instance_uid": 1, "series_instance_uid": 1}
        for key in query.keys:
            if home(query.level, key.tag) != level:
                continue
            if key.tag in COUNT_FIELDS[level]:
                wanted[COUNT_FIELDS[level][key.tag]] = 1
                continue
            wanted[f"json.{key.tag:08X}"] = 1
            if key.tag in SEARCH_FIELDS[level]:
                wanted[SEARCH_FIELDS[level][key.tag]] = 1
        return wanted

    async def _with_parents(self, query: Query, found: list[dict[str, Any]]) -> list[Record]:
        parents: dict[Level, Mapping[str, dict[str, Any]]] = {}
        for level in DOCUMENTS[query.level][1:]:
            if any(home(query.level, key.tag) == level for key in query.keys):
                ids = {doc[_LINKS[level]] for doc in found}
                parents[level] = await self._by_id(level, ids, self._projection(query, level))
        records: list[Record] = []
        for doc in found:
            record: dict[Level, Mapping[str, Any]] = {query.level: doc}
            for level, documents in parents.items():
                record[level] = documents.get(doc[_LINKS[level]], {})
            records.append(record)
        return records

    async def _by_id(self, level: Level, ids: Iterable[str], projection: dict[str, int]) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        remaining = iter(ids)
        while chunk := list(islice(remaining, _CHUNK)):
            async for doc in self._collection(level).find({"_id": {"$in": chunk}}, projection):
                found[doc["_id"]] = doc
        return found

    async def _count_patients(self, query: Query, found: list[dict[str, Any]]) -> None:
        if not found or not {PATIENT_STUDIES, PATIENT_SERIES, PATIENT_INSTANCES} & {key.tag for key in query.keys}:
            return
        group = {
            "_id": "$patient_key",
            "study_count": {"$sum": 1},
            "series_count": {"$sum": "$series_count"},
            "instance_count": {"$sum": "$instance_count"},
        }
        match = {"patient_key": {"$in": [doc["_id"] for doc in found]}}
        counts = {}
        async for row in self._collection("STUDY").aggregate([{"$match": match}, {"$group": group}]):
            counts[row["_id"]] = row
        for doc in found:
            doc.update({k: v for k, v in counts.get(doc["_id"], {}).items() if k != "_id"})


def _instance_number(doc: Mapping[str, Any]) -> float:
    values = doc.get("json", {}).get("00200013", {}).get("Value") or [0]
    return values[0] if isinstance(values[0], int | float) else 0
