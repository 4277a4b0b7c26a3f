"""The reader of PDUs and P-DATA: the same messages under any split, and one Violation for anything else."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from libs.dimse import wire
from libs.dimse.pdata import (
    INVALID_PARAMETER,
    UNEXPECTED_PARAMETER,
    UNEXPECTED_PDU,
    UNRECOGNISED_PDU,
    ControlPdu,
    Event,
    Message,
    PduReader,
    Violation,
)

MAX_PDU = 16384
COMMAND = wire.encode_command(
    {wire.COMMAND_FIELD: wire.C_STORE, wire.MESSAGE_ID: 7, wire.DATA_SET_TYPE: wire.WITH_DATASET}
)


def reader() -> PduReader:
    return PduReader(MAX_PDU, frozenset((1, 3)))


def seen(events: list[Event]) -> list[object]:
    return [
        (event.context_id, event.command, event.dataset.read() if event.dataset is not None else None)
        if isinstance(event, Message)
        else event
        for event in events
    ]


def p_data(context_id: int, control: int, data: bytes) -> bytes:
    return (
        wire.pdu_header(wire.P_DATA, len(data) + 6)
        + (len(data) + 2).to_bytes(4, "big")
        + bytes((context_id, control))
        + data
    )


def violation(data: bytes, by: PduReader | None = None) -> int:
    events = (by or reader()).feed(data)
    assert isinstance(events[-1], Violation)
    return events[-1].reason


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from((1, 3)), st.binary(max_size=6000)), min_size=1, max_size=4),
    st.integers(128, MAX_PDU),
    st.lists(st.integers(1, 3000), min_size=1, max_size=30),
)
def test_any_split_gives_the_same_messages(messages: list[tuple[int, bytes]], max_pdu: int, cuts: list[int]) -> None:
    stream = b"".join(
        b"".join(map(bytes, wire.fragment_message(context, COMMAND, [data], max_pdu))) for context, data in messages
    )
    stream += wire.RELEASE_RQ_PDU
    events: list[Event] = []
    split, offset, turn = reader(), 0, 0
    while offset < len(stream):
        step = cuts[turn % len(cuts)]
        events += split.feed(stream[offset : offset + step])
        offset, turn = offset + step, turn + 1
    command = wire.decode_command(COMMAND)
    # An odd length is made even on the way out.
    expected: list[object] = [(context, command, data + bytes(len(data) % 2)) for context, data in messages]
    assert seen(events) == [*expected, ControlPdu(wire.RELEASE_RQ, bytes(4))]
    assert split.is_idle
    assert seen(reader().feed(stream)) == seen(events)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.binary(max_size=400), max_size=8))
def test_random_bytes_never_raise_and_end_with_the_first_violation(blocks: list[bytes]) -> None:
    fuzzed, events = reader(), list[Event]()
    for block in blocks:
        events += fuzzed.feed(block)
    assert sum(isinstance(event, Violation) for event in events) <= 1
    assert not any(isinstance(event, Violation) for event in events[:-1])


@settings(max_examples=300, deadline=None)
@given(st.integers(0), st.binary(min_size=1, max_size=4), st.integers(1, 200))
def test_a_damaged_stream_never_raises(position: int, damage: bytes, step: int) -> None:
    stream = bytearray(b"".join(map(bytes, wire.fragment_message(1, COMMAND, [bytes(900)], 300))))
    at = position % len(stream)
    stream[at : at + len(damage)] = damage
    damaged = reader()
    for offset in range(0, len(stream), step):
        damaged.feed(bytes(stream[offset : offset + step]))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", UNRECOGNISED_PDU),
        (wire.pdu_header(0x08, 4), UNRECOGNISED_PDU),
        (wire.pdu_header(wire.P_DATA, 0xFFFFFFFF), INVALID_PARAMETER),
        (wire.pdu_header(wire.P_DATA, MAX_PDU + 1), INVALID_PARAMETER),
        (wire.pdu_header(wire.P_DATA, 0), INVALID_PARAMETER),
        (wire.pdu_header(wire.ASSOCIATE_RQ, 0xFFFFFFFF), INVALID_PARAMETER),
        (wire.pdu_header(wire.RELEASE_RQ, 400), INVALID_PARAMETER),
        (p_data(5, 3, COMMAND), INVALID_PARAMETER),
        (p_data(1, 1, b""), INVALID_PARAMETER),
        (p_data(1, 3, b"\1\0\0\0"), INVALID_PARAMETER),
        (p_data(1, 2, b"dataset"), UNEXPECTED_PARAMETER),
        (p_data(1, 3, COMMAND) + p_data(3, 2, b"other context"), UNEXPECTED_PARAMETER),
        (p_data(1, 3, COMMAND) + p_data(1, 3, COMMAND), UNEXPECTED_PARAMETER),
        (wire.pdu_header(wire.P_DATA, 8) + (100).to_bytes(4, "big") + b"\1\3", INVALID_PARAMETER),
        (p_data(1, 1, bytes(8000)) * 9, INVALID_PARAMETER),
    ],
)
def test_each_violation_has_its_reason(data: bytes, reason: int) -> None:
    assert violation(data) == reason


def test_p_data_before_the_association_is_refused_at_its_header() -> None:
    assert violation(wire.pdu_header(wire.P_DATA, 100), PduReader(MAX_PDU)) == UNEXPECTED_PDU


def test_nothing_is_read_after_a_violation() -> None:
    broken = reader()
    violation(b"\xff" * 6, broken)
    assert broken.feed(wire.RELEASE_RQ_PDU) == []


def test_large_pieces_are_views_and_small_ones_are_copied_together() -> None:
    large = reader()
    large.feed(p_data(1, 3, COMMAND))
    data = p_data(1, 0, bytes(5000))
    large.feed(data)
    assert large.dataset is not None
    (piece,) = large.dataset.pieces
    assert isinstance(piece, memoryview) and piece.obj is data
    for _ in range(500):
        large.feed(p_data(1, 0, b"x"))
    assert len(large.dataset.pieces) == 2 and large.dataset.size == 5500
    assert sum(map(len, large.take_pieces())) == 5500 and large.dataset.pieces == []
