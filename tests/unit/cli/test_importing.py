"""`sagittal import` against pynetdicom as the archive: what is found, sent, skipped and refused."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pydicom
import pytest
import typer
from pydicom.data import get_testdata_file
from pynetdicom import AE, evt
from pynetdicom.sop_class import CTImageStorage, MRImageStorage  # type: ignore[attr-defined]
from typer.testing import CliRunner

from cli.importing import register, sources
from cli.importing.command import parse_address, run_import
from cli.importing.examine import NotDicom, examine
from cli.importing.sending import Target
from cli.importing.sources import find
from libs.common.dicom.part10 import build_file_meta, split_part10
from libs.common.errors import Invalid
from libs.dimse import ConnectionRefused

CT = Path(str(get_testdata_file("CT_small.dcm")))
MR = Path(str(get_testdata_file("MR_small.dcm")))
IMPLICIT_MR = Path(str(get_testdata_file("MR_small_implicit.dcm")))
BIG_MR = Path(str(get_testdata_file("MR_small_bigendian.dcm")))
JPEG2000 = Path(str(get_testdata_file("JPEG2000.dcm")))


class Archive:
    """A pynetdicom storage SCP; ``answers`` are the statuses to give first."""

    def __init__(self) -> None:
        self.received: list[bytes] = []
        self.uids: list[str] = []
        self.answers: list[int] = []
        ae = AE("SAGITTAL")
        ae.maximum_associations = 20
        syntaxes = [pydicom.uid.ExplicitVRLittleEndian, pydicom.uid.ImplicitVRLittleEndian]
        syntaxes += [pydicom.uid.ExplicitVRBigEndian]
        for storage in (CTImageStorage, MRImageStorage):
            ae.add_supported_context(storage, syntaxes)
        server: Any = ae.start_server(("127.0.0.1", 0), block=False, evt_handlers=[(evt.EVT_C_STORE, self.store)])
        self._server = server
        self.port = int(server.socket.getsockname()[1])

    def store(self, event: Any) -> int:
        status = self.answers.pop() if self.answers else 0x0000
        if status == 0:
            self.received.append(event.request.DataSet.getvalue())
            self.uids.append(str(event.request.AffectedSOPInstanceUID))
        return status

    def stop(self) -> None:
        self._server.shutdown()

    def target(self, **options: Any) -> Target:
        return Target("127.0.0.1", self.port, "SAGITTAL", "IMPORT", **{"first_delay": 0.01, **options})


@pytest.fixture
def archive() -> Iterator[Archive]:
    served = Archive()
    yield served
    served.stop()


def dataset_of(path: Path) -> bytes:
    content = path.read_bytes()
    return content[split_part10(content)[1] :]


def copies(folder: Path, count: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    dataset = pydicom.dcmread(CT)
    for number in range(count):
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.UID(f"1.2.3.{number}")
        dataset.save_as(folder / f"{number:03}.dcm")


def test_a_folder_unmodified_and_what_is_no_dicom_is_counted(archive: Archive, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    copies(folder / "deep", 12)
    for path in (MR, IMPLICIT_MR):
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "note.txt").write_text("nothing to see")
    (folder / "empty").touch()
    summary = run_import([folder], archive.target(), tmp_path / "state")
    assert (summary.stored, summary.not_dicom, summary.refused) == (13, 2, [])
    assert summary.duplicate == 1, "both MR files are the same instance"
    files = [path for path in folder.rglob("*") if path.suffix == ".dcm"]
    assert sorted(archive.received) == sorted(map(dataset_of, files))


def test_a_second_run_goes_on_where_the_first_ended(archive: Archive, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    copies(folder, 5)
    archive.answers = [0xC000]
    first = run_import([folder], archive.target(), tmp_path)
    assert (first.stored, len(first.refused)) == (4, 1)
    with (tmp_path / ".sagittal-import.jsonl").open("a") as journal:
        journal.write('{"stored": "torn')
    second = run_import([folder], archive.target(), tmp_path)
    assert (second.stored, second.skipped) == (1, 4)
    third = run_import([folder], archive.target(), tmp_path)
    assert (third.stored, third.skipped) == (0, 5)
    assert run_import([folder], archive.target(), tmp_path, again=True).stored == 5
    lines = filter(None, (tmp_path / ".sagittal-import.jsonl").read_text().splitlines())
    assert not [line for line in lines if str(folder) in line or "000.dcm" in line], "paths may name patients"
    other = Target("localhost", archive.port, "SAGITTAL", "IMPORT")
    assert run_import([folder], other, tmp_path).stored == 5, "another destination has nothing yet"


def test_out_of_resources_is_tried_again(archive: Archive, tmp_path: Path) -> None:
    archive.answers = [0xA700, 0xA700]
    assert run_import([CT], archive.target(), tmp_path).stored == 1


def test_zip_members_whatever_their_names(archive: Archive, tmp_path: Path) -> None:
    packed = tmp_path / "study.zip"
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as file:
        file.write(CT, "../../../../escaped.dcm")
        file.write(MR, "/absolute/IM1")
        file.writestr("readme.txt", "hello")
    summary = run_import([packed], archive.target(), tmp_path / "state")
    assert (summary.stored, summary.not_dicom, summary.refused) == (2, 1, [])
    assert sorted(archive.received) == sorted([dataset_of(CT), dataset_of(MR)])
    assert not list(tmp_path.parent.rglob("escaped.dcm"))
    assert run_import([packed], archive.target(), tmp_path / "state").skipped == 3 - 1


def test_a_zip_bomb_is_refused(archive: Archive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "LEAST_LIMIT", 1_000_000)
    packed = tmp_path / "bomb.zip"
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("bomb", bytes(50_000_000))
        file.write(CT, "ct")
    summary = run_import([packed], archive.target(), tmp_path)
    assert summary.stored == 1
    assert "unpacks to more" in summary.refused[0][1]


def test_a_broken_zip_is_refused_with_its_reason(archive: Archive, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        file.write(CT, "ct")
    content = bytearray(buffer.getvalue())
    content[2000:2100] = bytes(100)
    packed = tmp_path / "broken.zip"
    packed.write_bytes(content)
    summary = run_import([packed], archive.target(), tmp_path)
    assert summary.stored == 0
    assert "cannot be unpacked" in summary.refused[0][1]


def test_a_class_that_is_not_taken_is_refused_and_the_rest_goes_on(archive: Archive, tmp_path: Path) -> None:
    summary = run_import([JPEG2000, CT], archive.target(), tmp_path)
    assert summary.stored == 1
    assert "A900" in summary.refused[0][1]


def test_dicomdir_stands_for_its_folder(archive: Archive, tmp_path: Path) -> None:
    directory = Path(str(get_testdata_file("DICOMDIR")))
    found = [candidate.path for candidate in find([directory])]
    assert len(found) > 10
    with pytest.raises(NotDicom):
        examine(directory)


@pytest.mark.parametrize("path", [CT, MR, IMPLICIT_MR, BIG_MR])
def test_without_preamble_or_meta_or_with_a_wrong_syntax(path: Path, tmp_path: Path) -> None:
    content = path.read_bytes()
    meta, offset = split_part10(content)
    bare = tmp_path / "bare"
    bare.write_bytes(content[offset:])
    found = examine(bare)
    assert found.offset == 0
    assert (found.sop_class_uid, found.transfer_syntax_uid) == (meta.sop_class_uid, meta.transfer_syntax_uid)
    bare.write_bytes(content[132:])
    assert examine(bare).offset == offset - 132
    other = pydicom.uid.ImplicitVRLittleEndian if path in (CT, MR) else pydicom.uid.ExplicitVRLittleEndian
    bare.write_bytes(build_file_meta(meta.sop_class_uid, meta.sop_instance_uid, other) + content[offset:])
    assert examine(bare).transfer_syntax_uid == meta.transfer_syntax_uid


def test_nobody_there_is_one_clear_failure(tmp_path: Path) -> None:
    with pytest.raises(ConnectionRefused):
        run_import([CT, MR], Target("127.0.0.1", 1, "X", "Y"), tmp_path)


def test_a_wrong_path_is_named(tmp_path: Path) -> None:
    with pytest.raises(Invalid, match="does not exist"):
        list(find([tmp_path / "absent"]))


@pytest.mark.parametrize("text", ["host", "host:", ":104", "host:0", "host:99999", "host:x"])
def test_addresses_that_are_none(text: str) -> None:
    with pytest.raises(Invalid):
        parse_address(text)


def test_the_command_says_what_came_of_it(archive: Archive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAGITTAL_DATA", str(tmp_path))
    app = typer.Typer()
    register(app)
    app.callback()(lambda: None)
    arguments = ["import", "--to", f"127.0.0.1:{archive.port}", "--called", "SAGITTAL"]
    done = CliRunner().invoke(app, [*arguments, str(CT)])
    assert done.exit_code == 0, done.output
    refused = CliRunner().invoke(app, [*arguments, str(JPEG2000)])
    assert refused.exit_code == 1
