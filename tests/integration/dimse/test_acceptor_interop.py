"""The acceptor against peers that we did not write: DCMTK's SCU tools and pynetdicom as SCU, also over TLS."""

from __future__ import annotations

import asyncio
import contextlib
import os
import ssl
import subprocess
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from pydicom import dcmread
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset
from pynetdicom import AE, build_context, build_role, evt
from pynetdicom.sop_class import (  # type: ignore[attr-defined]
    CTImageStorage,
    StudyRootQueryRetrieveInformationModelFind,
    StudyRootQueryRetrieveInformationModelGet,
    StudyRootQueryRetrieveInformationModelMove,
)

from libs.dimse.acceptor import Acceptor, serve
from libs.dimse.datasets import write_dataset
from libs.dimse.model import (
    CANCEL,
    PENDING,
    SUCCESS,
    Caller,
    OutgoingInstance,
    Progress,
    QueryRequest,
    Rejection,
    ReportProgress,
    RetrieveResult,
    Scp,
    SendInstance,
    Status,
    StoreRequest,
)
from services.ingest.scp import storage_sop_classes, storage_transfer_syntaxes

FIND = str(StudyRootQueryRetrieveInformationModelFind)
MOVE = str(StudyRootQueryRetrieveInformationModelMove)
GET = str(StudyRootQueryRetrieveInformationModelGet)
IMPLICIT, EXPLICIT, BIG_ENDIAN = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2"
DEFLATED, JPEG_2000, RLE = "1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.4.91", "1.2.840.10008.1.2.5"
CT = str(CTImageStorage)


def sample(name: str) -> Path:
    path = get_testdata_file(name)
    assert isinstance(path, str)
    return Path(path)


def dataset_bytes(path: Path) -> bytes:
    """The dataset part of a Part 10 file as it stands there."""
    data = path.read_bytes()
    return data[144 + int.from_bytes(data[140:144], "little") :]


@dataclass
class Archive:
    """A few handlers that keep what they get and hand it back."""

    stored: list[tuple[StoreRequest, bytes]] = field(default_factory=list)
    queries: list[QueryRequest] = field(default_factory=list)
    converted: list[tuple[str, ...]] = field(default_factory=list)
    matches: int = 3

    async def store(self, request: StoreRequest) -> Status:
        self.stored.append((request, request.dataset.read()))
        return SUCCESS

    async def find(self, request: QueryRequest) -> AsyncIterator[tuple[Status, Dataset | bytes | None]]:
        self.queries.append(request)
        for number in range(self.matches):
            if request.cancelled.is_set():
                yield CANCEL, None
                return
            match = Dataset()
            match.QueryRetrieveLevel = "STUDY"
            match.StudyInstanceUID = f"1.2.3.{number}"
            yield PENDING, write_dataset(match, request.transfer_syntax_uid) if number % 2 else match
            await asyncio.sleep(0)

    async def move(self, request: QueryRequest, report: ReportProgress) -> RetrieveResult:
        self.queries.append(request)
        await report(Progress(2, 0, 0, 0))
        await report(Progress(1, 1, 0, 0))
        return RetrieveResult(Status(0xB000, "one failed"), Progress(0, 1, 1, 0), ("1.2.3.4",))

    async def get(self, request: QueryRequest, report: ReportProgress, send: SendInstance) -> RetrieveResult:
        self.queries.append(request)
        completed, failed = 0, list[str]()
        for stored, data in self.stored:
            if request.cancelled.is_set():
                return RetrieveResult(CANCEL, Progress(len(self.stored) - completed, completed, len(failed), 0))
            status = await send(self.outgoing(stored, data))
            if status.code:
                failed.append(stored.sop_instance_uid)
            else:
                completed += 1
            await report(Progress(len(self.stored) - completed - len(failed), completed, len(failed), 0))
        final = Status(0xB000) if failed else SUCCESS
        return RetrieveResult(final, Progress(0, completed, len(failed), 0), tuple(failed))

    def outgoing(self, stored: StoreRequest, data: bytes) -> OutgoingInstance:
        async def read() -> AsyncIterator[bytes]:
            for offset in range(0, len(data), 10_000):
                yield data[offset : offset + 10_000]

        async def convert(accepted: tuple[str, ...]) -> tuple[str, bytes]:
            self.converted.append(accepted)
            held = Dataset()
            held.SOPClassUID, held.SOPInstanceUID = stored.sop_class_uid, stored.sop_instance_uid
            return accepted[0], write_dataset(held, accepted[0])

        return OutgoingInstance(
            stored.sop_class_uid, stored.sop_instance_uid, stored.transfer_syntax_uid, read, convert
        )

    def scps(self, **options: Any) -> list[Scp]:
        storage, syntaxes = storage_sop_classes(), storage_transfer_syntaxes()
        return [
            Scp("ingest", storage, syntaxes, store=self.store, **options),
            Scp(
                "query",
                frozenset((FIND, MOVE, GET)),
                (EXPLICIT, IMPLICIT, DEFLATED, BIG_ENDIAN),
                scu_abstract_syntaxes=storage,
                scu_transfer_syntaxes=syntaxes,
                find=self.find,
                move=self.move,
                get=self.get,
                extended_negotiation={FIND: lambda asked: bytes((*asked[:2], 0))},
            ),
        ]


