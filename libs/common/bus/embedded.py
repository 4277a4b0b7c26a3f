"""The bus without a broker: a durable journal in MongoDB, shared by any number of processes."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import structlog
from pymongo.errors import PyMongoError

from libs.common.bus import metrics
from libs.common.bus.delivery import Consumer, Delivery, Verdict, encode
from libs.common.bus.journal import Journal, database_errors
from libs.common.bus.port import DeadLetter, QueueStatus, Subscription
from libs.common.errors import Unavailable
from libs.common.events import Event

if TYPE_CHECKING:
    from motor.motor_asyncio import AsyncIOMotorDatabase

log = structlog.get_logger(__name__)

_POLL_FIRST = 0.025  # seconds; other processes' events are found by polling
_POLL_CAP = 0.1
_CLAIM_ITEMS = 500
_MAINTENANCE = 2.0


class _Feed:
    """Moves one queue's entries from the journal to its consumer."""

    def __init__(self, subscription: Subscription, journal: Journal) -> None:
        self.queue = subscription.queue
        self.wake = asyncio.Event()
        self.consumer = Consumer(subscription, self._settle, self._room_grew)
        self.task: asyncio.Task[None] | None = None
        self._journal = journal
        # Entries this process may hand over from memory right after their commit, because nothing older waits.
        self._caught_up = False
        self._behind = 0  # counts commits that went to the journal only; a claim that overlaps one proves nothing
        self.stopping = False

    async def _settle(self, verdicts: Sequence[Verdict]) -> None:
        delay = 0.05
        while True:
            try:
                return await self._journal.settle(self.queue, verdicts)
            except PyMongoError as error:
                if self.stopping:
                    raise
                log.warning("bus.settle_retried", queue=self.queue, reason=type(error).__name__)
                await asyncio.sleep(delay)
                delay = min(2.0, delay * 2)

    def _room_grew(self) -> None:
        if not self._caught_up:  # else nothing is known to wait, and the poll finds what is not known
            self.wake.set()

    def take(self) -> bool:
        """Whether the next entry of a commit is handed over from memory; if so its room is reserved."""
        if self._caught_up and not self.stopping and self.consumer.room > 0:
            self.consumer.reserve(1)
            return True
        self._caught_up = False
        self._behind += 1
        return False

    def committed(self) -> None:
        """Entries that were not taken are in the journal now."""
        self._behind += 1
        self.wake.set()

    async def run(self) -> None:
        delay = 0.1
        while not self.stopping:
            wanted = min(self.consumer.room, _CLAIM_ITEMS)
            self.wake.clear()
            behind = self._behind
            got: list[Delivery] = []
            try:
                if wanted > 0:
                    got = await self._journal.claim(self.queue, wanted)
                delay = 0.1
            except PyMongoError as error:
                log.warning("bus.claim_failed", queue=self.queue, reason=type(error).__name__)
                await asyncio.sleep(delay)
                delay = min(2.0, delay * 2)
                continue
            for delivery in got:
                self.consumer.offer(delivery)
            if wanted > 0 and len(got) == wanted:
                self._caught_up = False
                continue
            if wanted > 0 and behind == self._behind:
                self._caught_up = True
            await self.wake.wait()


