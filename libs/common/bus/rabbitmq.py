"""The bus over RabbitMQ: a topic exchange, quorum queues, publisher confirms. The only file that knows aio_pika.

Per subscription there are three kinds of durable queues: ``<queue>`` itself, ``<queue>.wait.<milliseconds>`` for each
delay of its retry schedule (declared at first use; messages expire from there back into the queue), and
``<queue>.dead``. An event that no queue is bound to is a fact that nobody asked for, not an error: the broker returns
it (mandatory), it is counted in ``sagittal_bus_unheard_total`` and logged at debug level.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from typing import Any

import aio_pika
import structlog
from aio_pika.abc import AbstractChannel, AbstractConnection, AbstractExchange, AbstractIncomingMessage
from aio_pika.exceptions import CONNECTION_EXCEPTIONS, ChannelNotFoundEntity
from aiormq.exceptions import ChannelLockedResource

from libs.common.bus import metrics
from libs.common.bus.delivery import Consumer, Delivery, Outcome, Verdict, encode, readable
from libs.common.bus.port import DeadLetter, QueueStatus, Subscription
from libs.common.errors import Unavailable
from libs.common.events import Event

log = structlog.get_logger(__name__)

EXCHANGE = "sagittal.events"
_BROWSE_LIMIT = 100_000

# Dead-lettering inside the broker (out of the wait queues) is at-least-once only with these two together.
_QUORUM: dict[str, Any] = {
    "x-queue-type": "quorum",
    "x-overflow": "reject-publish",
    "x-dead-letter-strategy": "at-least-once",
    "x-dead-letter-exchange": "",
}


def _header_number(message: AbstractIncomingMessage, name: str) -> int:
    value = message.headers.get(name, 0)
    return value if isinstance(value, int) else 0


@asynccontextmanager
async def _broker_errors(seconds: float, doing: str) -> AsyncIterator[None]:
    """Turn everything aio_pika raises when the broker is away, slow or refuses into Unavailable."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise Unavailable(f"RabbitMQ did not answer within {seconds} s ({doing})") from None
    except CONNECTION_EXCEPTIONS as error:
        raise Unavailable(f"RabbitMQ is away ({doing}: {type(error).__name__})") from error
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise Unavailable(f"the connection to RabbitMQ was lost ({doing})") from None


class _Link:
    """One live connection and its publishing channel. ``lost`` is set when either closes."""

    def __init__(self, connection: AbstractConnection, channel: AbstractChannel, exchange: AbstractExchange) -> None:
        self.connection = connection
        self.channel = channel
        self.exchange = exchange
        self.lost = asyncio.Event()
        self.waits: set[str] = set()
        self.watch(channel)
        connection.close_callbacks.add(self._on_close)

    def watch(self, channel: AbstractChannel) -> None:
        channel.close_callbacks.add(self._on_close)

    def _on_close(self, *_: object) -> None:
        self.lost.set()


