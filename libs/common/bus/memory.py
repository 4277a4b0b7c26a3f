"""The bus for unit tests: the same promise, kept in a Python object instead of on disk."""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from libs.common.bus import metrics
from libs.common.bus.delivery import Consumer, Delivery, Outcome, Verdict, encode, readable
from libs.common.bus.port import DeadLetter, QueueStatus, Subscription
from libs.common.errors import Unavailable
from libs.common.events import Event


@dataclass
class _Queue:
    name: str
    keys: frozenset[str]
    ready: deque[Delivery] = field(default_factory=deque)
    in_flight: set[Delivery] = field(default_factory=set)
    delayed: set[Delivery] = field(default_factory=set)
    dead: dict[str, tuple[Delivery, DeadLetter]] = field(default_factory=dict)
    consumers: list[Consumer] = field(default_factory=list)

    def dispatch(self) -> None:
        """Hand ready events to the consumers that have room, one each in turn."""
        while self.ready and (free := [c for c in self.consumers if c.room > 0]):
            for consumer in free:
                if not self.ready:
                    break
                delivery = self.ready.popleft()
                self.in_flight.add(delivery)
                consumer.offer(delivery)


class MemoryBroker:
    """What outlives a MemoryBus object, as a broker or a database does; give it to the next one."""

    def __init__(self) -> None:
        self.queues: dict[str, _Queue] = {}
        self.ids = itertools.count(1)
        self.away = False
        """Set it to make every publish raise Unavailable."""

    def inject(self, queue: str, body: bytes, key: str = "unknown") -> None:
        """Put any bytes into a queue, for tests of what does not parse."""
        self.queues[queue].ready.append(Delivery(body, key))
        self.queues[queue].dispatch()


class MemoryBus:
    """A Bus over a MemoryBroker."""

    def __init__(self, broker: MemoryBroker | None = None) -> None:
        self.broker = broker or MemoryBroker()
        self.published: list[Event] = []
        """Everything this object published, for assertions."""
        self._consumers: list[tuple[_Queue, Consumer]] = []

    async def start(self) -> None:
        if self.broker.away:
            raise Unavailable("the memory broker is away")

    async def publish(self, *events: Event) -> None:
        if self.broker.away:
            raise Unavailable("the memory broker is away")
        for event in events:
            self.published.append(event)
            metrics.PUBLISHED.labels(event.key).inc()
            bound = [queue for queue in self.broker.queues.values() if event.key in queue.keys]
            if not bound:
                metrics.UNHEARD.labels(event.key).inc()
            for queue in bound:
                queue.ready.append(Delivery(encode(event), event.key))
                queue.dispatch()

    async def declare(self, subscription: Subscription) -> None:
        self._declare(subscription)

    def _declare(self, subscription: Subscription) -> _Queue:
        keys = frozenset(event.key for event in subscription.events)
        queue = self.broker.queues.setdefault(subscription.queue, _Queue(subscription.queue, keys))
        queue.keys = keys
        return queue

    async def subscribe(self, subscription: Subscription) -> None:
        queue = self._declare(subscription)

        async def settle(verdicts: Sequence[Verdict]) -> None:
            for verdict in verdicts:
                self._settle(queue, verdict)

        consumer = Consumer(subscription, settle, queue.dispatch)
        consumer.start()
        self._consumers.append((queue, consumer))
        queue.consumers.append(consumer)
        queue.dispatch()

    def _settle(self, queue: _Queue, verdict: Verdict) -> None:
        delivery = verdict.delivery
        queue.in_flight.discard(delivery)
        if verdict.outcome is Outcome.RETRY:
            delivery.attempt += 1
            queue.delayed.add(delivery)
            asyncio.get_running_loop().call_later(verdict.delay, self._due, queue, delivery)
        elif verdict.outcome is Outcome.DEAD:
            letter = DeadLetter(
                id=str(next(self.broker.ids)),
                queue=queue.name,
                event_key=delivery.key,
                reason=verdict.reason,
                attempts=delivery.attempt,
                failed_at=datetime.now(UTC),
                document=readable(delivery.body),
            )
            queue.dead[letter.id] = (delivery, letter)

    @staticmethod
    def _due(queue: _Queue, delivery: Delivery) -> None:
        queue.delayed.discard(delivery)
        queue.ready.append(delivery)
        queue.dispatch()

    async def stop(self) -> None:
        for queue, consumer in self._consumers:
            queue.consumers.remove(consumer)
            untouched = await consumer.stop()
            queue.in_flight.difference_update(untouched)
            queue.ready.extendleft(reversed(untouched))
            queue.dispatch()
        self._consumers.clear()

    async def healthy(self) -> bool:
        return not self.broker.away

    async def queues(self) -> Sequence[QueueStatus]:
        return [
            QueueStatus(q.name, len(q.ready), len(q.in_flight), len(q.delayed), len(q.dead))
            for q in self.broker.queues.values()
        ]

    async def dead_letters(self, queue: str | None = None, limit: int = 100) -> Sequence[DeadLetter]:
        letters = [
            letter
            for q in self.broker.queues.values()
            if queue is None or q.name == queue
            for _, letter in q.dead.values()
        ]
        return sorted(letters, key=lambda letter: letter.failed_at)[:limit]

    async def replay(self, dead_letter_id: str) -> bool:
        for queue in self.broker.queues.values():
            if found := queue.dead.pop(dead_letter_id, None):
                queue.ready.append(Delivery(found[0].body, found[0].key))
                queue.dispatch()
                return True
        return False

    async def discard(self, dead_letter_id: str) -> bool:
        return any(queue.dead.pop(dead_letter_id, None) is not None for queue in self.broker.queues.values())
