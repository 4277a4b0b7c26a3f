"""The requestor against peers that we did not write: DCMTK's storescp and dcmqrscp, and pynetdicom as SCP."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydicom import dcmread
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset
from pydicom.uid import UID
from pynetdicom import AE, ALL_TRANSFER_SYNTAXES, AllStoragePresentationContexts, build_context, evt
from pynetdicom.sop_class import (  # type: ignore[attr-defined]
    CTImageStorage,
    ModalityPerformedProcedureStep,
    MRImageStorage,
    StorageCommitmentPushModel,
    StudyRootQueryRetrieveInformationModelFind,
    StudyRootQueryRetrieveInformationModelGet,
    StudyRootQueryRetrieveInformationModelMove,
    Verification,
)

from libs.common.errors import Invalid, NotFound
from libs.dimse.model import ConnectionRefused, OutgoingInstance, ProtocolError, Status, StoreRequest, TimedOut
from libs.dimse.requestor import UNCOMPRESSED, VERIFICATION, connect, store_many

EXPLICIT, IMPLICIT = UNCOMPRESSED
BIG_ENDIAN = "1.2.840.10008.1.2.2"
DEFLATED = "1.2.840.10008.1.2.1.99"
FILES = (
    "CT_small.dcm",
    "MR_small.dcm",
    "MR_small_bigendian.dcm",
    "image_dfl.dcm",
    "JPEG2000.dcm",
    "MR_small_RLE.dcm",
    "JPEG-lossy.dcm",
    "rtplan.dcm",
)
PAIRS: dict[str, Any] = {"called_ae_title": "PEER", "calling_ae_title": "SAGITTAL"}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def wait_for_port(port: int) -> None:
    end = time.monotonic() + 15
    while time.monotonic() < end:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.05)
    raise AssertionError(f"nothing listens on {port}")


def outgoing(path: str | Path, pieces: int = 1 << 16) -> OutgoingInstance:
    with Path(path).open("rb") as file:
        meta = dcmread(file, stop_before_pixels=True).file_meta
    data = Path(path).read_bytes()
    start = 144 + meta.FileMetaInformationGroupLength

    async def read() -> AsyncIterator[bytes]:
        for offset in range(start, len(data), pieces):
            yield data[offset : offset + pieces]

    return OutgoingInstance(
        str(meta.MediaStorageSOPClassUID), str(meta.MediaStorageSOPInstanceUID), str(meta.TransferSyntaxUID), read
    )


def sample(name: str) -> OutgoingInstance:
    path = get_testdata_file(name)
    assert isinstance(path, str)
    return outgoing(path)


def dataset_bytes(path: Path) -> bytes:
    """The dataset part of a Part 10 file as it stands there."""
    data = path.read_bytes()
    return data[144 + int.from_bytes(data[140:144], "little") :]


@contextlib.contextmanager
def running(*command: str, port: int) -> Iterator[None]:
    process = subprocess.Popen(
        command, env={"TCP_NODELAY": "1", "PATH": "/usr/bin:/bin"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        wait_for_port(port)
        yield
    finally:
        process.terminate()
        process.wait(10)


@contextlib.contextmanager
def peer(
    handlers: list[Any], *, contexts: list[Any] | None = None, roles: bool = False, max_pdu: int = 16382
) -> Iterator[int]:
    ae = AE("PEER")
    ae.maximum_pdu_size = max_pdu
    for context in contexts if contexts is not None else [*AllStoragePresentationContexts[:100]]:
        kwargs = {"scu_role": True, "scp_role": True} if roles else {}
        ae.add_supported_context(context.abstract_syntax or "", ALL_TRANSFER_SYNTAXES, **kwargs)
    ae.add_supported_context(Verification)
    for uid in (
        StudyRootQueryRetrieveInformationModelFind,
        StudyRootQueryRetrieveInformationModelMove,
        StudyRootQueryRetrieveInformationModelGet,
        StorageCommitmentPushModel,
        ModalityPerformedProcedureStep,
    ):
        ae.add_supported_context(uid, [EXPLICIT, IMPLICIT])
    server = ae.start_server(("127.0.0.1", 0), block=False, evt_handlers=handlers)
    assert server is not None
    try:
        yield int(server.server_address[1])
    finally:
        server.shutdown()


@pytest.mark.parametrize("max_pdu", [4096, 16384, 131072])
async def test_storescp_takes_every_syntax_byte_for_byte(tmp_path: Path, max_pdu: int) -> None:
    port = free_port()
    command = ("storescp", "-pdu", str(max_pdu), "+xa", "+B", "+uf", "-od", str(tmp_path), str(port))
    instances = [sample(name) for name in FILES]
    with running(*command, port=port):
        results = [(i, s) async for i, s in store_many("127.0.0.1", port, instances, **PAIRS)]
    assert [status.code for _, status in results] == [0] * len(FILES)
    received = [dataset_bytes(path) for path in tmp_path.iterdir()]
    for instance in instances:
        sent = b"".join([piece async for piece in instance.read()])
        sent += b"\0" * (len(sent) % 2)  # the deflated one
        assert sent in received


async def test_refused_syntax_is_converted_or_reported(tmp_path: Path) -> None:
    port = free_port()
    instance = sample("MR_small_RLE.dcm")

    async def convert(syntaxes: tuple[str, ...]) -> tuple[str, bytes]:
        path = get_testdata_file("MR_small_RLE.dcm")
        assert isinstance(path, str)
        dataset = dcmread(path)
        dataset.decompress(generate_instance_uid=False)
        buffer = DicomBytesIO()
        buffer.is_little_endian, buffer.is_implicit_VR = True, UID(syntaxes[0]).is_implicit_VR
        write_dataset(buffer, dataset)
        return syntaxes[0], buffer.getvalue()

    async def refuse(syntaxes: tuple[str, ...]) -> tuple[str, bytes]:
        raise Invalid("no decoder")

    convertible = OutgoingInstance(
        instance.sop_class_uid, instance.sop_instance_uid, instance.transfer_syntax_uid, instance.read, convert
    )
    broken = OutgoingInstance(
        instance.sop_class_uid, instance.sop_instance_uid, instance.transfer_syntax_uid, instance.read, refuse
    )
    with running("storescp", "+xi", "-od", str(tmp_path), str(port), port=port):
        # Only Implicit Little Endian is taken here.
        results = [s async for _, s in store_many("127.0.0.1", port, [convertible, broken, instance], **PAIRS)]
    assert [status.code for status in results] == [0, 0xA900, 0xA900]
    assert "no decoder" in results[1].comment
    (path,) = tmp_path.iterdir()
    assert dcmread(path).pixel_array.shape == (64, 64)


@pytest.mark.parametrize("max_pdu", [0, 4096, 65536])
async def test_large_instance_streams_to_pynetdicom(max_pdu: int) -> None:
    received: list[bytes] = []

    def handle_store(event: evt.Event) -> int:
        received.append(event.encoded_dataset(include_meta=False))
        return 0x0000

    piece = bytes(range(256)) * 1024

    async def read() -> AsyncIterator[bytes]:
        yield b"\x08\x00\x18\x00\x06\x00\x00\x001.2.3\x00"
        for _ in range(12):
            yield piece

    instance = OutgoingInstance(CTImageStorage, "1.2.3", IMPLICIT, read)
    with peer([(evt.EVT_C_STORE, handle_store)], max_pdu=max_pdu) as port:
        async with connect("127.0.0.1", port, contexts=[(CTImageStorage, (IMPLICIT,))], **PAIRS) as association:
            assert (await association.store(instance)).code == 0
            assert (
                await association.store(instance, move_originator_ae_title="X", move_originator_message_id=9)
            ).code == 0
    assert len(received) == 2
    assert received[0][14:] == piece * 12


async def test_echo_and_the_three_kinds_of_connection_error() -> None:
    contexts = [(VERIFICATION, (IMPLICIT,))]
    with peer([]) as port:
        async with connect("127.0.0.1", port, contexts=contexts, **PAIRS) as association:
            assert (await association.echo()).code == 0
            assert (await association.echo()).code == 0
            with pytest.raises(Invalid, match="did not accept CT Image"):
                await association.n_delete(CTImageStorage, "1.2")
            await association.release()
            with pytest.raises(ProtocolError, match="over"):
                await association.echo()
    with pytest.raises(ConnectionRefused, match="No connection"):
        async with connect("127.0.0.1", free_port(), contexts=contexts, **PAIRS):
            pass


async def test_rejection_is_told_in_words() -> None:
    ae = AE("OTHER")
    ae.require_called_aet = True
    ae.add_supported_context(Verification)
    server = ae.start_server(("127.0.0.1", 0), block=False)
    assert server is not None
    try:
        with pytest.raises(ConnectionRefused, match="called ae title not recognised"):
            async with connect("127.0.0.1", server.server_address[1], contexts=[(VERIFICATION, (IMPLICIT,))], **PAIRS):
                pass
    finally:
        server.shutdown()


async def test_peer_that_aborts_in_the_middle() -> None:
    def handle_store(event: evt.Event) -> int:
        event.assoc.abort()
        return 0x0000

    with peer([(evt.EVT_C_STORE, handle_store)]) as port, pytest.raises(ProtocolError, match=r"abort|closed"):
        async for _ in store_many("127.0.0.1", port, [sample("CT_small.dcm")], **PAIRS):
            pass


async def test_peer_that_is_slow_to_answer_times_out() -> None:
    def handle_echo(event: evt.Event) -> int:
        time.sleep(2)
        return 0x0000

    with peer([(evt.EVT_C_ECHO, handle_echo)]) as port, pytest.raises(TimedOut, match=r"nothing for 0\.3 s"):
        async with connect(
            "127.0.0.1", port, contexts=[(VERIFICATION, (IMPLICIT,))], dimse_timeout=0.3, **PAIRS
        ) as association:
            await association.echo()


async def test_unreadable_instance_costs_itself_only() -> None:
    received: list[str] = []

    def handle_store(event: evt.Event) -> int:
        received.append(str(event.dataset.SOPInstanceUID))
        return 0x0000

    async def fail_at_once() -> AsyncIterator[bytes]:
        raise NotFound("The object is gone.")
        yield b""

    async def fail_late() -> AsyncIterator[bytes]:
        yield bytes(1 << 20)
        raise NotFound("The object is gone.")

    good = sample("CT_small.dcm")
    early = OutgoingInstance(good.sop_class_uid, "1.1", good.transfer_syntax_uid, fail_at_once)
    late = OutgoingInstance(good.sop_class_uid, "1.2", good.transfer_syntax_uid, fail_late)
    with peer([(evt.EVT_C_STORE, handle_store)]) as port:
        results = [s async for _, s in store_many("127.0.0.1", port, [early, good, late, good], **PAIRS)]
    assert [status.code for status in results] == [0xC001, 0, 0xC001, 0]
    assert received == [good.sop_instance_uid] * 2


async def test_find_yields_matches_and_cancel_stops_the_peer() -> None:
    cancelled = asyncio.Event()
    loop = asyncio.get_running_loop()

    def handle_find(event: evt.Event) -> Iterator[tuple[int, Dataset | None]]:
        for i in range(int(event.identifier.get("StudyID") or 3)):
            if event.is_cancelled:
                loop.call_soon_threadsafe(cancelled.set)
                yield 0xFE00, None
                return
            match = Dataset()
            match.StudyInstanceUID = f"1.2.{i}"
            yield 0xFF00, match
            if event.identifier.get("StudyID"):
                time.sleep(0.01)

    model = StudyRootQueryRetrieveInformationModelFind
    with peer([(evt.EVT_C_FIND, handle_find)]) as port:
        async with connect("127.0.0.1", port, contexts=[(model, UNCOMPRESSED)], **PAIRS) as association:
            query = Dataset()
            query.QueryRetrieveLevel = "STUDY"
            found = [(s.code, d.StudyInstanceUID if d else None) async for s, d in association.find(model, query)]
            assert found == [(0xFF00, "1.2.0"), (0xFF00, "1.2.1"), (0xFF00, "1.2.2"), (0, None)]
            query.StudyID = "3000"
            async with contextlib.aclosing(association.find(model, query)) as answers:
                async for _ in answers:
                    break
            assert cancelled.is_set()
            del query.StudyID
            assert len([s async for s, _ in association.find(model, query)]) == 4


def dcmqrscp_config(tmp_path: Path, port: int, move_port: int) -> Path:
    storage = tmp_path / "archive"
    storage.mkdir()
    config = tmp_path / "dcmqrscp.cfg"
    config.write_text(
        f"NetworkTCPPort = {port}\nMaxPDUSize = 16384\nMaxAssociations = 16\n"
        f"HostTable BEGIN\nmover = (MOVER, 127.0.0.1, {move_port})\nHostTable END\n"
        "VendorTable BEGIN\nVendorTable END\n"
        f"AETable BEGIN\nPEER {storage} RW (200, 1024mb) ANY\nAETable END\n"
    )
    return config


async def test_store_find_move_and_get_with_dcmqrscp(tmp_path: Path) -> None:
    port, move_port = free_port(), free_port()
    moved = tmp_path / "moved"
    moved.mkdir()
    config = dcmqrscp_config(tmp_path, port, move_port)
    instances = [sample("CT_small.dcm"), sample("MR_small.dcm")]
    got: list[StoreRequest] = []
    data: list[bytes] = []

    async def on_store(request: StoreRequest) -> Status:
        got.append(request)
        data.append(request.dataset.read())
        return Status(0)

    find, move, get = (
        StudyRootQueryRetrieveInformationModelFind,
        StudyRootQueryRetrieveInformationModelMove,
        StudyRootQueryRetrieveInformationModelGet,
    )
    with (
        running("dcmqrscp", "-c", str(config), port=port),
        running("storescp", "-aet", "MOVER", "-od", str(moved), str(move_port), port=move_port),
    ):
        assert [s.code async for _, s in store_many("127.0.0.1", port, instances, **PAIRS)] == [0, 0]
        storage = [CTImageStorage, MRImageStorage]
        async with connect(
            "127.0.0.1",
            port,
            contexts=[(uid, UNCOMPRESSED) for uid in (find, move, get)] + [(uid, (EXPLICIT,)) for uid in storage],
            roles=storage,
            **PAIRS,
        ) as association:
            assert {c.abstract_syntax for c in association.accepted if c.as_scp} == set(storage)
            query = Dataset()
            query.QueryRetrieveLevel = "STUDY"
            query.StudyInstanceUID = ""
            query.PatientName = "CompressedSamples^CT1"
            answers = [item async for item in association.find(find, query)]
            assert [status.code for status, _ in answers] == [0xFF00, 0]
            match = answers[0][1]
            assert match is not None
            wanted = Dataset()
            wanted.QueryRetrieveLevel = "STUDY"
            wanted.StudyInstanceUID = match.StudyInstanceUID
            last = [item async for item in association.get(get, wanted, on_store)][-1]
            assert (last[0].code, last[1].completed, last[1].failed) == (0, 1, 0)
            last = [item async for item in association.move(move, wanted, "MOVER")][-1]
            assert (last[0].code, last[1].completed) == (0, 1)
            last = [item async for item in association.move(move, wanted, "NOBODY")][-1]
            assert last[0].code == 0xA801
    assert [request.sop_instance_uid for request in got] == [instances[0].sop_instance_uid]
    sent = b"".join([piece async for piece in instances[0].read()])
    assert len(data[0]) == len(sent) or dcmread(DicomBytesIO(data[0]), force=True).PatientName == match.PatientName
    assert len(list(moved.iterdir())) == 1


async def test_get_spools_large_instances_and_can_be_cancelled(tmp_path: Path) -> None:
    def handle_get(event: evt.Event) -> Iterator[Any]:
        yield 20
        for i in range(20):
            if event.is_cancelled:
                yield 0xFE00, None
                return
            instance = Dataset()
            instance.SOPClassUID, instance.SOPInstanceUID = CTImageStorage, f"1.2.{i}"
            instance.PixelData = bytes(3 << 20)
            instance["PixelData"].VR = "OW"
            instance.file_meta = dcmread(get_testdata_file("CT_small.dcm")).file_meta  # type: ignore[arg-type]
            yield 0xFF00, instance

    seen: list[tuple[int, bool]] = []

    async def on_store(request: StoreRequest) -> Status:
        assert request.dataset.path is not None
        seen.append((request.dataset.size, request.dataset.path.stat().st_size == request.dataset.size))
        return Status(0)

    model = StudyRootQueryRetrieveInformationModelGet
    with peer([(evt.EVT_C_GET, handle_get)], roles=True, contexts=[build_context(CTImageStorage)]) as port:
        async with connect(
            "127.0.0.1",
            port,
            contexts=[(model, UNCOMPRESSED), (CTImageStorage, (EXPLICIT,))],
            roles=[CTImageStorage],
            spool_threshold=1 << 20,
            spool_directory=tmp_path,
            **PAIRS,
        ) as association:
            wanted = Dataset()
            wanted.QueryRetrieveLevel = "STUDY"
            async with contextlib.aclosing(association.get(model, wanted, on_store)) as answers:
                async for _status, progress, _identifier in answers:
                    if progress.completed >= 3:
                        break
            assert association.is_open
    assert 3 <= len(seen) < 20
    assert all(size > 3 << 20 and whole for size, whole in seen)
    assert list(tmp_path.iterdir()) == []


async def test_normalized_services() -> None:
    def answer(event: evt.Event) -> tuple[int, Dataset | None]:
        reply = Dataset()
        reply.PatientID = "X"
        return 0x0000, reply

    def refuse(event: evt.Event) -> tuple[int, Dataset | None]:
        return 0x0112, None

    handlers = [
        (evt.EVT_N_ACTION, answer),
        (evt.EVT_N_EVENT_REPORT, answer),
        (evt.EVT_N_CREATE, answer),
        (evt.EVT_N_SET, answer),
        (evt.EVT_N_GET, refuse),
    ]
    data = Dataset()
    data.TransactionUID = "1.2.3"
    mpps, commitment = ModalityPerformedProcedureStep, StorageCommitmentPushModel
    with peer(handlers) as port:
        contexts = [(mpps, UNCOMPRESSED), (commitment, UNCOMPRESSED)]
        async with connect("127.0.0.1", port, contexts=contexts, **PAIRS) as association:
            created = await association.n_create(mpps, "1.2.9", data)
            assert (created.status.code, created.sop_instance_uid) == (0, "1.2.9")
            assert created.dataset is not None
            assert created.dataset.PatientID == "X"
            assert (await association.n_set(mpps, "1.2.9", data)).status.code == 0
            assert (await association.n_get(mpps, "1.2.9", (0x00100020, 0x00100010))).status.code == 0x0112
            assert (await association.n_action(commitment, "1.2.840.10008.1.20.1.1", 1, data)).status.code == 0
            assert (await association.n_event_report(commitment, "1.2.840.10008.1.20.1.1", 1, data)).status.code == 0


@pytest.fixture
def certificates(tmp_path: Path) -> Path:
    if shutil.which("openssl") is None:
        raise AssertionError("openssl is needed to make the certificates of this test")
    for name in ("server", "client"):
        subprocess.run(
            f"openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN={name} "
            f"-addext subjectAltName=IP:127.0.0.1 -keyout {name}.key -out {name}.pem".split(),
            cwd=tmp_path,
            check=True,
            capture_output=True,
        )
    return tmp_path


async def test_tls_with_client_certificate_against_storescp(certificates: Path) -> None:
    port = free_port()
    received = certificates / "received"
    received.mkdir()
    server = (str(certificates / "server.key"), str(certificates / "server.pem"))
    command = ("storescp", "-od", str(received), "+tls", *server, "+cf", str(certificates / "client.pem"), str(port))
    context = ssl.create_default_context(cafile=str(certificates / "server.pem"))
    with running(*command, port=port):
        with pytest.raises(ConnectionRefused, match="TLS"):
            async with connect(
                "127.0.0.1", port, contexts=[(VERIFICATION, (IMPLICIT,))], ssl=ssl.create_default_context(), **PAIRS
            ):
                pass
        with pytest.raises((ConnectionRefused, ProtocolError)):
            async with connect("127.0.0.1", port, contexts=[(VERIFICATION, (IMPLICIT,))], ssl=context, **PAIRS):
                pass
        context.load_cert_chain(certificates / "client.pem", certificates / "client.key")
        results = [
            s.code async for _, s in store_many("127.0.0.1", port, [sample("CT_small.dcm")], ssl=context, **PAIRS)
        ]
    assert results == [0]
