"""The story of an instance that arrives: looked at, wrapped as a file, made durable, told to the others."""

from __future__ import annotations

import asyncio
import hashlib
import tempfile
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, Protocol

from libs.common.bus.port import Bus
from libs.common.config import Settings
from libs.common.dicom.part10 import build_file_meta
from libs.common.dicom.uids import clean_uid, is_usable_uid
from libs.common.errors import Invalid, Unavailable
from libs.common.events import InstanceRejected, InstanceStored, ObjectReference
from libs.common.objects.port import Content, Objects
from libs.dimse import Payload, StoreRequest
from services.ingest.config import IngestSettings
from services.ingest.model.placing import check_identity, object_key, quarantine_key, resolve_site
from services.ingest.model.refusal import CannotUnderstand, DoesNotMatch, Duplicate
from services.ingest.model.scan import Identity, NeedMore, scan

_COPY = 1 << 20

Piece = bytes | bytearray | memoryview


@dataclass(frozen=True)
class Quarantined:
    """What is remembered of something refused. ``sha256`` is of its bytes as they came."""

    id: str
    reason: str
    received_at: datetime
    key: str
    size: int
    sha256: str
    sop_class_uid: str
    sop_instance_uid: str
    transfer_syntax_uid: str
    calling_ae_title: str
    called_ae_title: str
    host: str
    site: str
    correlation_id: str
    source: Literal["dimse", "stow", "import"] = "dimse"


class Quarantine(Protocol):
    """The list of what was refused and kept."""

    async def add(self, entry: Quarantined) -> None:
        """Remember the entry; one with the same id is replaced. Raises Unavailable."""


class CurrentVersions(Protocol):
    """What the image index knows of an instance."""

    async def current_digest(self, sop_instance_uid: str) -> str | None:
        """The SHA-256 of the current version, None when the instance is not there. Raises Unavailable."""


@dataclass(frozen=True)
class Shelves:
    """What ``store_instance`` works with."""

    settings: Settings
    ingest: IngestSettings
    objects: Objects
    bus: Bus
    quarantine: Quarantine
    versions: CurrentVersions


async def store_instance(request: StoreRequest, shelves: Shelves) -> ObjectReference:
    """Keep the instance of a C-STORE and tell that it is here; both are durable on return. Safe to repeat.

    Raises DoesNotMatch or CannotUnderstand for unusable data, which then is in quarantine; Duplicate by policy;
    Unavailable when the store, the bus or, where it is needed, the database is away.
    """
    caller = request.caller
    site = resolve_site(
        shelves.settings,
        called_ae_title=caller.called_ae_title,
        calling_ae_title=caller.calling_ae_title,
        host=caller.host,
    )
    try:
        identity = await identify(request.dataset, request.transfer_syntax_uid, shelves.ingest)
        check_identity(identity, sop_class_uid=request.sop_class_uid, sop_instance_uid=request.sop_instance_uid)
        meta = build_file_meta(identity.sop_class_uid, identity.sop_instance_uid, request.transfer_syntax_uid)
    except Invalid as refusal:
        await _set_aside(request, shelves, site, str(refusal))
        raise
    reference = await _keep(request, identity, meta, shelves)
    await shelves.bus.publish(
        InstanceStored(
            correlation_id=caller.association_id,
            site=site,
            study_instance_uid=identity.study_instance_uid,
            series_instance_uid=identity.series_instance_uid,
            sop_instance_uid=identity.sop_instance_uid,
            sop_class_uid=identity.sop_class_uid,
            reference=reference,
            calling_ae_title=caller.calling_ae_title,
            called_ae_title=caller.called_ae_title,
            on_conflict=shelves.ingest.on_conflict,
        )
    )
    return reference


async def identify(dataset: Payload, transfer_syntax_uid: str, limits: IngestSettings) -> Identity:
    """The UIDs in the head of an encoded dataset. Raises CannotUnderstand, or DoesNotMatch when they come too late."""
    length = limits.head_bytes
    while True:
        head = await asyncio.to_thread(dataset.head, length) if dataset.path is not None else dataset.head(length)
        complete = len(head) >= dataset.size
        try:
            # A dataset is inflated or long only where something is unusual: not worth a thread each time.
            if len(head) <= limits.head_bytes:
                return scan(head, transfer_syntax_uid, complete=complete, max_inflated=limits.max_head_bytes)
            return await asyncio.to_thread(
                scan, head, transfer_syntax_uid, complete=complete, max_inflated=limits.max_head_bytes
            )
        except NeedMore:
            if complete or length >= limits.max_head_bytes:
                raise DoesNotMatch(f"the UIDs are not within the first {length} bytes of the dataset") from None
            length = min(length * 8, limits.max_head_bytes)
        except Invalid as error:
            raise CannotUnderstand(str(error)) from None


