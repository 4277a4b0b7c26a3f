"""How a batch is judged."""

from __future__ import annotations

import asyncio
from typing import Any

from libs.common.bus.delivery import MAX_RETURNS, Delivery, Outcome, encode, handle
from libs.common.bus.port import Retry, Subscription
from libs.common.errors import Unavailable
from libs.common.events import StudyChanged


def deliveries(count: int, attempt: int = 1) -> list[Delivery]:
    events = [StudyChanged(study_instance_uid=f"1.{n}", instance_count=n, revision=1) for n in range(count)]
    return [Delivery(encode(event), event.key, attempt) for event in events]


class Away:
    """A handler during an outage."""

    def __init__(self) -> None:
        self.calls = 0

    async def __call__(self, events: list[Any]) -> None:
        self.calls += 1
        raise Unavailable("the store is away")


def subscription(handler: Any, attempts: int = 10) -> Subscription:
    return Subscription("s", "q", (StudyChanged,), handler, max_items=100, retry=Retry(attempts=attempts))


def test_delays_grow_to_the_cap() -> None:
    retry = Retry()
    assert [retry.delay(attempt) for attempt in (1, 2, 3, 9, 10)] == [1.0, 2.0, 4.0, 256.0, 300.0]


async def test_outage_does_not_cost_a_timeout_per_event() -> None:
    away = Away()
    verdicts = await handle(subscription(away), deliveries(50))
    assert away.calls == 4  # the batch and three alone
    assert [verdict.outcome for verdict in verdicts] == [Outcome.RETRY] * 50
    assert {verdict.delay for verdict in verdicts} == {1.0}


async def test_late_attempts_are_made_alone_even_in_an_outage() -> None:
    away = Away()
    verdicts = await handle(subscription(away), deliveries(5, attempt=9))
    assert away.calls == 6
    assert [verdict.outcome for verdict in verdicts] == [Outcome.RETRY] * 5


async def test_last_attempt_makes_dead_letters() -> None:
    verdicts = await handle(subscription(Away(), attempts=2), deliveries(2, attempt=2))
    assert [verdict.outcome for verdict in verdicts] == [Outcome.DEAD] * 2
    assert verdicts[0].reason == "Unavailable: the store is away (after 2 attempts)"


async def test_event_that_kills_its_process_each_time_is_given_up_unseen() -> None:
    away = Away()
    killer = deliveries(1)
    killer[0].returns = MAX_RETURNS + 1
    (verdict,) = await handle(subscription(away), killer)
    assert away.calls == 0
    assert verdict.outcome is Outcome.DEAD


async def test_handler_that_cancels_itself_has_failed() -> None:
    async def handler(events: list[Any]) -> None:
        raise asyncio.CancelledError

    (verdict,) = await handle(subscription(handler), deliveries(1))
    assert verdict.outcome is Outcome.RETRY
