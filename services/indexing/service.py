"""The wiring of the indexing service."""

from __future__ import annotations

from collections.abc import Callable

from libs.common.bus.port import Subscription
from libs.common.events import InstanceStored
from libs.common.runtime import Job, Resources, Service
from services.indexing.config import IndexingSettings
from services.indexing.handlers import Reading, announce_quiet_studies, index_instances, rebuild_index
from services.indexing.repository import MongoIndex


def build(resources: Resources) -> Service:
    """What indexing hears and does, on the resources of a process."""
    settings = IndexingSettings()
    index = MongoIndex(resources.database)
    objects, bus = resources.objects, resources.bus
    reading = Reading.of(resources.settings, settings)

    async def on_instances_stored(events: list[InstanceStored]) -> None:
        await index_instances(events, objects=objects, index=index, bus=bus, reading=reading)

    async def on_tick() -> None:
        await announce_quiet_studies(index=index, bus=bus, settings=settings)

    return Service(
        "indexing",
        subscriptions=[
            Subscription(
                service="indexing",
                name="instances",
                events=(InstanceStored,),
                handler=on_instances_stored,
                max_items=settings.batch_items,
                max_wait=settings.batch_wait,
                prefetch=settings.batch_items * 2 * settings.concurrency,
                concurrency=settings.concurrency,
            )
        ],
        jobs=[Job("announce quiet studies", settings.check_seconds, on_tick)],
        start=index.ensure_indexes,
    )


async def rebuild(resources: Resources, progress: Callable[[int], None] | None = None) -> int:
    """Drop the image index and make it again from the object store; gives the number of objects read."""
    reading = Reading.of(resources.settings, IndexingSettings())
    return await rebuild_index(
        objects=resources.objects, index=MongoIndex(resources.database), reading=reading, progress=progress
    )
