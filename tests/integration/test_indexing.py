"""Indexing over a real MongoDB: exact under concurrency and redelivery, and rebuilt when dropped."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from motor.motor_asyncio import AsyncIOMotorDatabase

from libs.common.bus import MemoryBus
from libs.common.config import Settings
from libs.common.errors import NotFound, Unavailable
from libs.common.events import InstanceIndexed, InstanceRejected, InstanceStored, StudyChanged, StudyStable
from libs.common.objects.filesystem import FilesystemObjects
from libs.common.runtime import Resources
from services.indexing.config import IndexingSettings
from services.indexing.handlers import announce_quiet_studies, index_instances, rebuild_index
from services.indexing.repository import MongoIndex
from services.indexing.service import build, rebuild
from tests.unit.services.indexing.stage import reading, stored

Database = AsyncIOMotorDatabase[dict[str, Any]]
QUIET_AT_ONCE = IndexingSettings(quiet_seconds=0)


class Room:
    """The indexing service's handlers with their neighbours."""

    def __init__(self, database: Database, objects: FilesystemObjects) -> None:
        self.database = database
        self.objects = objects
        self.index = MongoIndex(database)
        self.bus = MemoryBus()

    async def store(self, **keywords: Any) -> InstanceStored:
        event, content = stored(**keywords)
        await self.objects.put(event.reference.key, content)
        return event

    async def take(self, *events: InstanceStored, **settings: Any) -> None:
        await index_instances(events, objects=self.objects, index=self.index, bus=self.bus, reading=reading(**settings))

    async def documents(self, collection: str) -> dict[str, dict[str, Any]]:
        return {document["_id"]: document async for document in self.database[collection].find()}

    def told(self, kind: type[Any]) -> list[Any]:
        return [event for event in self.bus.published if isinstance(event, kind)]


@pytest.fixture
async def room(database: Database, tmp_path: Path) -> AsyncIterator[Room]:
    objects = FilesystemObjects(tmp_path / "objects")
    await objects.start()
    made = Room(database, objects)
    await asyncio.gather(*(MongoIndex(database).ensure_indexes() for _ in range(4)))
    yield made
    await objects.stop()


async def test_fifty_at_once_and_every_event_three_times(room: Room) -> None:
    """50 handlers on one study: one patient, exact counts, one document each, however often an event comes."""
    events = [await room.store(InstanceNumber=n, SeriesNumber=n % 5, Modality="CT") for n in range(100)]
    deliveries = events * 3
    random.Random(7).shuffle(deliveries)
    batches = [deliveries[start : start + 6] for start in range(0, len(deliveries), 6)]
    await asyncio.gather(*(room.take(*batch) for batch in batches))
    (study,) = (await room.documents("studies")).values()
    series = await room.documents("series")
    assert (study["instance_count"], study["series_count"]) == (100, 5)
    assert study["size"] == sum(event.reference.length for event in events)
    assert sorted(one["instance_count"] for one in series.values()) == [20] * 5
    assert len(await room.documents("instances")) == 100
    assert list(await room.documents("patients")) == ["HOSPITAL|P1"]
    assert study["changes"] == 100
    assert {event.sop_instance_uid for event in room.told(InstanceIndexed)} == {e.sop_instance_uid for e in events}


async def test_one_patient_from_fifty_studies_at_once(room: Room) -> None:
    events = [await room.store(AccessionNumber=str(n)) for n in range(50)]
    await asyncio.gather(*(room.take(event) for event in events))
    assert list(await room.documents("patients")) == ["HOSPITAL|P1"]
    assert len(await room.documents("studies")) == 50


async def test_a_bad_header_never_blocks_its_batch(room: Room) -> None:
    good = await room.store(InstanceNumber=1)
    bad, content = stored(InstanceNumber=2)
    await room.objects.put(bad.reference.key, b"\xff" * len(content))
    lied = (await room.store(InstanceNumber=3)).model_copy(update={"study_instance_uid": "1.2.3"})
    await room.take(good, bad, lied)
    await room.take(good, bad, lied)
    assert list(await room.documents("instances")) == [good.sop_instance_uid]
    kept = await room.documents("quarantine")
    assert len(kept) == 2
    told = room.told(InstanceRejected)
    assert {event.quarantine_id for event in told} == set(kept) and len({event.id for event in told}) == 2
    for document in kept.values():
        assert document["reason"] and document["sop_instance_uid"]
        assert (await room.objects.stat(document["key"])).size > 0


async def test_neighbours_that_are_away_are_waited_for(room: Room) -> None:
    event = await room.store()
    room.bus.broker.away = True
    with pytest.raises(Unavailable):
        await room.take(event)
    room.bus.broker.away = False
    await room.take(event)
    assert [one.new for one in room.told(InstanceIndexed)] == [True]
    absent, _ = stored(InstanceNumber=9)
    with pytest.raises(NotFound):
        await room.take(absent)