class _Feed:
    """Moves one queue's messages to its consumer, over a channel of its own with the subscription's prefetch."""

    def __init__(self, subscription: Subscription, bus: RabbitBus) -> None:
        self.subscription = subscription
        self.consumer = Consumer(subscription, self._settle)
        self._bus = bus
        self._channel: AbstractChannel | None = None
        self._cancel: Any = None

    async def open(self, link: _Link) -> None:
        self.consumer.drop_buffer()  # deliveries of a lost connection come again
        channel = await link.connection.channel(publisher_confirms=False)
        link.watch(channel)
        await channel.set_qos(prefetch_count=self.subscription.prefetch)
        queue = await channel.get_queue(self.subscription.queue, ensure=False)
        tag = await queue.consume(self._receive)
        self._channel = channel
        self._cancel = lambda: queue.cancel(tag)

    async def _receive(self, message: AbstractIncomingMessage) -> None:
        self.consumer.offer(
            Delivery(
                body=message.body,
                key=message.type or message.routing_key or "",
                attempt=_header_number(message, "sagittal-failures") + 1,
                returns=_header_number(message, "x-delivery-count"),
                receipt=message,
            )
        )

    async def _settle(self, verdicts: Sequence[Verdict]) -> None:
        settled = await asyncio.gather(*(self._move(verdict) for verdict in verdicts))
        messages: list[AbstractIncomingMessage] = [
            v.delivery.receipt for v, moved in zip(verdicts, settled, strict=True) if moved
        ]
        # A lost channel cannot be answered on: the broker offers the messages again.
        with suppress(*CONNECTION_EXCEPTIONS):
            if self.subscription.concurrency > 1:
                for message in messages:
                    await message.ack()
            elif messages:
                # One worker takes the messages in the order of their tags, so everything up to the last is settled.
                await max(messages, key=lambda message: message.delivery_tag or 0).ack(multiple=True)

    async def _move(self, verdict: Verdict) -> bool:
        """Put a failed event where it belongs. False when that did not work and the broker has it again."""
        try:
            if verdict.outcome is Outcome.RETRY:
                await self._bus.put_off(self.subscription.queue, verdict)
            elif verdict.outcome is Outcome.DEAD:
                await self._bus.bury(self.subscription.queue, verdict)
        except Unavailable as error:
            log.warning("bus.settle_failed", queue=self.subscription.queue, reason=str(error))
            with suppress(*CONNECTION_EXCEPTIONS):
                await verdict.delivery.receipt.nack(requeue=True)
            return False
        return True

    async def stop(self) -> None:
        if self._cancel is not None:
            with suppress(*CONNECTION_EXCEPTIONS, TimeoutError):
                async with asyncio.timeout(5):
                    await self._cancel()
        untouched = await self.consumer.stop()
        for delivery in untouched:
            with suppress(*CONNECTION_EXCEPTIONS):
                await delivery.receipt.nack(requeue=True)


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
        self._link: _Link | None = None
        self._connected = asyncio.Event()
        self._declared: dict[str, Subscription] = {}
        self._feeds: list[_Feed] = []
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
            link: _Link | None = None
            try:
                async with self._topology, _broker_errors(self._connect_timeout, "connect"):
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

    async def _open(self) -> _Link:
        connection = await aio_pika.connect(
            self._url, timeout=self._connect_timeout, client_properties={"connection_name": self._owner}, heartbeat=15
        )
        try:
            channel = await connection.channel(publisher_confirms=True, on_return_raises=False)
            exchange = await channel.declare_exchange(EXCHANGE, aio_pika.ExchangeType.TOPIC, durable=True)
            link = _Link(connection, channel, exchange)
            for subscription in self._declared.values():
                await self._declare(link, subscription)
            for feed in self._feeds:
                await feed.open(link)
        except BaseException:
            with suppress(*CONNECTION_EXCEPTIONS):
                await connection.close()
            raise
        return link

    @staticmethod
    async def _close(link: _Link) -> None:
        with suppress(*CONNECTION_EXCEPTIONS, TimeoutError):
            async with asyncio.timeout(5):
                await link.connection.close()

    async def _declare(self, link: _Link, subscription: Subscription) -> None:
        name = subscription.queue
        dead = f"{name}.dead"
        # Looking at dead letters counts as a delivery, so their queue has no limit that matters.
        await link.channel.declare_queue(
            dead, durable=True, arguments={"x-queue-type": "quorum", "x-delivery-limit": 2_000_000_000}
        )
        # We give up a message before the broker does; its limit is the net under ours.
        limits = {"x-dead-letter-routing-key": dead, "x-delivery-limit": 1000}
        queue = await link.channel.declare_queue(name, durable=True, arguments=_QUORUM | limits)
        for event in subscription.events:
            await queue.bind(link.exchange, event.key)

    def _require_link(self) -> _Link:
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
        async with _broker_errors(self._publish_timeout, "publish"):
            # All are written in order on one channel; the confirms come when they come.
            answers = await asyncio.gather(
                *(
                    link.exchange.publish(message, routing_key=event.key, mandatory=True)
                    for event, message in zip(events, messages, strict=True)
                )
            )
        for event, answer in zip(events, answers, strict=True):
            metrics.PUBLISHED.labels(event.key).inc()
            if _returned(answer):
                metrics.UNHEARD.labels(event.key).inc()
                log.debug("bus.unheard", event_key=event.key)

    async def put_off(self, queue: str, verdict: Verdict) -> None:
        """Put a failed event into the wait queue of its delay. Raises Unavailable."""
        milliseconds = max(1, round(verdict.delay * 1000))
        name = f"{queue}.wait.{milliseconds}"
        link = self._require_link()
        async with _broker_errors(self._publish_timeout, "declare"):
            if name not in link.waits:
                arguments = {"x-dead-letter-routing-key": queue, "x-message-ttl": milliseconds}
                await link.channel.declare_queue(name, durable=True, arguments=_QUORUM | arguments)
                link.waits.add(name)
        headers = {"sagittal-failures": verdict.delivery.attempt, "sagittal-reason": verdict.reason}
        await self._send(link, name, verdict.delivery.body, verdict.delivery.key, headers)

    async def bury(self, queue: str, verdict: Verdict) -> None:
        """Put an event into the dead-letter queue with its reason. Raises Unavailable."""
        headers = {
            "sagittal-attempts": verdict.delivery.attempt,
            "sagittal-reason": verdict.reason,
            "sagittal-failed-at": datetime.now(UTC).isoformat(),
        }
        link = self._require_link()
        await self._send(link, f"{queue}.dead", verdict.delivery.body, verdict.delivery.key, headers)

    async def _send(self, link: _Link, queue: str, body: bytes, key: str, headers: dict[str, Any]) -> None:
        message = aio_pika.Message(
            body,
            headers=headers,
            content_type="application/cloudevents+json",
            delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
            message_id=uuid.uuid4().hex,
            type=key,
        )
        async with _broker_errors(self._publish_timeout, "publish"):
            answer = await link.channel.default_exchange.publish(message, routing_key=queue, mandatory=True)
        if _returned(answer):
            link.waits.discard(queue)
            raise Unavailable(f"queue {queue} is not there")

    async def declare(self, subscription: Subscription) -> None:
        # While the broker is away there is nothing to miss: a reconnect declares before anything can be published.
        async with self._topology:
            self._declared[subscription.queue] = subscription
            if self._link is not None:
                async with _broker_errors(self._connect_timeout, "declare"):
                    await self._declare(self._link, subscription)

    async def subscribe(self, subscription: Subscription) -> None:
        await self.declare(subscription)
        feed = _Feed(subscription, self)
        feed.consumer.start()
        async with self._topology:
            self._feeds.append(feed)
            if self._link is not None:
                async with _broker_errors(self._connect_timeout, "subscribe"):
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

    async def _status(self, link: _Link, subscription: Subscription, held: int) -> QueueStatus:
        retry = subscription.retry
        delays = {max(1, round(retry.delay(attempt) * 1000)) for attempt in range(1, retry.attempts)}
        names = [f"{subscription.queue}.wait.{delay}" for delay in sorted(delays)]
        ready, dead, *waiting = await asyncio.gather(
            *(self._count(link, name) for name in (subscription.queue, f"{subscription.queue}.dead", *names))
        )
        return QueueStatus(subscription.queue, ready, held, sum(waiting), dead)

    async def _count(self, link: _Link, queue: str) -> int:
        """Messages in a queue that nobody holds; 0 when the queue was never needed."""
        async with _broker_errors(self._publish_timeout, "count"):
            # A passive declare of a missing queue closes the channel, so it gets one of its own.
            channel = await link.connection.channel(publisher_confirms=False)
            try:
                declared = await channel.declare_queue(queue, passive=True)
                return declared.declaration_result.message_count or 0
            except ChannelNotFoundEntity:
                return 0
            finally:
                await channel.close()

    @asynccontextmanager
    async def _browse(self, queue: str, limit: int) -> AsyncIterator[list[AbstractIncomingMessage]]:
        """The messages of a dead-letter queue, unacknowledged; those still so at the end go back.

        Two processes that browse would hide messages from each other, so one waits: the lock is an exclusive queue,
        which the broker frees when its owner dies.
        """
        link = self._require_link()
        async with self._browsing, _broker_errors(30, "dead letters"):
            lock = await self._lock(link, f"{queue}.lock")
            try:
                channel = await link.connection.channel(publisher_confirms=False)
                try:
                    source = await channel.get_queue(queue, ensure=False)
                    found: list[AbstractIncomingMessage] = []
                    with suppress(ChannelNotFoundEntity):
                        while len(found) < limit and (message := await source.get(fail=False)) is not None:
                            found.append(message)
                    yield found
                finally:
                    await channel.close()
            finally:
                await lock.queue_delete(f"{queue}.lock")
                await lock.close()

    @staticmethod
    async def _lock(link: _Link, name: str) -> Any:
        while True:
            channel = await link.connection.channel(publisher_confirms=False)
            try:
                await channel.declare_queue(name, exclusive=True)
            except ChannelLockedResource:
                await asyncio.sleep(0.05)
            else:
                return channel

    async def dead_letters(self, queue: str | None = None, limit: int = 100) -> Sequence[DeadLetter]:
        letters: list[DeadLetter] = []
        for name in sorted(self._declared) if queue is None else [queue]:
            async with self._browse(f"{name}.dead", limit) as messages:
                letters += [_letter(name, message) for message in messages]
        return sorted(letters, key=lambda letter: letter.failed_at)[:limit]

    async def replay(self, dead_letter_id: str) -> bool:
        return await self._take(dead_letter_id, again=True)

    async def discard(self, dead_letter_id: str) -> bool:
        return await self._take(dead_letter_id, again=False)

    async def _take(self, dead_letter_id: str, *, again: bool) -> bool:
        queue, _, message_id = dead_letter_id.rpartition("/")
        if queue not in self._declared:
            return False
        async with self._browse(f"{queue}.dead", _BROWSE_LIMIT) as messages:
            for message in messages:
                if message.message_id == message_id:
                    if again:  # first in, then out: a crash between the two repeats an event, it never loses one
                        await self._send(self._require_link(), queue, message.body, message.type or "", {})
                    await message.ack()
                    return True
        return False


def _returned(answer: object) -> bool:
    """Whether the broker gave a mandatory message back because no queue is bound to its key."""
    return hasattr(answer, "delivery")


def _letter(queue: str, message: AbstractIncomingMessage) -> DeadLetter:
    headers = message.headers
    try:
        failed_at = datetime.fromisoformat(str(headers.get("sagittal-failed-at")))
    except ValueError:
        failed_at = datetime.now(UTC)
    # Without our header it was the broker itself that gave the message up, at its delivery limit.
    reason = str(headers.get("sagittal-reason") or "given up by RabbitMQ: too many deliveries without an answer")
    return DeadLetter(
        id=f"{queue}/{message.message_id}",
        queue=queue,
        event_key=message.type or "",
        reason=reason,
        attempts=_header_number(message, "sagittal-attempts"),
        failed_at=failed_at,
        document=readable(message.body),
    )
