"""The bytes on the wire, checked against pynetdicom's codecs and by properties."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from io import BytesIO

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pynetdicom.dsutils import decode, encode
from pynetdicom.pdu import P_DATA_TF

from libs.dimse import wire
from libs.dimse.model import ProtocolError, Rejection, UserIdentity


def _split(data: bytes) -> list[bytes]:
    pdus = []
    while data:
        end = 6 + int.from_bytes(data[2:6], "big")
        pdus.append(data[:end])
        data = data[end:]
    return pdus


def _even(data: bytes) -> bytes:
    return data + b"\0" * (len(data) % 2)


def _reassemble(data: bytes, largest: int) -> tuple[bytes, bytes | None]:
    command, dataset = b"", None
    ended = {True: False, False: False}
    for raw in _split(data):
        assert len(raw) - 6 <= largest
        pdu = P_DATA_TF()
        pdu.decode(raw)
        for item in pdu.presentation_data_value_items:
            assert item.presentation_context_id == 3
            value = item.presentation_data_value
            assert value is not None
            assert len(value) % 2 == 1  # the control header and an even number of bytes
            is_command, is_last = bool(value[0] & 1), bool(value[0] & 2)
            assert not ended[is_command]
            ended[is_command] = is_last
            if is_command:
                command += value[1:]
            else:
                dataset = (dataset or b"") + value[1:]
    assert ended[True]
    assert ended[False] == (dataset is not None)
    return command, dataset


@given(
    st.binary(min_size=1, max_size=400),
    st.none() | st.lists(st.binary(max_size=700), max_size=5),
    st.sampled_from([0, 128, 129, 200, 4096]),
)
def test_fragments_carry_the_message(command: bytes, dataset: list[bytes] | None, max_pdu: int) -> None:
    data = b"".join(wire.fragment_message(3, command, dataset, max_pdu))
    expected = None if dataset is None else _even(b"".join(dataset))
    assert _reassemble(data, max_pdu or wire.UNLIMITED_PDU) == (_even(command), expected)


@pytest.mark.parametrize("max_pdu", [0, 128, 200, 4096])
@pytest.mark.parametrize("sizes", [[], [0], [122], [122, 122], [123], [1, 500, 0, 3], [5000, 122], [4090], [300_000]])
async def test_stream_carries_the_message(sizes: list[int], max_pdu: int) -> None:
    pieces = [bytes([i]) * size for i, size in enumerate(sizes)]

    async def dataset() -> AsyncIterator[bytes]:
        for piece in pieces:
            yield piece

    data = b"".join([b"".join(block) async for block in wire.fragment_stream(3, b"cc", dataset(), max_pdu)])
    assert _reassemble(data, max_pdu or wire.UNLIMITED_PDU) == (b"cc", _even(b"".join(pieces)))


def test_command_set_reads_back_in_pydicom() -> None:
    elements: dict[int, wire.CommandValue] = {
        wire.AFFECTED_SOP_CLASS_UID: "1.2.840.10008.1.1",
        wire.COMMAND_FIELD: wire.C_ECHO,
        wire.MESSAGE_ID: 7,
        wire.DATA_SET_TYPE: wire.NO_DATASET,
        wire.MOVE_DESTINATION: "ODD",
        wire.OFFENDING_ELEMENT: (0x00100020, 0x7FE00010),
        wire.ERROR_COMMENT: "because\\of ü",
    }
    data = wire.encode_command(elements)
    dataset = decode(BytesIO(data), True, True)
    assert dataset.CommandGroupLength == len(data) - 12
    assert dataset.AffectedSOPClassUID == "1.2.840.10008.1.1"
    assert dataset.OffendingElement == [0x00100020, 0x7FE00010]
    assert dataset.ErrorComment == "because/of ?"
    assert wire.decode_command(data) == elements | {wire.ERROR_COMMENT: "because/of ?"}


def test_command_set_of_pynetdicom_is_read() -> None:
    dataset = Dataset()
    dataset.CommandField = wire.C_STORE
    dataset.MessageID = 65535
    dataset.AffectedSOPInstanceUID = "1.2.3"
    dataset.MoveOriginatorApplicationEntityTitle = "MOVER"
    data = encode(dataset, True, True)
    assert data is not None
    command = wire.decode_command(data)
    assert command[wire.MESSAGE_ID] == 65535
    assert command[wire.AFFECTED_SOP_INSTANCE_UID] == "1.2.3"
    assert command[wire.MOVE_ORIGINATOR_AE_TITLE] == "MOVER"


@given(st.binary(max_size=300))
def test_junk_is_a_protocol_error_or_a_command(data: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        assert wire.COMMAND_FIELD in wire.decode_command(data)


def test_a_command_set_is_bounded() -> None:
    with pytest.raises(ProtocolError, match="longer"):
        wire.decode_command(bytes(wire.LARGEST_COMMAND + 8))


def test_association_request_reads_back() -> None:
    pdu = wire.build_associate_rq(
        called_ae_title="CALLED",
        calling_ae_title="CALLING",
        contexts=[(1, "1.2.840.10008.1.1", ["1.2.840.10008.1.2"])],
        max_pdu=4096,
        scp_roles=["1.2.3"],
        extended_negotiation={"1.2.4": b"\x01"},
        user_identity=UserIdentity(2, b"name", b"secret"),
    )
    primitive = wire.parse_associate_rq(pdu)
    assert primitive.called_ae_title == "CALLED"
    assert primitive.maximum_length_received == 4096
    assert [context.abstract_syntax for context in primitive.presentation_context_definition_list] == [
        "1.2.840.10008.1.1"
    ]
    assert len(primitive.user_information) == 6


@given(st.binary(max_size=200))
def test_junk_association_is_a_protocol_error(data: bytes) -> None:
    for pdu_type, parse in ((1, wire.parse_associate_rq), (2, wire.parse_associate_ac)):
        try:
            parse(wire.pdu_header(pdu_type, len(data)) + data)
        except ProtocolError:
            continue


def test_rejection_and_abort_in_words() -> None:
    rejection = wire.parse_reject(wire.reject_pdu(Rejection(1, 1, 7))[6:])
    assert rejection.text == "Called AE title not recognised"
    assert wire.parse_reject(bytes((0, 2, 9, 99))).text == "reason 99 of source 9"
    assert wire.abort_reason(wire.abort_pdu(2, 2)[6:]).endswith("unexpected PDU")
