"""From an event in a queue to a handler and back: what every adapter does the same way."""

from __future__ import annotations

import asyncio
import traceback
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import orjson
import structlog

from libs.common.bus import metrics
from libs.common.bus.port import Subscription
from libs.common.errors import Invalid, NotFound, SagittalError, Unavailable
from libs.common.events import Event, from_cloudevent, to_cloudevent

log = structlog.get_logger(__name__)

MAX_RETURNS = 50
"""Deliveries that ended without an answer (process killed, connection lost) before an event is given up."""

_OUTAGE_FAILURES = 3
"""Single tries in a row that end with Unavailable before the rest of a batch is spared the same wait."""


def encode(event: Event) -> bytes:
    """The CloudEvents JSON of an event."""
    return orjson.dumps(to_cloudevent(event))


def decode(body: bytes) -> Event:
    """The event of a CloudEvents JSON document. Raises Invalid."""
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise Invalid(f"event is not JSON ({error.msg})") from None
    return from_cloudevent(document)


def readable(body: bytes) -> Any:
    """The body of a dead letter for a person: the JSON document, or the text when it is none."""
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        return body.decode("utf-8", "replace")


@dataclass(eq=False, slots=True)
class Delivery:
    """One event in hand. ``attempt`` is 1 for the first try; ``returns`` counts tries that ended without an answer."""

    body: bytes
    key: str
    attempt: int = 1
    returns: int = 0
    receipt: Any = None
    arrived: float = 0.0


