"""What an acceptor does to peers that misbehave, stay silent, come too many or leave: raw bytes on a socket."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from pydicom.dataset import Dataset

from libs.common.errors import Invalid, NotFound, Unavailable
from libs.dimse import wire
from libs.dimse.acceptor import Acceptor, serve
from libs.dimse.model import (
    CANCEL,
    PENDING,
    SUCCESS,
    Caller,
    NormalizedRequest,
    NormalizedResponse,
    QueryRequest,
    Rejection,
    Scp,
    Status,
    StoreRequest,
)

CT = "1.2.840.10008.5.1.4.1.1.2"
FIND = "1.2.840.10008.5.1.4.1.2.2.1"
IMPLICIT, EXPLICIT = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1"
SYNTAXES = (EXPLICIT, IMPLICIT)


def storing(store: Callable[[StoreRequest], Any]) -> Scp:
    return Scp("storing", frozenset((CT,)), SYNTAXES, store=store)


async def accept(_request: StoreRequest) -> Status:
    return SUCCESS


@contextlib.asynccontextmanager
async def accepting(*scps: Scp, **options: Any) -> AsyncIterator[Acceptor]:
    acceptor = await serve(scps or (storing(accept),), ae_title="HERE", host="127.0.0.1", **options)
    try:
        yield acceptor
    finally:
        await acceptor.stop(0.2)


class Peer:
    """A requestor that sends what it is told."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def connect(cls, acceptor: Acceptor) -> Peer:
        return cls(*await asyncio.open_connection("127.0.0.1", acceptor.port))

    @classmethod
    async def associate(cls, acceptor: Acceptor, *abstract_syntaxes: str) -> Peer:
        peer = await cls.connect(acceptor)
        peer.writer.write(request_pdu(*abstract_syntaxes))
        kind, _ = await peer.pdu()
        assert kind == wire.ASSOCIATE_AC
        return peer

    async def pdu(self) -> tuple[int, bytes]:
        async with asyncio.timeout(10):
            header = await self.reader.readexactly(6)
            return header[0], await self.reader.readexactly(int.from_bytes(header[2:], "big"))

    async def ended(self) -> bytes:
        """All that comes until the acceptor closes."""
        async with asyncio.timeout(10):
            try:
                return await self.reader.read()
            except ConnectionError:
                return b""

    def send(self, command: dict[int, wire.CommandValue], dataset: bytes | None = None, context_id: int = 1) -> None:
        elements = {wire.DATA_SET_TYPE: wire.NO_DATASET if dataset is None else wire.WITH_DATASET} | command
        pieces = None if dataset is None else [dataset]
        self.writer.writelines(wire.fragment_message(context_id, wire.encode_command(elements), pieces, 16384))

    def store(self, dataset: bytes | None = b"\x08\0\5\0CS\0\0", message_id: int = 1, uid: str = "1.2.3") -> None:
        command: dict[int, wire.CommandValue] = {
            wire.AFFECTED_SOP_CLASS_UID: CT,
            wire.COMMAND_FIELD: wire.C_STORE,
            wire.MESSAGE_ID: message_id,
            wire.PRIORITY: 0,
        }
        if uid:
            command[wire.AFFECTED_SOP_INSTANCE_UID] = uid
        self.send(command, dataset)

    async def response(self) -> dict[int, wire.CommandValue]:
        kind, body = await self.pdu()
        assert kind == wire.P_DATA, (kind, body)
        return wire.decode_command(body[6:])

    async def status(self) -> int:
        status = (await self.response())[wire.STATUS]
        assert isinstance(status, int)
        return status


def request_pdu(*abstract_syntaxes: str, **options: Any) -> bytes:
    contexts = [(2 * i + 1, uid, SYNTAXES) for i, uid in enumerate(abstract_syntaxes or (CT,))]
    named: dict[str, Any] = {"called_ae_title": "HERE", "calling_ae_title": "THERE", "max_pdu": 16384}
    return wire.build_associate_rq(contexts=contexts, **(named | options))


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (b"GET / HTTP/1.0\r\n\r\n", 1),
        (wire.pdu_header(wire.P_DATA, 20) + bytes(20), 2),
        (wire.pdu_header(wire.ASSOCIATE_RQ, 0xFFFFFFFF), 6),
        (wire.pdu_header(wire.ASSOCIATE_RQ, 8) + bytes(8), 6),
        (wire.RELEASE_RQ_PDU, 2),
    ],
)
async def test_garbage_before_an_association_is_aborted_with_its_reason(sent: bytes, reason: int) -> None:
    async with accepting() as acceptor:
        peer = await Peer.connect(acceptor)
        peer.writer.write(sent)
        assert await peer.ended() == wire.abort_pdu(2, reason)


