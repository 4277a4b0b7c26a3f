"""Instances become findable: headers are read back from the store, documents written, and told."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import structlog

from libs.common.bus.port import Bus
from libs.common.config import Settings
from libs.common.dicom.header import read_header
from libs.common.dicom.part10 import Truncated
from libs.common.errors import Invalid
from libs.common.events import Event, InstanceIndexed, InstanceRejected, InstanceStored
from libs.common.objects.port import Objects
from services.indexing.config import IndexingSettings
from services.indexing.handlers.announce import study_changed
from services.indexing.handlers.promise import NAMESPACE, Index
from services.indexing.model import (
    Collection,
    Document,
    Found,
    HeaderNeeded,
    State,
    Verdict,
    apply,
    describe,
    drop_empty,
    whole_milliseconds,
)

log = structlog.get_logger()


@dataclass(frozen=True)
class Reading:
    """How headers are read, and which issuer an id without one gets at each site."""

    settings: IndexingSettings
    issuers: Mapping[str, str]
    default_site: str

    @classmethod
    def of(cls, settings: Settings, indexing: IndexingSettings) -> Reading:
        """From the settings of the process and of the service."""
        issuers = {site.code: site.issuer_of_patient_id or site.code for site in settings.sites}
        return cls(indexing, issuers, settings.site)

    def issuer(self, site: str) -> str:
        """The issuer for ids that come without one from ``site``."""
        site = site or self.default_site
        return self.issuers.get(site, site)


@dataclass(frozen=True)
class Rejection:
    """An object whose header cannot be made into documents."""

    event: InstanceStored
    reason: str


async def read_found(event: InstanceStored, *, objects: Objects, reading: Reading) -> Found | Rejection:
    """The header of a stored object, read with as few bytes as it takes. Raises NotFound, Unavailable."""
    reference, settings = event.reference, reading.settings
    size = min(settings.header_bytes, reference.length)
    while True:
        content = await objects.get(reference.key, reference.offset, size)
        try:
            header = read_header(content, max(reference.length, len(content)))
            return describe(event, header, reading.issuer(event.site))
        except Truncated as more:
            if len(content) < size:
                return Rejection(event, "the object is shorter than it was when it was stored")
            if size >= settings.max_header_bytes:
                return Rejection(event, f"the header is longer than {settings.max_header_bytes} bytes")
            wanted = max(more.needed + settings.header_bytes, size * 2)
            size = min(wanted, reference.length, settings.max_header_bytes)
        except Invalid as error:
            return Rejection(event, str(error))


async def _read_all(events: Sequence[InstanceStored], *, objects: Objects, reading: Reading) -> list[Found | Rejection]:
    room = asyncio.Semaphore(reading.settings.parallel_reads)

    async def one(event: InstanceStored) -> Found | Rejection:
        async with room:
            return await read_found(event, objects=objects, reading=reading)

    return list(await asyncio.gather(*(one(event) for event in events)))


async def write_found(
    found: Sequence[Found], *, objects: Objects, index: Index, reading: Reading, silent: bool = False
) -> tuple[Verdict, list[Document]]:
    """Write the documents of a batch in one transaction; gives what it did and the studies that opened again."""
    known = {one.event.reference.key: one for one in found}
    now = whole_milliseconds(datetime.now(UTC))
    wanted: set[tuple[Collection, str]] = set()
    for one in found:
        wanted |= {
            ("instances", one.event.sop_instance_uid),
            ("series", one.event.series_instance_uid),
            ("studies", one.event.study_instance_uid),
            ("patients", one.patient_key),
        }

    def decide(state: State) -> tuple[Verdict, list[Document]]:
        verdict = Verdict(silent=silent)
        for one in found:
            apply(state, one, known, one.stored_at if silent else now, verdict)
        drop_empty(state)
        studies = (state.get("studies", identity) for identity in sorted(verdict.reopened))
        return verdict, [study for study in studies if study is not None]

    while True:
        try:
            return await index.change(wanted, decide)
        except HeaderNeeded as needed:
            earlier = await read_found(needed.event, objects=objects, reading=reading)
            if isinstance(earlier, Rejection):
                raise Invalid(f"an earlier version of the instance cannot be read: {earlier.reason}") from None
            known[needed.event.reference.key] = earlier


async def index_instances(
    events: Sequence[InstanceStored], *, objects: Objects, index: Index, bus: Bus, reading: Reading
) -> None:
    """Read the headers back from the store, write their documents, tell what can be found. Safe to repeat.

    A header that cannot be read goes to quarantine and is told; the others of the batch are indexed. Raises
    Unavailable when the store, the database or the bus is away, NotFound when an object is not in the store.
    """
    read = await _read_all(events, objects=objects, reading=reading)
    told: list[Event] = []
    for one in read:
        if isinstance(one, Rejection):
            told.append(await keep_aside(one, objects=objects, index=index))
    found = [one for one in read if isinstance(one, Found)]
    reopened: list[Document] = []
    if found:
        verdict, reopened = await write_found(found, objects=objects, index=index, reading=reading)
        for outcome in verdict.outcomes:
            if outcome.indexed:
                told.append(_indexed(outcome.event, outcome.new))
    told += [study_changed(study) for study in reopened]
    if told:
        await bus.publish(*told)
    for study in reopened:
        await index.change_told(study)
    if found:
        log.info("instance.indexed", count=len(found), rejected=len(read) - len(found))


def _indexed(event: InstanceStored, new: bool) -> InstanceIndexed:
    return InstanceIndexed(
        id=str(uuid.uuid5(NAMESPACE, f"indexed {event.id}")),
        correlation_id=event.correlation_id,
        site=event.site,
        traceparent=event.traceparent,
        study_instance_uid=event.study_instance_uid,
        series_instance_uid=event.series_instance_uid,
        sop_instance_uid=event.sop_instance_uid,
        sop_class_uid=event.sop_class_uid,
        reference=event.reference,
        new=new,
    )


async def keep_aside(rejection: Rejection, *, objects: Objects, index: Index) -> InstanceRejected:
    """Copy a rejected object into quarantine with its reason; gives the event that tells of it."""
    event = rejection.event
    identity = str(uuid.uuid5(NAMESPACE, f"quarantine {event.reference.key}"))
    key = f"quarantine/{identity}.bin"
    await objects.copy(event.reference.key, key)
    await index.quarantine(
        {
            "_id": identity,
            "reason": rejection.reason,
            "received_at": event.time,
            "calling_ae_title": event.calling_ae_title,
            "called_ae_title": event.called_ae_title,
            "site": event.site,
            "source": event.source,
            "sop_class_uid": event.sop_class_uid,
            "sop_instance_uid": event.sop_instance_uid,
            "transfer_syntax_uid": event.reference.transfer_syntax_uid,
            "key": key,
        }
    )
    log.warning("instance.rejected", quarantine_id=identity, reason=rejection.reason)
    return InstanceRejected(
        id=str(uuid.uuid5(NAMESPACE, f"rejected {event.id}")),
        correlation_id=event.correlation_id,
        site=event.site,
        quarantine_id=identity,
        reason=rejection.reason,
        sop_instance_uid=event.sop_instance_uid,
        sop_class_uid=event.sop_class_uid,
    )
