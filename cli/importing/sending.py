"""Sends what was found over several associations, each reopened when it meets a new kind of instance."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from cli.importing.examine import Found, NotDicom, examine
from cli.importing.journal import Journal
from cli.importing.sources import Candidate
from libs.common.errors import Invalid
from libs.dimse import ConnectionRefused, DimseError, OutgoingInstance, Status
from libs.dimse.requestor import RequestorAssociation, connect

ATTEMPTS = 4
MOST_CONTEXTS = 120
_PIECE = 1 << 20

Context = tuple[str, tuple[str, ...]]


@dataclass(frozen=True)
class Target:
    """The archive that takes the instances."""

    host: str
    port: int
    called_ae_title: str
    calling_ae_title: str
    associations: int = 4
    first_delay: float = 1.0
    """Seconds before the second attempt after a failure that may pass; doubled for each further one."""

    def __str__(self) -> str:
        return f"{self.called_ae_title}@{self.host}:{self.port}"


@dataclass
class Summary:
    """Numbers of an import, and what was refused with its reason."""

    stored: int = 0
    duplicate: int = 0
    skipped: int = 0
    not_dicom: int = 0
    size: int = 0
    refused: list[tuple[str, str]] = field(default_factory=list)

    @property
    def reasons(self) -> Counter[str]:
        return Counter(reason for _, reason in self.refused)


async def send_all(
    candidates: Iterator[Candidate], target: Target, journal: Journal, advance: Callable[[Summary], None]
) -> Summary:
    """Send every candidate that the journal does not know; ``advance`` is called after each.

    Raises ConnectionRefused when the archive cannot be reached at all, DimseError when it stays away.
    """
    summary = Summary()
    work = _Work(target, journal, summary, advance)
    queue: asyncio.Queue[Candidate | None] = asyncio.Queue(maxsize=target.associations * 2)

    async def feed() -> None:
        while (candidate := await asyncio.to_thread(next, candidates, None)) is not None:
            await queue.put(candidate)
        for _ in range(target.associations):
            await queue.put(None)

    async with asyncio.TaskGroup() as group:
        group.create_task(feed())
        for _ in range(target.associations):
            group.create_task(_Sender(work).run(queue))
    return summary


@dataclass
class _Work:
    target: Target
    journal: Journal
    summary: Summary
    advance: Callable[[Summary], None]
    contexts: dict[Context, None] = field(default_factory=dict)
    seen: set[str] = field(default_factory=set)


class _Sender:
    """One association and what it takes to keep it fitting."""

    def __init__(self, work: _Work) -> None:
        self._work = work
        self._stack = contextlib.AsyncExitStack()
        self._association: RequestorAssociation | None = None
        self._proposed: set[Context] = set()

    async def run(self, queue: asyncio.Queue[Candidate | None]) -> None:
        try:
            while (candidate := await queue.get()) is not None:
                await self._take(candidate)
                self._work.advance(self._work.summary)
        finally:
            await self._close()

    async def _take(self, candidate: Candidate) -> None:
        summary = self._work.summary
        if candidate.refusal:
            summary.refused.append((candidate.label, candidate.refusal))
            return
        if self._work.journal.knows(candidate.identity):
            summary.skipped += 1
            return
        try:
            # Opening a member unpacks it: not in the event loop.
            opened = candidate.opened()
            path = await asyncio.to_thread(opened.__enter__)
            try:
                found = await asyncio.to_thread(examine, path)
                size = path.stat().st_size - found.offset
                status = await self._send(path, found)
            finally:
                await asyncio.to_thread(opened.__exit__, None, None, None)
        except NotDicom:
            summary.not_dicom += 1
        except Invalid as error:
            summary.refused.append((candidate.label, str(error)))
        except OSError as error:
            summary.refused.append((candidate.label, f"cannot be read: {error.strerror}"))
        else:
            self._count(candidate, found, status, size)

    def _count(self, candidate: Candidate, found: Found, status: Status, size: int) -> None:
        summary = self._work.summary
        if status.code != 0x0000 and status.code >> 12 != 0xB:
            comment = status.comment or "no reason given"
            summary.refused.append((candidate.label, f"{comment} (status {status.code:04X})"))
            return
        if found.sop_instance_uid in self._work.seen:
            summary.duplicate += 1
        else:
            self._work.seen.add(found.sop_instance_uid)
            summary.stored += 1
        summary.size += size
        self._work.journal.add(candidate.identity)

    async def _send(self, path: Path, found: Found) -> Status:
        """C-STORE with a few attempts over what may pass: a lost association, an archive out of resources."""
        instance = OutgoingInstance(
            found.sop_class_uid,
            found.sop_instance_uid,
            found.transfer_syntax_uid,
            lambda: _read(path, found.offset),
        )
        delay = self._work.target.first_delay
        for attempt in range(1, ATTEMPTS + 1):
            try:
                association = await self._fitting((found.sop_class_uid, (found.transfer_syntax_uid,)))
                status = await association.store(instance)
            except DimseError as error:
                await self._close()
                if attempt == ATTEMPTS or (isinstance(error, ConnectionRefused) and not self._work.seen):
                    raise
            else:
                if status.code >> 8 != 0xA7 or attempt == ATTEMPTS:
                    return status
            await asyncio.sleep(delay)
            delay *= 2
        raise AssertionError("the last attempt returns or raises")

    async def _fitting(self, context: Context) -> RequestorAssociation:
        """An open association on which the context was proposed, with all others met so far."""
        if self._association is not None and self._association.is_open and context in self._proposed:
            return self._association
        await self._close()
        known = self._work.contexts
        known.pop(context, None)
        known[context] = None  # the newest last
        while len(known) > MOST_CONTEXTS:
            del known[next(iter(known))]
        self._proposed = set(known)
        target = self._work.target
        self._association = await self._stack.enter_async_context(
            connect(
                target.host,
                target.port,
                called_ae_title=target.called_ae_title,
                calling_ae_title=target.calling_ae_title,
                contexts=list(known),
            )
        )
        return self._association

    async def _close(self) -> None:
        self._association = None
        # An association that is lost has nothing to release any more.
        with contextlib.suppress(DimseError, OSError):
            await self._stack.aclose()


async def _read(path: Path, offset: int) -> AsyncIterator[bytes]:
    with path.open("rb") as file:
        file.seek(offset)
        while piece := await asyncio.to_thread(file.read, _PIECE):
            yield piece
