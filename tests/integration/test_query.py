"""Query with its real neighbours: MongoDB asked every question, and the DIMSE door tried by DCMTK."""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from motor.motor_asyncio import AsyncIOMotorDatabase
from pydicom import dcmread
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset
from pydicom.uid import UID, ExplicitVRLittleEndian

from libs.common.config import Peer
from libs.common.dicom.part10 import split_part10
from libs.common.objects.memory import MemoryObjects
from libs.dimse.acceptor import serve
from services.indexing.repository import MongoIndex
from services.query.config import QuerySettings
from services.query.model.query import PATIENT_ROOT, STUDY_ROOT, parse_query, parse_retrieve
from services.query.repository import MongoCatalog, to_filter
from services.query.scp import QueryScp
from tests.unit.services.query.archive import MemoryCatalog, create_index
from tests.unit.services.query.questions import QUESTIONS, SERIES_1, STUDY_1, create_archive

Database = AsyncIOMotorDatabase[dict[str, Any]]


@pytest.fixture
async def filled(database: Database) -> Database:
    await MongoIndex(database).ensure_indexes()
    for collection, documents in create_index(create_archive()).items():
        await database[collection].insert_many(documents)
    return database


async def test_both_catalogs_answer_every_question_alike(filled: Database) -> None:
    mongo, memory = MongoCatalog(filled), MemoryCatalog(create_index(create_archive()))
    wrong = []
    for question in QUESTIONS:
        query = parse_query(
            question.identifier(), question.model, relational=question.relational, combined_date_time=question.combined
        )
        answers = [
            {record[query.level]["_id"] for record in await catalog.find(query, 1000)} for catalog in (mongo, memory)
        ]
        if answers[0] != answers[1]:
            wrong.append((question.name, answers))
    assert wrong == []


async def test_the_limit_holds_over_several_parents(filled: Database) -> None:
    identifier = keys(QueryRetrieveLevel="SERIES", PatientName="smith*", Modality="")
    query = parse_query(identifier, STUDY_ROOT, relational=True)
    assert len(await MongoCatalog(filled).find(query, 2)) == 2


async def test_counts_of_each_level(filled: Database) -> None:
    identifier = keys(
        QueryRetrieveLevel="PATIENT",
        PatientID="P-1",
        NumberOfPatientRelatedStudies="",
        NumberOfPatientRelatedSeries="",
        NumberOfPatientRelatedInstances="",
    )
    (record,) = await MongoCatalog(filled).find(parse_query(identifier, PATIENT_ROOT), 10)
    document = record["PATIENT"]
    assert (document["study_count"], document["series_count"], document["instance_count"]) == (2, 3, 4)


@pytest.mark.parametrize(
    "wanted",
    [
        {"QueryRetrieveLevel": "PATIENT", "PatientID": "P-1"},
        {"QueryRetrieveLevel": "STUDY", "PatientID": "P-1", "StudyInstanceUID": STUDY_1},
        {"QueryRetrieveLevel": "STUDY", "PatientID": "P-2", "StudyInstanceUID": STUDY_1},
        {
            "QueryRetrieveLevel": "SERIES",
            "PatientID": "P-1",
            "StudyInstanceUID": STUDY_1,
            "SeriesInstanceUID": SERIES_1,
        },
        {"QueryRetrieveLevel": "PATIENT", "PatientID": "P*"},
        {"QueryRetrieveLevel": "PATIENT", "PatientID": "P*4", "IssuerOfPatientID": "OTHER"},
        {"QueryRetrieveLevel": "PATIENT", "PatientID": "P*4", "IssuerOfPatientID": "MAIN"},
    ],
)
async def test_both_catalogs_hand_back_the_same(filled: Database, wanted: dict[str, Any]) -> None:
    query = parse_retrieve(keys(**wanted), PATIENT_ROOT)
    assert await MongoCatalog(filled).stored(query) == await MemoryCatalog(create_index(create_archive())).stored(query)


