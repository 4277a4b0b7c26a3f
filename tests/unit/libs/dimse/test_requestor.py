"""The requestor against peers that misbehave on the wire, and how it plans many instances."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from pynetdicom import build_context

from libs.common.errors import Invalid
from libs.dimse import wire
from libs.dimse.model import ConnectionRefused, OutgoingInstance, ProtocolError, Rejection, TimedOut
from libs.dimse.requestor import MOST_CONTEXTS, UNCOMPRESSED, VERIFICATION, connect, plan_associations

Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
IMPLICIT = "1.2.840.10008.1.2"


@contextlib.asynccontextmanager
async def peer(talk: Talk) -> AsyncIterator[int]:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            await talk(reader, writer)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


async def read_pdu(reader: asyncio.StreamReader) -> bytes:
    header = await reader.readexactly(6)
    return header + await reader.readexactly(int.from_bytes(header[2:], "big"))


async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    primitive = wire.parse_associate_rq(await read_pdu(reader))
    context = build_context(VERIFICATION, IMPLICIT)
    context.context_id, context.result = 1, 0
    primitive.presentation_context_definition_list = []
    primitive.presentation_context_definition_results_list = [context]
    primitive.user_information = wire.user_information(16384)
    writer.write(wire.build_associate_ac(primitive))


async def echo(port: int, timeout: float = 5.0) -> int:
    async with connect(
        "127.0.0.1",
        port,
        contexts=[(VERIFICATION, (IMPLICIT,))],
        called_ae_title="PEER",
        calling_ae_title="US",
        acse_timeout=timeout,
        dimse_timeout=timeout,
    ) as association:
        return (await association.echo()).code


def answering(pdus: bytes) -> Talk:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await accept(reader, writer)
        await read_pdu(reader)
        writer.write(pdus)
        await reader.read()

    return talk


def response(message_id: int = 1, field: int = wire.C_ECHO | wire.RESPONSE) -> bytes:
    command: dict[int, wire.CommandValue] = {
        wire.COMMAND_FIELD: field,
        wire.MESSAGE_ID_RESPONDED_TO: message_id,
        wire.DATA_SET_TYPE: wire.NO_DATASET,
        wire.STATUS: 0,
    }
    return b"".join(wire.fragment_message(1, wire.encode_command(command), None, 0))


async def test_an_answer_split_into_single_bytes_is_read() -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await accept(reader, writer)
        await read_pdu(reader)
        for byte in response():
            writer.write(bytes([byte]))
            await writer.drain()
        # Release collision: the peer asks at the same time, and answers ours after ours came.
        await read_pdu(reader)
        writer.write(wire.RELEASE_RQ_PDU)
        assert (await read_pdu(reader))[0] == wire.RELEASE_RP
        writer.write(wire.RELEASE_RP_PDU)

    async with peer(talk) as port:
        assert await echo(port) == 0


async def test_silent_peer_times_out() -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async with peer(talk) as port:
        with pytest.raises(TimedOut, match="association request"):
            await echo(port, 0.2)


async def test_peer_that_takes_no_data_times_out() -> None:
    stop = asyncio.Event()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await accept(reader, writer)
        await stop.wait()

    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield bytes(1 << 20)

    async with peer(talk) as port:
        with pytest.raises(TimedOut, match="took no data"):
            async with connect(
                "127.0.0.1",
                port,
                contexts=[(VERIFICATION, (IMPLICIT,))],
                called_ae_title="PEER",
                calling_ae_title="US",
                dimse_timeout=0.3,
            ) as association:
                await association.store(OutgoingInstance(VERIFICATION, "1.2", IMPLICIT, endless))
        stop.set()


async def test_rejection_names_its_reason() -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_pdu(reader)
        writer.write(wire.reject_pdu(Rejection(2, 3, 2)))

    async with peer(talk) as port:
        with pytest.raises(ConnectionRefused, match="for now: local limit exceeded"):
            await echo(port)


@pytest.mark.parametrize(
    "pdus",
    [
        pytest.param(wire.abort_pdu(2, 1), id="abort"),
        pytest.param(wire.RELEASE_RQ_PDU, id="release in the middle"),
        pytest.param(b"HTTP/1.1 400 Bad Request\r\n\r\n", id="another protocol"),
        pytest.param(wire.pdu_header(4, 0), id="empty P-DATA"),
        pytest.param(wire.pdu_header(4, 6) + bytes(6), id="fragment without control header"),
        pytest.param(wire.pdu_header(4, 8) + b"\xff\xff\xff\xff\1\3ab", id="4 GiB fragment"),
        pytest.param((wire.pdu_header(4, 6) + b"\0\0\0\2\1\1") * 3, id="endless empty fragments"),
        pytest.param(wire.pdu_header(4, 8) + b"\0\0\0\4\1\2ab", id="dataset without command"),
        pytest.param(wire.pdu_header(4, 8) + b"\0\0\0\4\1\3ab", id="command that is none"),
        pytest.param(wire.pdu_header(9, 0), id="unknown PDU"),
        pytest.param(wire.pdu_header(2, 0xFFFFFFFF), id="4 GiB control PDU"),
        pytest.param(response(message_id=7), id="answer to another message"),
        pytest.param(response(field=wire.C_FIND | wire.RESPONSE), id="answer to another operation"),
    ],
)
async def test_a_peer_that_breaks_the_protocol_is_a_protocol_error(pdus: bytes) -> None:
    async with peer(answering(pdus)) as port:
        with pytest.raises(ProtocolError):
            await echo(port)


async def test_cancelled_operation_ends_the_association() -> None:
    ended: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await accept(reader, writer)
        await read_pdu(reader)
        ended.set_result(await reader.read())

    async with peer(talk) as port:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await echo(port)
        assert (await ended)[:1] == bytes([wire.ABORT])


async def test_contexts_are_bounded() -> None:
    with pytest.raises(Invalid, match="1 to 128"):
        async with connect("127.0.0.1", 1, contexts=[], called_ae_title="A", calling_ae_title="B"):
            pass


def test_many_classes_are_planned_over_several_associations() -> None:
    async def read() -> AsyncIterator[bytes]:
        yield b""

    async def convert(syntaxes: tuple[str, ...]) -> tuple[str, bytes]:
        return syntaxes[0], b""

    instances = [OutgoingInstance(f"1.2.{i % 300}", f"1.3.{i}", UNCOMPRESSED[0], read, convert) for i in range(400)]
    plan = plan_associations(instances)
    assert all(len(contexts) <= MOST_CONTEXTS for contexts, _ in plan)
    assert [instance for _, planned in plan for instance in planned] == instances
    for contexts, planned in plan:
        assert all((instance.sop_class_uid, (UNCOMPRESSED[0],)) in contexts for instance in planned)
