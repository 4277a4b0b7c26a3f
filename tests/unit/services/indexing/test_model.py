"""The rules of the image index: the same documents whatever the order in which the instances are heard of."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from pydicom.uid import CTImageStorage, MRImageStorage

from libs.common.dicom.header import read_header
from libs.common.errors import Invalid
from services.indexing.model import Found, HeaderNeeded, describe
from tests.builders import uid
from tests.unit.services.indexing.stage import Archive, found, stored


def essence(archive: Archive) -> dict[Any, Any]:
    """What must not depend on the order: all but the times of writing and who was compared with whom."""
    volatile = {"updated_at", "created_at", "changes", "conflicts", "change_untold"}
    return {
        where: {key: value for key, value in document.items() if key not in volatile}
        for where, document in archive.documents.items()
        if where[0] != "patients"
    }


def test_a_header_becomes_documents_of_four_levels() -> None:
    archive = Archive()
    verdict = archive.take(found(PatientName="Müller^Jörg", SpecificCharacterSet="ISO_IR 100", InstanceNumber=7))
    assert [(o.indexed, o.new) for o in verdict.outcomes] == [(True, True)]
    patient, study = archive.one("patients"), archive.one("studies")
    series, instance = archive.one("series"), archive.one("instances")
    assert patient["_id"] == study["patient_key"] == series["patient_key"] == instance["patient_key"] == "HOSPITAL|P1"
    assert (patient["issuer"], patient["patient_id"]) == ("HOSPITAL", "P1")
    assert study["json"]["00100010"] == {"vr": "PN", "Value": [{"Alphabetic": "Müller^Jörg"}]}
    assert study["names"]["00100010"] == ["muller^jorg"]
    assert study["date_times"]["00080020"] == "20240131101500.000000" and study["times"]["00080030"] == "101500.000000"
    assert "00280010" in instance["json"] and "00280010" not in series["json"]
    assert series["json"]["00080060"]["Value"] == ["CT"] and series["modality"] == "CT"
    assert (study["instance_count"], study["series_count"], study["modalities"]) == (1, 1, ["CT"])
    assert study["size"] == series["size"] == instance["reference"]["length"]
    assert study["sop_classes"] == series["sop_classes"] == [str(CTImageStorage)]
    assert study["sites"] == ["MAIN"] and study["stable"] is False and study["stable_revision"] == 0
    assert instance["json"]["00200013"]["Value"] == [7]


def test_counts_are_of_instances_not_of_events() -> None:
    archive = Archive()
    batch = [found(InstanceNumber=n, SeriesNumber=s) for n in (1, 2, 3) for s in (1, 2)]
    archive.take(*batch)
    archive.take(*batch)
    archive.take(batch[0], batch[0])
    study = archive.one("studies")
    assert (study["instance_count"], study["series_count"], study["changes"]) == (6, 2, 6)
    assert study["size"] == sum(one.event.reference.length for one in batch)
    assert [series["instance_count"] for series in archive.all("series")] == [3, 3]


def test_the_same_event_is_told_again_and_the_same_bytes_are_not() -> None:
    archive = Archive()
    first = found()
    archive.take(first)
    assert archive.take(first).outcomes[0].indexed
    again = archive.take(found(minute=5)).outcomes[0]
    assert not again.indexed
    assert len(archive.one("instances")["versions"]) == 1


OTHER = uid("another study")
STORIES: dict[str, list[dict[str, Any]]] = {
    "replaced twice": [{"minute": n, "ImageComments": str(n) * n} for n in range(3)],
    "kept": [{"minute": n, "ImageComments": str(n), "on_conflict": "keep"} for n in range(3)],
    "kept, then replaced": [
        {"minute": 0, "ImageComments": "a", "on_conflict": "reject"},
        {"minute": 1, "ImageComments": "bb", "on_conflict": "keep"},
        {"minute": 2, "ImageComments": "cccc", "on_conflict": "replace"},
    ],
    "another class": [
        {"minute": 0, "SeriesInstanceUID": "1.2.3", "Modality": "CT"},
        {"minute": 1, "SeriesInstanceUID": "1.2.3", "Modality": "MR", "SOPClassUID": MRImageStorage},
    ],
    "from another study": [
        {"minute": 0, "ImageComments": "a"},
        {"minute": 1, "StudyInstanceUID": OTHER, "SeriesInstanceUID": "1.2.4"},
        {"minute": 2, "ImageComments": "ccc"},
    ],
    "the first sent again": [
        {"minute": 0, "ImageComments": "a"},
        {"minute": 1, "ImageComments": "bb"},
        {"minute": 2, "ImageComments": "a"},
    ],
    "a refused one insists": [
        {"minute": 0, "ImageComments": "a", "on_conflict": "keep"},
        {"minute": 1, "ImageComments": "bb", "on_conflict": "keep"},
        {"minute": 2, "ImageComments": "a", "on_conflict": "keep"},
        {"minute": 3, "ImageComments": "bb", "on_conflict": "replace"},
    ],
    "at the same moment": [{"minute": 0, "ImageComments": c} for c in ("a", "bb", "ccc")],
}


@pytest.mark.parametrize("story", STORIES)
def test_the_order_of_arrival_does_not_matter(story: str) -> None:
    """Every order, one by one, in one batch, and with repetition, gives the same documents."""
    instances: list[Found] = [found(SOPInstanceUID="1.2.3.4.5", **keywords) for keywords in STORIES[story]]
    neighbour = found(InstanceNumber=99, SOPInstanceUID="1.2.3.4.6")
    expected: dict[Any, Any] | None = None
    for order in itertools.permutations(instances):
        for batches in ([[one] for one in order], [list(order)], [[one, order[0]] for one in order]):
            archive = Archive()
            archive.take(neighbour)
            archive.known.update({one.event.reference.key: one for one in instances})
            for batch in batches:
                archive.take(*batch)
            result = essence(archive)
            expected = expected or result
            assert result == expected
    assert expected is not None


def test_what_each_story_ends_with() -> None:
    def end(story: str) -> Archive:
        archive = Archive()
        for keywords in STORIES[story]:
            archive.take(found(SOPInstanceUID="1.2.3.4.5", **keywords))
        return archive

    def status(archive: Archive) -> list[str]:
        return [version["status"] for version in archive.one("instances")["versions"]]

    assert status(end("replaced twice")) == ["replaced", "replaced", "current"]
    assert status(end("kept")) == ["current", "refused", "refused"]
    assert status(end("kept, then replaced")) == ["replaced", "refused", "current"]
    assert status(end("the first sent again")) == ["current", "replaced"]
    assert status(end("a refused one insists")) == ["replaced", "current"]
    replaced = end("replaced twice")
    instance, study = replaced.one("instances"), replaced.one("studies")
    assert study["instance_count"] == 1 and study["size"] == instance["reference"]["length"]
    assert instance["json"]["00204000"]["Value"] == ["22"]
    other_class = end("another class").one("studies")
    assert other_class["modalities"] == ["MR"] and other_class["sop_classes"] == [str(MRImageStorage)]
    elsewhere = end("from another study")
    assert status(elsewhere) == ["replaced", "refused", "current"]
    assert {c["tag"] for c in elsewhere.one("studies")["conflicts"]} == {"0020000D", "0020000E"}


def test_an_earlier_version_that_comes_late_moves_the_instance_and_leaves_nothing_behind() -> None:
    archive = Archive()
    archive.take(found(SOPInstanceUID="1.2.9", StudyInstanceUID=OTHER, SeriesInstanceUID="1.2.4", minute=5))
    archive.take(found(SOPInstanceUID="1.2.9", minute=1))
    assert archive.one("studies")["_id"] != OTHER and archive.one("series")["instance_count"] == 1
    assert [v["status"] for v in archive.one("instances")["versions"]] == ["current", "refused"]


def test_a_header_that_is_needed_again_is_asked_for() -> None:
    archive = Archive()
    archive.take(found(SOPInstanceUID="1.2.9", StudyInstanceUID=OTHER, SeriesInstanceUID="1.2.4", minute=2))
    latest = found(SOPInstanceUID="1.2.9", minute=3)
    archive.take(latest)
    archive.known.clear()
    with pytest.raises(HeaderNeeded) as needed:
        archive.take(found(SOPInstanceUID="1.2.9", minute=1, ImageComments="first"))
    assert needed.value.event == latest.event


def test_other_demographics_are_recorded_and_gaps_are_filled() -> None:
    archive = Archive()
    archive.take(found(InstanceNumber=1, PatientBirthDate=None, StudyDescription=""))
    other = found(InstanceNumber=2, PatientName="Doe^Janet", StudyDescription="Chest CT")
    second = other.event.sop_instance_uid
    archive.take(other)
    archive.take(found(InstanceNumber=3, PatientName="Doe^Janet", PatientID="P2", AccessionNumber="A1",
                       StudyInstanceUID=archive.one("studies")["_id"]))  # fmt: skip
    study = archive.one("studies")
    assert {(c["tag"], str(c["value"])) for c in study["conflicts"]} == {
        ("00100010", "[{'Alphabetic': 'Doe^Janet'}]"),
        ("00100020", "['P2']"),
        ("00081030", "['Chest']"),
    }
    assert [c["sop_instance_uid"] for c in study["conflicts"] if c["tag"] == "00100010"] == [second]
    assert study["json"]["00100010"]["Value"] == [{"Alphabetic": "Doe^Jane"}]
    assert study["json"]["00100030"]["Value"] == ["19700102"]
    assert study["json"]["00081030"]["Value"] == ["Chest CT"]
    assert len(archive.all("patients")) == 1


def test_an_id_has_its_own_issuer_or_that_of_its_site_and_no_id_is_nobody_else() -> None:
    archive = Archive()
    archive.take(found(IssuerOfPatientID="OTHER", AccessionNumber="1"), found(AccessionNumber="2"))
    archive.take(found(PatientID="", AccessionNumber="3"), found(PatientID=None, AccessionNumber="4"))
    assert len(archive.all("studies")) == len(archive.all("patients")) == 4
    assert {p["issuer"] for p in archive.all("patients") if p["patient_id"]} == {"OTHER", "HOSPITAL"}


def test_a_stable_study_opens_again() -> None:
    archive = Archive()
    archive.take(found(InstanceNumber=1))
    study = archive.one("studies")
    archive.documents["studies", study["_id"]] = study | {"stable": True, "stable_revision": 1}
    assert archive.take(found(InstanceNumber=1)).reopened == set()
    assert archive.take(found(InstanceNumber=2)).reopened == {study["_id"]}
    assert archive.one("studies")["stable"] is False and archive.one("studies")["change_untold"] is True


def test_a_rebuild_is_silent() -> None:
    archive = Archive()
    assert archive.take(found(InstanceNumber=1), found(InstanceNumber=2), silent=True).reopened == set()
    assert archive.one("studies")["stable"] is True


def test_a_header_that_contradicts_its_event_is_refused() -> None:
    event, content = stored()
    for change in ({"study_instance_uid": "1.2"}, {"sop_instance_uid": "1.2"}, {"sop_class_uid": "1.2"}):
        with pytest.raises(Invalid):
            describe(event.model_copy(update=change), read_header(content), "HOSPITAL")
