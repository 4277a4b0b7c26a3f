"""What a service is, and how any set of services runs in one process."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from libs.common.bus.port import Bus, Subscription
from libs.common.config import Settings
from libs.common.objects.port import Objects

if TYPE_CHECKING:
    from fastapi import APIRouter
    from motor.motor_asyncio import AsyncIOMotorDatabase

    from libs.dimse import Scp


@dataclass(frozen=True)
class Job:
    """Periodic work: ``run`` is called every ``every`` seconds, never twice at the same time in one process."""

    name: str
    every: float
    run: Callable[[], Awaitable[None]]


@dataclass(frozen=True)
class Resources:
    """What the process lends to the services it hosts."""

    settings: Settings
    database: AsyncIOMotorDatabase[dict[str, Any]]
    objects: Objects
    bus: Bus


@dataclass(frozen=True)
class Service:
    """All that a service says about itself."""

    name: str
    scp: Sequence[Scp] = ()
    http: APIRouter | None = None
    subscriptions: Sequence[Subscription] = ()
    jobs: Sequence[Job] = ()
    start: Callable[[], Awaitable[None]] | None = None
    stop: Callable[[], Awaitable[None]] | None = None
    ready: Callable[[], Awaitable[str | None]] | None = None
    """Returns None when ready, else a sentence that says what is missing."""
    labels: dict[str, str] = field(default_factory=dict)
