"""The image index in MongoDB: the only file of this service that knows it."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

import bson.errors
import pymongo.errors
from bson.codec_options import CodecOptions
from motor.motor_asyncio import AsyncIOMotorCollection, AsyncIOMotorDatabase
from pymongo import ASCENDING, DeleteOne, IndexModel, InsertOne, ReplaceOne, ReturnDocument
from pymongo.read_concern import ReadConcern
from pymongo.write_concern import WriteConcern

from libs.common.errors import Invalid, Unavailable
from services.indexing.model import COLLECTIONS, Collection, Document, NotLoaded, State

Result = TypeVar("Result")
_DURABLE = WriteConcern("majority", j=True)
_AWAY = (pymongo.errors.ConnectionFailure, pymongo.errors.ExecutionTimeout)
_ASIDE = "instances_before_rebuild"
_PATIENCE = 30.0  # seconds for which a transaction is tried again before its events are given back to the bus


def _index(*keys: str, **options: Any) -> IndexModel:
    return IndexModel([(key, ASCENDING) for key in keys], **options)


def index_specs() -> dict[str, list[IndexModel]]:
    """The indexes of each collection this service owns: what queries search by, and what our own rules need."""
    return {
        "patients": [
            _index(
                "issuer", "patient_id", unique=True, partialFilterExpression={"patient_id": {"$gt": ""}},
                name="one_patient_per_id",
            ),
            _index("patient_id"),
            _index("names.00100010"),
            _index("json.00100030.Value"),
        ],
        "studies": [
            _index("patient_key"),
            _index("patient_id", "issuer"),
            _index("names.00100010"),
            _index("json.00080050.Value"),
            _index("json.00080020.Value"),
            _index("date_times.00080020"),
            _index("modalities", "date_times.00080020"),
            _index("names.00080090"),
            _index("json.00200010.Value"),
            _index("updated_at"),
            _index("stable", "updated_at", partialFilterExpression={"stable": False}, name="not_yet_stable"),
            _index("change_untold", partialFilterExpression={"change_untold": True}, name="change_untold"),
        ],
        "series": [
            _index("study_instance_uid"),
            _index("patient_key"),
            _index("json.00400244.Value"),
        ],
        "instances": [
            _index("series_instance_uid"),
            _index("study_instance_uid"),
        ],
        "quarantine": [_index("received_at")],
    }  # fmt: skip


def _is_transient(error: pymongo.errors.PyMongoError) -> bool:
    if isinstance(error, pymongo.errors.DuplicateKeyError):
        return True  # another replica was first; the next turn finds what it wrote
    if isinstance(error, pymongo.errors.BulkWriteError):
        failures = (error.details or {}).get("writeErrors", [])
        if failures and all(failure.get("code") == 11000 for failure in failures):
            return True
    return error.has_error_label("TransientTransactionError") or error.has_error_label("UnknownTransactionCommitResult")


class MongoIndex:
    """Patients, studies, series and instances; all methods raise Unavailable when the database is away."""

    def __init__(self, database: AsyncIOMotorDatabase[Document]) -> None:
        self._database = database.with_options(
            codec_options=CodecOptions(tz_aware=True, tzinfo=UTC), write_concern=_DURABLE
        )

    def _collection(self, name: str) -> AsyncIOMotorCollection[Document]:
        return self._database[name]

    async def ensure_indexes(self) -> None:
        """Create what ``index_specs`` names; safe to repeat and by many replicas at once."""
        try:
            for name, models in index_specs().items():
                await self._collection(name).create_indexes(models)
        except _AWAY as error:
            raise Unavailable("the database is away") from error

    async def change(self, wanted: Iterable[tuple[Collection, str]], decide: Callable[[State], Result]) -> Result:
        """Read the ``wanted`` documents, let ``decide`` change them, write what changed: all of it or nothing.

        ``decide`` must be pure: it is called again when another replica was faster, or when it asked for a document
        that was not read (NotLoaded). Raises Invalid when a document cannot be kept in the database at all.
        """
        identities = set(wanted)
        deadline = time.monotonic() + _PATIENCE
        attempt = 0
        while True:
            try:
                return await self._attempt(identities, decide)
            except NotLoaded as missing:
                identities.add((missing.collection, missing.identity))
                continue
            except (bson.errors.BSONError, pymongo.errors.DocumentTooLarge, OverflowError) as error:
                raise Invalid("the header makes a document that the database cannot hold") from error
            except pymongo.errors.PyMongoError as error:
                if time.monotonic() < deadline and _is_transient(error):
                    attempt += 1
                elif _is_transient(error) or isinstance(error, _AWAY):
                    raise Unavailable("the database is away or overloaded") from error
                else:
                    raise
            await asyncio.sleep(random.uniform(0, min(0.5, 0.005 * 2**attempt)))  # noqa: S311 (jitter, no secret)

    async def _attempt(self, identities: set[tuple[Collection, str]], decide: Callable[[State], Result]) -> Result:
        state = State()
        async with (
            await self._database.client.start_session() as session,
            session.start_transaction(ReadConcern("snapshot"), _DURABLE),
        ):
            for name in COLLECTIONS:
                ids = [identity for collection, identity in identities if collection == name]
                if not ids:
                    continue
                found: dict[str, Document] = {}
                async for document in self._collection(name).find({"_id": {"$in": ids}}, session=session):
                    found[document["_id"]] = document
                for identity in ids:
                    state.load(name, identity, found.get(identity))
            result = decide(state)
            for name in COLLECTIONS:
                inserted, replaced, deleted = state.changes(name)
                operations: list[Any] = [InsertOne(document) for document in inserted]
                operations += [ReplaceOne({"_id": document["_id"]}, document) for document in replaced]
                operations += [DeleteOne({"_id": identity}) for identity in deleted]
                if operations:
                    await self._collection(name).bulk_write(operations, ordered=False, session=session)
        return result

    async def quarantine(self, document: Document) -> None:
        """Keep why something could not be indexed; the same ``_id`` again changes nothing."""
        try:
            await self._collection("quarantine").update_one(
                {"_id": document["_id"]}, {"$setOnInsert": document}, upsert=True
            )
        except _AWAY as error:
            raise Unavailable("the database is away") from error

    async def claim_quiet_study(self, quiet: timedelta, lease: timedelta, token: str) -> Document | None:
        """One study that nothing arrived for, leased to ``token`` until the lease ends or ``announced`` is called."""
        now = datetime.now(UTC)
        try:
            return await self._collection("studies").find_one_and_update(
                {"stable": False, "updated_at": {"$lte": now - quiet}, "lease_until": {"$not": {"$gt": now}}},
                {"$set": {"lease": token, "lease_until": now + lease}},
                sort=[("updated_at", ASCENDING)],
                return_document=ReturnDocument.AFTER,
            )
        except _AWAY as error:
            raise Unavailable("the database is away") from error

    async def announced(self, study: Document, token: str) -> Document | None:
        """End the lease: the next revision was announced. A study that changed meanwhile is open, not stable.

        Gives the study as it is now, None when the lease was lost to another replica.
        """
        same = {"$eq": ["$changes", study["changes"]]}
        try:
            return await self._collection("studies").find_one_and_update(
                {"_id": study["_id"], "lease": token},
                [
                    {
                        "$set": {
                            "stable": same,
                            "change_untold": {"$cond": [same, "$$REMOVE", True]},
                            "stable_revision": {"$add": ["$stable_revision", 1]},
                        }
                    },
                    {"$unset": ["lease", "lease_until"]},
                ],
                return_document=ReturnDocument.AFTER,
            )
        except _AWAY as error:
            raise Unavailable("the database is away") from error

    async def untold_changes(self, older_than: timedelta) -> list[Document]:
        """Studies that opened again without anybody having been told, for the time given."""
        before = datetime.now(UTC) - older_than
        try:
            return [
                study
                async for study in self._collection("studies")
                .find({"change_untold": True, "updated_at": {"$lte": before}})
                .limit(100)
            ]
        except _AWAY as error:
            raise Unavailable("the database is away") from error

    async def change_told(self, study: Document) -> None:
        """It has been told that this revision of the study is no longer what the study is."""
        try:
            await self._collection("studies").update_one(
                {"_id": study["_id"], "stable_revision": study["stable_revision"]}, {"$unset": {"change_untold": ""}}
            )
        except _AWAY as error:
            raise Unavailable("the database is away") from error

    async def begin_rebuild(self) -> None:
        """Empty the index; the instances are put aside, unless an interrupted rebuild has put them aside before."""
        try:
            names = set(await self._database.list_collection_names())
            if "instances" in names and _ASIDE not in names:
                await self._collection("instances").rename(_ASIDE)
            for name in COLLECTIONS:
                await self._collection(name).drop()
        except _AWAY as error:
            raise Unavailable("the database is away") from error
        await self.ensure_indexes()

    async def remembered(self, sop_instance_uids: Iterable[str]) -> Mapping[str, Document]:
        """The versions put aside of these instances, by object key."""
        try:
            return {
                version["reference"]["key"]: version
                async for document in self._collection(_ASIDE).find(
                    {"_id": {"$in": list(sop_instance_uids)}}, {"versions": 1}
                )
                for version in document["versions"]
            }
        except _AWAY as error:
            raise Unavailable("the database is away") from error

    async def end_rebuild(self, quiet_since: datetime) -> None:
        """Forget what was put aside, and let studies with something newer wait for their quiet period as usual."""
        try:
            await self._collection("studies").update_many(
                {"updated_at": {"$gt": quiet_since}}, {"$set": {"stable": False, "stable_revision": 0}}
            )
            await self._collection(_ASIDE).drop()
        except _AWAY as error:
            raise Unavailable("the database is away") from error