async def _keep(request: StoreRequest, identity: Identity, meta: bytes, shelves: Shelves) -> ObjectReference:
    """Write the Part 10 object; durable on return. Memory stays flat for a spooled dataset."""
    dataset = request.dataset
    if dataset.path is None:
        pieces: list[Piece] = [meta, *dataset.pieces]
        sha256 = await digest(pieces, inline=shelves.ingest.hash_inline_bytes)
        return await _put(request, identity, pieces, sha256, len(meta) + dataset.size, shelves)
    try:
        wrapped, sha256 = await asyncio.to_thread(_wrap, meta, dataset.path)
    except OSError as error:
        raise Unavailable(f"no room to prepare a large instance ({error.strerror})") from error
    try:
        return await _put(request, identity, wrapped, sha256, len(meta) + dataset.size, shelves)
    finally:
        await asyncio.to_thread(wrapped.unlink, missing_ok=True)


async def _put(
    request: StoreRequest, identity: Identity, content: Content, sha256: str, length: int, shelves: Shelves
) -> ObjectReference:
    if shelves.ingest.on_conflict == "reject":
        current = await shelves.versions.current_digest(identity.sop_instance_uid)
        if current is not None and current != sha256:
            raise Duplicate("another version of this instance is stored, and the policy is to refuse a second one")
    key = object_key(identity, sha256)
    # The digest of what is in memory was made from the same memory: checking it again would only cost. What went
    # through a file is checked.
    await shelves.objects.put(key, content, sha256=sha256 if isinstance(content, Path) else None)
    return ObjectReference(key=key, length=length, sha256=sha256, transfer_syntax_uid=request.transfer_syntax_uid)


async def digest(pieces: Sequence[Piece], *, inline: int) -> str:
    """The SHA-256 (hex) of the pieces in a row; in a thread when they are more than ``inline`` bytes."""
    if sum(map(len, pieces)) <= inline:
        return _digest(pieces)
    return await asyncio.to_thread(_digest, pieces)


def _digest(pieces: Sequence[Piece]) -> str:
    total = hashlib.sha256()
    for piece in pieces:
        total.update(piece)
    return total.hexdigest()


def _wrap(meta: bytes, dataset: Path) -> tuple[Path, str]:
    """A new file beside the spooled dataset with the file meta before it, and its SHA-256 (hex)."""
    total = hashlib.sha256(meta)
    with (
        dataset.open("rb") as source,
        tempfile.NamedTemporaryFile(dir=dataset.parent, suffix=".dcm", delete=False) as target,
    ):
        path = Path(target.name)
        try:
            target.write(meta)
            while piece := source.read(_COPY):
                total.update(piece)
                target.write(piece)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
    return path, total.hexdigest()


def _digest_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


async def _set_aside(request: StoreRequest, shelves: Shelves, site: str, reason: str) -> None:
    """Keep unusable data in quarantine, with its reason, where a person can see it.

    The id follows from the data and the command: a sender that tries again and again fills one place.
    """
    dataset, caller = request.dataset, request.caller
    if dataset.path is not None:
        sha256 = await asyncio.to_thread(_digest_file, dataset.path)
    else:
        sha256 = await digest(dataset.pieces, inline=shelves.ingest.hash_inline_bytes)
    sop_class_uid, sop_instance_uid = (
        uid if is_usable_uid(uid) else "" for uid in map(clean_uid, (request.sop_class_uid, request.sop_instance_uid))
    )
    name = "|".join((sha256, request.sop_class_uid, request.sop_instance_uid, request.transfer_syntax_uid))
    quarantine_id = str(uuid.uuid5(uuid.NAMESPACE_OID, name))
    key = quarantine_key(quarantine_id)
    await shelves.objects.put(key, dataset.path if dataset.path is not None else dataset.pieces)
    await shelves.quarantine.add(
        Quarantined(
            id=quarantine_id,
            reason=reason,
            received_at=datetime.now(UTC),
            key=key,
            size=dataset.size,
            sha256=sha256,
            sop_class_uid=sop_class_uid,
            sop_instance_uid=sop_instance_uid,
            transfer_syntax_uid=request.transfer_syntax_uid,
            calling_ae_title=caller.calling_ae_title,
            called_ae_title=caller.called_ae_title,
            host=caller.host,
            site=site,
            correlation_id=caller.association_id,
        )
    )
    await shelves.bus.publish(
        InstanceRejected(
            correlation_id=caller.association_id,
            site=site,
            quarantine_id=quarantine_id,
            reason=reason,
            sop_instance_uid=sop_instance_uid,
            sop_class_uid=sop_class_uid,
        )
    )
