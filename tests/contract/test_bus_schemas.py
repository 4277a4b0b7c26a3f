"""The wire format of every event is recorded, so that changing it shows as a changed file in review.

To record a new event (or, after thinking of who still sends the old one, a changed one):
``SAGITTAL_RECORD_SCHEMAS=1 pytest tests/contract/test_bus_schemas.py``.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import jsonschema
import pytest
from pydantic import ValidationError

from libs.common.bus.delivery import decode, encode
from libs.common.errors import Invalid
from libs.common.events import Event, InstanceStored, ObjectReference, known_events, to_cloudevent

SCHEMAS = Path(__file__).parent / "schemas"
CATALOGUE = Path(__file__).parents[2] / "docs" / "events.md"


def ours() -> dict[str, type[Event]]:
    """The events of the system, without those that tests define for themselves."""
    return {key: cls for key, cls in known_events().items() if cls.__module__ == "libs.common.events"}


@pytest.mark.parametrize("key", sorted(ours()))
def test_schema_is_as_recorded(key: str) -> None:
    schema = ours()[key].model_json_schema(mode="serialization")
    schema.pop("description", None)
    path = SCHEMAS / f"{key}.json"
    if os.environ.get("SAGITTAL_RECORD_SCHEMAS"):
        path.write_text(json.dumps(schema, indent=2, sort_keys=True) + "\n")
    assert path.exists(), f"{path.name} is not recorded"
    assert json.loads(path.read_text()) == schema


def test_no_schema_without_an_event() -> None:
    assert {path.stem for path in SCHEMAS.glob("*.json")} == set(ours())


@pytest.mark.parametrize("key", sorted(ours()))
def test_catalogue_names_every_event(key: str) -> None:
    section = CATALOGUE.read_text().partition(f"## {key}\n")[2].partition("\n## ")[0]
    assert section, f"docs/events.md has no section {key}"
    for name in ours()[key].model_fields.keys() - Event.model_fields.keys():
        assert f"`{name}`" in section, f"docs/events.md does not tell what {key} has in {name}"


def stored() -> InstanceStored:
    reference = ObjectReference(key="instances/1/2/3/00.dcm", length=10, sha256="00", transfer_syntax_uid="1.2")
    return InstanceStored(
        correlation_id="c",
        site="MAIN",
        study_instance_uid="1",
        series_instance_uid="2",
        sop_instance_uid="3",
        sop_class_uid="4",
        reference=reference,
    )


def test_event_survives_the_wire() -> None:
    event = stored()
    assert decode(encode(event)) == event


def test_event_on_the_wire_fits_its_recorded_schema() -> None:
    event = stored()
    document = to_cloudevent(event)
    schema = json.loads((SCHEMAS / f"{event.key}.json").read_text())
    jsonschema.validate({**document["data"], "id": document["id"], "time": document["time"]}, schema)


def test_field_added_later_does_not_hinder_an_older_reader() -> None:
    document = to_cloudevent(stored())
    document["data"]["invented_later"] = 1
    assert decode(json.dumps(document).encode()).key == InstanceStored.key


@pytest.mark.parametrize("body", [b"", b"\xff", b"[]", b"{}", b'{"type":"no.such.v1","data":{}}'])
def test_what_is_no_event_is_invalid(body: bytes) -> None:
    with pytest.raises(Invalid):
        decode(body)


def test_events_are_immutable() -> None:
    with pytest.raises(ValidationError):
        stored().sop_instance_uid = "9"  # type: ignore[misc]
