"""Query with its real neighbours: the same questions to MongoDB, and which indexes they use."""

from __future__ import annotations

from typing import Any

import pytest
from motor.motor_asyncio import AsyncIOMotorDatabase
from pydicom.dataset import Dataset

from services.indexing.repository import MongoIndex
from services.query.model.query import PATIENT_ROOT, STUDY_ROOT, parse_query, parse_retrieve
from services.query.repository import MongoCatalog, to_filter
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
