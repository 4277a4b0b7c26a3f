"""Processes are killed and servers are stopped in the middle: nothing published is missing afterwards."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from motor.motor_asyncio import AsyncIOMotorClient, AsyncIOMotorDatabase

from libs.common.bus import Bus, EmbeddedBus, MemoryBroker, MemoryBus, OutboxBus, RabbitBus
from libs.common.errors import Unavailable
from tests.contract.bus_stage import EmbeddedStage, Heard, RabbitStage, Server, Stage, Ticked, until

ROOT = Path(__file__).parents[2]


@pytest.fixture(params=["embedded", "rabbitmq"])
async def stage(request: pytest.FixtureRequest) -> AsyncIterator[EmbeddedStage | RabbitStage]:
    made: EmbeddedStage | RabbitStage
    if request.param == "embedded":
        made = EmbeddedStage(request.getfixturevalue("private_mongod"))
    else:
        made = RabbitStage(request.getfixturevalue("private_rabbitmq"))
    yield made
    await made.end()


async def test_events_of_a_killed_process_are_taken_over(stage: EmbeddedStage | RabbitStage) -> None:
    adapter = "embedded" if isinstance(stage, EmbeddedStage) else "rabbitmq"
    publisher, heard = await stage.open(), Heard()
    await publisher.declare(stage.subscription(heard))
    await publisher.publish(*[Ticked(number=number) for number in range(10)])
    victim = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.contract.bus_victim",
        adapter,
        stage.server.url,
        stage.service,
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
    )
    assert victim.stdout is not None
    taken = [int(await victim.stdout.readline()) for _ in range(3)]
    assert taken == [0, 1, 2]
    await publisher.subscribe(stage.subscription(heard))
    await until(lambda: len(heard.numbers) >= 4)
    assert not {0, 1, 2, 3, 4, 5} & set(heard.numbers), "a live process's events were taken"
    victim.kill()
    await victim.wait()
    started = time.monotonic()
    await until(lambda: len(heard.numbers) >= 10)
    assert sorted(heard.numbers) == list(range(10))
    assert time.monotonic() - started < 10, "waited for the lease instead of noticing the death"


async def test_server_restart_in_the_middle(stage: EmbeddedStage | RabbitStage) -> None:
    bus, heard = await stage.open(), Heard()
    await bus.subscribe(stage.subscription(heard, max_items=5))
    confirmed: list[int] = []
    refused = 0
    going = True

    async def publish() -> None:
        nonlocal refused
        number = 0
        while going:
            try:
                await bus.publish(Ticked(number=number))
                confirmed.append(number)
            except Unavailable:
                refused += 1
                await asyncio.sleep(0.05)
            number += 1

    publishing = asyncio.create_task(publish())
    await until(lambda: len(confirmed) > 50)
    await asyncio.to_thread(stage.server.stop)
    if isinstance(stage, RabbitStage):
        await until(lambda: refused > 0)
    await asyncio.to_thread(stage.server.restart)
    before = len(confirmed)
    await until(lambda: len(confirmed) > before + 50, timeout=60)
    going = False
    await publishing
    await until(lambda: set(confirmed) <= set(heard.numbers), timeout=60)
    await until(bus.healthy)


async def test_queue_survives_a_server_restart(stage: EmbeddedStage | RabbitStage) -> None:
    bus, heard = await stage.open(), Heard()
    await bus.declare(stage.subscription(heard))
    await bus.publish(*[Ticked(number=number) for number in range(5)])
    await stage.close(bus)
    await asyncio.to_thread(stage.server.stop)
    await asyncio.to_thread(stage.server.restart)
    again = await stage.open()
    await again.subscribe(stage.subscription(heard))
    await until(lambda: heard.numbers == [0, 1, 2, 3, 4], timeout=60)


async def test_embedded_lease_is_renewed_while_a_handler_runs(mongod: Server) -> None:
    stage = EmbeddedStage(mongod)
    try:
        calls: list[int] = []

        async def slow(events: list[Any]) -> None:
            calls.append(events[0].number)
            await asyncio.sleep(1.5)

        one, two = EmbeddedBus(stage.database, lease=0.5), EmbeddedBus(stage.database, lease=0.5)
        for bus in (one, two):
            await bus.start()
            stage.buses.append(bus)
            await bus.subscribe(stage.subscription(slow))
        await one.publish(Ticked(number=1))

        async def empty() -> bool:
            status = (await one.queues())[0]
            return (status.ready, status.in_flight) == (0, 0)

        await until(empty)
        assert calls == [1]
    finally:
        await stage.end()


async def test_embedded_lease_of_a_silent_owner_ends(mongod: Server) -> None:
    stage = EmbeddedStage(mongod)
    try:
        heard = Heard()
        silent = EmbeddedBus(stage.database, lease=0.5)  # never started: nobody renews
        await silent.declare(stage.subscription(heard))
        await silent.publish(*[Ticked(number=number) for number in range(3)])
        assert len(await silent.journal.claim(f"{stage.service}.q", 3)) == 3
        bus = await stage.open()
        await bus.subscribe(stage.subscription(heard))
        await until(lambda: heard.numbers == [0, 1, 2], timeout=5)
    finally:
        await stage.end()


async def test_absent_servers_are_unavailable() -> None:
    rabbit = RabbitBus("amqp://guest:guest@127.0.0.1:1/", connect_timeout=0.5)
    with pytest.raises(Unavailable):
        await rabbit.start()
    with pytest.raises(Unavailable):
        await rabbit.publish(Ticked())
    assert not await rabbit.healthy()
    client: AsyncIOMotorClient[dict[str, Any]] = AsyncIOMotorClient(
        "mongodb://127.0.0.1:1/", serverSelectionTimeoutMS=200
    )
    embedded = EmbeddedBus(client["none"])
    with pytest.raises(Unavailable):
        await embedded.start()
    with pytest.raises(Unavailable):
        await embedded.publish(Ticked())
    assert not await embedded.healthy()
    client.close()


@pytest.fixture
async def outbox_stage(mongod: Server) -> AsyncIterator[EmbeddedStage]:
    """Only for its database."""
    stage = EmbeddedStage(mongod)
    yield stage
    await stage.end()


async def open_outbox(stage: Stage, inner: Bus, database: AsyncIOMotorDatabase[dict[str, Any]]) -> OutboxBus:
    bus = OutboxBus(inner, database, interval=0.05)
    await bus.start()
    stage.buses.append(bus)
    return bus


async def emptied(bus: OutboxBus) -> bool:
    return await bus.backlog() == 0


async def test_outbox_keeps_and_relays_in_order(outbox_stage: EmbeddedStage) -> None:
    stage, broker, heard = outbox_stage, MemoryBroker(), Heard()
    bus = await open_outbox(stage, MemoryBus(broker), stage.database)
    other = await open_outbox(stage, MemoryBus(broker), stage.database)
    await bus.subscribe(stage.subscription(heard))
    await bus.publish(Ticked(number=0))
    broker.away = True
    for number in range(1, 300):
        await bus.publish(Ticked(number=number))
    assert await other.backlog() == 299
    assert await bus.healthy()
    assert heard.numbers == [0]
    broker.away = False
    for number in range(300, 320):
        await bus.publish(Ticked(number=number))
    await until(lambda: len(heard.numbers) >= 320)
    assert heard.numbers == list(range(320)), "twice, missing, or out of order"
    await until(lambda: emptied(bus))
    await until(lambda: not bus.behind)
    await bus.publish(Ticked(number=320))
    assert await bus.backlog() == 0


async def test_outbox_is_relayed_by_the_next_process(outbox_stage: EmbeddedStage) -> None:
    stage, broker, heard = outbox_stage, MemoryBroker(), Heard()
    broker.away = True
    first = await open_outbox(stage, MemoryBus(broker), stage.database)
    await first.publish(Ticked(number=1))
    await stage.close(first)
    second = await open_outbox(stage, MemoryBus(broker), stage.database)
    await second.subscribe(stage.subscription(heard))
    broker.away = False
    await until(lambda: heard.numbers == [1])
    await until(lambda: emptied(second))


async def test_outbox_over_a_rabbitmq_that_stops(outbox_stage: EmbeddedStage, private_rabbitmq: Server) -> None:
    stage, heard = RabbitStage(private_rabbitmq), Heard()
    try:
        bus = await open_outbox(stage, RabbitBus(private_rabbitmq.url), outbox_stage.database)
        await bus.subscribe(stage.subscription(heard))
        await bus.publish(Ticked(number=0))
        await asyncio.to_thread(private_rabbitmq.stop)
        started = time.monotonic()
        for number in range(1, 20):
            await bus.publish(Ticked(number=number))
        assert time.monotonic() - started < 15
        assert await bus.backlog() >= 1
        await asyncio.to_thread(private_rabbitmq.restart)
        await until(lambda: set(heard.numbers) == set(range(20)), timeout=60)
        await until(lambda: emptied(bus))
    finally:
        await stage.end()
