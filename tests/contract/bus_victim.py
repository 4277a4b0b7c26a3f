"""A consumer process to be killed: prints each number it is given and then never answers.

Arguments: embedded|rabbitmq, server URL, service (queue prefix and database).
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

from motor.motor_asyncio import AsyncIOMotorClient

from libs.common.bus import Bus, EmbeddedBus, RabbitBus, Subscription
from tests.contract.bus_stage import QUICK, Ticked


async def main(adapter: str, url: str, service: str) -> None:
    async def handler(events: list[Any]) -> None:
        for event in events:
            print(event.number, flush=True)
        await asyncio.sleep(3600)

    bus: Bus
    if adapter == "embedded":
        client: AsyncIOMotorClient[dict[str, Any]] = AsyncIOMotorClient(url)
        bus = EmbeddedBus(client[service])
    else:
        bus = RabbitBus(url)
    await bus.start()
    await bus.subscribe(Subscription(service, "q", (Ticked,), handler, max_items=3, prefetch=6, retry=QUICK))
    await asyncio.sleep(3600)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
