"""C-FIND answers: which keys, which values, in which encoding and character set, and how they end."""

from __future__ import annotations

import asyncio
import io
from typing import Any

import pytest
from pydicom.dataset import Dataset
from pydicom.filereader import dcmread
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from libs.common.dicom.part10 import build_file_meta
from libs.common.errors import Invalid
from libs.dimse.model import Status
from services.query.handlers.find import LIMIT_REACHED, find
from services.query.model.answer import decimal_string
from services.query.model.charset import choose_encoder
from services.query.model.query import PATIENT_ROOT, STUDY_ROOT, InformationModel, parse_query
from tests.unit.services.query.archive import MemoryCatalog, create_index
from tests.unit.services.query.questions import SERIES_1, STUDY_1, create_archive

SYNTAXES = [ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian]


def keys(**keywords: Any) -> Dataset:
    identifier = Dataset()
    for keyword, value in keywords.items():
        setattr(identifier, keyword, value)
    return identifier


def decode(encoded: bytes, syntax: str) -> Dataset:
    return dcmread(io.BytesIO(build_file_meta("1.2.840.10008.5.1.4.1.1.7", "2.25.1", syntax) + encoded))


async def ask(
    identifier: Dataset,
    *,
    model: InformationModel = STUDY_ROOT,
    syntax: str = ExplicitVRLittleEndian,
    limit: int = 100,
    cancelled: asyncio.Event | None = None,
) -> tuple[list[Dataset], list[Status]]:
    answers = find(
        parse_query(identifier, model),
        catalog=MemoryCatalog(create_index(create_archive())),
        ae_title="SAGITTAL",
        transfer_syntax_uid=syntax,
        limit=limit,
        cancelled=cancelled or asyncio.Event(),
    )
    found, statuses = [], []
    async for status, encoded in answers:
        statuses.append(status)
        if encoded is not None:
            found.append(decode(encoded, syntax))
    return found, statuses


@pytest.mark.parametrize("syntax", SYNTAXES, ids=lambda uid: uid.name)
async def test_the_answer_has_the_requested_keys_and_the_unique_ones(syntax: str) -> None:
    identifier = keys(
        QueryRetrieveLevel="STUDY",
        AccessionNumber="A1",
        PatientName="",
        ModalitiesInStudy="",
        SOPClassesInStudy="",
        NumberOfStudyRelatedSeries="",
        NumberOfStudyRelatedInstances="",
        InstanceAvailability="",
        RetrieveAETitle="",
        ProcedureCodeSequence=[],
        PatientComments="",
    )
    (answer,), statuses = await ask(identifier, syntax=syntax)
    assert [status.code for status in statuses] == [0xFF00, 0]
    assert {e.keyword for e in answer} == {e.keyword for e in identifier} | {
        "SpecificCharacterSet",
        "StudyInstanceUID",
    }
    assert answer.SpecificCharacterSet == "ISO_IR 192"
    assert answer.PatientName == "Müller^Jörg^^Dr"
    assert answer.StudyInstanceUID == STUDY_1
    assert list(answer.ModalitiesInStudy) == ["CT", "MR"]
    assert (answer.NumberOfStudyRelatedSeries, answer.NumberOfStudyRelatedInstances) == (2, 3)
    assert (answer.InstanceAvailability, answer.RetrieveAETitle) == ("ONLINE", "SAGITTAL")
    assert answer.ProcedureCodeSequence[0].CodeMeaning == "CT of chest"
    assert answer["PatientComments"].is_empty


async def test_items_have_the_requested_keys_only() -> None:
    identifier = keys(QueryRetrieveLevel="STUDY", AccessionNumber="A1")
    identifier.ProcedureCodeSequence = [keys(CodeValue="", CodeMeaning="", CodingSchemeVersion="")]
    (answer,), _ = await ask(identifier)
    (item,) = answer.ProcedureCodeSequence
    assert [e.keyword for e in item] == ["CodeValue", "CodingSchemeVersion", "CodeMeaning"]
    assert (item.CodeValue, item["CodingSchemeVersion"].is_empty) == ("CTCHEST", True)


async def test_images_carry_numbers_in_their_own_representation() -> None:
    identifier = keys(
        QueryRetrieveLevel="IMAGE", StudyInstanceUID=STUDY_1, SeriesInstanceUID=SERIES_1, Rows=None, InstanceNumber=""
    )
    answers, _ = await ask(identifier)
    assert [(answer.InstanceNumber, answer.Rows) for answer in answers] == [(1, 4), (2, 4)]