class EmbeddedBus:
    """A Bus over MongoDB.

    ``publish`` gathers concurrent calls into one journalled insert: while one commit is on its way the next is
    collected. ``lease`` and ``timeout`` are in seconds.
    """

    def __init__(
        self,
        database: AsyncIOMotorDatabase[dict[str, Any]],
        *,
        owner: str = "",
        lease: float = 30.0,
        timeout: float = 10.0,
    ) -> None:
        self.journal = Journal(database, name=owner, lease=lease)
        self._lease = lease
        self._timeout = timeout
        self._feeds: list[_Feed] = []
        self._pending: list[tuple[str, bytes, asyncio.Future[None]]] = []
        self._committer: asyncio.Task[None] | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        async with database_errors(self._timeout):
            await self.journal.prepare()
        self._tasks = [asyncio.create_task(self._poll()), asyncio.create_task(self._maintain())]

    async def publish(self, *events: Event) -> None:
        if not events:
            return
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        bodies = [(event.key, encode(event), done) for event in events]
        self._pending += bodies
        if self._committer is None or self._committer.done():
            self._committer = asyncio.create_task(self._commit())
        await done

    async def _commit(self) -> None:
        while self._pending:
            # Calls are never split: the events of one call become durable by one insert.
            batch, self._pending = self._pending, []
            error: Unavailable | None = None
            try:
                async with database_errors(self._timeout):
                    await self._write(batch)
            except Unavailable as unavailable:
                error = unavailable
            for done in {done for _, _, done in batch}:
                if not done.done():
                    if error is None:
                        done.set_result(None)
                    else:
                        done.set_exception(Unavailable(str(error)))

    async def _write(self, batch: list[tuple[str, bytes, asyncio.Future[None]]]) -> None:
        bindings = await self.journal.bindings()
        feeds: dict[str, list[_Feed]] = {}
        for feed in self._feeds:
            feeds.setdefault(feed.queue, []).append(feed)
        documents: list[dict[str, Any]] = []
        taken: list[tuple[_Feed, dict[str, Any]]] = []
        left: set[_Feed] = set()
        for key, body, _ in batch:
            queues = bindings.get(key, ())
            if not queues:
                metrics.UNHEARD.labels(key).inc()
            for queue in queues:
                own = feeds.get(queue, ())
                # With several local consumers of one queue the journal shares the work out; one takes it directly.
                direct = own[0] if len(own) == 1 and own[0].take() else None
                document = self.journal.entry(queue, key, body, mine=direct is not None)
                documents.append(document)
                if direct is not None:
                    taken.append((direct, document))
                else:
                    left.update(own)
        try:
            if documents:
                await self.journal.insert(documents)
        finally:
            for feed, _ in taken:
                feed.consumer.reserve(-1)
            for feed in left:
                feed.committed()
        for feed, document in taken:
            feed.consumer.offer(self.journal.delivery(document))
        for key, _, _ in batch:
            metrics.PUBLISHED.labels(key).inc()

    async def declare(self, subscription: Subscription) -> None:
        async with database_errors(self._timeout):
            await self.journal.declare(subscription.queue, {event.key for event in subscription.events})

    async def subscribe(self, subscription: Subscription) -> None:
        await self.declare(subscription)
        feed = _Feed(subscription, self.journal)
        feed.consumer.start()
        feed.task = asyncio.create_task(feed.run())
        self._feeds.append(feed)

    async def _poll(self) -> None:
        """Find what other processes published and what has become due again, with one query for all queues."""
        delay = _POLL_FIRST
        while True:
            await asyncio.sleep(delay)
            asking = {f.queue: f for f in self._feeds if f.consumer.room > 0 and not f.wake.is_set()}
            try:
                due = await self.journal.due(list(asking))
            except PyMongoError:
                delay = 1.0
                continue
            for feed in self._feeds:
                if feed.queue in due:
                    feed.wake.set()
            delay = _POLL_FIRST if due else min(_POLL_CAP, delay * 1.5)

    async def _maintain(self) -> None:
        """Lengthen our leases, and take over from processes that died."""
        since = 0.0
        period = min(_MAINTENANCE, self._lease / 3)
        while True:
            await asyncio.sleep(period)
            since += period
            try:
                if since >= self._lease / 3:
                    since = 0.0
                    await self.journal.heartbeat()
                    for feed in self._feeds:
                        await self.journal.renew(feed.consumer.held)
                if freed := await self.journal.reclaim():
                    log.info("bus.reclaimed", events=freed)
            except PyMongoError as error:
                log.warning("bus.maintenance_failed", reason=type(error).__name__)

    async def stop(self) -> None:
        for feed in self._feeds:
            feed.stopping = True
            feed.wake.set()
        if self._committer is not None:
            await self._committer
        await asyncio.gather(*(feed.task for feed in self._feeds if feed.task is not None))
        untouched = await asyncio.gather(*(feed.consumer.stop() for feed in self._feeds))
        self._feeds.clear()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()
        try:
            async with database_errors(self._timeout):
                await self.journal.release([delivery for deliveries in untouched for delivery in deliveries])
                await self.journal.leave()
        except Unavailable:
            log.warning("bus.release_failed")  # the leases end by themselves

    async def healthy(self) -> bool:
        try:
            async with database_errors(2.0):
                await self.journal.bindings()
        except Unavailable:
            return False
        return True

    async def queues(self) -> Sequence[QueueStatus]:
        async with database_errors(self._timeout):
            return await self.journal.status()

    async def dead_letters(self, queue: str | None = None, limit: int = 100) -> Sequence[DeadLetter]:
        async with database_errors(self._timeout):
            return await self.journal.dead_letters(queue, limit)

    async def replay(self, dead_letter_id: str) -> bool:
        async with database_errors(self._timeout):
            queue = await self.journal.replay(dead_letter_id)
        for feed in self._feeds:
            if feed.queue == queue:
                feed.committed()
        return queue is not None

    async def discard(self, dead_letter_id: str) -> bool:
        async with database_errors(self._timeout):
            return await self.journal.discard(dead_letter_id)