class Outcome(Enum):
    DONE = "done"
    RETRY = "retry"
    DEAD = "dead"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What becomes of a delivery. ``delay`` is in seconds, for a retry."""

    delivery: Delivery
    outcome: Outcome
    reason: str = ""
    delay: float = 0.0


def _reason(error: BaseException) -> str:
    # Only our own errors promise to be free of patient data; of others we tell the type and the place.
    if isinstance(error, SagittalError):
        return f"{type(error).__name__}: {error}"
    frames = traceback.extract_tb(error.__traceback__)
    where = f" at {frames[-1].filename.rsplit('/', 1)[-1]}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}{where}"


def _failed(subscription: Subscription, delivery: Delivery, error: BaseException) -> Verdict:
    reason = _reason(error)
    if isinstance(error, Invalid | NotFound):
        return Verdict(delivery, Outcome.DEAD, reason)
    if delivery.attempt >= subscription.retry.attempts:
        return Verdict(delivery, Outcome.DEAD, f"{reason} (after {delivery.attempt} attempts)")
    return Verdict(delivery, Outcome.RETRY, reason, subscription.retry.delay(delivery.attempt))


async def _call(subscription: Subscription, events: list[Event]) -> BaseException | None:
    try:
        await subscription.handler(events)
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        return error  # the handler cancelled itself: a failure like any other
    except Exception as error:
        log.warning(
            "bus.handler_failed",
            queue=subscription.queue,
            events=len(events),
            correlation_id=events[0].correlation_id,
            reason=_reason(error),
        )
        return error
    return None


async def handle(subscription: Subscription, deliveries: Sequence[Delivery]) -> list[Verdict]:
    """Give the deliveries to the handler, as one batch and, when that fails, one by one; judge each."""
    verdicts: list[Verdict] = []
    good: list[tuple[Delivery, Event]] = []
    for delivery in deliveries:
        if delivery.returns > MAX_RETURNS:
            reason = f"given up: {delivery.returns} deliveries ended without an answer"
            verdicts.append(Verdict(delivery, Outcome.DEAD, reason))
            continue
        try:
            good.append((delivery, decode(delivery.body)))
        except Invalid as error:
            verdicts.append(Verdict(delivery, Outcome.DEAD, _reason(error)))
    if good:
        failure = await _call(subscription, [event for _, event in good])
        if failure is None:
            verdicts += [Verdict(delivery, Outcome.DONE) for delivery, _ in good]
        elif len(good) == 1:
            verdicts.append(_failed(subscription, good[0][0], failure))
        else:
            verdicts += await _one_by_one(subscription, good)
    _count(subscription.queue, verdicts)
    return verdicts


async def _one_by_one(subscription: Subscription, good: list[tuple[Delivery, Event]]) -> list[Verdict]:
    verdicts: list[Verdict] = []
    outage: list[BaseException] = []
    for delivery, event in good:
        # During an outage every try may cost a time-out, so the rest goes back untried; but not for ever, or an event
        # that always comes behind the same bad neighbours would be condemned with them.
        if len(outage) >= _OUTAGE_FAILURES and delivery.attempt * 2 < subscription.retry.attempts:
            verdicts.append(_failed(subscription, delivery, outage[-1]))
            continue
        error = await _call(subscription, [event])
        if isinstance(error, Unavailable):
            outage.append(error)
        else:
            outage.clear()
        verdicts.append(_failed(subscription, delivery, error) if error else Verdict(delivery, Outcome.DONE))
    return verdicts


def _count(queue: str, verdicts: Sequence[Verdict]) -> None:
    numbers = dict.fromkeys(Outcome, 0)
    for verdict in verdicts:
        numbers[verdict.outcome] += 1
        if verdict.outcome is Outcome.DEAD:
            log.error("bus.dead_letter", queue=queue, event_key=verdict.delivery.key, reason=verdict.reason)
    metrics.HANDLED.labels(queue).inc(numbers[Outcome.DONE])
    metrics.RETRIED.labels(queue).inc(numbers[Outcome.RETRY])
    metrics.DEAD.labels(queue).inc(numbers[Outcome.DEAD])


class Consumer:
    """The events one process holds for one subscription: buffered, put together to batches, handled, settled.

    ``settle`` writes the verdicts of one batch back to the queue. ``room`` says how many more events may be held;
    ``on_room`` is called when it grows.
    """

    def __init__(
        self,
        subscription: Subscription,
        settle: Callable[[Sequence[Verdict]], Awaitable[None]],
        on_room: Callable[[], None] = lambda: None,
    ) -> None:
        self.subscription = subscription
        self._settle = settle
        self._on_room = on_room
        self._buffer: deque[Delivery] = deque()
        self._in_hand: set[Delivery] = set()
        self._reserved = 0
        self._waiters: set[asyncio.Future[None]] = set()
        self._workers: list[asyncio.Task[None]] = []
        self._stopping = False
        self._full = min(subscription.max_items, subscription.prefetch)

    @property
    def room(self) -> int:
        if self._stopping:
            return 0
        return self.subscription.prefetch - len(self._buffer) - len(self._in_hand) - self._reserved

    @property
    def held(self) -> list[Delivery]:
        """Everything not yet settled."""
        return [*self._buffer, *self._in_hand]

    def start(self) -> None:
        self._workers = [asyncio.create_task(self._work()) for _ in range(self.subscription.concurrency)]

    def reserve(self, number: int) -> None:
        """Keep room for deliveries that are on their way (or, negative, give it back)."""
        self._reserved += number

    def offer(self, delivery: Delivery) -> None:
        """Take a delivery into the buffer."""
        delivery.arrived = asyncio.get_running_loop().time()
        self._buffer.append(delivery)
        self._wake()

    def drop_buffer(self) -> list[Delivery]:
        """Forget what no handler has seen yet, and return it."""
        dropped = list(self._buffer)
        self._buffer.clear()
        return dropped

    async def stop(self) -> list[Delivery]:
        """Let the handlers in hand finish and settle; return what no handler has seen."""
        self._stopping = True
        self._wake()
        await asyncio.gather(*self._workers)
        return self.drop_buffer()

    def _wake(self) -> None:
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def _changed(self, timeout: float | None) -> None:
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.add(waiter)
        try:
            async with asyncio.timeout(timeout):
                await waiter
        except TimeoutError:
            pass
        finally:
            self._waiters.discard(waiter)

    async def _next(self) -> list[Delivery]:
        loop = asyncio.get_running_loop()
        while not self._stopping:
            if self._buffer:
                left = self._buffer[0].arrived + self.subscription.max_wait - loop.time()
                if len(self._buffer) >= self._full or left <= 0:
                    return [self._buffer.popleft() for _ in range(min(self._full, len(self._buffer)))]
                await self._changed(left)
            else:
                await self._changed(None)
        return []

    async def _work(self) -> None:
        while batch := await self._next():
            self._in_hand.update(batch)
            try:
                await self._settle(await handle(self.subscription, batch))
            except Exception as error:
                # The events come back by themselves (lease, redelivery): at least once.
                log.warning("bus.settle_failed", queue=self.subscription.queue, reason=_reason(error))
            finally:
                self._in_hand.difference_update(batch)
                self._on_room()
