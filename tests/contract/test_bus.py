"""One promise, three adapters: everything ``libs/common/bus/port.py`` says, asked of each of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from libs.common.bus import Retry
from libs.common.errors import Invalid, NotFound, Unavailable
from tests.contract.bus_stage import EmbeddedStage, Heard, MemoryStage, RabbitStage, Stage, Ticked, Tocked, until


@pytest.fixture(params=["memory", "embedded", "rabbitmq"])
async def stage(request: pytest.FixtureRequest) -> AsyncIterator[Stage]:
    made: Stage
    if request.param == "memory":
        made = MemoryStage()
    elif request.param == "embedded":
        made = EmbeddedStage(request.getfixturevalue("mongod"))
    else:
        made = RabbitStage(request.getfixturevalue("rabbitmq"))
    yield made
    await made.end()


def ticks(*numbers: int) -> list[Ticked]:
    return [Ticked(number=number) for number in numbers]


async def test_order_of_one_publisher(stage: Stage) -> None:
    bus, heard = await stage.open(), Heard()
    await bus.subscribe(stage.subscription(heard))
    for start in range(0, 100, 10):
        await bus.publish(*ticks(*range(start, start + 10)))
    await until(lambda: len(heard.numbers) == 100)
    assert heard.numbers == list(range(100))
    assert all(len(batch) == 1 for batch in heard.batches)


async def test_order_of_a_backlog_then_live(stage: Stage) -> None:
    bus, heard = await stage.open(), Heard()
    await bus.declare(stage.subscription(heard))
    await bus.publish(*ticks(*range(300)))
    await bus.subscribe(stage.subscription(heard, max_items=20))
    for number in range(300, 350):
        await bus.publish(Ticked(number=number))
    await until(lambda: len(heard.numbers) >= 350)
    assert heard.numbers == list(range(350))


async def test_event_arrives_whole(stage: Stage) -> None:
    bus = await stage.open()
    got: list[Any] = []

    async def keep(events: list[Any]) -> None:
        got.extend(events)

    await bus.subscribe(stage.subscription(keep))
    sent = Ticked(number=7, site="MAIN", correlation_id="c", traceparent="00-1-2-01")
    await bus.publish(sent)
    await until(lambda: got)
    assert got == [sent]


async def test_only_bound_events_are_heard_and_an_unheard_one_is_no_error(stage: Stage) -> None:
    bus, heard = await stage.open(), Heard()
    await bus.subscribe(stage.subscription(heard))
    await bus.publish(Tocked(number=1), Ticked(number=2))
    await until(lambda: heard.numbers)
    assert heard.numbers == [2]


async def test_each_queue_gets_every_event(stage: Stage) -> None:
    bus, one, two = await stage.open(), Heard(), Heard()
    await bus.subscribe(stage.subscription(one))
    await bus.subscribe(stage.subscription(two, "p"))
    await bus.publish(*ticks(1, 2, 3))
    await until(lambda: one.numbers == two.numbers == [1, 2, 3])


async def test_declared_queue_keeps_events_across_restart(stage: Stage) -> None:
    first, heard = await stage.open(), Heard()
    await first.declare(stage.subscription(heard))
    await first.publish(*ticks(1, 2, 3))
    await stage.close(first)
    second = await stage.open()
    await second.declare(stage.subscription(heard))
    assert [(s.ready, s.in_flight, s.delayed, s.dead) for s in await second.queues()] == [(3, 0, 0, 0)]
    await second.subscribe(stage.subscription(heard))
    await until(lambda: heard.numbers == [1, 2, 3])


async def test_queue_declared_by_another_process_misses_nothing(stage: Stage) -> None:
    publisher, consumer, heard = await stage.open(), await stage.open(), Heard()
    await publisher.publish(Ticked(number=0))
    await consumer.subscribe(stage.subscription(heard))
    await publisher.publish(*ticks(1, 2))
    await until(lambda: heard.numbers == [1, 2])


async def test_full_batch_is_handed_over_at_once(stage: Stage) -> None:
    bus, heard = await stage.open(), Heard()
    await bus.subscribe(stage.subscription(heard, max_items=10, max_wait=30.0))
    await bus.publish(*ticks(*range(20)))
    await until(lambda: len(heard.numbers) == 20)
    assert [len(batch) for batch in heard.batches] == [10, 10]


async def test_incomplete_batch_is_handed_over_after_max_wait(stage: Stage) -> None:
    bus, heard = await stage.open(), Heard()
    await bus.subscribe(stage.subscription(heard, max_items=10, max_wait=0.3))
    await bus.publish(Ticked(number=1))
    await bus.publish(Ticked(number=2))
    await until(lambda: heard.batches)
    assert heard.batches == [[1, 2]]


async def test_retry_schedule_without_blocking_those_behind(stage: Stage) -> None:
    bus, heard = await stage.open(), Heard(lambda events: Unavailable("away") if events[0].number == 1 else None)
    await bus.subscribe(stage.subscription(heard, retry=Retry(attempts=3, first=0.3, factor=2.0)))
    await bus.publish(*ticks(1, 2, 3))
    await until(lambda: heard.numbers == [1, 2, 3])
    await until(lambda: heard.numbers == [1, 2, 3, 1, 1])
    first, second, third = (time for time, number in zip(heard.times, heard.numbers, strict=True) if number == 1)
    assert second - first >= 0.28
    assert third - second >= 0.58

    async def dead() -> bool:
        return len(await bus.dead_letters(f"{stage.service}.q")) == 1

    await until(dead)
    letter = (await bus.dead_letters())[0]
    assert letter.attempts == 3
    assert letter.reason.startswith("Unavailable: away")


async def test_retried_event_succeeds_and_is_gone(stage: Stage) -> None:
    failures = [Unavailable("away"), RuntimeError("a defect")]
    bus, heard = await stage.open(), Heard(lambda events: failures.pop() if failures else None)
    await bus.subscribe(stage.subscription(heard))
    await bus.publish(Ticked(number=5))
    await until(lambda: heard.numbers == [5, 5, 5])

    async def empty() -> bool:
        return all((s.ready, s.in_flight, s.delayed, s.dead) == (0, 0, 0, 0) for s in await bus.queues())

    await until(empty)


async def test_delayed_events_are_counted_and_survive_a_restart(stage: Stage) -> None:
    bus, heard = await stage.open(), Heard(lambda events: Unavailable("away"))
    slow = Retry(attempts=2, first=1.5)
    await bus.subscribe(stage.subscription(heard, retry=slow))
    await bus.publish(Ticked(number=1))

    async def delayed() -> bool:
        return (await bus.queues())[0].delayed == 1

    await until(delayed)
    await stage.close(bus)
    again, calm = await stage.open(), Heard()
    await again.subscribe(stage.subscription(calm, retry=slow))
    await until(lambda: calm.numbers == [1])


@pytest.mark.parametrize("error", [Invalid("no UID"), NotFound("no such study")])
async def test_hopeless_event_is_dead_at_once(stage: Stage, error: Exception) -> None:
    bus, heard = await stage.open(), Heard(lambda events: error)
    await bus.subscribe(stage.subscription(heard))
    await bus.publish(Ticked(number=1))

    async def dead() -> bool:
        return len(await bus.dead_letters(f"{stage.service}.q")) == 1

    await until(dead)
    letter = (await bus.dead_letters(f"{stage.service}.q"))[0]
    assert heard.numbers == [1]
    assert (letter.queue, letter.event_key, letter.attempts) == (f"{stage.service}.q", Ticked.key, 1)
    assert str(error) in letter.reason
    assert letter.document["data"] == {"number": 1}


async def test_unexpected_error_tells_its_place_but_not_its_text(stage: Stage) -> None:
    bus, heard = await stage.open(), Heard(lambda events: ValueError("DOE^JANE"))
    await bus.subscribe(stage.subscription(heard, retry=Retry(attempts=1)))
    await bus.publish(Ticked(number=1))

    async def dead() -> bool:
        return len(await bus.dead_letters(f"{stage.service}.q")) == 1

    await until(dead)
    reason = (await bus.dead_letters(f"{stage.service}.q"))[0].reason
    assert reason.startswith("ValueError at bus_stage.py:")
    assert "DOE" not in reason


async def test_poison_event_does_not_condemn_its_batch(stage: Stage) -> None:
    def poison(events: list[Any]) -> Exception | None:
        return Invalid("poison") if any(event.number == 3 for event in events) else None

    bus, heard = await stage.open(), Heard(poison)
    await bus.subscribe(stage.subscription(heard, max_items=6, max_wait=10.0))
    await bus.publish(*ticks(*range(6)))

    async def dead() -> bool:
        return len(await bus.dead_letters(f"{stage.service}.q")) == 1

    await until(dead)
    assert heard.batches == [[0, 1, 2, 3, 4, 5], [0], [1], [2], [3], [4], [5]]
    status = (await bus.queues())[0]
    assert (status.ready, status.delayed, status.dead) == (0, 0, 1)


async def test_bytes_that_are_no_event_are_dead_at_once_and_can_be_shown(stage: Stage) -> None:
    bus, heard = await stage.open(), Heard()
    queue = f"{stage.service}.q"
    await bus.subscribe(stage.subscription(heard, max_items=3, max_wait=0.05))
    await stage.inject(queue, b"\xffnot json")
    await stage.inject(queue, b'{"type": "from.the.future.v9", "data": {}}')
    await bus.publish(Ticked(number=1))

    async def dead() -> bool:
        return len(await bus.dead_letters(queue)) == 2 and heard.numbers == [1]

    await until(dead)
    letters = await bus.dead_letters(queue)
    assert {str(letter.document) for letter in letters} == {
        "\ufffdnot json",
        "{'type': 'from.the.future.v9', 'data': {}}",
    }
    assert all(letter.reason.startswith("Invalid: ") for letter in letters)


async def test_dead_letters_are_listed_oldest_first_and_stay(stage: Stage) -> None:
    bus, heard = await stage.open(), Heard(lambda events: Invalid("no"))
    queue = f"{stage.service}.q"
    await bus.subscribe(stage.subscription(heard))
    for number in range(3):
        await bus.publish(Ticked(number=number))

    async def three() -> bool:
        return (await bus.queues())[0].dead == 3

    await until(three)
    for _ in range(3):
        assert [letter.document["data"]["number"] for letter in await bus.dead_letters(queue)] == [0, 1, 2]
        assert len(await bus.dead_letters(queue, limit=2)) == 2
    both = await asyncio.gather(bus.dead_letters(queue), bus.dead_letters(queue))
    assert [len(letters) for letters in both] == [3, 3]
    other = await stage.open()
    await other.declare(stage.subscription(heard))
    both = await asyncio.gather(bus.dead_letters(queue), other.dead_letters(queue))
    assert [len(letters) for letters in both] == [3, 3]
    assert await bus.dead_letters("no.such") == []


async def test_dead_letter_is_replayed_with_fresh_attempts_to_its_own_queue(stage: Stage) -> None:
    broken = [True]
    bus, heard, other = await stage.open(), Heard(lambda events: Invalid("no") if broken else None), Heard()
    queue = f"{stage.service}.q"
    await bus.subscribe(stage.subscription(heard))
    await bus.subscribe(stage.subscription(other, "p"))
    await bus.publish(*ticks(1, 2))

    async def dead(number: int) -> bool:
        return len(await bus.dead_letters(queue)) == number

    await until(lambda: dead(2))
    first, second = await bus.dead_letters(queue)
    broken.clear()
    assert await bus.replay(first.id)
    await until(lambda: heard.numbers == [1, 2, 1])
    assert [letter.id for letter in await bus.dead_letters(queue)] == [second.id]
    assert await bus.discard(second.id)
    assert await dead(0)
    assert not await bus.replay(first.id)
    assert not await bus.discard(second.id)
    assert not await bus.replay("nonsense")
    assert not await bus.discard("nonsense")
    assert other.numbers == [1, 2]


async def test_slow_consumer_holds_no_more_than_its_prefetch(stage: Stage) -> None:
    bus, go = await stage.open(), asyncio.Event()
    heard: list[int] = []

    async def slow(events: list[Any]) -> None:
        await go.wait()
        heard.extend(event.number for event in events)

    await bus.subscribe(stage.subscription(slow, prefetch=5, max_items=2))
    await bus.publish(*ticks(*range(20)))

    async def full() -> bool:
        status = (await bus.queues())[0]
        assert status.in_flight <= 5
        return (status.ready, status.in_flight) == (15, 5)

    await until(full)
    go.set()
    await until(lambda: len(heard) == 20)
    assert heard == list(range(20))


async def test_concurrency(stage: Stage) -> None:
    bus = await stage.open()
    inside, most = 0, 0

    async def handler(events: list[Any]) -> None:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        await asyncio.sleep(0.05)
        inside -= 1

    await bus.subscribe(stage.subscription(handler, concurrency=3))
    await bus.publish(*ticks(*range(9)))
    await until(lambda: most == 3)


async def test_replicas_share_a_queue(stage: Stage) -> None:
    heard: tuple[Heard, Heard] = (Heard(), Heard())
    for each in heard:
        bus = await stage.open()

        async def handler(events: list[Any], each: Heard = each) -> None:
            await each(events)
            await asyncio.sleep(0.005)

        await bus.subscribe(stage.subscription(handler, prefetch=4))
    publisher = await stage.open()
    await publisher.publish(*ticks(*range(60)))
    await until(lambda: len(heard[0].numbers) + len(heard[1].numbers) >= 60)
    assert sorted(heard[0].numbers + heard[1].numbers) == list(range(60))
    assert heard[0].numbers
    assert heard[1].numbers


async def test_stop_finishes_what_is_in_hand_and_gives_back_the_rest(stage: Stage) -> None:
    bus, entered, go = await stage.open(), asyncio.Event(), asyncio.Event()
    done: list[int] = []

    async def handler(events: list[Any]) -> None:
        entered.set()
        await go.wait()
        await bus.publish(Tocked(number=1))  # a handler in hand may still publish
        done.extend(event.number for event in events)

    await bus.subscribe(stage.subscription(handler))
    await bus.publish(*ticks(1, 2, 3))
    await entered.wait()
    stopping = asyncio.create_task(stage.close(bus))
    await asyncio.sleep(0.05)
    assert not stopping.done()
    go.set()
    await stopping
    assert done == [1]
    again, heard = await stage.open(), Heard()
    await again.subscribe(stage.subscription(heard))
    await until(lambda: heard.numbers == [2, 3])


async def test_many_publishers_at_once(stage: Stage) -> None:
    bus, heard = await stage.open(), Heard()
    await bus.subscribe(stage.subscription(heard, max_items=50, prefetch=200))

    async def publish(start: int) -> None:
        for number in range(start, start + 25):
            await bus.publish(Ticked(number=number))

    await asyncio.gather(*(publish(start) for start in range(0, 400, 25)))
    await until(lambda: len(heard.numbers) >= 400)
    assert sorted(heard.numbers) == list(range(400))
    assert await bus.healthy()