@contextlib.asynccontextmanager
async def accepting(
    archive: Archive, scp_options: dict[str, Any] | None = None, **options: Any
) -> AsyncIterator[Acceptor]:
    acceptor = await serve(archive.scps(**(scp_options or {})), ae_title="HERE", host="127.0.0.1", **options)
    try:
        yield acceptor
    finally:
        await acceptor.stop(1)


async def run(*command: str | Path | int) -> tuple[int, str]:
    process = await asyncio.create_subprocess_exec(
        *map(str, command),
        env={**os.environ, "TCP_NODELAY": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    async with asyncio.timeout(60):
        output, _ = await process.communicate()
    return process.returncode or 0, output.decode(errors="replace")


async def dcmtk(tool: str, acceptor: Acceptor, *options: str | Path | int, after: tuple[str | Path, ...] = ()) -> str:
    code, output = await run(tool, "-v", *options, "127.0.0.1", acceptor.port, *after)
    assert code == 0, output
    return output


async def test_echo() -> None:
    async with accepting(Archive()) as acceptor:
        assert "Success" in await dcmtk("echoscu", acceptor, "--repeat", 3)


@pytest.mark.parametrize(
    ("name", "option", "syntax"),
    [
        ("CT_small.dcm", "-xe", EXPLICIT),
        ("MR_small_bigendian.dcm", "-xb", BIG_ENDIAN),
        ("rtplan.dcm", "-xi", IMPLICIT),
        ("image_dfl.dcm", "-xd", DEFLATED),
        ("JPEG2000.dcm", "-xw", JPEG_2000),
        ("MR_small_RLE.dcm", "-xr", RLE),
    ],
)
async def test_storescu_in_every_kind_of_syntax(name: str, option: str, syntax: str) -> None:
    archive, path = Archive(), sample(name)
    async with accepting(archive) as acceptor:
        await dcmtk("storescu", acceptor, option, after=(path,))
    ((request, data),) = archive.stored
    assert request.transfer_syntax_uid == syntax
    assert request.sop_instance_uid == dcmread(path, stop_before_pixels=True).SOPInstanceUID
    assert request.caller.calling_ae_title == "STORESCU"
    if syntax != DEFLATED:  # storescu inflates and deflates again
        # storescu pads an odd file and drops group lengths: what it sends is compared where it keeps the bytes.
        assert dcmread(path).PixelData[:100] in data if name != "rtplan.dcm" else len(data) > 1000


@pytest.mark.parametrize("pdu", [4096, 16384, 131072])
async def test_storescu_with_pdus_of_any_size(pdu: int) -> None:
    archive = Archive()
    names = ("CT_small.dcm", "MR_small.dcm", "rtplan.dcm")
    async with accepting(archive, max_pdu=pdu) as acceptor:
        output = await dcmtk("storescu", acceptor, "-R", "--max-pdu", pdu, "+C", after=tuple(map(sample, names)))
        assert output.count("Received Store Response (Success)") == 3
    assert len(archive.stored) == 3


async def test_storescu_aborts_and_a_private_class_is_taken_when_configured() -> None:
    archive = Archive()
    async with accepting(archive, {"accept_any_abstract_syntax": True}) as acceptor:
        await run("echoscu", "--abort", "127.0.0.1", acceptor.port)
        ae = AE()
        ae.add_requested_context("1.2.826.0.1.3680043.9.9", EXPLICIT)
        ae.add_requested_context("1.2.840.10008.5.1.1.9", EXPLICIT)
        association = await asyncio.to_thread(ae.associate, "127.0.0.1", acceptor.port)
        assert [str(context.abstract_syntax) for context in association.accepted_contexts] == [
            "1.2.826.0.1.3680043.9.9"
        ]
        await asyncio.to_thread(association.release)


async def test_findscu_gets_every_match() -> None:
    archive = Archive()
    async with accepting(archive) as acceptor:
        output = await dcmtk("findscu", acceptor, "-S", "-k", "QueryRetrieveLevel=STUDY", "-k", "StudyInstanceUID")
    assert all(f"1.2.3.{number}" in output for number in range(3))
    assert archive.queries[0].identifier.QueryRetrieveLevel == "STUDY"


async def test_findscu_cancels() -> None:
    archive = Archive(matches=100_000)
    async with accepting(archive) as acceptor:
        output = await dcmtk(
            "findscu", acceptor, "-S", "--cancel", 3, "-k", "QueryRetrieveLevel=STUDY", "-k", "StudyInstanceUID"
        )
    assert "Cancel" in output and archive.queries[0].cancelled.is_set()


async def test_movescu_is_told_the_progress_and_what_failed() -> None:
    archive = Archive()
    async with accepting(archive) as acceptor:
        code, output = await run(
            *("movescu", "-d", "-S", "-aem", "ELSEWHERE", "-k", "QueryRetrieveLevel=STUDY", "-k"),
            *("StudyInstanceUID=1.2", "127.0.0.1", acceptor.port),
        )
    assert "Remaining Suboperations       : 1" in output and "0xb000" in output, (code, output)
    assert "1.2.3.4" in output and archive.queries[0].move_destination == "ELSEWHERE"


async def test_getscu_gets_back_what_storescu_sent(tmp_path: Path) -> None:
    archive = Archive()
    async with accepting(archive) as acceptor:
        await dcmtk("storescu", acceptor, "-xe", after=(sample("CT_small.dcm"), sample("MR_small.dcm")))
        await dcmtk(
            *("getscu", acceptor, "-S", "+B", "-od", tmp_path, "-k", "QueryRetrieveLevel=STUDY"),
            *("-k", "StudyInstanceUID=1.2"),
        )
    back = [dataset_bytes(path) for path in tmp_path.iterdir()]
    assert sorted(back) == sorted(data for _, data in archive.stored)


async def test_a_get_converts_what_the_peer_does_not_take_and_counts_what_it_cannot_have() -> None:
    archive = Archive()
    got: list[tuple[str, str]] = []

    def on_store(event: Any) -> int:
        got.append((str(event.request.AffectedSOPInstanceUID), str(event.context.transfer_syntax)))
        return 0

    async with accepting(archive) as acceptor:
        names = ("CT_small.dcm", "rtplan.dcm")
        for name, option in zip(names, ("-xe", "-xi"), strict=True):
            await dcmtk("storescu", acceptor, option, after=(sample(name),))

        def get() -> tuple[list[Any], list[Any]]:
            ae = AE()
            ae.add_requested_context(GET, [EXPLICIT])
            ae.add_requested_context(CT, [IMPLICIT])
            association = ae.associate(
                "127.0.0.1",
                acceptor.port,
                ext_neg=[build_role(CT, scp_role=True, scu_role=True)],
                evt_handlers=[(evt.EVT_C_STORE, on_store)],
            )
            roles = [(c.as_scu, c.as_scp) for c in association.accepted_contexts if c.abstract_syntax == CT]
            query = Dataset()
            query.QueryRetrieveLevel, query.StudyInstanceUID = "STUDY", "1.2"
            answers = list(association.send_c_get(query, GET))
            association.release()
            return answers, roles

        answers, roles = await asyncio.to_thread(get)
    ct, plan = (request.sop_instance_uid for request, _ in archive.stored)
    assert roles == [(True, True)]
    assert got == [(ct, IMPLICIT)] and archive.converted == [(IMPLICIT,)]
    status, identifier = answers[-1]
    assert status.Status == 0xB000 and status.NumberOfFailedSuboperations == 1
    assert identifier.FailedSOPInstanceUIDList == plan


async def test_pynetdicom_stores_and_negotiates_everything() -> None:
    archive, callers = Archive(), list[Caller]()

    async def policy(caller: Caller) -> Rejection | None:
        callers.append(caller)
        return None if caller.called_ae_title == "HERE" else Rejection(1, 1, 7, "called AE title")

    async with accepting(archive, policy=policy) as acceptor:
        dataset = dcmread(sample("CT_small.dcm"))

        def store() -> tuple[list[int], dict[Any, bytes], Any, bool]:
            from pynetdicom.pdu_primitives import (
                AsynchronousOperationsWindowNegotiation,
                SOPClassExtendedNegotiation,
                UserIdentityNegotiation,
            )

            ae = AE("SCU")
            ae.requested_contexts = [build_context(CT, [EXPLICIT]), build_context(FIND, [EXPLICIT])]
            identity = UserIdentityNegotiation()
            identity.user_identity_type, identity.positive_response_requested = 2, True
            identity.primary_field, identity.secondary_field = b"user", b"secret"
            extended = SOPClassExtendedNegotiation()
            extended.sop_class_uid, extended.service_class_application_information = FIND, b"\1\1\1"
            window = AsynchronousOperationsWindowNegotiation()
            window.maximum_number_operations_invoked = window.maximum_number_operations_performed = 5
            association = ae.associate(
                "127.0.0.1", acceptor.port, ae_title="HERE", max_pdu=0, ext_neg=[identity, extended, window]
            )
            codes = [association.send_c_store(dataset).Status for _ in range(3)]
            query = Dataset()
            query.QueryRetrieveLevel, query.StudyInstanceUID = "STUDY", ""
            list(association.send_c_find(query, FIND))
            granted = dict(association.acceptor.sop_class_extended)
            operations = association.acceptor.asynchronous_operations
            answered = association.acceptor.user_identity is not None
            association.release()
            refused = ae.associate("127.0.0.1", acceptor.port, ae_title="OTHER")
            assert refused.is_rejected
            return codes, granted, operations, answered

        codes, granted, operations, answered = await asyncio.to_thread(store)
    assert codes == [0, 0, 0] and operations == (1, 1) and answered
    assert list(granted.values()) == [b"\1\1\0"]
    query = archive.queries[0]
    assert (query.relational, query.combined_date_time, query.fuzzy_names) == (True, True, False)
    identity = callers[0].user_identity
    assert identity is not None and (identity.kind, identity.primary, identity.secondary) == (2, b"user", b"secret")


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    folder = tmp_path_factory.mktemp("tls")
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    extension = "subjectAltName=IP:127.0.0.1"
    subprocess.run(
        f"openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=modality -addext {extension}".split()
        + f"-keyout {key} -out {certificate}".split(),
        check=True,
        capture_output=True,
    )
    yield key, certificate


async def test_tls_with_client_certificates(certificates: tuple[Path, Path]) -> None:
    key, certificate = certificates
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(certificate))
    context.load_cert_chain(certificate, key)
    context.verify_mode = ssl.CERT_REQUIRED
    archive, callers = Archive(), list[Caller]()

    async def policy(caller: Caller) -> Rejection | None:
        callers.append(caller)
        return None

    async with accepting(archive, ssl=context, policy=policy, artim=5) as acceptor:
        await dcmtk(
            *("storescu", acceptor, "+tls", key, certificate, "+cf", certificate),
            after=(sample("CT_small.dcm"),),
        )
        code, _ = await run("echoscu", "127.0.0.1", acceptor.port, "-ta", 2, "-td", 2)
        assert code != 0
    assert callers[0].tls_subject == "commonName=modality" and len(archive.stored) == 1
