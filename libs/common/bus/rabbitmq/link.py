"""One live connection to RabbitMQ, what can be sent over it, and what its failures are called here."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import aio_pika
from aio_pika.abc import AbstractChannel, AbstractConnection, AbstractExchange, AbstractIncomingMessage
from aio_pika.exceptions import CONNECTION_EXCEPTIONS

from libs.common.bus.delivery import Verdict
from libs.common.bus.port import Subscription
from libs.common.errors import Unavailable

EXCHANGE = "sagittal.events"

# Dead-lettering inside the broker (out of the wait queues) is at-least-once only with these two together.
QUORUM: dict[str, Any] = {
    "x-queue-type": "quorum",
    "x-overflow": "reject-publish",
    "x-dead-letter-strategy": "at-least-once",
    "x-dead-letter-exchange": "",
}


def header_number(message: AbstractIncomingMessage, name: str) -> int:
    value = message.headers.get(name, 0)
    return value if isinstance(value, int) else 0


def returned(answer: object) -> bool:
    """Whether the broker gave a mandatory message back because no queue is bound to its key."""
    return hasattr(answer, "delivery")


@asynccontextmanager
async def broker_errors(seconds: float, doing: str) -> AsyncIterator[None]:
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


class Link:
    """One live connection and its publishing channel. ``lost`` is set when either closes."""

    def __init__(
        self, connection: AbstractConnection, channel: AbstractChannel, exchange: AbstractExchange, timeout: float
    ) -> None:
        self.connection = connection
        self.channel = channel
        self.exchange = exchange
        self.timeout = timeout  # seconds that a confirm may take
        self.lost = asyncio.Event()
        self.waits: set[str] = set()
        self.watch(channel)
        connection.close_callbacks.add(self._on_close)

    def watch(self, channel: AbstractChannel) -> None:
        channel.close_callbacks.add(self._on_close)

    def _on_close(self, *_: object) -> None:
        self.lost.set()

    async def declare(self, subscription: Subscription) -> None:
        """Make the subscription's queues and bindings (idempotent). Raises what aio_pika raises."""
        name = subscription.queue
        dead = f"{name}.dead"
        # Looking at dead letters counts as a delivery, so their queue has no limit that matters.
        await self.channel.declare_queue(
            dead, durable=True, arguments={"x-queue-type": "quorum", "x-delivery-limit": 2_000_000_000}
        )
        # We give up a message before the broker does; its limit is the net under ours.
        limits = {"x-dead-letter-routing-key": dead, "x-delivery-limit": 1000}
        queue = await self.channel.declare_queue(name, durable=True, arguments=QUORUM | limits)
        for event in subscription.events:
            await queue.bind(self.exchange, event.key)

    async def put_off(self, queue: str, verdict: Verdict) -> None:
        """Put a failed event into the wait queue of its delay. Raises Unavailable."""
        milliseconds = max(1, round(verdict.delay * 1000))
        name = f"{queue}.wait.{milliseconds}"
        async with broker_errors(self.timeout, "declare"):
            if name not in self.waits:
                arguments = {"x-dead-letter-routing-key": queue, "x-message-ttl": milliseconds}
                await self.channel.declare_queue(name, durable=True, arguments=QUORUM | arguments)
                self.waits.add(name)
        headers = {"sagittal-failures": verdict.delivery.attempt, "sagittal-reason": verdict.reason}
        await self.send(name, verdict.delivery.body, verdict.delivery.key, headers)

    async def bury(self, queue: str, verdict: Verdict) -> None:
        """Put an event into the dead-letter queue with its reason. Raises Unavailable."""
        headers = {
            "sagittal-attempts": verdict.delivery.attempt,
            "sagittal-reason": verdict.reason,
            "sagittal-failed-at": datetime.now(UTC).isoformat(),
        }
        await self.send(f"{queue}.dead", verdict.delivery.body, verdict.delivery.key, headers)

    async def send(self, queue: str, body: bytes, key: str, headers: dict[str, Any]) -> None:
        message = aio_pika.Message(
            body,
            headers=headers,
            content_type="application/cloudevents+json",
            delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
            message_id=uuid.uuid4().hex,
            type=key,
        )
        async with broker_errors(self.timeout, "publish"):
            answer = await self.channel.default_exchange.publish(message, routing_key=queue, mandatory=True)
        if returned(answer):
            self.waits.discard(queue)
            raise Unavailable(f"queue {queue} is not there")
