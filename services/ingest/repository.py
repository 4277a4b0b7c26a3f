"""The MongoDB side of ingest: its own quarantine list, and one question to the image index."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from motor.motor_asyncio import AsyncIOMotorDatabase

from libs.common.database import translate_errors
from services.ingest.handlers import Quarantined


class MongoQuarantine:
    """Writes `quarantine`."""

    def __init__(self, database: AsyncIOMotorDatabase[dict[str, Any]]) -> None:
        self._entries = database["quarantine"]

    async def add(self, entry: Quarantined) -> None:
        document = asdict(entry)
        document["service"] = "ingest"
        identifier = document.pop("id")
        with translate_errors():
            await self._entries.update_one({"_id": identifier}, {"$set": document, "$inc": {"times": 1}}, upsert=True)


class MongoCurrentVersions:
    """Reads `instances`, which indexing owns."""

    def __init__(self, database: AsyncIOMotorDatabase[dict[str, Any]]) -> None:
        self._instances = database["instances"]

    async def current_digest(self, sop_instance_uid: str) -> str | None:
        with translate_errors():
            found = await self._instances.find_one({"_id": sop_instance_uid}, {"reference.sha256": 1, "_id": 0})
        return str(found["reference"]["sha256"]) if found else None