async def test_a_long_header_is_read_on(room: Room) -> None:
    event = await room.store(ImageComments="x" * 3000, AdditionalPatientHistory="y" * 9000, rows=64, columns=64)
    await room.take(event, header_bytes=1024)
    (instance,) = (await room.documents("instances")).values()
    assert len(instance["json"]["00204000"]["Value"][0]) == 3000 and instance["json"]["00280010"]["Value"] == [64]


async def test_another_version_replaces_and_adjusts_the_size(room: Room) -> None:
    first = await room.store(ImageComments="a")
    second = await room.store(ImageComments="b" * 100, minute=1)
    await room.take(second)
    await room.take(first)
    (study,) = (await room.documents("studies")).values()
    (instance,) = (await room.documents("instances")).values()
    assert study["instance_count"] == 1 and study["size"] == second.reference.length
    assert instance["reference"] == second.reference.model_dump()
    assert [version["status"] for version in instance["versions"]] == ["replaced", "current"]
    await room.take(second)
    assert [e.reference.key for e in room.told(InstanceIndexed)] == [second.reference.key] * 2


async def test_a_version_that_counts_again_is_read_again(room: Room) -> None:
    """Known: from another study (current), then a third that was refused. The first of all comes last."""
    elsewhere = await room.store(SOPInstanceUID="1.2.9", StudyInstanceUID="1.2.8", SeriesInstanceUID="1.2.7", minute=2)
    third = await room.store(SOPInstanceUID="1.2.9", minute=3, ImageComments="third")
    first = await room.store(SOPInstanceUID="1.2.9", minute=1, ImageComments="first")
    for event in (elsewhere, third, first):
        await room.take(event)
    (instance,) = (await room.documents("instances")).values()
    assert instance["json"]["00204000"]["Value"] == ["third"]
    assert list(await room.documents("studies")) == [first.study_instance_uid]
    assert list(await room.documents("series")) == [first.series_instance_uid]


async def test_stable_is_told_once_and_a_late_instance_opens_it_again(room: Room) -> None:
    first, late = await room.store(InstanceNumber=1), await room.store(InstanceNumber=2)
    await room.take(first)
    waiting = IndexingSettings(quiet_seconds=3600)
    assert await announce_quiet_studies(index=room.index, bus=room.bus, settings=waiting) == 0

    async def everybody() -> int:
        replicas = (announce_quiet_studies(index=MongoIndex(room.database), bus=room.bus, settings=QUIET_AT_ONCE),) * 1
        return sum(await asyncio.gather(*replicas, *(_announce(room) for _ in range(5))))

    assert await everybody() == 1
    assert await everybody() == 0
    await room.take(late)
    await room.take(late)
    assert await everybody() == 1
    stable, changed = room.told(StudyStable), room.told(StudyChanged)
    assert [(event.revision, event.instance_count) for event in stable] == [(1, 1), (2, 2)]
    assert [(event.revision, event.instance_count) for event in changed] == [(1, 2)]
    assert len({event.id for event in stable}) == 2


async def _announce(room: Room) -> int:
    return await announce_quiet_studies(index=MongoIndex(room.database), bus=room.bus, settings=QUIET_AT_ONCE)


async def test_an_announcement_that_died_halfway_is_told_under_the_same_id(room: Room) -> None:
    await room.take(await room.store())
    room.bus.broker.away = True
    short = IndexingSettings(quiet_seconds=0, lease_seconds=0.05)
    with pytest.raises(Unavailable):
        await announce_quiet_studies(index=room.index, bus=room.bus, settings=short)
    room.bus.broker.away = False
    deadline = asyncio.get_running_loop().time() + 10
    while not await announce_quiet_studies(index=room.index, bus=room.bus, settings=short):
        assert asyncio.get_running_loop().time() < deadline
        await asyncio.sleep(0.02)
    assert [event.revision for event in room.told(StudyStable)] == [1]


async def test_an_instance_that_arrives_while_its_study_is_announced_is_not_lost(room: Room) -> None:
    await room.take(await room.store(InstanceNumber=1))
    study = await room.index.claim_quiet_study(timedelta(0), timedelta(seconds=30), "token")
    assert study is not None
    await room.take(await room.store(InstanceNumber=2))
    after = await room.index.announced(study, "token")
    assert after is not None and after["stable"] is False and after["change_untold"] is True
    assert [one["_id"] for one in await room.index.untold_changes(timedelta(0))] == [study["_id"]]
    assert await room.index.announced(study, "token") is None


