"""The event bus: one promise (``port``), kept by MongoDB alone (embedded), by RabbitMQ, or in memory for tests."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from libs.common.bus.embedded import EmbeddedBus
from libs.common.bus.memory import MemoryBroker, MemoryBus
from libs.common.bus.outbox import OutboxBus
from libs.common.bus.port import Bus, DeadLetter, Handler, QueueStatus, Retry, Subscription
from libs.common.bus.rabbitmq import RabbitBus
from libs.common.config import Settings
from libs.common.errors import Invalid

if TYPE_CHECKING:
    from motor.motor_asyncio import AsyncIOMotorDatabase

__all__ = [
    "Bus",
    "DeadLetter",
    "EmbeddedBus",
    "Handler",
    "MemoryBroker",
    "MemoryBus",
    "OutboxBus",
    "QueueStatus",
    "RabbitBus",
    "Retry",
    "Subscription",
    "open_bus",
]


def open_bus(settings: Settings, database: AsyncIOMotorDatabase[dict[str, Any]], owner: str = "") -> Bus:
    """The bus that the settings ask for, not yet started. ``owner`` names the process, for people who look.

    Raises Invalid when the settings ask for RabbitMQ and do not say where it is.
    """
    if settings.bus == "embedded":
        return EmbeddedBus(database, owner=owner)
    if not settings.rabbitmq_url:
        raise Invalid("bus is rabbitmq but SAGITTAL_RABBITMQ_URL is not set")
    return OutboxBus(RabbitBus(settings.rabbitmq_url, owner=owner or "sagittal"), database)
