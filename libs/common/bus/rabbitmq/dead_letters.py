"""Dead letters in RabbitMQ: looked at without losing any, replayed, discarded."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from typing import Any

from aio_pika.abc import AbstractIncomingMessage
from aio_pika.exceptions import ChannelNotFoundEntity
from aiormq.exceptions import ChannelLockedResource

from libs.common.bus.delivery import readable
from libs.common.bus.port import DeadLetter
from libs.common.bus.rabbitmq.link import Link, broker_errors, header_number

_BROWSE_LIMIT = 100_000


@asynccontextmanager
async def _browse(link: Link, queue: str, limit: int) -> AsyncIterator[list[AbstractIncomingMessage]]:
    """The messages of a dead-letter queue, unacknowledged; those still so at the end go back.

    Two processes that browse would hide messages from each other, so one waits: the lock is an exclusive queue,
    which the broker frees when its owner dies.
    """
    async with broker_errors(30, "dead letters"):
        lock = await _lock(link, f"{queue}.lock")
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


async def _lock(link: Link, name: str) -> Any:
    while True:
        channel = await link.connection.channel(publisher_confirms=False)
        try:
            await channel.declare_queue(name, exclusive=True)
        except ChannelLockedResource:
            await asyncio.sleep(0.05)
        else:
            return channel


async def read(link: Link, queue: str, limit: int) -> list[DeadLetter]:
    """Up to ``limit`` dead letters of a queue. Raises Unavailable."""
    async with _browse(link, f"{queue}.dead", limit) as messages:
        return [_letter(queue, message) for message in messages]


async def take(link: Link, queue: str, message_id: str, *, again: bool) -> bool:
    """Remove a dead letter; ``again``: into its queue. False when it is not there. Raises Unavailable."""
    async with _browse(link, f"{queue}.dead", _BROWSE_LIMIT) as messages:
        for message in messages:
            if message.message_id == message_id:
                if again:  # first in, then out: a crash between the two repeats an event, it never loses one
                    await link.send(queue, message.body, message.type or "", {})
                await message.ack()
                return True
    return False


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
        attempts=header_number(message, "sagittal-attempts"),
        failed_at=failed_at,
        document=readable(message.body),
    )
