"""The image index made again from the object store, which is the truth."""

from __future__ import annotations

import asyncio
import hashlib
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import structlog

from libs.common.dicom.part10 import FileMeta, Truncated, split_part10
from libs.common.errors import Invalid, NotFound
from libs.common.events import InstanceStored, ObjectReference
from libs.common.objects.port import Objects, ObjectStat
from services.indexing.handlers.index import Reading, Rejection, keep_aside, read_found, write_found
from services.indexing.handlers.promise import NAMESPACE, Index
from services.indexing.model import Document, Found

log = structlog.get_logger()
PREFIX = "instances/"
_META_BYTES = 4096


async def rebuild_index(
    *, objects: Objects, index: Index, reading: Reading, progress: Callable[[int], None] | None = None
) -> int:
    """Drop patients, studies, series and instances and make them again; gives the number of objects read.

    Nothing is told to other services, who were told when the objects came; instances that arrive meanwhile are
    indexed as always. May be interrupted and repeated. ``progress`` gets the number of objects done. Objects that
    cannot be read go to quarantine. Raises Unavailable.
    """
    began = datetime.now(UTC)
    await index.begin_rebuild()
    done = 0
    async for batch in _batches(objects, reading.settings.batch_items):
        done += len(batch)
        await _take(batch, objects=objects, index=index, reading=reading)
        if progress is not None:
            progress(done)
    await index.end_rebuild(began - timedelta(seconds=reading.settings.quiet_seconds))
    log.info("index.rebuilt", count=done)
    return done


async def _batches(objects: Objects, size: int) -> AsyncIterator[list[ObjectStat]]:
    """The objects study by study as the store lists them, within a study in the order in which they were written."""
    study, group = "", list[ObjectStat]()

    def cut() -> list[list[ObjectStat]]:
        ordered = sorted(group, key=lambda stat: (stat.modified, stat.key))
        return [ordered[start : start + size] for start in range(0, len(ordered), size)]

    async for stat in objects.list(PREFIX):
        folder = stat.key[: stat.key.find("/", len(PREFIX)) + 1]
        if folder != study:
            for batch in cut():
                yield batch
            study, group = folder, []
        group.append(stat)
    for batch in cut():
        yield batch


async def _take(batch: list[ObjectStat], *, objects: Objects, index: Index, reading: Reading) -> None:
    remembered = await index.remembered({_uids(stat.key)[2] for stat in batch})
    room = asyncio.Semaphore(reading.settings.parallel_reads)

    async def one(stat: ObjectStat) -> Found | Rejection | None:
        async with room:
            try:
                event, fault = await _derive(stat, remembered.get(stat.key), objects)
                return Rejection(event, fault) if fault else await read_found(event, objects=objects, reading=reading)
            except NotFound:
                return None  # deleted since it was listed

    read = await asyncio.gather(*(one(stat) for stat in batch))
    for rejection in read:
        if isinstance(rejection, Rejection):
            await keep_aside(rejection, objects=objects, index=index)
    first = [one for one in read if isinstance(one, Found)]
    again = [_stored_again(one, remembered.get(one.event.reference.key)) for one in first]
    found = sorted([*first, *(one for one in again if one is not None)], key=lambda one: one.stored_at)
    if found:
        await write_found(found, objects=objects, index=index, reading=reading, silent=True)


def _stored_again(found: Found, remembered: Document | None) -> Found | None:
    """The later event of a version that was replaced and then sent once more."""
    if remembered is None or remembered["last_event_id"] in ("", found.event.id):
        return None
    moment = remembered["last_stored_at"]
    event = found.event.model_copy(update={"id": remembered["last_event_id"], "time": moment, "on_conflict": "replace"})
    return replace(found, event=event, stored_at=moment)


def _uids(key: str) -> tuple[str, str, str]:
    parts = key[len(PREFIX) :].split("/")
    return (parts[0], parts[1], parts[2]) if len(parts) == 4 else ("", "", "")


async def _derive(stat: ObjectStat, remembered: Document | None, objects: Objects) -> tuple[InstanceStored, str]:
    """The event that told of the object when it was stored, and what is wrong with the object (empty: nothing)."""
    digest = hashlib.sha256()
    start = b""
    async for piece in objects.stream(stat.key):
        if len(start) < _META_BYTES:
            start += piece[: _META_BYTES - len(start)]
        digest.update(piece)
    meta, fault = FileMeta("", "", ""), ""
    try:
        meta, _ = split_part10(start)
    except (Truncated, Invalid) as error:
        fault = str(error)
    sha256 = digest.hexdigest()
    study, series, instance = _uids(stat.key)
    if not fault and stat.key.rpartition("/")[2].partition(".")[0] != sha256[:16]:
        fault = "the bytes of the object are not those that were stored under its name"
    known = remembered or {}
    event = InstanceStored(
        id=known.get("event_id") or str(uuid.uuid5(NAMESPACE, f"rebuilt {stat.key}")),
        time=known.get("stored_at") or stat.modified,
        site=known.get("site", ""),
        study_instance_uid=study,
        series_instance_uid=series,
        sop_instance_uid=instance,
        sop_class_uid=meta.sop_class_uid,
        reference=ObjectReference(
            key=stat.key, length=stat.size, sha256=sha256, transfer_syntax_uid=meta.transfer_syntax_uid
        ),
        calling_ae_title=known.get("calling_ae_title", ""),
        source=known.get("source", "rebuild"),
        on_conflict=known.get("on_conflict", "replace"),
    )
    return event, fault
