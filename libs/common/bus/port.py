"""The promise every event bus keeps.

* ``publish`` returns when the events are durable: they survive the death of any process from then on.
* A handler is called at least once per event and must be safe to repeat.
* Events of one subscription are first offered in the order in which they were published by one publisher; after a
  retry, or with several replicas, the order may differ. Handlers must not depend on it for correctness.
* A handler that raises Unavailable (or anything unexpected, see ``Retry``) is called again after a growing delay,
  without holding up the events behind; after the last attempt the event becomes a dead letter with its reason.
* A handler that raises Invalid or NotFound makes dead letters at once. An event that does not parse is a dead letter
  at once.
* A batch of several events that fails is taken apart and each event tried alone, so one bad event never condemns
  its neighbours.
* All replicas of a service that use the same subscription share its events between them.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Protocol

from libs.common.events import Event

Handler = Callable[[list[Any]], Awaitable[None]]


@dataclass(frozen=True)
class Retry:
    """How often and how late a failed event is offered again: ``first * factor**n`` seconds, at most ``cap``."""

    attempts: int = 10
    first: float = 1.0
    factor: float = 2.0
    cap: float = 300.0

    def delay(self, attempt: int) -> float:
        """Seconds to wait after the given failed attempt (the first is 1)."""
        return min(self.cap, self.first * self.factor ** (attempt - 1))


@dataclass(frozen=True)
class Subscription:
    """What one service hears with one handler. Its queue is named ``<service>.<name>``.

    ``handler`` gets between 1 and ``max_items`` events; a batch is handed over when it is full or ``max_wait``
    seconds after its first event. ``prefetch`` bounds the events a process holds unacknowledged.
    """

    service: str
    name: str
    events: tuple[type[Event], ...]
    handler: Handler
    max_items: int = 1
    max_wait: float = 0.0
    prefetch: int = 64
    concurrency: int = 1
    retry: Retry = field(default_factory=Retry)

    @property
    def queue(self) -> str:
        return f"{self.service}.{self.name}"


@dataclass(frozen=True)
class DeadLetter:
    """An event that was given up, with everything a person needs to decide about it."""

    id: str
    queue: str
    event_key: str
    reason: str
    attempts: int
    failed_at: datetime
    document: Any


@dataclass(frozen=True)
class QueueStatus:
    """Numbers of one subscription's queue."""

    queue: str
    ready: int
    in_flight: int
    delayed: int
    dead: int


class Bus(Protocol):
    """One connection of one process to the bus."""

    async def start(self) -> None:
        """Connect. Raises Unavailable when the bus is away and stays so for the connect time-out."""

    async def publish(self, *events: Event) -> None:
        """Make the events durable, all of them, in order. Raises Unavailable; then some may have been published."""

    async def subscribe(self, subscription: Subscription) -> None:
        """Declare the queue (idempotent) and begin to deliver to its handler."""

    async def declare(self, subscription: Subscription) -> None:
        """Declare the queue (idempotent) without consuming, so that events published from now on wait in it."""

    async def stop(self) -> None:
        """Stop taking new events, finish the handlers in hand, acknowledge, disconnect."""

    async def healthy(self) -> bool:
        """Whether a publish would be expected to work now."""

    async def queues(self) -> Sequence[QueueStatus]:
        """The state of every queue the bus knows."""

    async def dead_letters(self, queue: str | None = None, limit: int = 100) -> Sequence[DeadLetter]:
        """Dead letters, oldest first."""

    async def replay(self, dead_letter_id: str) -> bool:
        """Offer a dead letter to its own queue again, with fresh attempts. False when it is not there."""

    async def discard(self, dead_letter_id: str) -> bool:
        """Delete a dead letter. False when it is not there."""
