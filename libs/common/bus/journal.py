"""The embedded bus's durable journal: its MongoDB collections and what is done to them.

One document per queue and event, deleted when handled. ``due`` (nanoseconds since 1970) is at once the order, the
retry time and the lease: whoever claims a document moves it into the future, so a claim costs one indexed find and
one update, and the lease of a killed process ends by itself.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
import uuid
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bson import ObjectId
from bson.errors import InvalidId
from pymongo import ReplaceOne, WriteConcern
from pymongo.errors import PyMongoError

from libs.common.bus.delivery import Delivery, Outcome, Verdict, readable
from libs.common.bus.port import DeadLetter, QueueStatus
from libs.common.errors import Unavailable

if TYPE_CHECKING:
    from motor.motor_asyncio import AsyncIOMotorDatabase

Document = dict[str, Any]

_DURABLE = WriteConcern(w="majority", j=True)
_LOSABLE = WriteConcern(w=1)  # claims and acknowledgements: when they are lost, the event is offered again

HOST = socket.gethostname()


def _process_started(pid: int) -> str | None:
    """When a process of this host started, in the kernel's own count; None when there is no such process."""
    try:
        # The command (field 2) may hold spaces; the start time is field 22.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        pass
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        return ""
    return ""


@asynccontextmanager
async def database_errors(seconds: float | None = None) -> AsyncIterator[None]:
    """Turn the driver's errors, and a wait of more than ``seconds``, into Unavailable."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise Unavailable(f"the database did not answer within {seconds} s") from None
    except PyMongoError as error:
        raise Unavailable(f"the database is away ({type(error).__name__})") from error


class Journal:
    """The collections ``bus_journal``, ``bus_dead``, ``bus_queues`` and ``bus_owners``. Raises PyMongoError."""

    def __init__(self, database: AsyncIOMotorDatabase[Document], *, name: str = "", lease: float) -> None:
        self.owner = f"{name or HOST}/{os.getpid()}/{uuid.uuid4().hex[:12]}"
        self._lease = int(lease * 1e9)
        self._entries = database.get_collection("bus_journal", write_concern=_LOSABLE)
        self._durable = database.get_collection("bus_journal", write_concern=_DURABLE)
        self._dead = database.get_collection("bus_dead", write_concern=_DURABLE)
        self._queues = database.get_collection("bus_queues", write_concern=_DURABLE)
        self._owners = database.get_collection("bus_owners", write_concern=_LOSABLE)
        self._last = 0

    async def prepare(self) -> None:
        """Create the indexes, say who we are, and free what dead processes of this host held."""
        await self._durable.create_index([("queue", 1), ("due", 1)])
        await self._dead.create_index([("queue", 1), ("failed_at", 1)])
        await self.heartbeat()
        await self.reclaim()

    async def declare(self, queue: str, keys: Iterable[str]) -> None:
        await self._queues.update_one({"_id": queue}, {"$set": {"events": sorted(keys)}}, upsert=True)

    async def bindings(self) -> dict[str, list[str]]:
        """Event key -> names of the queues that hear it. Read anew for every commit, so a queue declared by another
        process misses nothing."""
        found: dict[str, list[str]] = {}
        async for queue in self._queues.find({}):
            for key in queue["events"]:
                found.setdefault(key, []).append(queue["_id"])
        return found

    def entry(self, queue: str, key: str, body: bytes, *, mine: bool) -> Document:
        """A new journal document; ``mine``: already claimed by this process, which will handle it itself."""
        # Strictly growing within the process, so that one publisher's events keep their order.
        self._last = max(self._last + 1, time.time_ns())
        document: Document = {"_id": ObjectId(), "queue": queue, "due": self._last, "key": key, "body": body}
        if mine:
            document |= {"due": self._last + self._lease, "owner": self.owner, "claims": 1}
        return document

    async def insert(self, documents: list[Document]) -> None:
        await self._durable.insert_many(documents, ordered=False)

    async def claim(self, queue: str, limit: int) -> list[Delivery]:
        """Lease up to ``limit`` due entries, oldest first; safe with any number of processes."""
        now = time.time_ns()
        found = self._entries.find({"queue": queue, "due": {"$lte": now}}).sort("due", 1).limit(limit)
        documents = await found.to_list(limit)
        if not documents:
            return []
        ids = [document["_id"] for document in documents]
        token = ObjectId()
        claimed = await self._entries.update_many(
            {"_id": {"$in": ids}, "due": {"$lte": now}},
            {"$set": {"due": now + self._lease, "owner": self.owner, "claim": token}, "$inc": {"claims": 1}},
        )
        if claimed.modified_count != len(documents):  # another process was faster with some
            ours = {d["_id"] async for d in self._entries.find({"_id": {"$in": ids}, "claim": token}, {"_id": 1})}
            documents = [document for document in documents if document["_id"] in ours]
        return [self.delivery(document) for document in documents]

    @staticmethod
    def delivery(document: Document) -> Delivery:
        return Delivery(
            body=document["body"],
            key=document["key"],
            attempt=document.get("failures", 0) + 1,
            returns=document.get("claims", 0),
            receipt=document["_id"],
        )

    async def due(self, queues: list[str]) -> set[str]:
        """Which of these queues have something to claim."""
        if not queues:
            return set()
        found = self._entries.find({"queue": {"$in": queues}, "due": {"$lte": time.time_ns()}}, {"queue": 1, "_id": 0})
        return {document["queue"] for document in await found.limit(50).to_list(50)}

    async def settle(self, queue: str, verdicts: Sequence[Verdict]) -> None:
        """Write what became of claimed entries. Safe to repeat."""
        gone: list[ObjectId] = []
        letters: list[ReplaceOne[Document]] = []
        for verdict in verdicts:
            delivery = verdict.delivery
            if verdict.outcome is Outcome.DONE:
                gone.append(delivery.receipt)
            elif verdict.outcome is Outcome.DEAD:
                gone.append(delivery.receipt)
                letter = {
                    "queue": queue,
                    "key": delivery.key,
                    "body": bytes(delivery.body),
                    "reason": verdict.reason,
                    "attempts": delivery.attempt,
                    "failed_at": datetime.now(UTC),
                }
                letters.append(ReplaceOne({"_id": delivery.receipt}, letter, upsert=True))
            else:
                await self._entries.update_one(
                    {"_id": delivery.receipt, "owner": self.owner},
                    {
                        "$set": {
                            "due": time.time_ns() + int(verdict.delay * 1e9),
                            "failures": delivery.attempt,
                            "claims": 0,
                        },
                        "$unset": {"owner": "", "claim": ""},
                    },
                )
        if letters:
            await self._dead.bulk_write(letters, ordered=False)
        if gone:
            await self._entries.delete_many({"_id": {"$in": gone}})

    async def renew(self, deliveries: Sequence[Delivery]) -> None:
        """Lengthen the leases of what is still held."""
        ids = [delivery.receipt for delivery in deliveries]
        if ids:
            await self._entries.update_many(
                {"_id": {"$in": ids}, "owner": self.owner}, {"$set": {"due": time.time_ns() + self._lease}}
            )

    async def release(self, deliveries: Sequence[Delivery]) -> None:
        """Give back what no handler has seen."""
        ids = [delivery.receipt for delivery in deliveries]
        if ids:
            await self._entries.update_many(
                {"_id": {"$in": ids}, "owner": self.owner},
                {"$set": {"due": time.time_ns()}, "$unset": {"owner": "", "claim": ""}, "$inc": {"claims": -1}},
            )

    async def heartbeat(self) -> None:
        me = {"host": HOST, "pid": os.getpid(), "started": _process_started(os.getpid()), "seen": datetime.now(UTC)}
        await self._owners.update_one({"_id": self.owner}, {"$set": me}, upsert=True)

    async def leave(self) -> None:
        await self._owners.delete_one({"_id": self.owner})

    async def reclaim(self) -> int:
        """Free at once what processes of this host held that are no more. Returns the number of entries."""
        freed = 0
        dead = []
        async for other in self._owners.find({"host": HOST, "_id": {"$ne": self.owner}}):
            if _process_started(other["pid"]) != other["started"]:
                dead.append(other["_id"])
        if dead:
            queues = await self._queues.distinct("_id")
            now = time.time_ns()
            result = await self._entries.update_many(
                {"queue": {"$in": queues}, "due": {"$gt": now}, "owner": {"$in": dead}},
                {"$set": {"due": now}, "$unset": {"owner": "", "claim": ""}},
            )
            freed = result.modified_count
            await self._owners.delete_many({"_id": {"$in": dead}})
        await self._owners.delete_many({"seen": {"$lt": datetime.now(UTC) - timedelta(days=1)}})
        return freed

    async def status(self) -> list[QueueStatus]:
        return [await self._status(queue) for queue in sorted(await self._queues.distinct("_id"))]

    async def _status(self, queue: str) -> QueueStatus:
        now = time.time_ns()
        ready, in_flight, delayed, dead = await asyncio.gather(
            self._entries.count_documents({"queue": queue, "due": {"$lte": now}}),
            self._entries.count_documents({"queue": queue, "due": {"$gt": now}, "owner": {"$exists": True}}),
            self._entries.count_documents({"queue": queue, "due": {"$gt": now}, "owner": {"$exists": False}}),
            self._dead.count_documents({"queue": queue}),
        )
        return QueueStatus(queue, ready, in_flight, delayed, dead)

    async def dead_letters(self, queue: str | None, limit: int) -> list[DeadLetter]:
        found = self._dead.find({} if queue is None else {"queue": queue}).sort([("failed_at", 1), ("_id", 1)])
        return [
            DeadLetter(
                id=str(document["_id"]),
                queue=document["queue"],
                event_key=document["key"],
                reason=document["reason"],
                attempts=document["attempts"],
                failed_at=document["failed_at"].replace(tzinfo=UTC),
                document=readable(document["body"]),
            )
            async for document in found.limit(limit)
        ]

    async def replay(self, dead_letter_id: str) -> str | None:
        """Put a dead letter back into its queue; returns the queue, or None when it is not there."""
        letter = await self._find(dead_letter_id)
        if letter is None:
            return None
        entry = self.entry(letter["queue"], letter["key"], letter["body"], mine=False) | {"_id": letter["_id"]}
        # First in, then out: a crash between the two repeats an event, it never loses one.
        await self._durable.replace_one({"_id": letter["_id"]}, entry, upsert=True)
        await self._dead.delete_one({"_id": letter["_id"]})
        return str(letter["queue"])

    async def discard(self, dead_letter_id: str) -> bool:
        letter = await self._find(dead_letter_id)
        return letter is not None and (await self._dead.delete_one({"_id": letter["_id"]})).deleted_count == 1

    async def _find(self, dead_letter_id: str) -> Document | None:
        try:
            return await self._dead.find_one({"_id": ObjectId(dead_letter_id)})
        except InvalidId:
            return None

    async def inject(self, queue: str, body: bytes, key: str = "unknown") -> None:
        """Put any bytes into a queue, as a foreign or a newer program might."""
        await self.insert([self.entry(queue, key, body, mine=False)])
