"""What the bus contract suite needs of each adapter beyond the promise itself: restart, kill, foreign bytes."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Any, ClassVar, Protocol

import aio_pika
from motor.motor_asyncio import AsyncIOMotorClient

from libs.common.bus import Bus, EmbeddedBus, MemoryBroker, MemoryBus, RabbitBus, Retry, Subscription
from libs.common.events import Event

QUICK = Retry(attempts=3, first=0.05, factor=2.0, cap=1.0)


class Ticked(Event):
    """An event for these tests only."""

    key: ClassVar[str] = "test.ticked.v1"

    number: int = 0


class Tocked(Event):
    """Another one, that most queues do not hear."""

    key: ClassVar[str] = "test.tocked.v1"

    number: int = 0


class Server(Protocol):
    """A real server of the test session."""

    url: str

    def restart(self) -> Any: ...

    def stop(self) -> Any: ...


async def until(condition: Callable[[], Any], timeout: float = 20.0) -> None:
    """Wait until ``condition()``, which may be a coroutine function, is true."""
    end = time.monotonic() + timeout
    while True:
        result = condition()
        if isinstance(result, Awaitable):
            result = await result
        if result:
            return
        assert time.monotonic() < end, "the condition did not come true in time"
        await asyncio.sleep(0.01)


class Heard:
    """A handler that remembers its batches, and fails as told by ``fail``."""

    def __init__(self, fail: Callable[[list[Any]], BaseException | None] = lambda events: None) -> None:
        self.batches: list[list[int]] = []
        self.times: list[float] = []
        self._fail = fail

    async def __call__(self, events: list[Any]) -> None:
        self.batches.append([event.number for event in events])
        self.times.append(time.monotonic())
        error = self._fail(events)
        if error is not None:
            raise error

    @property
    def numbers(self) -> list[int]:
        return [number for batch in self.batches for number in batch]


class Stage:
    """One adapter on its server, with queues of its own."""

    def __init__(self) -> None:
        self.service = f"t{uuid.uuid4().hex[:8]}"
        self.buses: list[Bus] = []

    def make(self) -> Bus:
        raise NotImplementedError

    async def inject(self, queue: str, body: bytes) -> None:
        raise NotImplementedError

    async def open(self) -> Bus:
        bus = self.make()
        await bus.start()
        self.buses.append(bus)
        return bus

    async def close(self, bus: Bus) -> None:
        self.buses.remove(bus)
        await bus.stop()

    def subscription(
        self, handler: Callable[[list[Any]], Awaitable[None]], name: str = "q", **more: Any
    ) -> Subscription:
        return Subscription(self.service, name, (Ticked,), handler, **({"retry": QUICK} | more))

    async def end(self) -> None:
        for bus in self.buses:
            await bus.stop()


class MemoryStage(Stage):
    def __init__(self) -> None:
        super().__init__()
        self.broker = MemoryBroker()

    def make(self) -> Bus:
        return MemoryBus(self.broker)

    async def inject(self, queue: str, body: bytes) -> None:
        self.broker.inject(queue, body)


class EmbeddedStage(Stage):
    def __init__(self, server: Server) -> None:
        super().__init__()
        self.server = server
        self.client: AsyncIOMotorClient[dict[str, Any]] = AsyncIOMotorClient(server.url)
        self.database = self.client[self.service]

    def make(self) -> EmbeddedBus:
        return EmbeddedBus(self.database)

    async def inject(self, queue: str, body: bytes) -> None:
        bus = self.make()
        await bus.journal.insert([bus.journal.entry(queue, "unknown", body, mine=False)])

    async def end(self) -> None:
        await super().end()
        await self.client.drop_database(self.service)
        self.client.close()


class RabbitStage(Stage):
    def __init__(self, server: Server) -> None:
        super().__init__()
        self.server = server

    def make(self) -> RabbitBus:
        return RabbitBus(self.server.url, owner=self.service)

    async def inject(self, queue: str, body: bytes) -> None:
        async with await aio_pika.connect(self.server.url) as connection:
            channel = await connection.channel()
            await channel.default_exchange.publish(aio_pika.Message(body), routing_key=queue)

    async def end(self) -> None:
        await super().end()
        async with await aio_pika.connect(self.server.url) as connection:
            channel = await connection.channel()
            for name in ("q", "p"):
                queue = f"{self.service}.{name}"
                waits = [f"{queue}.wait.{round(QUICK.delay(attempt) * 1000)}" for attempt in range(1, QUICK.attempts)]
                for each in (queue, f"{queue}.dead", *waits):
                    await channel.queue_delete(each)
