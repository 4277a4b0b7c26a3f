"""From a RabbitMQ queue to a consumer and back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import structlog
from aio_pika.abc import AbstractChannel, AbstractIncomingMessage
from aio_pika.exceptions import CONNECTION_EXCEPTIONS

from libs.common.bus.delivery import Consumer, Delivery, Outcome, Verdict
from libs.common.bus.port import Subscription
from libs.common.bus.rabbitmq.link import Link, header_number
from libs.common.errors import Unavailable

log = structlog.get_logger(__name__)


class Feed:
    """Moves one queue's messages to its consumer, over a channel of its own with the subscription's prefetch."""

    def __init__(self, subscription: Subscription, require_link: Callable[[], Link]) -> None:
        self.subscription = subscription
        self.consumer = Consumer(subscription, self._settle)
        self._require_link = require_link
        self._channel: AbstractChannel | None = None
        self._cancel: Any = None

    async def open(self, link: Link) -> None:
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
                attempt=header_number(message, "sagittal-failures") + 1,
                returns=header_number(message, "x-delivery-count"),
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
                await self._require_link().put_off(self.subscription.queue, verdict)
            elif verdict.outcome is Outcome.DEAD:
                await self._require_link().bury(self.subscription.queue, verdict)
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
