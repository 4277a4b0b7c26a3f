"""What a header becomes, and the documents that one transaction works on."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

from libs.common.dicom.dicom_json import Json, first, level_json
from libs.common.dicom.header import Header
from libs.common.dicom.levels import INSTANCE, PATIENT, SERIES, STUDY
from libs.common.dicom.uids import clean_uid
from libs.common.errors import Invalid
from libs.common.events import InstanceStored

Document = dict[str, Any]
Collection = Literal["patients", "studies", "series", "instances"]
COLLECTIONS: tuple[Collection, ...] = ("patients", "studies", "series", "instances")


@dataclass(frozen=True)
class Found:
    """What one stored object says, by level. ``study`` holds the attributes of patient and study together."""

    event: InstanceStored
    stored_at: datetime
    issuer: str
    patient_id: str
    patient_key: str
    modality: str
    patient: Json
    study: Json
    series: Json
    instance: Json
    problems: tuple[str, ...] = ()


class NotLoaded(Exception):
    """A rule needs a document that was not read yet."""

    def __init__(self, collection: Collection, identity: str) -> None:
        self.collection = collection
        self.identity = identity


class HeaderNeeded(Exception):
    """A version that was stored earlier counts again, so its header has to be read again."""

    def __init__(self, event: InstanceStored) -> None:
        self.event = event


class State:
    """The documents one transaction has read, and what became of them. ``None`` stands for: is not there."""

    def __init__(self) -> None:
        self._documents: dict[tuple[Collection, str], Document | None] = {}
        self._before: dict[tuple[Collection, str], bool] = {}
        self.written: set[tuple[Collection, str]] = set()

    def load(self, collection: Collection, identity: str, document: Document | None) -> None:
        """Tell what the database has."""
        self._documents[collection, identity] = document
        self._before[collection, identity] = document is not None

    def get(self, collection: Collection, identity: str) -> Document | None:
        """The document as it is now. Raises NotLoaded when nobody looked."""
        try:
            return self._documents[collection, identity]
        except KeyError:
            raise NotLoaded(collection, identity) from None

    def put(self, collection: Collection, document: Document) -> None:
        identity = document["_id"]
        self.get(collection, identity)
        self._documents[collection, identity] = document
        self.written.add((collection, identity))

    def drop(self, collection: Collection, identity: str) -> None:
        self.get(collection, identity)
        self._documents[collection, identity] = None
        self.written.add((collection, identity))

    def changes(self, collection: Collection) -> tuple[list[Document], list[Document], list[str]]:
        """``(inserted, replaced, deleted)`` of one collection."""
        inserted: list[Document] = []
        replaced: list[Document] = []
        deleted: list[str] = []
        for where, identity in sorted(self.written):
            if where != collection:
                continue
            document, existed = self._documents[where, identity], self._before[where, identity]
            if document is None:
                deleted += [identity] * existed
            else:
                (replaced if existed else inserted).append(document)
        return inserted, replaced, deleted


@dataclass
class Outcome:
    """What one event did. ``indexed``: it has to be told; ``new``: no version of the instance was there before."""

    event: InstanceStored
    indexed: bool = False
    new: bool = False


@dataclass
class Verdict:
    """What a batch did: an outcome per event, and the studies that were announced as stable and have changed."""

    outcomes: list[Outcome] = field(default_factory=list)
    reopened: set[str] = field(default_factory=set)
    silent: bool = False
    """A rebuild: what is found was told long ago, so studies neither open nor wait to be announced."""


def whole_milliseconds(moment: datetime) -> datetime:
    """The moment as the database keeps it, so that comparisons come out the same before and after writing."""
    moment = moment.astimezone(UTC)
    return moment.replace(microsecond=moment.microsecond // 1000 * 1000)


def describe(event: InstanceStored, header: Header, site_issuer: str) -> Found:
    """The documents' content from a header. Raises Invalid when the header contradicts the event."""
    patient, study = level_json(header, PATIENT), level_json(header, STUDY)
    series, instance = level_json(header, SERIES), level_json(header, INSTANCE)
    for json, tag, told, what in (
        (study, "0020000D", event.study_instance_uid, "Study Instance UID"),
        (series, "0020000E", event.series_instance_uid, "Series Instance UID"),
        (instance, "00080018", event.sop_instance_uid, "SOP Instance UID"),
        (instance, "00080016", event.sop_class_uid, "SOP Class UID"),
    ):
        if clean_uid(first(json, tag)) != told:
            raise Invalid(f"the header's {what} is not the one the object was stored under")
    patient_id = str(first(patient, "00100020") or "")
    issuer = str(first(patient, "00100021") or "") or site_issuer
    # Without an id nothing says that two studies are of one person, so each gets a patient of its own.
    key = f"{issuer}|{patient_id}" if patient_id else f"{issuer}||{event.study_instance_uid}"
    return Found(
        event=event,
        stored_at=whole_milliseconds(event.time),
        issuer=issuer,
        patient_id=patient_id,
        patient_key=key,
        modality=str(first(series, "00080060") or ""),
        patient=patient,
        study=patient | study,
        series=series,
        instance=instance,
        problems=tuple(dict.fromkeys(header.problems)),
    )
