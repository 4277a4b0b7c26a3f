"""MongoDB: one way to connect, failures in our words, migrations once, and leases for work that one replica does."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from motor.motor_asyncio import AsyncIOMotorClient, AsyncIOMotorDatabase
from pymongo import IndexModel, ReturnDocument
from pymongo.errors import (
    AutoReconnect,
    ConnectionFailure,
    DuplicateKeyError,
    ExecutionTimeout,
    NetworkTimeout,
    OperationFailure,
    ServerSelectionTimeoutError,
    WTimeoutError,
)
from pymongo.read_concern import ReadConcern
from pymongo.write_concern import WriteConcern

from libs.common.errors import Unavailable

Database = AsyncIOMotorDatabase[dict[str, Any]]

_AWAY = (
    AutoReconnect,
    ConnectionFailure,
    NetworkTimeout,
    ServerSelectionTimeoutError,
    ExecutionTimeout,
    WTimeoutError,
)
# Of the server's error_codes.yml: host away, shutting down, no primary, interrupted by either, replication too slow,
# disk full.
_AWAY_CODES = {6, 7, 64, 89, 91, 189, 9001, 10107, 11600, 11602, 13435, 13436, 14031}


def connect(url: str, name: str) -> Database:
    """A database whose writes are journalled on a majority before they return, and whose reads see only such writes.

    Connects lazily: the first operation raises what ``translate_errors`` turns into Unavailable.
    """
    client: AsyncIOMotorClient[dict[str, Any]] = AsyncIOMotorClient(
        url,
        tz_aware=True,
        serverSelectionTimeoutMS=5_000,
        connectTimeoutMS=5_000,
        socketTimeoutMS=60_000,
        maxPoolSize=50,
        retryWrites=True,
        retryReads=True,
        appname="sagittal",
    )
    return client.get_database(
        name, write_concern=WriteConcern("majority", j=True, wtimeout=30_000), read_concern=ReadConcern("majority")
    )


def is_away(error: BaseException) -> bool:
    """Whether the error means that MongoDB is away or changing primary: the same call may work later."""
    if isinstance(error, _AWAY):
        return True
    if isinstance(error, DuplicateKeyError) or not isinstance(error, OperationFailure):
        return False
    if error.has_error_label("RetryableWriteError") or error.has_error_label("TransientTransactionError"):
        return True
    details = error.details or {}  # a bulk write keeps here what became of each of its writes
    codes = {error.code, *(found.get("code") for found in details.get("writeConcernErrors", []))}
    return not codes.isdisjoint(_AWAY_CODES)


@contextlib.contextmanager
def translate_errors() -> Iterator[None]:
    """Raise Unavailable for what pymongo raises when MongoDB is away; all other errors pass."""
    try:
        yield
    except Exception as error:
        if is_away(error):
            raise Unavailable(f"MongoDB is away: {type(error).__name__}") from error
        raise


async def ensure_indexes(database: Database, specifications: Mapping[str, Sequence[IndexModel]]) -> None:
    """Make the indexes of each collection; nothing happens for those that exist. Raises Unavailable."""
    with translate_errors():
        for collection, models in specifications.items():
            await database[collection].create_indexes(list(models))


async def acquire_lease(database: Database, name: str, owner: str, seconds: float) -> bool:
    """Take or renew the lease of this name; False when another owner holds it. Raises Unavailable.

    The lease ends by itself ``seconds`` from now, so that a killed owner blocks nobody for longer. The time is
    MongoDB's: the clocks of replicas differ.
    """
    mine = {"$literal": owner}
    free = {"$or": [{"$eq": ["$owner", mine]}, {"$lte": [{"$ifNull": ["$until", "$$NOW"]}, "$$NOW"]}]}
    until = {"$add": ["$$NOW", int(seconds * 1000)]}
    change = {"owner": {"$cond": [free, mine, "$owner"]}, "until": {"$cond": [free, until, "$until"]}}
    with translate_errors():
        try:
            taken = await database["leases"].find_one_and_update(
                {"_id": name}, [{"$set": change}], upsert=True, return_document=ReturnDocument.AFTER
            )
        except DuplicateKeyError:
            return False
    return bool(taken and taken["owner"] == owner)


async def release_lease(database: Database, name: str, owner: str) -> None:
    """Give the lease back, if this owner holds it. Raises Unavailable."""
    with translate_errors():
        await database["leases"].delete_one({"_id": name, "owner": owner})


@contextlib.asynccontextmanager
async def lease(database: Database, name: str, owner: str, seconds: float = 30.0) -> AsyncIterator[bool]:
    """Hold the lease during the block, renewed every third of its time; gives False when another owner holds it."""
    if not await acquire_lease(database, name, owner, seconds):
        yield False
        return

    async def renew() -> None:
        while True:
            await asyncio.sleep(seconds / 3)
            with contextlib.suppress(Unavailable):
                await acquire_lease(database, name, owner, seconds)

    renewing = asyncio.create_task(renew())
    try:
        yield True
    finally:
        renewing.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await renewing
        with contextlib.suppress(Unavailable):
            await release_lease(database, name, owner)


@dataclass(frozen=True)
class Migration:
    """One step of the schema. ``apply`` must be safe to repeat: a replica may die in the middle of it."""

    id: str
    apply: Callable[[Database], Awaitable[None]]


async def apply_migrations(database: Database, migrations: Sequence[Migration], owner: str) -> list[str]:
    """Apply, in order, those that this database has not had; gives their ids.

    Any number of replicas may call it at once: one works under a lease, the others wait for it. Raises Unavailable.
    """
    while True:
        async with lease(database, "migrations", owner) as mine:
            if mine:
                return await _apply_missing(database, migrations)
        await asyncio.sleep(0.1)


async def _apply_missing(database: Database, migrations: Sequence[Migration]) -> list[str]:
    with translate_errors():
        done = {document["_id"] async for document in database["migrations"].find({}, {"_id": 1})}
        applied = []
        for migration in migrations:
            if migration.id in done:
                continue
            await migration.apply(database)
            await database["migrations"].insert_one({"_id": migration.id, "applied_at": datetime.now(UTC)})
            applied.append(migration.id)
        return applied