async def test_a_pdu_longer_than_advertised_ends_one_association_only() -> None:
    async with accepting(max_pdu=4096) as acceptor:
        good, bad = await Peer.associate(acceptor), await Peer.associate(acceptor)
        bad.writer.write(wire.pdu_header(wire.P_DATA, 4097))
        assert await bad.ended() == wire.abort_pdu(2, 6)
        good.send({wire.COMMAND_FIELD: wire.C_STORE, wire.MESSAGE_ID: 1, wire.AFFECTED_SOP_CLASS_UID: CT})
        assert await good.status() == 0xC000
        assert acceptor.associations == 1


async def test_random_bytes_cost_one_association_each() -> None:
    chance = random.Random(5)
    async with accepting(artim=1) as acceptor:
        survivor = await Peer.associate(acceptor)
        for turn in range(60):
            peer = await (Peer.associate(acceptor) if turn % 2 else Peer.connect(acceptor))
            garbage = chance.randbytes(chance.randint(6, 5000))
            if turn % 3 == 0:
                garbage = bytes((chance.randint(1, 7), 0)) + garbage
            peer.writer.write(garbage)
            peer.writer.write_eof()
            await peer.ended()
            peer.writer.close()
        survivor.store()
        assert await survivor.status() == 0
        await until(lambda: acceptor.associations == 1 and acceptor.held_bytes == 0)


async def test_silence_ends_by_artim_idle_and_dimse_time() -> None:
    async with accepting(artim=0.2, idle_timeout=0.4, dimse_timeout=0.2) as acceptor:
        silent = await Peer.connect(acceptor)
        assert await silent.ended() == b""
        idle = await Peer.associate(acceptor)
        assert await idle.ended() == wire.abort_pdu(0, 0)
        half = await Peer.associate(acceptor)
        half.writer.write(wire.pdu_header(wire.P_DATA, 100) + b"\0\0")
        assert await half.ended() == wire.abort_pdu(0, 0)


async def test_too_many_are_rejected_for_the_moment() -> None:
    async with accepting(max_associations=1) as acceptor:
        first = await Peer.associate(acceptor)
        second = await Peer.connect(acceptor)
        second.writer.write(request_pdu())
        assert await second.pdu() == (wire.ASSOCIATE_RJ, b"\0\2\3\2")
        first.writer.write(wire.RELEASE_RQ_PDU)
        assert (await first.pdu())[0] == wire.RELEASE_RP
        await until(lambda: acceptor.associations == 0)
        await Peer.associate(acceptor)


async def test_the_policy_sees_the_caller_and_its_word_goes_out() -> None:
    callers: list[Caller] = []

    async def policy(caller: Caller) -> Rejection | None:
        callers.append(caller)
        return Rejection(1, 1, 3, "unknown")

    async with accepting(policy=policy) as acceptor:
        peer = await Peer.connect(acceptor)
        peer.writer.write(request_pdu(calling_ae_title="STRANGER"))
        assert await peer.pdu() == (wire.ASSOCIATE_RJ, b"\0\1\1\3")
        assert (callers[0].calling_ae_title, callers[0].called_ae_title) == ("STRANGER", "HERE")
        assert acceptor.associations == 0


async def test_another_application_context_is_rejected() -> None:
    async with accepting() as acceptor:
        peer = await Peer.connect(acceptor)
        peer.writer.write(request_pdu().replace(b"1.2.840.10008.3.1.1.1", b"1.2.840.10008.3.1.1.9"))
        assert await peer.pdu() == (wire.ASSOCIATE_RJ, b"\0\1\1\2")


@pytest.mark.parametrize(
    ("error", "code"),
    [(Invalid("bad"), 0xC000), (NotFound("gone"), 0x0112), (Unavailable("away"), 0xA700), (KeyError("x"), 0x0110)],
)
async def test_what_a_store_handler_raises_becomes_a_status(error: Exception, code: int) -> None:
    async def store(_request: StoreRequest) -> Status:
        raise error

    async with accepting(storing(store)) as acceptor:
        peer = await Peer.associate(acceptor)
        for _ in range(2):
            peer.store()
            assert await peer.status() == code