async def test_a_rebuild_gives_the_same_index(room: Room) -> None:
    """Dropped and made again, with versions, refusals, sites and two interrupted attempts, all is as it was."""
    events = [
        await room.store(InstanceNumber=n, AccessionNumber=str(n % 3), PatientID=f"P{n % 2}", site=site, minute=n)
        for n, site in enumerate(("MAIN", "NORTH", "MAIN", "SOUTH", "MAIN", "MAIN"))
    ]
    events.append(await room.store(InstanceNumber=0, AccessionNumber="0", PatientID="P0", minute=9, ImageComments="2"))
    events.append(await room.store(InstanceNumber=0, AccessionNumber="0", PatientID="P0", minute=12))
    events.append(
        await room.store(
            InstanceNumber=1, AccessionNumber="1", PatientID="P1", minute=9, on_conflict="keep", PatientSex="O"
        )
    )
    for event in events:
        await room.take(event)
    await _announce(room)
    before = {name: await room.documents(name) for name in ("patients", "studies", "series", "instances")}
    told = len(room.bus.published)

    class Interrupted(Exception): ...

    def interrupt(_done: int) -> None:
        raise Interrupted

    for _ in range(2):
        with pytest.raises(Interrupted):
            await rebuild_index(objects=room.objects, index=room.index, reading=reading(), progress=interrupt)
    progress: list[int] = []
    count = await rebuild_index(objects=room.objects, index=room.index, reading=reading(), progress=progress.append)
    assert count == progress[-1] == len(events) - 1  # one object was stored twice
    after = {name: await room.documents(name) for name in before}
    volatile = {"created_at", "updated_at", "changes"}
    for name, documents in before.items():
        assert after[name].keys() == documents.keys()
        for identity, document in documents.items():
            rebuilt = after[name][identity]
            for key in document.keys() - volatile:
                assert rebuilt[key] == document[key], (name, key)
    assert len(room.bus.published) == told
    assert await _announce(room) == 0


async def test_a_rebuild_without_any_index_keeps_the_order_of_versions_and_finds_damage(room: Room) -> None:
    first, second = stored(ImageComments="a"), stored(ImageComments="b", minute=1)
    for event, content in (first, second):
        before = datetime.now(UTC)
        await room.objects.put(event.reference.key, content)
        while datetime.now(UTC) - before < timedelta(milliseconds=5):
            await asyncio.sleep(0.001)
    damaged, content = stored(InstanceNumber=2)
    await room.objects.put(damaged.reference.key, content[:-1] + b"\x01")
    assert await rebuild_index(objects=room.objects, index=room.index, reading=reading()) == 3
    (instance,) = (await room.documents("instances")).values()
    assert instance["reference"] == second[0].reference.model_dump()
    assert [version["source"] for version in instance["versions"]] == ["rebuild", "rebuild"]
    assert len(await room.documents("quarantine")) == 1


async def test_the_questions_of_queries_use_an_index(room: Room) -> None:
    await room.take(await room.store())
    for collection, question in (
        ("studies", {"patient_id": "P1"}),
        ("studies", {"names.00100010": {"$regex": "^doe"}}),
        ("studies", {"json.00080050.Value": "A1"}),
        ("studies", {"json.00080020.Value": {"$gte": "20240101", "$lte": "20241231"}}),
        ("studies", {"modalities": "CT"}),
        ("series", {"study_instance_uid": "1"}),
        ("instances", {"series_instance_uid": "1"}),
        ("instances", {"study_instance_uid": "1"}),
        ("patients", {"issuer": "HOSPITAL", "patient_id": "P1"}),
    ):
        plan = await room.database[collection].find(question).explain()
        assert "COLLSCAN" not in str(plan["queryPlanner"]["winningPlan"]), (collection, question)


async def test_the_service_hears_a_stored_instance_and_its_study_becomes_stable(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAGITTAL_INDEXING_QUIET_SECONDS", "0")
    service = build(Resources(Settings(), room.database, room.objects, room.bus))
    assert service.start is not None
    await service.start()
    for subscription in service.subscriptions:
        await room.bus.subscribe(subscription)
    await room.bus.publish(await room.store(site=""))
    deadline = asyncio.get_running_loop().time() + 20
    while not room.told(InstanceIndexed):
        assert asyncio.get_running_loop().time() < deadline
        await asyncio.sleep(0.02)
    for job in service.jobs:
        await job.run()
    await room.bus.stop()
    assert [event.instance_count for event in room.told(StudyStable)] == [1]
    assert list(await room.documents("patients")) == ["MAIN|P1"]
    assert await rebuild(Resources(Settings(), room.database, room.objects, room.bus)) == 1
