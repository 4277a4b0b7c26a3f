"""C-MOVE and C-GET: stored instances handed to a receiver, one C-STORE sub-operation each."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field

import structlog

from libs.common.dicom.part10 import split_part10
from libs.common.errors import Invalid, NotFound, Unavailable
from libs.dimse.model import (
    DimseError,
    OutgoingInstance,
    Progress,
    ReportProgress,
    RetrieveResult,
    SendInstance,
    Status,
)
from services.query.handlers.promises import Catalog, Destination, Stored, StoredInstance
from services.query.model.query import Query
from services.query.model.transcode import transcode

log = structlog.get_logger()

UNABLE, SOME_FAILED, CANCELLED, SUCCESS = 0xA702, 0xB000, 0xFE00, 0x0000
UNREADABLE = Status(0xC001, "The stored instance cannot be read")


@dataclass(frozen=True)
class Pace:
    """How far to read ahead (instances), up to which size at once (bytes), how often to report (seconds)."""

    read_ahead: int = 4
    read_whole: int = 4 << 20
    progress_interval: float = 0.1


@dataclass
class Tally:
    """The sub-operations of one retrieval so far (PS3.4 C.4.2.1.6)."""

    total: int
    completed: int = 0
    warning: int = 0
    failed: list[str] = field(default_factory=list)

    @property
    def remaining(self) -> int:
        return self.total - self.completed - self.warning - len(self.failed)

    def count(self, sop_instance_uid: str, status: Status) -> None:
        if status.code == SUCCESS:
            self.completed += 1
        elif status.code >> 12 == 0xB or status.code in (0x0001, 0x0107, 0x0116):
            self.warning += 1
        else:
            self.failed.append(sop_instance_uid)

    def progress(self) -> Progress:
        return Progress(self.remaining, self.completed, len(self.failed), self.warning)

    def result(self, *, cancelled: bool = False) -> RetrieveResult:
        """The final response (PS3.4 C.4.2.1.5): all failed is a failure, some failed or warned a warning."""
        failed = len(self.failed)
        if cancelled:
            status = Status(CANCELLED)
        elif failed and not (self.completed or self.warning):
            status = Status(UNABLE, "No sub-operation succeeded")
        elif failed or self.warning:
            status = Status(SOME_FAILED, f"{failed} failed, {self.warning} with warnings")
        else:
            status = Status(SUCCESS)
        return RetrieveResult(status, self.progress(), tuple(self.failed))


class Reader:
    """Reads instances, the next ones before they are asked for, so that the network is not kept waiting."""

    def __init__(self, objects: Stored, instances: Sequence[StoredInstance], pace: Pace) -> None:
        self._objects = objects
        self._pace = pace
        self._ahead: deque[StoredInstance] = deque(
            stored for stored in instances if stored.reference.length <= pace.read_whole
        )
        self._reads: dict[str, asyncio.Task[bytes]] = {}

    def outgoing(self, stored: StoredInstance) -> OutgoingInstance:
        async def convert(accepted: tuple[str, ...]) -> tuple[str, bytes]:
            content = await self._whole(stored)
            return await asyncio.to_thread(_convert, content, stored.reference.transfer_syntax_uid, accepted)

        return OutgoingInstance(
            stored.sop_class_uid,
            stored.sop_instance_uid,
            stored.reference.transfer_syntax_uid,
            lambda: self._pieces(stored),
            convert,
        )

    def done(self, stored: StoredInstance) -> None:
        """Forget a read that nobody took."""
        task = self._reads.pop(stored.sop_instance_uid, None)
        if task is not None:
            _drop(task)

    def close(self) -> None:
        self._ahead.clear()
        for task in self._reads.values():
            _drop(task)
        self._reads.clear()

    async def _pieces(self, stored: StoredInstance) -> AsyncIterator[bytes]:
        reference = stored.reference
        if reference.length <= self._pace.read_whole:
            content = await self._whole(stored)
            yield content[split_part10(content)[1] :]
            return
        header_left = True
        async for piece in self._objects.stream(reference.key, reference.offset, reference.length):
            if header_left:
                piece = piece[split_part10(piece)[1] :]
                header_left = False
            yield piece

    async def _whole(self, stored: StoredInstance) -> bytes:
        task = self._reads.pop(stored.sop_instance_uid, None) or self._read(stored)
        self._fill()
        return await task

    def _read(self, stored: StoredInstance) -> asyncio.Task[bytes]:
        reference = stored.reference
        if self._ahead and self._ahead[0] is stored:
            self._ahead.popleft()
        return asyncio.ensure_future(self._objects.get(reference.key, reference.offset, reference.length))

    def _fill(self) -> None:
        while self._ahead and len(self._reads) < self._pace.read_ahead:
            stored = self._ahead[0]
            self._reads[stored.sop_instance_uid] = self._read(stored)


def _drop(task: asyncio.Task[bytes]) -> None:
    task.cancel()
    # A read that failed before it was cancelled: take its exception, so that asyncio does not report it.
    task.add_done_callback(lambda done: done.cancelled() or done.exception())


def _convert(content: bytes, source: str, accepted: tuple[str, ...]) -> tuple[str, bytes]:
    return transcode(content[split_part10(content)[1] :], source, accepted)


async def get(
    query: Query,
    *,
    catalog: Catalog,
    objects: Stored,
    send: SendInstance,
    report: ReportProgress,
    cancelled: asyncio.Event,
    pace: Pace,
) -> RetrieveResult:
    """Send every matching instance on the caller's own association (PS3.4 C.4.3). Raises Unavailable, DimseError."""
    instances = await catalog.stored(query)
    tally = Tally(len(instances))
    reader = Reader(objects, instances, pace)
    try:
        await _send_all(instances, reader, send, tally, report, cancelled, pace)
    finally:
        reader.close()
    return tally.result(cancelled=cancelled.is_set() and tally.remaining > 0)


