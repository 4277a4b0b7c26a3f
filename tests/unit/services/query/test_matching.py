"""Every kind of matching over the catalog in memory, and the pieces it is made of."""

from __future__ import annotations

import pytest

from libs.common.errors import Invalid
from services.query.model.matching import conditions_of, name_to_regex, pattern_to_regex, split_range
from services.query.model.query import parse_query
from tests.unit.services.query.archive import MemoryCatalog, create_index
from tests.unit.services.query.questions import QUESTIONS, Question, create_archive


@pytest.fixture(scope="module")
def catalog() -> MemoryCatalog:
    return MemoryCatalog(create_index(create_archive()))


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda question: question.name)
async def test_question_finds_what_it_must(catalog: MemoryCatalog, question: Question) -> None:
    query = parse_query(
        question.identifier(), question.model, relational=question.relational, combined_date_time=question.combined
    )
    records = await catalog.find(query, 1000)
    if isinstance(question.expected, int):
        assert len(records) == question.expected
    else:
        assert {record["STUDY"]["json"]["00080050"]["Value"][0] for record in records} == question.expected


def test_a_prefix_stays_a_prefix_for_an_index() -> None:
    assert pattern_to_regex("DOE*") == "^DOE"
    assert name_to_regex("doe^j*") == r"^doe\^j"
    assert name_to_regex("doe^*") == r"^doe(?:\^.*)?$"
    assert pattern_to_regex("a.b") == r"^a\.b$"


@pytest.mark.parametrize(
    ("vr", "text", "ends"),
    [
        ("DA", "20240131", ("20240131", "20240131")),
        ("DA", "20240101 - 20240131", ("20240101", "20240131")),
        ("TM", "10", ("100000.000000", "105959.999999")),
        ("TM", "10:15-", ("101500.000000", None)),
        ("DT", "2024-0500", ("2024", "2024~")),
        ("DT", "2023-2024", ("2023", "2024~")),
        ("DT", "20240131101500.5+0100", ("20240131101500.5", "20240131101500.5~")),
        ("DT", "-20240131", (None, "20240131~")),
        ("DT", "20240131101500+0100-20240201", ("20240131101500", "20240201~")),
    ],
)
def test_ranges_span_what_their_precision_leaves_open(vr: str, text: str, ends: tuple[str | None, str | None]) -> None:
    assert split_range(0x00080020, vr, text) == ends


@pytest.mark.parametrize(
    ("vr", "text"), [("DA", "-"), ("DA", "2024"), ("TM", "1"), ("TM", "x-"), ("DT", "-"), ("DT", "*")]
)
def test_what_is_no_range_is_refused(vr: str, text: str) -> None:
    with pytest.raises(Invalid):
        conditions_of(0x00080020, vr, [text])