def keys(**keywords: Any) -> Dataset:
    identifier = Dataset()
    for keyword, value in keywords.items():
        setattr(identifier, keyword, value)
    return identifier


@pytest.mark.parametrize(
    "wanted",
    [
        {"PatientID": "P-1"},
        {"PatientID": "P-*"},
        {"AccessionNumber": "A3"},
        {"PatientName": "MÜLL*"},
        {"PatientName": "Muller^Jorg^^Dr"},
        {"PatientName": "smith^*"},
        {"StudyDate": "20240101-20240131"},
        {"StudyDate": "20240131"},
        {"ModalitiesInStudy": "MR"},
        {"StudyInstanceUID": [STUDY_1, "2.25.7"]},
    ],
)
async def test_frequent_questions_use_an_index(filled: Database, wanted: dict[str, Any]) -> None:
    query = parse_query(keys(QueryRetrieveLevel="STUDY", **wanted), STUDY_ROOT)
    filtered = to_filter("STUDY", query.conditions["STUDY"])
    explained = await filled["studies"].find(filtered).explain()
    stages = list(plan_stages(explained["queryPlanner"]["winningPlan"]))
    names = {stage["stage"] for stage in stages}
    assert names & {"IXSCAN", "IDHACK", "EXPRESS_IXSCAN"}, names
    assert "COLLSCAN" not in names
    # The bounds of the index's first key have to be the value or the prefix, not the whole index.
    for stage in stages:
        if "keyPattern" in stage:
            bounds = stage["indexBounds"][next(iter(stage["keyPattern"]))]
            assert bounds
            assert not any(bound.startswith(('["", {})', "[MinKey")) for bound in bounds), bounds


def plan_stages(plan: dict[str, Any]) -> Any:
    plan = plan.get("queryPlan", plan)
    yield plan
    for name in ("inputStage", "inputStages"):
        inner = plan.get(name, [])
        for stage in inner if isinstance(inner, list) else [inner]:
            yield from plan_stages(stage)


