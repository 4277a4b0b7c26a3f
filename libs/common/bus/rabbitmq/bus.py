"""A Bus over RabbitMQ: connects, connects again, publishes, and owns the feeds."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress

import aio_pika
import structlog
from aio_pika.exceptions import CONNECTION_EXCEPTIONS, ChannelNotFoundEntity

from libs.common.bus import metrics
from libs.common.bus.delivery import encode
from libs.common.bus.port import DeadLetter, QueueStatus, Subscription
from libs.common.bus.rabbitmq import dead_letters
from libs.common.bus.rabbitmq.feed import Feed
from libs.common.bus.rabbitmq.link import EXCHANGE, Link, broker_errors, returned
from libs.common.errors import Unavailable
from libs.common.events import Event

log = structlog.get_logger(__name__)


class RabbitBus:
    """A Bus over RabbitMQ 3.10 or later. ``connect_timeout`` and ``publish_timeout`` are in seconds.

    ``queues`` and ``dead_letters`` know the subscriptions that this object declared or subscribed. ``ready`` counts
    what no process holds; ``in_flight`` counts what this process holds.
    """

    def __init__(
        self, url: str, *, owner: str = "sagittal", connect_timeout: float = 10.0, publish_timeout: float = 10.0
    ) -> None:
        self._url = url
        self._owner = owner
        self._connect_timeout = connect_timeout
        self._publish_timeout = publish_timeout
        self._link: Link | None = None
        self._connected = asyncio.Event()
        self._declared: dict[str, Subscription] = {}
        self._feeds: list[Feed] = []
        self._supervisor: asyncio.Task[None] | None = None
        self._topology = asyncio.Lock()
        self._browsing = asyncio.Lock()

    async def start(self) -> None:
        self._supervisor = asyncio.create_task(self._supervise())
        try:
            async with asyncio.timeout(self._connect_timeout):
                await self._connected.wait()
        except TimeoutError:
            await self._end_supervisor()
            raise Unavailable(f"RabbitMQ is not reachable within {self._connect_timeout} s") from None

    async def _supervise(self) -> None:
        delay = 0.1
        while True:
            link: Link | None = None
            try:
                async with self._topology, broker_errors(self._connect_timeout, "connect"):
                    link = await self._open()
                delay = 0.1
                self._link = link
                self._connected.set()
                await link.lost.wait()
                log.warning("bus.connection_lost")
            except Unavailable as error:
                log.warning("bus.connect_failed", reason=str(error))
            finally:
                self._link = None
                self._connected.clear()
                if link is not None:
                    await self._close(link)
            await asyncio.sleep(delay)
            delay = min(2.0, delay * 2)

    async def _open(self) -> Link:
        connection = await aio_pika.connect(
            self._url, timeout=self._connect_timeout, client_properties={"connection_name": self._owner}, heartbeat=15
        )
        try:
            channel = await connection.channel(publisher_confirms=True, on_return_raises=False)
            exchange = await channel.declare_exchange(EXCHANGE, aio_pika.ExchangeType.TOPIC, durable=True)
            link = Link(connection, channel, exchange, self._publish_timeout)
            for subscription in self._declared.values():
                await link.declare(subscription)
            for feed in self._feeds:
                await feed.open(link)
        except BaseException:
            with suppress(*CONNECTION_EXCEPTIONS):
                await connection.close()
            raise
        return link

    @staticmethod
    async def _close(link: Link) -> None:
        with suppress(*CONNECTION_EXCEPTIONS, TimeoutError):
            async with asyncio.timeout(5):
                await link.connection.close()

    def _require_link(self) -> Link:
        link = self._link
        if link is None or link.lost.is_set():
            raise Unavailable("RabbitMQ is away")
        return link

    async def publish(self, *events: Event) -> None:
        link = self._require_link()
        messages = [
            aio_pika.Message(
                encode(event),
                content_type="application/cloudevents+json",
                delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
                message_id=event.id,
                type=event.key,
            )
            for event in events
        ]
        async with broker_errors(self._publish_timeout, "publish"):
            # All are written in order on one channel; the confirms come when they come.
            answers = await asyncio.gather(
                *(
                    link.exchange.publish(message, routing_key=event.key, mandatory=True)
                    for event, message in zip(events, messages, strict=True)
                )
            )
        for event, answer in zip(events, answers, strict=True):
            metrics.PUBLISHED.labels(event.key).inc()
            if returned(answer):
                metrics.UNHEARD.labels(event.key).inc()
                log.debug("bus.unheard", event_key=event.key)

    async def declare(self, subscription: Subscription) -> None:
        # While the broker is away there is nothing to miss: a reconnect declares before anything can be published.
        async with self._topology:
            self._declared[subscription.queue] = subscription
            if self._link is not None:
                async with broker_errors(self._connect_timeout, "declare"):
                    await self._link.declare(subscription)

    async def subscribe(self, subscription: Subscription) -> None:
        await self.declare(subscription)
        feed = Feed(subscription, self._require_link)
        feed.consumer.start()
        async with self._topology:
            self._feeds.append(feed)
            if self._link is not None:
                async with broker_errors(self._connect_timeout, "subscribe"):
                    await feed.open(self._link)

    async def _end_supervisor(self) -> None:
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.gather(self._supervisor, return_exceptions=True)
            self._supervisor = None

    async def stop(self) -> None:
        await asyncio.gather(*(feed.stop() for feed in self._feeds))
        self._feeds.clear()
        await self._end_supervisor()

    async def healthy(self) -> bool:
        return self._link is not None and not self._link.lost.is_set()

    async def queues(self) -> Sequence[QueueStatus]:
        link = self._require_link()
        held: dict[str, int] = {}
        for feed in self._feeds:
            name = feed.subscription.queue
            held[name] = held.get(name, 0) + len(feed.consumer.held)
        return [await self._status(link, s, held.get(name, 0)) for name, s in sorted(self._declared.items())]

    async def _status(self, link: Link, subscription: Subscription, held: int) -> QueueStatus:
        retry = subscription.retry
        delays = {max(1, round(retry.delay(attempt) * 1000)) for attempt in range(1, retry.attempts)}
        names = [f"{subscription.queue}.wait.{delay}" for delay in sorted(delays)]
        ready, dead, *waiting = await asyncio.gather(
            *(self._count(link, name) for name in (subscription.queue, f"{subscription.queue}.dead", *names))
        )
        return QueueStatus(subscription.queue, ready, held, sum(waiting), dead)

    async def _count(self, link: Link, queue: str) -> int:
        """Messages in a queue that nobody holds; 0 when the queue was never needed."""
        async with broker_errors(self._publish_timeout, "count"):
            # A passive declare of a missing queue closes the channel, so it gets one of its own.
            channel = await link.connection.channel(publisher_confirms=False)
            try:
                declared = await channel.declare_queue(queue, passive=True)
                return declared.declaration_result.message_count or 0
            except ChannelNotFoundEntity:
                return 0
            finally:
                await channel.close()

    async def dead_letters(self, queue: str | None = None, limit: int = 100) -> Sequence[DeadLetter]:
        letters: list[DeadLetter] = []
        for name in sorted(self._declared) if queue is None else [queue]:
            async with self._browsing:
                letters += await dead_letters.read(self._require_link(), name, limit)
        return sorted(letters, key=lambda letter: letter.failed_at)[:limit]

    async def replay(self, dead_letter_id: str) -> bool:
        return await self._take(dead_letter_id, again=True)

    async def discard(self, dead_letter_id: str) -> bool:
        return await self._take(dead_letter_id, again=False)

    async def _take(self, dead_letter_id: str, *, again: bool) -> bool:
        queue, _, message_id = dead_letter_id.rpartition("/")
        if queue not in self._declared:
            return False
        async with self._browsing:
            return await dead_letters.take(self._require_link(), queue, message_id, again=again)
