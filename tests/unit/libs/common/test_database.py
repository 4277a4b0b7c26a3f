"""Leases, migrations and failures of MongoDB, on a real one."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from motor.motor_asyncio import AsyncIOMotorDatabase
from pymongo import IndexModel
from pymongo.errors import AutoReconnect, BulkWriteError, DuplicateKeyError, OperationFailure

from cli.servers.mongod import Mongod
from libs.common.database import (
    Migration,
    acquire_lease,
    apply_migrations,
    connect,
    ensure_indexes,
    lease,
    release_lease,
    translate_errors,
)
from libs.common.errors import Unavailable

Database = AsyncIOMotorDatabase[dict[str, Any]]


async def _until(condition: Callable[[], Awaitable[bool]], seconds: float = 10.0) -> None:
    async with asyncio.timeout(seconds):
        while not await condition():
            await asyncio.sleep(0.02)


async def test_writes_are_journalled_on_a_majority(mongod: Any) -> None:
    database = connect(mongod.url, "concern")
    assert database.write_concern.document["w"] == "majority"
    assert database.write_concern.document["j"] is True
    assert database["any"].write_concern == database.write_concern
    database.client.close()


async def test_eight_replicas_apply_each_migration_once_in_order(database: Database) -> None:
    ran: list[str] = []

    def step(name: str) -> Migration:
        async def apply(target: Database) -> None:
            await target["steps"].insert_one({"name": name})
            await asyncio.sleep(0.05)  # time in which another replica could start it too
            ran.append(name)

        return Migration(name, apply)

    steps = [step("one"), step("two"), step("three")]
    applied = await asyncio.gather(*(apply_migrations(database, steps, f"replica-{n}") for n in range(8)))
    assert ran == ["one", "two", "three"]
    assert sorted(map(tuple, applied)) == [()] * 7 + [("one", "two", "three")]
    assert await database["steps"].count_documents({}) == 3
    assert await apply_migrations(database, [*steps, step("four")], "later") == ["four"]


async def test_a_migration_that_fails_is_tried_again_by_the_next(database: Database) -> None:
    attempts = 0

    async def apply(_target: Database) -> None:
        nonlocal attempts
        attempts += 1
        if attempts == 1:
            raise RuntimeError("first attempt")

    with pytest.raises(RuntimeError):
        await apply_migrations(database, [Migration("m", apply)], "a")
    assert await apply_migrations(database, [Migration("m", apply)], "b") == ["m"]


async def test_one_of_eight_gets_the_lease(database: Database) -> None:
    taken = await asyncio.gather(*(acquire_lease(database, "work", f"replica-{n}", 30) for n in range(8)))
    assert sum(taken) == 1
    winner = f"replica-{taken.index(True)}"
    assert await acquire_lease(database, "work", winner, 30), "its owner renews it"
    assert await acquire_lease(database, "other work", "somebody", 30)
    await release_lease(database, "work", "not-the-owner")
    assert not await acquire_lease(database, "work", "somebody", 30)
    await release_lease(database, "work", winner)
    assert await acquire_lease(database, "work", "somebody", 30)


async def test_a_dead_owner_blocks_for_the_time_of_its_lease_only(database: Database) -> None:
    assert await acquire_lease(database, "work", "dead", 0.3)
    assert not await acquire_lease(database, "work", "next", 30)
    await _until(lambda: acquire_lease(database, "work", "next", 30))
    assert not await acquire_lease(database, "work", "dead", 30)


async def test_a_held_lease_is_renewed_and_given_back(database: Database) -> None:
    async with lease(database, "work", "holder", 0.6) as mine:
        assert mine
        for _ in range(20):
            assert not await acquire_lease(database, "work", "rival", 30)
            await asyncio.sleep(0.06)
        async with lease(database, "work", "rival", 0.6) as other:
            assert not other
    assert await acquire_lease(database, "work", "rival", 30)


async def test_indexes_are_made_once_by_many(database: Database) -> None:
    wanted = {"studies": [IndexModel([("a", 1)], name="a"), IndexModel([("b", -1)], name="b", unique=True)]}
    await asyncio.gather(*(ensure_indexes(database, wanted) for _ in range(8)))
    assert set(await database["studies"].index_information()) == {"_id_", "a", "b"}


def test_only_absence_becomes_unavailable() -> None:
    with pytest.raises(Unavailable), translate_errors():
        raise AutoReconnect("gone")
    for away in (OperationFailure("stopping", 91), BulkWriteError({"writeConcernErrors": [{"code": 64}]})):
        with pytest.raises(Unavailable), translate_errors():
            raise away
    for error in (DuplicateKeyError("twice"), OperationFailure("no such command"), KeyError("x")):
        with pytest.raises(type(error)), translate_errors():
            raise error


async def test_a_mongod_that_is_away_is_unavailable_and_comes_back(private_mongod: Mongod) -> None:
    database = connect(private_mongod.url, "away")
    with translate_errors():
        await database["things"].insert_one({"_id": 1})
    await asyncio.to_thread(private_mongod.kill)
    with pytest.raises(Unavailable):
        await acquire_lease(database, "work", "me", 30)
    await asyncio.to_thread(private_mongod.restart)
    with translate_errors():
        assert await database["things"].count_documents({}) == 1
    assert await acquire_lease(database, "work", "me", 30)
    database.client.close()