async def test_a_store_without_dataset_or_uid_or_of_another_class_is_refused() -> None:
    async with accepting() as acceptor:
        peer = await Peer.associate(acceptor)
        peer.store(dataset=None)
        assert await peer.status() == 0xC000
        peer.store(uid="")
        assert (await peer.response())[wire.OFFENDING_ELEMENT] == (wire.AFFECTED_SOP_INSTANCE_UID,)
        peer.send({wire.COMMAND_FIELD: wire.C_STORE, wire.MESSAGE_ID: 1, wire.AFFECTED_SOP_CLASS_UID: FIND}, b"xx")
        assert await peer.status() == 0x0122
        peer.send({wire.COMMAND_FIELD: wire.C_FIND, wire.MESSAGE_ID: 1, wire.AFFECTED_SOP_CLASS_UID: CT}, b"xx")
        assert await peer.status() == 0x0211


async def test_a_large_dataset_is_spooled_whole_and_its_file_deleted(tmp_path: Path) -> None:
    data = random.Random(1).randbytes(6 << 20)
    got: list[tuple[bool, bytes]] = []

    async def store(request: StoreRequest) -> Status:
        got.append((request.dataset.path is not None, request.dataset.read()))
        return SUCCESS

    async with accepting(storing(store), spool_threshold=1 << 20, spool_dir=tmp_path) as acceptor:
        peer = await Peer.associate(acceptor)
        for _ in range(2):
            peer.store(data)
            assert await peer.status() == 0
        await until(lambda: not list(tmp_path.iterdir()))
        peer.writer.write(wire.RELEASE_RQ_PDU)
    assert got == [(True, data)] * 2


async def test_a_sender_cut_in_the_middle_leaves_no_file_and_no_memory(tmp_path: Path) -> None:
    async with accepting(spool_threshold=1 << 20, spool_dir=tmp_path) as acceptor:
        peer = await Peer.associate(acceptor)
        whole = b"".join(map(bytes, wire.fragment_message(1, store_command(), [bytes(8 << 20)], 16384)))
        peer.writer.write(whole[: 5 << 20])
        await until(lambda: bool(list(tmp_path.iterdir())))
        peer.writer.transport.abort()
        await until(lambda: not list(tmp_path.iterdir()) and acceptor.associations == 0 and not acceptor.held_bytes)


async def test_a_folder_that_takes_no_file_gives_out_of_resources(tmp_path: Path) -> None:
    async with accepting(spool_threshold=1 << 20, spool_dir=tmp_path / "absent") as acceptor:
        peer = await Peer.associate(acceptor)
        peer.store(bytes(4 << 20))
        assert await peer.status() == 0xA700
        peer.store(b"small")
        assert await peer.status() == 0


async def test_reading_pauses_while_a_handler_is_busy() -> None:
    go = asyncio.Event()

    async def store(_request: StoreRequest) -> Status:
        await go.wait()
        return SUCCESS

    async with accepting(storing(store)) as acceptor:
        peer = await Peer.associate(acceptor)

        async def flood() -> None:
            for number in range(100):
                peer.store(bytes(1 << 20), message_id=number + 1)
                await peer.writer.drain()

        flooding = asyncio.create_task(flood())
        await until(lambda: acceptor.held_bytes > 4 << 20)
        await asyncio.sleep(0.1)
        assert not flooding.done() and acceptor.held_bytes < 16 << 20
        go.set()
        answers = [await peer.status() for _ in range(100)]
        await flooding
        assert answers == [0] * 100


async def test_cancel_ends_a_find_that_goes_on_for_ever() -> None:
    async def find(_request: QueryRequest) -> AsyncIterator[tuple[Status, Dataset | bytes | None]]:
        while True:
            yield PENDING, b"\x08\0\x52\0CS\6\0STUDY "
            await asyncio.sleep(0.001)

    scp = Scp("finding", frozenset((FIND,)), SYNTAXES, find=find)
    async with accepting(scp) as acceptor:
        peer = await Peer.associate(acceptor, FIND)
        identifier = b"\x08\0\x52\0CS\6\0STUDY "
        peer.send({wire.COMMAND_FIELD: wire.C_FIND, wire.MESSAGE_ID: 9, wire.AFFECTED_SOP_CLASS_UID: FIND}, identifier)
        assert await peer.status() == PENDING.code
        assert (await peer.pdu())[1][6:] == identifier
        peer.send({wire.COMMAND_FIELD: wire.C_CANCEL, wire.MESSAGE_ID_RESPONDED_TO: 9})
        async with asyncio.timeout(10):
            while await peer.status() != CANCEL.code:
                await peer.pdu()


