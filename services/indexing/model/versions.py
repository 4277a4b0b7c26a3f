"""The versions of one instance: which one is current, which were replaced, which refused, in any order of arrival."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime

from libs.common.events import InstanceStored, ObjectReference
from services.indexing.model.documents import Document, Found

ELSEWHERE = "the instance belongs to another study or series"
"""Why a version is refused that names other parents than the first one."""


def version_of(found: Found) -> Document:
    event = found.event
    return {
        "reference": event.reference.model_dump(),
        "stored_at": found.stored_at,
        # When these bytes were last sent to replace what is there; never, for the other policies.
        "last_stored_at": found.stored_at if event.on_conflict == "replace" else None,
        "last_event_id": event.id if event.on_conflict == "replace" else "",
        "status": "current",
        "reason": "",
        "study_instance_uid": event.study_instance_uid,
        "series_instance_uid": event.series_instance_uid,
        "sop_class_uid": event.sop_class_uid,
        "on_conflict": event.on_conflict,
        "calling_ae_title": event.calling_ae_title,
        "source": event.source,
        "site": event.site,
        "event_id": event.id,
    }


def last_stored(version: Document) -> datetime:
    """When the version last arrived in a way that counts."""
    moment: datetime = version["last_stored_at"] or version["stored_at"]
    return moment


def with_version(versions: Iterable[Document], version: Document) -> list[Document]:
    """The versions with one more. The same bytes at the same place are one version, which can be stored again."""
    by_key = {known["reference"]["key"]: known for known in versions}
    key = version["reference"]["key"]
    known = by_key.get(key)
    if known is None:
        by_key[key] = version
    else:
        first = min(known, version, key=lambda v: (v["stored_at"], v["event_id"]))
        last = max(known, version, key=lambda v: (v["last_stored_at"] is not None, last_stored(v), v["last_event_id"]))
        by_key[key] = first | {name: last[name] for name in ("last_stored_at", "last_event_id")}
    return list(by_key.values())


def settle(versions: Iterable[Document]) -> tuple[list[Document], Document]:
    """Every version with its status, in the order in which they were first stored, and the current one.

    The first stored decides the study and series; a later one from elsewhere is refused. A later one with the policy
    ``replace`` becomes current, with ``keep`` or ``reject`` it is refused. A version that was replaced and is then
    sent again is current again.
    """
    ordered = [dict(v) for v in sorted(versions, key=lambda v: (v["stored_at"], v["reference"]["key"]))]
    moments = [(v["stored_at"], v["reference"]["key"], v) for v in ordered]
    moments += [(last_stored(v), v["reference"]["key"], v) for v in ordered if last_stored(v) > v["stored_at"]]
    moments.sort(key=lambda moment: moment[:2])
    current = ordered[0]
    parents = (current["study_instance_uid"], current["series_instance_uid"])
    for version in ordered:
        version |= {"status": "", "reason": ""}
    current["status"] = "current"
    for moment, _, version in moments:
        if version is current:
            continue
        again = moment > version["stored_at"]
        if (version["study_instance_uid"], version["series_instance_uid"]) != parents:
            version |= {"status": "refused", "reason": ELSEWHERE}
        elif version["on_conflict"] != "replace" and not again:
            policy = version["on_conflict"]
            version |= {"status": "refused", "reason": f"another version was stored before (policy {policy})"}
        else:
            current["status"] = "replaced"
            version |= {"status": "current", "reason": ""}
            current = version
    return ordered, current


def event_of(sop_instance_uid: str, version: Document) -> InstanceStored:
    """The event that once told of a version."""
    return InstanceStored(
        id=version["event_id"],
        time=version["stored_at"],
        site=version["site"],
        study_instance_uid=version["study_instance_uid"],
        series_instance_uid=version["series_instance_uid"],
        sop_instance_uid=sop_instance_uid,
        sop_class_uid=version["sop_class_uid"],
        reference=ObjectReference.model_validate(version["reference"]),
        calling_ae_title=version["calling_ae_title"],
        source=version["source"],
        on_conflict=version["on_conflict"],
    )