async def test_a_key_we_do_not_match_is_told() -> None:
    identifier = keys(QueryRetrieveLevel="STUDY", AccessionNumber="A1", SeriesDescription="x")
    answers, statuses = await ask(identifier)
    assert [status.code for status in statuses] == [0xFF01, 0]
    assert answers[0]["SeriesDescription"].is_empty


async def test_newest_studies_come_first() -> None:
    answers, _ = await ask(keys(QueryRetrieveLevel="STUDY", StudyDate="20240101-", StudyTime=""))
    assert [answer.StudyDate for answer in answers] == ["20240215", "20240131", "20240131", "20240101"]


async def test_the_limit_ends_the_answer_with_a_failure_that_says_so() -> None:
    answers, statuses = await ask(keys(QueryRetrieveLevel="STUDY"), limit=2)
    assert (len(answers), statuses[-1].code) == (2, LIMIT_REACHED)
    assert "More than 2" in statuses[-1].comment
    answers, statuses = await ask(keys(QueryRetrieveLevel="STUDY"), limit=6)
    assert (len(answers), statuses[-1].code) == (6, 0)


async def test_cancel() -> None:
    cancelled = asyncio.Event()
    cancelled.set()
    answers, statuses = await ask(keys(QueryRetrieveLevel="STUDY"), cancelled=cancelled)
    assert (answers, [status.code for status in statuses]) == ([], [0xFE00])


@pytest.mark.parametrize(
    ("requested", "name", "expected"),
    [
        ((), "Müller", ("ISO_IR 192",)),
        (("ISO_IR 100",), "Müller", ("ISO_IR 100",)),
        (("ISO_IR 100",), "山田", ("ISO_IR 192",)),
        (("", "ISO 2022 IR 87"), "Yamada=山田", ("", "ISO 2022 IR 87")),
        (("", "ISO 2022 IR 149"), "Hong=洪^吉洞=홍^길동", ("", "ISO 2022 IR 149")),
        (("GB18030",), "王^小东", ("GB18030",)),
        (("ISO_IR 999",), "Doe", ("ISO_IR 192",)),
        (("ISO_IR 6",), "Doe", ("ISO_IR 6",)),
        (("ISO_IR 144",), "Müller", ("ISO_IR 192",)),
    ],
)
def test_the_answer_is_in_a_character_set_that_the_caller_reads(
    requested: tuple[str, ...], name: str, expected: tuple[str, ...]
) -> None:
    encoder = choose_encoder(requested, [name])
    assert encoder.terms == expected
    dataset = keys(SpecificCharacterSet=list(expected), PatientName=name)
    read = Dataset()
    read.SpecificCharacterSet = list(expected)
    assert encoder.encode(name)
    if not name.isascii():
        from pydicom.charset import convert_encodings
        from pydicom.valuerep import PersonName

        assert str(PersonName(encoder.encode(name), convert_encodings(list(expected))).decode()) == str(
            dataset.PatientName
        )


@pytest.mark.parametrize(
    ("identifier", "model"),
    [
        (keys(PatientID="P-1"), STUDY_ROOT),
        (keys(QueryRetrieveLevel="PATIENT"), STUDY_ROOT),
        (keys(QueryRetrieveLevel="SERIES"), STUDY_ROOT),
        (keys(QueryRetrieveLevel="IMAGE", StudyInstanceUID=STUDY_1), STUDY_ROOT),
        (keys(QueryRetrieveLevel="SERIES", StudyInstanceUID=[STUDY_1, "1.2"]), STUDY_ROOT),
        (keys(QueryRetrieveLevel="STUDY"), PATIENT_ROOT),
        (keys(QueryRetrieveLevel="STUDY", PatientID="P*"), PATIENT_ROOT),
    ],
)
def test_an_identifier_that_does_not_fit_the_model_is_refused(identifier: Dataset, model: InformationModel) -> None:
    with pytest.raises(Invalid):
        parse_query(identifier, model)


@pytest.mark.parametrize(
    ("number", "text"), [(1.0, "1"), (0.1, "0.1"), (-1234567.123456789, "-1234567.1234568"), (1e-20 / 3, None)]
)
def test_decimal_strings_fit_into_16_characters(number: float, text: str | None) -> None:
    written = decimal_string(number)
    assert len(written) <= 16
    assert abs(float(written) - number) <= abs(number) * 1e-9
    if text is not None:
        assert written == text