async def move(
    query: Query,
    *,
    catalog: Catalog,
    objects: Stored,
    destination: Destination,
    report: ReportProgress,
    cancelled: asyncio.Event,
    pace: Pace,
) -> RetrieveResult:
    """Send every matching instance to the destination (PS3.4 C.4.2). Raises Unavailable.

    What a lost association, or a destination that refuses, leaves unsent counts as failed.
    """
    instances = await catalog.stored(query)
    tally = Tally(len(instances))
    reader = Reader(objects, instances, pace)
    by_uid = {stored.sop_instance_uid: stored for stored in instances}
    try:
        for group in destination.plan([reader.outgoing(stored) for stored in instances]):
            members = [by_uid[outgoing.sop_instance_uid] for outgoing in group]
            sent = tally.total - tally.remaining
            try:
                async with destination.open(group) as send:
                    await _send_all(members, reader, send, tally, report, cancelled, pace)
            except DimseError as error:
                left = members[tally.total - tally.remaining - sent :]
                log.warning("move.destination_lost", reason=str(error), unsent=len(left))
                tally.failed.extend(stored.sop_instance_uid for stored in left)
            if cancelled.is_set():
                break
    finally:
        reader.close()
    return tally.result(cancelled=cancelled.is_set() and tally.remaining > 0)


async def _send_all(
    instances: Iterable[StoredInstance],
    reader: Reader,
    send: SendInstance,
    tally: Tally,
    report: ReportProgress,
    cancelled: asyncio.Event,
    pace: Pace,
) -> None:
    reported = 0.0
    for stored in instances:
        if cancelled.is_set():
            return
        try:
            status = await send(reader.outgoing(stored))
        except (Invalid, NotFound, Unavailable) as error:
            status = Status(UNREADABLE.code, str(error))
        finally:
            reader.done(stored)
        tally.count(stored.sop_instance_uid, status)
        if status.code != SUCCESS:
            log.warning(
                "retrieve.instance_not_sent",
                sop_instance_uid=stored.sop_instance_uid,
                transfer_syntax_uid=stored.reference.transfer_syntax_uid,
                status=f"{status.code:04X}",
                reason=status.comment,
            )
        now = time.monotonic()
        if tally.remaining and now - reported >= pace.progress_interval:
            reported = now
            await report(tally.progress())