async def test_normalized_requests_reach_their_handler() -> None:
    seen: list[NormalizedRequest] = []

    async def normalized(request: NormalizedRequest) -> NormalizedResponse:
        seen.append(request)
        return NormalizedResponse(SUCCESS)

    uid = "1.2.840.10008.1.20.1"
    async with accepting(Scp("n", frozenset((uid,)), SYNTAXES, normalized=normalized)) as acceptor:
        peer = await Peer.associate(acceptor, uid)
        requested = {wire.REQUESTED_SOP_CLASS_UID: uid, wire.REQUESTED_SOP_INSTANCE_UID: "1.2.9"}
        affected = {wire.AFFECTED_SOP_CLASS_UID: uid, wire.AFFECTED_SOP_INSTANCE_UID: "1.2.9"}
        operations: list[dict[int, wire.CommandValue]] = [
            {wire.COMMAND_FIELD: wire.N_ACTION, wire.ACTION_TYPE_ID: 1, **requested},
            {wire.COMMAND_FIELD: wire.N_EVENT_REPORT, wire.EVENT_TYPE_ID: 2, **affected},
            {wire.COMMAND_FIELD: wire.N_CREATE, **affected},
            {wire.COMMAND_FIELD: wire.N_SET, **requested},
            {wire.COMMAND_FIELD: wire.N_GET, wire.ATTRIBUTE_IDENTIFIER_LIST: (0x00100010,), **requested},
            {wire.COMMAND_FIELD: wire.N_DELETE, **requested},
        ]
        for command in operations:
            peer.send({wire.MESSAGE_ID: 4, **command})
            response = await peer.response()
            assert response[wire.STATUS] == 0 and response[wire.AFFECTED_SOP_INSTANCE_UID] == "1.2.9"
    names = ["N-ACTION", "N-EVENT-REPORT", "N-CREATE", "N-SET", "N-GET", "N-DELETE"]
    assert [request.operation for request in seen] == names
    assert seen[0].type_id == 1 and seen[1].type_id == 2 and seen[4].attribute_identifiers == (0x00100010,)


async def test_stop_lets_a_handler_finish_and_releases_the_idle() -> None:
    begun, go = asyncio.Event(), asyncio.Event()

    async def store(_request: StoreRequest) -> Status:
        begun.set()
        await go.wait()
        return SUCCESS

    acceptor = await serve([storing(store)], ae_title="HERE", host="127.0.0.1")
    idle, busy = await Peer.associate(acceptor), await Peer.associate(acceptor)
    busy.store()
    await begun.wait()
    stopping = asyncio.create_task(acceptor.stop(10))
    assert (await idle.pdu())[0] == wire.RELEASE_RQ
    # A release collision: the acceptor waits for our answer, then gives its own (PS3.8 9.2.3).
    idle.writer.write(wire.RELEASE_RQ_PDU)
    idle.writer.write(wire.RELEASE_RP_PDU)
    assert (await idle.pdu())[0] == wire.RELEASE_RP
    idle.writer.close()
    go.set()
    assert await busy.status() == 0
    assert (await busy.pdu())[0] == wire.RELEASE_RQ
    busy.writer.write(wire.RELEASE_RP_PDU)
    async with asyncio.timeout(10):
        await stopping
    assert await busy.ended() == b""
    with pytest.raises(OSError):
        await Peer.connect(acceptor)


async def test_stop_aborts_what_does_not_end() -> None:
    begun = asyncio.Event()

    async def store(_request: StoreRequest) -> Status:
        begun.set()
        await asyncio.Event().wait()
        return SUCCESS

    acceptor = await serve([storing(store)], ae_title="HERE", host="127.0.0.1")
    peer = await Peer.associate(acceptor)
    peer.store()
    await begun.wait()
    async with asyncio.timeout(10):
        await acceptor.stop(0.1)
    assert acceptor.associations == 0


def store_command() -> bytes:
    return wire.encode_command(
        {
            wire.AFFECTED_SOP_CLASS_UID: CT,
            wire.COMMAND_FIELD: wire.C_STORE,
            wire.MESSAGE_ID: 1,
            wire.PRIORITY: 0,
            wire.DATA_SET_TYPE: wire.WITH_DATASET,
            wire.AFFECTED_SOP_INSTANCE_UID: "1.2.3",
        }
    )
