"""Stored instances for tests of indexing: a dataset, the object it became and the event that told of it."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

from libs.common.dicom.header import read_header
from libs.common.events import InstanceStored, ObjectReference
from services.indexing.config import IndexingSettings
from services.indexing.handlers import Reading
from services.indexing.model import Document, Found, NotLoaded, State, Verdict, apply, describe, drop_empty
from tests.builders import create_file, create_instance

START = datetime(2024, 2, 1, 12, tzinfo=UTC)
Policy = Literal["replace", "keep", "reject"]


def reading(**settings: Any) -> Reading:
    """How the tests read headers: site MAIN issues ids as HOSPITAL."""
    return Reading(IndexingSettings(**settings), {"MAIN": "HOSPITAL"}, "MAIN")


def stored(
    *, minute: float = 0, on_conflict: Policy = "replace", site: str = "MAIN", **keywords: Any
) -> tuple[InstanceStored, bytes]:
    """The event and the object of an instance that was stored ``minute`` minutes after the start."""
    dataset = create_instance(**keywords)
    content = create_file(**keywords)
    digest = hashlib.sha256(content).hexdigest()
    study, series = str(dataset.StudyInstanceUID), str(dataset.SeriesInstanceUID)
    instance = str(dataset.SOPInstanceUID)
    event = InstanceStored(
        time=START + timedelta(minutes=minute),
        site=site,
        study_instance_uid=study,
        series_instance_uid=series,
        sop_instance_uid=instance,
        sop_class_uid=str(dataset.SOPClassUID),
        reference=ObjectReference(
            key=f"instances/{study}/{series}/{instance}/{digest[:16]}.dcm",
            length=len(content),
            sha256=digest,
            transfer_syntax_uid=str(dataset.file_meta.TransferSyntaxUID),
        ),
        calling_ae_title="MODALITY",
        on_conflict=on_conflict,
    )
    return event, content


def found(**keywords: Any) -> Found:
    """What ``describe`` makes of such an instance."""
    event, content = stored(**keywords)
    return describe(event, read_header(content), "HOSPITAL")


class Archive:
    """The documents in memory; ``take`` applies a batch as one transaction does."""

    def __init__(self) -> None:
        self.documents: dict[tuple[str, str], Document] = {}
        self.known: dict[str, Found] = {}

    def take(self, *batch: Found, silent: bool = False) -> Verdict:
        for one in batch:
            self.known[one.event.reference.key] = one
        wanted: set[Any] = set()
        while True:
            state, verdict = State(), Verdict(silent=silent)
            for collection, identity in wanted:
                state.load(collection, identity, self.documents.get((collection, identity)))
            try:
                for one in batch:
                    apply(state, one, self.known, START, verdict)
                drop_empty(state)
                break
            except NotLoaded as missing:
                wanted.add((missing.collection, missing.identity))
        for collection, identity in state.written:
            document = state.get(collection, identity)
            if document is None:
                self.documents.pop((collection, identity), None)
            else:
                self.documents[collection, identity] = document
        return verdict

    def all(self, collection: str) -> list[Document]:
        return [document for (name, _), document in sorted(self.documents.items()) if name == collection]

    def one(self, collection: str) -> Document:
        (document,) = self.all(collection)
        return document
