"""What lets a service keep accepting while the broker is away: events wait in MongoDB and are relayed later."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any

import structlog
from pymongo import ReturnDocument, WriteConcern
from pymongo.errors import DuplicateKeyError, PyMongoError

from libs.common.bus import metrics
from libs.common.bus.delivery import decode, encode
from libs.common.bus.journal import database_errors
from libs.common.bus.port import Bus, DeadLetter, QueueStatus, Subscription
from libs.common.errors import Invalid, Unavailable
from libs.common.events import Event

if TYPE_CHECKING:
    from motor.motor_asyncio import AsyncIOMotorDatabase

log = structlog.get_logger(__name__)

_DURABLE = WriteConcern(w="majority", j=True)
_RELAY_ITEMS = 200


class OutboxBus:
    """A Bus around another one. ``publish`` succeeds when either the broker or the database has the events.

    One process at a time relays (by lease), oldest first, and deletes what the broker has confirmed; a process killed
    between the two repeats at most one batch. While events of this process wait in the outbox its new ones queue up
    behind them, so their order holds. ``lease``, ``interval`` and ``timeout`` are in seconds.
    """

    def __init__(
        self,
        inner: Bus,
        database: AsyncIOMotorDatabase[dict[str, Any]],
        *,
        lease: float = 30.0,
        interval: float = 0.5,
        timeout: float = 10.0,
    ) -> None:
        self._inner = inner
        self._outbox = database.get_collection("outbox", write_concern=_DURABLE)
        self._leases = database.get_collection("bus_leases", write_concern=_DURABLE)
        self._owner = uuid.uuid4().hex
        self._lease = lease
        self._interval = interval
        self._timeout = timeout
        self._last = 0
        self._storing = 0
        self._kept = 0
        self.behind = False
        """Whether events of this process wait in the outbox, so that new ones must wait behind them."""
        self._started = False
        self._waiting: list[Subscription] = []
        self._declaring: list[Subscription] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._wake = asyncio.Event()

    async def start(self) -> None:
        """Never raises for an absent broker: it is tried again in the background."""
        try:
            await self._inner.start()
            self._started = True
        except Unavailable as error:
            log.warning("bus.outbox_only", reason=str(error))
            self._tasks.append(asyncio.create_task(self._start_later()))
        self._tasks.append(asyncio.create_task(self._relay()))

    async def _start_later(self) -> None:
        while not self._started:
            await asyncio.sleep(self._interval)
            try:
                await self._inner.start()
            except Unavailable:
                continue
            declaring, self._declaring = self._declaring, []
            for subscription in declaring:
                await self._later(self._inner.declare, subscription)
            self._started = True
            waiting, self._waiting = self._waiting, []
            for subscription in waiting:
                await self._later(self._inner.subscribe, subscription)
            log.info("bus.broker_found")

    async def _later(self, action: Callable[[Subscription], Awaitable[None]], subscription: Subscription) -> None:
        while True:
            try:
                await action(subscription)
                return
            except Unavailable:
                await asyncio.sleep(self._interval)

    async def publish(self, *events: Event) -> None:
        if self._started and not self.behind:
            try:
                await self._inner.publish(*events)
                return
            except Unavailable as error:
                log.warning("bus.outbox_used", events=len(events), reason=str(error))
        await self._keep(events)

    async def _keep(self, events: Sequence[Event]) -> None:
        if not events:
            return
        self.behind = True
        self._storing += 1
        self._kept += 1
        try:
            documents = []
            for event in events:
                self._last = max(self._last + 1, time.time_ns())
                key = f"{self._last:020d}/{self._owner}"
                documents.append({"_id": key, "owner": self._owner, "body": encode(event)})
            async with database_errors(self._timeout):
                await self._outbox.insert_many(documents, ordered=True)
        finally:
            self._storing -= 1
        for event in events:
            metrics.OUTBOX.labels(event.key).inc()

    async def backlog(self) -> int:
        """Events that wait in the outbox, of all processes. Raises Unavailable when the database is away."""
        async with database_errors(self._timeout):
            return await self._outbox.count_documents({})

    async def _relay(self) -> None:
        while True:
            moved = 0
            try:
                if self._started and await self._inner.healthy():
                    if await self._outbox.find_one({}, {"_id": 1}) and await self._hold_lease():
                        moved = await self._move()
                    await self._catch_up()
            except (Unavailable, PyMongoError) as error:
                log.warning("bus.relay_failed", reason=str(error) if isinstance(error, Unavailable) else "database")
            if moved == 0:
                await asyncio.sleep(self._interval)

    async def _catch_up(self) -> None:
        """Publish directly again once everything this process kept has gone out."""
        if self.behind and not self._storing:
            kept = self._kept
            mine = await self._outbox.find_one({"owner": self._owner}, {"_id": 1})
            if mine is None and kept == self._kept:
                self.behind = False

    async def _hold_lease(self) -> bool:
        now = time.time()
        try:
            held = await self._leases.find_one_and_update(
                {"_id": "outbox", "$or": [{"owner": self._owner}, {"until": {"$lt": now}}]},
                {"$set": {"owner": self._owner, "until": now + self._lease}},
                upsert=True,
                return_document=ReturnDocument.AFTER,
            )
        except DuplicateKeyError:
            return False  # another process relays
        return bool(held["owner"] == self._owner)

    async def _move(self) -> int:
        documents = await self._outbox.find({}).sort("_id", 1).limit(_RELAY_ITEMS).to_list(_RELAY_ITEMS)
        events: list[Event] = []
        for document in documents:
            try:
                events.append(decode(document["body"]))
            except Invalid as error:
                # Written by a newer version of this program: leave it to a process that knows it.
                log.error("bus.outbox_unreadable", id=document["_id"], reason=str(error))
                documents = documents[: len(events)]
                break
        if not documents:
            return 0
        await self._inner.publish(*events)
        await self._outbox.delete_many({"_id": {"$in": [document["_id"] for document in documents]}})
        log.info("bus.outbox_relayed", events=len(documents))
        return len(documents)

    async def declare(self, subscription: Subscription) -> None:
        if self._started:
            await self._inner.declare(subscription)
        else:
            self._declaring.append(subscription)

    async def subscribe(self, subscription: Subscription) -> None:
        if self._started:
            await self._inner.subscribe(subscription)
        else:
            self._declaring.append(subscription)
            self._waiting.append(subscription)

    async def stop(self) -> None:
        started = self._started
        if started:
            await self._inner.stop()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()
        try:
            async with database_errors(2.0):
                await self._leases.delete_one({"_id": "outbox", "owner": self._owner})
        except Unavailable:
            log.warning("bus.lease_left")  # it ends by itself

    async def healthy(self) -> bool:
        """Whether a publish would work: by the broker, or else by the database."""
        if self._started and await self._inner.healthy():
            return True
        try:
            await self.backlog()
        except Unavailable:
            return False
        return True

    async def queues(self) -> Sequence[QueueStatus]:
        return await self._inner.queues()

    async def dead_letters(self, queue: str | None = None, limit: int = 100) -> Sequence[DeadLetter]:
        return await self._inner.dead_letters(queue, limit)

    async def replay(self, dead_letter_id: str) -> bool:
        return await self._inner.replay(dead_letter_id)

    async def discard(self, dead_letter_id: str) -> bool:
        return await self._inner.discard(dead_letter_id)
