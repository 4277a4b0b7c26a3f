"""Every fact the services tell each other. Identifiers and sizes only: no patient data, no pixels.

On the wire an event is a CloudEvents 1.0 JSON document (structured mode); the routing key is the event's
``key``, which carries its version. A new field with a default is free; any other change is a new class with
the next version, and both are published until the last old queue is empty.
"""

from __future__ import annotations

import uuid
from datetime import UTC, datetime
from typing import Any, ClassVar, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from libs.common.errors import Invalid


def _now() -> datetime:
    return datetime.now(UTC)


class ObjectReference(BaseModel):
    """Where the bytes of one instance are. ``offset`` and ``length`` let many instances share one object later."""

    model_config = ConfigDict(frozen=True)

    key: str
    offset: int = 0
    length: int
    sha256: str
    transfer_syntax_uid: str


class Event(BaseModel):
    """What all events share. ``correlation_id`` follows one association, message or request through everything."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    key: ClassVar[str]

    id: str = Field(default_factory=lambda: str(uuid.uuid4()))
    time: AwareDatetime = Field(default_factory=_now)
    correlation_id: str = ""
    site: str = ""
    traceparent: str | None = None


class InstanceStored(Event):
    """The bytes of an instance are durable in the object store."""

    key: ClassVar[str] = "instance.stored.v1"

    study_instance_uid: str
    series_instance_uid: str
    sop_instance_uid: str
    sop_class_uid: str
    reference: ObjectReference
    calling_ae_title: str = ""
    called_ae_title: str = ""
    source: Literal["dimse", "stow", "import", "rebuild"] = "dimse"
    on_conflict: Literal["replace", "keep", "reject"] = "replace"


class InstanceRejected(Event):
    """Something could not be accepted and is kept in quarantine with its reason."""

    key: ClassVar[str] = "instance.rejected.v1"

    quarantine_id: str
    reason: str
    sop_instance_uid: str = ""
    sop_class_uid: str = ""


class InstanceIndexed(Event):
    """An instance can be found. ``new`` is false when another version of it was there before."""

    key: ClassVar[str] = "instance.indexed.v1"

    study_instance_uid: str
    series_instance_uid: str
    sop_instance_uid: str
    sop_class_uid: str
    reference: ObjectReference
    new: bool = True


class StudyStable(Event):
    """No instance of the study has arrived for the quiet period (or its sender said that it is complete)."""

    key: ClassVar[str] = "study.stable.v1"

    study_instance_uid: str
    instance_count: int
    series_count: int
    size: int
    reason: Literal["quiet", "mpps", "sender"] = "quiet"
    revision: int = 1


class StudyChanged(Event):
    """A study that had been announced as stable has changed: late or replaced instances."""

    key: ClassVar[str] = "study.changed.v1"

    study_instance_uid: str
    instance_count: int
    revision: int


def _leaves(base: type[Event]) -> dict[str, type[Event]]:
    found = {cls.key: cls for cls in base.__subclasses__()}
    for cls in base.__subclasses__():
        found.update(_leaves(cls))
    return found


def known_events() -> dict[str, type[Event]]:
    """Every event class by its routing key."""
    return _leaves(Event)


def to_cloudevent(event: Event) -> dict[str, Any]:
    """The CloudEvents 1.0 document of an event (structured JSON mode)."""
    data = event.model_dump(mode="json", exclude={"id", "time", "correlation_id", "site", "traceparent"})
    document: dict[str, Any] = {
        "specversion": "1.0",
        "id": event.id,
        "source": f"/sagittal/{event.site}" if event.site else "/sagittal",
        "type": event.key,
        "time": event.time.isoformat(),
        "datacontenttype": "application/json",
        "correlationid": event.correlation_id,
        "site": event.site,
        "data": data,
    }
    if event.traceparent:
        document["traceparent"] = event.traceparent
    return document


def from_cloudevent(document: Any) -> Event:
    """The event of a CloudEvents document. Raises Invalid when it is not one of ours or does not fit its class."""
    if not isinstance(document, dict) or not isinstance(document.get("data"), dict):
        raise Invalid("not a CloudEvents document with a JSON object as data")
    cls = known_events().get(str(document.get("type")))
    if cls is None:
        raise Invalid(f"unknown event type {document.get('type')!r}")
    envelope = {
        "id": document.get("id"),
        "time": document.get("time"),
        "correlation_id": document.get("correlationid", ""),
        "site": document.get("site", ""),
        "traceparent": document.get("traceparent"),
    }
    try:
        return cls.model_validate({**document["data"], **envelope})
    except ValidationError as error:
        fields = ", ".join(".".join(map(str, e["loc"])) + ": " + e["type"] for e in error.errors(include_input=False))
        raise Invalid(f"event {cls.key} does not fit its schema ({fields})") from None
