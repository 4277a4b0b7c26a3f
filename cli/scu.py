"""`sagittal echo`, `send`, `find` and `get`: talk to any DICOM archive as a client, from the command line."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Final, NoReturn, TypeVar

import typer
from pydicom.datadict import tag_for_keyword
from pydicom.dataset import Dataset
from pydicom.uid import UID
from pynetdicom import AllStoragePresentationContexts
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

from libs.common.dicom.part10 import build_file_meta, split_part10
from libs.common.errors import Invalid, SagittalError
from libs.dimse.model import DimseError, OutgoingInstance, ProtocolError, Status, StoreRequest
from libs.dimse.requestor import UNCOMPRESSED, VERIFICATION, connect, store_many

FIND: Final = {"PATIENT": "1.2.840.10008.5.1.4.1.2.1.1"}
STUDY_ROOT_FIND: Final = "1.2.840.10008.5.1.4.1.2.2.1"
STUDY_ROOT_GET: Final = "1.2.840.10008.5.1.4.1.2.2.3"
COMPRESSED: Final = tuple(
    f"1.2.840.10008.1.2.{suffix}"
    for suffix in ("5", "4.50", "4.51", "4.57", "4.70", "4.80", "4.81", "4.90", "4.91", "4.201", "4.202", "4.203")
)
COLUMNS: Final = {
    "PATIENT": ("PatientID", "PatientName", "PatientBirthDate", "PatientSex"),
    "STUDY": ("StudyDate", "PatientID", "PatientName", "ModalitiesInStudy", "StudyDescription", "StudyInstanceUID"),
    "SERIES": ("SeriesNumber", "Modality", "SeriesDescription", "SeriesInstanceUID"),
    "IMAGE": ("InstanceNumber", "SOPClassUID", "SOPInstanceUID"),
}
HEADER_BYTES: Final = 64 << 10
PIECE_BYTES: Final = 1 << 20
MOST_STORAGE_CONTEXTS: Final = 126
MOST_LOST: Final = 3

Result = TypeVar("Result")
Peer = Annotated[str, typer.Argument(metavar="HOST:PORT", help="Where the other DICOM application listens.")]
Called = Annotated[str, typer.Option(help="AE title of the other application.")]
Calling = Annotated[str, typer.Option(help="Our own AE title.")]

console = Console()
errors = Console(stderr=True)


def register(app: typer.Typer) -> None:
    """Put the commands of this file on the command line."""
    app.command()(echo)
    app.command()(send)
    app.command()(find)
    app.command()(get)


def echo(peer: Peer, called: Called = "SAGITTAL", calling: Calling = "SAGITTAL_SCU") -> None:
    """Ask whether a DICOM application answers (C-ECHO)."""
    host, port = _address(peer)

    async def run() -> Status:
        contexts = [(VERIFICATION, UNCOMPRESSED)]
        async with connect(
            host, port, called_ae_title=called, calling_ae_title=calling, contexts=contexts
        ) as association:
            return await association.echo()

    status = _finish(run())
    if status.code:
        _fail(f"{called} at {peer} answered with status 0x{status.code:04X} {status.comment}")
    console.print(f"{called} at {peer} answers.")


def send(
    peer: Peer,
    paths: Annotated[list[Path], typer.Argument(metavar="PATH...", help="DICOM files, and folders of them.")],
    called: Called = "SAGITTAL",
    calling: Calling = "SAGITTAL_SCU",
) -> None:
    """Send DICOM files (C-STORE). Exit code 1 when any of them was not taken."""
    host, port = _address(peer)
    if missing := [path for path in paths if not path.exists()]:
        _fail(f"There is no {missing[0]}.")
    reasons: Counter[str] = Counter()
    instances = list(_instances(paths, reasons))
    warned = 0

    async def run() -> int:
        nonlocal warned
        sent, done, lost = 0, 0, 0
        with _progress() as progress:
            task = progress.add_task("sending", total=len(instances))
            while done < len(instances):
                try:
                    async with contextlib.aclosing(
                        store_many(host, port, instances[done:], called_ae_title=called, calling_ae_title=calling)
                    ) as results:
                        async for _, status in results:
                            done, lost = done + 1, 0
                            progress.advance(task)
                            # 0xB000, 0xB006, 0xB007: stored, with a remark (PS3.4 B.2.3).
                            if status.code == 0 or status.code >> 12 == 0xB:
                                sent += 1
                                warned += status.code != 0
                            else:
                                reasons[f"0x{status.code:04X} {status.comment or _words(status.code)}"] += 1
                except ProtocolError as error:
                    # Some peers abort at a file that they do not like: the one without an answer. Go on behind it.
                    lost += 1
                    reasons[f"no answer: {error}"] += 1
                    done += 1
                    if lost < MOST_LOST:
                        continue
                    reasons["not sent: the peer ends every association"] += len(instances) - done
                    break
                except DimseError as error:
                    reasons[f"not sent: {error}"] += len(instances) - done
                    break
        return sent

    sent = _finish(run()) if instances else 0
    console.print(f"{sent} stored" + (f" ({warned} with a warning)" if warned else "") + f", {reasons.total()} not.")
    for reason, count in (+reasons).most_common():
        errors.print(f"  {count} x {reason}", soft_wrap=True, markup=False)
    if reasons.total() or not sent:
        raise typer.Exit(1)


def find(
    peer: Peer,
    level: Annotated[str, typer.Option(help="PATIENT, STUDY, SERIES or IMAGE.")] = "STUDY",
    key: Annotated[list[str] | None, typer.Option("-k", "--key", help="KEYWORD=VALUE, or KEYWORD to return.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print DICOM JSON, one match a line.")] = False,
    called: Called = "SAGITTAL",
    calling: Calling = "SAGITTAL_SCU",
) -> None:
    """Search an archive (C-FIND)."""
    host, port = _address(peer)
    level = level.upper()
    if level not in COLUMNS:
        _fail(f"There is no level {level}: use PATIENT, STUDY, SERIES or IMAGE.")
    identifier = Dataset()
    identifier.QueryRetrieveLevel = level
    columns = list(COLUMNS[level])
    for name in columns:
        setattr(identifier, name, "")
    for item in key or []:
        keyword, _, value = item.partition("=")
        if tag_for_keyword(keyword) is None:
            _fail(f"{keyword} is no DICOM keyword: write it as in PatientName or StudyInstanceUID.")
        try:
            setattr(identifier, keyword, value)
        except (TypeError, ValueError) as error:
            _fail(f"{keyword} cannot be {value!r}: {error}.")
        if keyword not in columns:
            columns.append(keyword)
    identifier.SpecificCharacterSet = "ISO_IR 192"
    model = FIND.get(level, STUDY_ROOT_FIND)

    async def run() -> tuple[Status, list[Dataset]]:
        matches = []
        status = Status(0)
        async with connect(
            host, port, called_ae_title=called, calling_ae_title=calling, contexts=[(model, UNCOMPRESSED)]
        ) as association:
            async for answer, match in association.find(model, identifier):
                status = answer
                if match is not None:
                    matches.append(match)
        return status, matches

    status, matches = _finish(run())
    if as_json:
        for match in matches:
            print(json.dumps(match.to_json_dict(), ensure_ascii=False))
    else:
        table = Table(*(Column(name, overflow="fold") for name in columns))
        for match in matches:
            table.add_row(*(_cell(match, name) for name in columns))
        console.print(table)
        console.print(f"{len(matches)} found.")
    if status.code:
        _fail(f"The search ended with status 0x{status.code:04X} {status.comment}")


def get(
    peer: Peer,
    folder: Annotated[Path, typer.Argument(help="Where to put the files; made when absent.")],
    study: Annotated[str, typer.Option(help="Study Instance UID.")],
    series: Annotated[str, typer.Option(help="Series Instance UID.")] = "",
    instance: Annotated[str, typer.Option(help="SOP Instance UID.")] = "",
    called: Called = "SAGITTAL",
    calling: Calling = "SAGITTAL_SCU",
) -> None:
    """Fetch a study, series or instance as DICOM files (C-GET), in the syntax in which the archive keeps them."""
    host, port = _address(peer)
    if instance and not series:
        _fail("Say also which --series the instance belongs to.")
    identifier = Dataset()
    identifier.QueryRetrieveLevel = "IMAGE" if instance else "SERIES" if series else "STUDY"
    identifier.StudyInstanceUID = study
    if series:
        identifier.SeriesInstanceUID = series
    if instance:
        identifier.SOPInstanceUID = instance
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        _fail(f"{folder} cannot be made: {error.strerror}.")
    received = 0

    async def on_store(request: StoreRequest) -> Status:
        nonlocal received
        await asyncio.to_thread(_write, folder, request)
        received += 1
        return Status(0)

    async def run() -> tuple[Status, int]:
        # What the study consists of decides the contexts: the classes of a hospital do not fit in one association.
        classes = await _classes(host, port, called, calling, identifier)
        contexts: list[tuple[str, tuple[str, ...]]] = [(STUDY_ROOT_GET, UNCOMPRESSED)]
        for uid in classes:
            contexts += [(uid, (syntax,)) for syntax in (*UNCOMPRESSED, *COMPRESSED)]
        if len(contexts) > MOST_STORAGE_CONTEXTS:
            contexts = [(STUDY_ROOT_GET, UNCOMPRESSED)]
            contexts += [(uid, (*COMPRESSED, *UNCOMPRESSED)) for uid in classes[:MOST_STORAGE_CONTEXTS]]
        status, failed = Status(0), 0
        async with connect(
            host, port, called_ae_title=called, calling_ae_title=calling, contexts=contexts, roles=classes
        ) as association:
            async for answer, counts, _ in association.get(STUDY_ROOT_GET, identifier, on_store):
                status, failed = answer, counts.failed
        return status, failed

    status, failed = _finish(run())
    console.print(f"{received} received in {folder}" + (f", {failed} failed." if failed else "."))
    if status.code or failed:
        _fail(f"The retrieve ended with status 0x{status.code:04X} {status.comment}")
    if not received:
        _fail("Nothing was found under these UIDs.")


async def _classes(host: str, port: int, called: str, calling: str, wanted: Dataset) -> list[str]:
    """The SOP classes in a study as the archive tells them, else the storage classes that fit in one association."""
    query = Dataset()
    query.QueryRetrieveLevel = "STUDY"
    query.StudyInstanceUID = wanted.StudyInstanceUID
    query.SOPClassesInStudy = ""
    found: set[str] = set()
    async with connect(
        host, port, called_ae_title=called, calling_ae_title=calling, contexts=[(STUDY_ROOT_FIND, UNCOMPRESSED)]
    ) as association:
        if association.accepted:
            async for _, match in association.find(STUDY_ROOT_FIND, query):
                value = match.get("SOPClassesInStudy") if match is not None else None
                found.update([str(value)] if isinstance(value, str) else map(str, value or ()))
    common = [str(context.abstract_syntax) for context in AllStoragePresentationContexts]
    return sorted(found) or common[:MOST_STORAGE_CONTEXTS]


def _write(folder: Path, request: StoreRequest) -> None:
    if not UID(request.sop_instance_uid).is_valid:
        raise Invalid("The SOP Instance UID is not valid: no file can be named after it.")
    target = folder / f"{request.sop_instance_uid}.dcm"
    partial = target.with_suffix(".part")
    with partial.open("wb") as file:
        file.write(build_file_meta(request.sop_class_uid, request.sop_instance_uid, request.transfer_syntax_uid))
        if request.dataset.path is not None:
            with request.dataset.path.open("rb") as spooled:
                while piece := spooled.read(PIECE_BYTES):
                    file.write(piece)
        else:
            file.writelines(request.dataset.pieces)
    partial.replace(target)


def _instances(paths: Iterable[Path], reasons: Counter[str]) -> Iterator[OutgoingInstance]:
    for path in _files(paths):
        try:
            with path.open("rb") as file:
                meta, offset = split_part10(file.read(HEADER_BYTES))
        except OSError as error:
            reasons[f"not readable: {error.strerror}"] += 1
            continue
        except Invalid:
            reasons["no DICOM file"] += 1
            continue
        if not (meta.sop_class_uid and meta.sop_instance_uid and meta.transfer_syntax_uid):
            reasons["no DICOM file: its file meta is incomplete"] += 1
            continue
        if meta.sop_class_uid == "1.2.840.10008.1.3.10":
            continue  # a DICOMDIR lists the other files and is not an instance
        yield OutgoingInstance(
            meta.sop_class_uid, meta.sop_instance_uid, meta.transfer_syntax_uid, _Reader(path, offset)
        )


class _Reader:
    """Reads the dataset of one file in pieces, each time it is called."""

    __slots__ = ("_offset", "_path")

    def __init__(self, path: Path, offset: int) -> None:
        self._path, self._offset = path, offset

    async def __call__(self) -> AsyncIterator[bytes]:
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                while piece := file.read(PIECE_BYTES):
                    yield piece
        except OSError as error:
            raise Invalid(f"not readable: {error.strerror}") from error


def _files(paths: Iterable[Path]) -> Iterator[Path]:
    for path in paths:
        if path.is_dir():
            for folder, folders, names in os.walk(path):
                folders.sort()
                yield from (Path(folder) / name for name in sorted(names))
        else:
            yield path


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=errors,
        transient=True,
    )


def _cell(match: Dataset, keyword: str) -> str:
    value: Any = match.get(keyword, "")
    text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value if value is not None else "")
    return text.replace("[", r"\[")


def _words(code: int) -> str:
    """What a C-STORE status means (PS3.4 B.2.3) when the peer did not say."""
    if code >> 8 == 0xA7:
        return "the peer is out of resources: try again later"
    if code >> 8 == 0xA9:
        return "the dataset does not match its SOP class"
    if code >> 12 == 0xC:
        return "the peer cannot understand it"
    return {0x0122: "the peer does not take this SOP class", 0x0124: "not authorised"}.get(code, "refused")


def _address(peer: str) -> tuple[str, int]:
    host, _, port = peer.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        _fail(f"{peer!r} is no address: write HOST:PORT, as in localhost:11112.")
    return host.strip("[]"), int(port)


def _finish(work: Coroutine[Any, Any, Result]) -> Result:
    try:
        return asyncio.run(work)
    except SagittalError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def _fail(message: str) -> NoReturn:
    errors.print(message, style="red", soft_wrap=True, markup=False)
    raise typer.Exit(1)