@dataclass
class Archive:
    """A query service on a port of its own, over some of pydicom's test files."""

    port: int
    files: dict[str, bytes]
    study: str

    async def run(self, tool: str, *arguments: str) -> str:
        environment = {**os.environ, "TCP_NODELAY": "1"}
        process = await asyncio.create_subprocess_exec(
            tool, "-v", "-aec", "SAGITTAL", *arguments[:-1], "127.0.0.1", str(self.port), *filter(None, arguments[-1:]),
            env=environment, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        output, _ = await asyncio.wait_for(process.communicate(), 60)
        return output.decode("utf-8", "replace")


FILES = ["CT_small.dcm", "MR_small_implicit.dcm", "MR_small_RLE.dcm", "JPEG2000.dcm", "rtplan.dcm"]


def part10(name: str) -> bytes:
    return Path(str(get_testdata_file(name, download=False))).read_bytes()


@pytest.fixture
def destination_port(free_port: Callable[[], int]) -> int:
    return free_port()


@pytest.fixture
async def archive(database: Database, destination_port: int) -> AsyncIterator[Archive]:
    await MongoIndex(database).ensure_indexes()
    objects = MemoryObjects()
    datasets: list[Dataset] = []
    files: dict[str, bytes] = {}
    for number, name in enumerate(FILES):
        dataset: Dataset = dcmread(Path(str(get_testdata_file(name, download=False))))
        dataset.StudyInstanceUID, dataset.SeriesInstanceUID = "2.25.1", f"2.25.1.{number}"
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = UID(f"2.25.1.{number}.1")
        dataset.PatientID = "EVERY"
        datasets.append(dataset)
    index = create_index(datasets)
    for collection, documents in index.items():
        await database[collection].insert_many(documents)
    for dataset in datasets:
        content = file_of(dataset)
        (document,) = [doc for doc in index["instances"] if doc["_id"] == dataset.SOPInstanceUID]
        await objects.put(document["reference"]["key"], content)
        files[str(dataset.SOPInstanceUID)] = content
    scp = QueryScp(
        catalog=MongoCatalog(database),
        objects=objects,
        settings=QuerySettings(),
        ae_title="SAGITTAL",
        peers=[Peer(ae_title="THERE", host="127.0.0.1", port=destination_port)],
    )
    acceptor = await serve([scp.scp()], ae_title="SAGITTAL", host="127.0.0.1", port=0)
    yield Archive(acceptor.port, files, "2.25.1")
    await acceptor.stop(5)


def file_of(dataset: Dataset) -> bytes:
    buffer = BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


@pytest.mark.parametrize("model", ["-P", "-S", "-O"])
async def test_findscu_finds(archive: Archive, model: str) -> None:
    output = await archive.run(
        "findscu", model, "-k", "QueryRetrieveLevel=STUDY", "-k", "PatientID=EVERY", "-k", "StudyInstanceUID",
        "-k", "NumberOfStudyRelatedInstances", "-k", "ModalitiesInStudy", "",
    )  # fmt: skip
    assert "2.25.1" in output
    assert "[5" in output, output
    assert "Success" in output, output


async def test_findscu_is_told_what_does_not_fit(archive: Archive) -> None:
    output = await archive.run("findscu", "-S", "-k", "QueryRetrieveLevel=SERIES", "")
    assert "DataSetDoesNotMatchSOPClass" in output or "0xa900" in output.lower(), output


async def test_getscu_brings_every_instance(archive: Archive, tmp_path: Path) -> None:
    output = await archive.run(
        "getscu", "+B", "-S", "-od", str(tmp_path), "-k", "QueryRetrieveLevel=STUDY",
        "-k", f"StudyInstanceUID={archive.study}", "",
    )  # fmt: skip
    check_all_there(archive, tmp_path, output)
    # getscu prefers Explicit VR Little Endian: two were compressed and two implicit.
    assert {dcmread(path).file_meta.TransferSyntaxUID for path in tmp_path.iterdir()} == {ExplicitVRLittleEndian}


def check_all_there(archive: Archive, folder: Path, output: str) -> None:
    received = {str(dcmread(path).SOPInstanceUID): path.read_bytes() for path in folder.iterdir()}
    assert received.keys() == archive.files.keys(), output
    for uid, content in received.items():
        meta, offset = split_part10(content)
        before, before_offset = split_part10(archive.files[uid])
        if meta.transfer_syntax_uid == before.transfer_syntax_uid:
            assert content[offset:] == archive.files[uid][before_offset:]


@pytest.mark.parametrize("option", [[], ["+xi"], ["+xa"]], ids=["explicit", "implicit", "any"])
async def test_movescu_sends_to_a_configured_peer(
    archive: Archive, destination_port: int, tmp_path: Path, option: list[str]
) -> None:
    receiver = await asyncio.create_subprocess_exec(
        "storescp", "+B", "-od", str(tmp_path), "-aet", "THERE", *option, str(destination_port),
        stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    try:
        await listening(destination_port)
        output = await archive.run(
            "movescu", "-S", "-aem", "THERE", "-k", "QueryRetrieveLevel=STUDY",
            "-k", f"StudyInstanceUID={archive.study}", "",
        )  # fmt: skip
        assert "Success" in output, output
        check_all_there(archive, tmp_path, output)
    finally:
        receiver.terminate()
        await receiver.wait()


async def listening(port: int) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            await asyncio.sleep(0.05)
        else:
            writer.close()
            return
    raise AssertionError(f"nothing listens on {port}")


@pytest.mark.parametrize(("title", "status"), [("NOWHERE", "a801"), ("THERE", "a702")])
async def test_movescu_is_told_why_it_failed(archive: Archive, title: str, status: str) -> None:
    output = await archive.run(
        "movescu", "-d", "-S", "-aem", title, "-k", "QueryRetrieveLevel=STUDY",
        "-k", f"StudyInstanceUID={archive.study}", "",
    )  # fmt: skip
    assert re.search(f"0x{status}", output, re.I), output
