"""Studies become stable after a quiet period, and open again: both are told once per revision."""

from __future__ import annotations

import uuid
from datetime import timedelta

import structlog

from libs.common.bus.port import Bus
from libs.common.events import StudyChanged, StudyStable
from services.indexing.config import IndexingSettings
from services.indexing.handlers.promise import NAMESPACE, Index
from services.indexing.model import Document

log = structlog.get_logger()


def _study_event_id(what: str, study: Document, revision: int) -> str:
    """The same for every attempt to tell the same, so that who hears it twice can know."""
    return str(uuid.uuid5(NAMESPACE, f"{what} {study['_id']} {study['created_at'].isoformat()} {revision}"))


def study_changed(study: Document) -> StudyChanged:
    """The fact that a study which was announced as stable no longer is what was announced."""
    revision = study["stable_revision"]
    return StudyChanged(
        id=_study_event_id("changed", study, revision),
        study_instance_uid=study["_id"],
        instance_count=study["instance_count"],
        revision=revision,
    )


async def announce_quiet_studies(*, index: Index, bus: Bus, settings: IndexingSettings) -> int:
    """Tell of every study for which nothing arrived in the quiet period, each revision once; gives their number.

    A study is leased while it is announced: a process that dies in between leaves it to another, which tells the same
    revision under the same event id. Raises Unavailable.
    """
    await _tell_untold(index=index, bus=bus)
    count = 0
    token = str(uuid.uuid4())
    quiet, lease = timedelta(seconds=settings.quiet_seconds), timedelta(seconds=settings.lease_seconds)
    while (study := await index.claim_quiet_study(quiet, lease, token)) is not None:
        revision = study["stable_revision"] + 1
        await bus.publish(
            StudyStable(
                id=_study_event_id("stable", study, revision),
                study_instance_uid=study["_id"],
                instance_count=study["instance_count"],
                series_count=study["series_count"],
                size=study["size"],
                revision=revision,
            )
        )
        now = await index.announced(study, token)
        if now is not None and not now["stable"]:
            await bus.publish(study_changed(now))
            await index.change_told(now)
        count += 1
    if count:
        log.info("study.stable", count=count)
    return count


async def _tell_untold(*, index: Index, bus: Bus) -> None:
    """Tell of changes whose process died between writing and telling."""
    for study in await index.untold_changes(timedelta(seconds=5)):
        await bus.publish(study_changed(study))
        await index.change_told(study)
