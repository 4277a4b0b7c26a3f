"""Images in over DICOM, found, and back out byte for byte: with DCMTK and pynetdicom."""

from __future__ import annotations

import os
import subprocess
import time
import urllib.request
from pathlib import Path

from pydicom import dcmread
from pydicom.dataset import Dataset
from pynetdicom import AE
from pynetdicom import _config as pynetdicom_settings

from tests.e2e.archives import STUDY_ROOT_FIND, Address, dataset_bytes, retrieve, storable_files

DCMTK = {**os.environ, "TCP_NODELAY": "1"}


def run(*command: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([str(part) for part in command], env=DCMTK, capture_output=True, text=True, timeout=120)
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


def find_instances(archive: Address, study: str, sop: str = "") -> list[Dataset]:
    ae = AE("TESTER")
    ae.add_requested_context(STUDY_ROOT_FIND)
    association = ae.associate("127.0.0.1", archive.query_port, ae_title="SAGITTAL")
    assert association.is_established
    keys = Dataset()
    keys.QueryRetrieveLevel = "STUDY"
    keys.StudyInstanceUID = study
    keys.NumberOfStudyRelatedInstances = ""
    keys.PatientName = ""
    try:
        answers = association.send_c_find(keys, STUDY_ROOT_FIND)
        return [identifier for _, identifier in answers if identifier is not None]
    finally:
        association.release()


def wait_found(archive: Address, study: str, instances: int = 1, seconds: float = 30) -> Dataset:
    deadline = time.monotonic() + seconds
    found: list[Dataset] = []
    while time.monotonic() < deadline:
        found = find_instances(archive, study)
        if found and int(found[0].NumberOfStudyRelatedInstances) >= instances:
            return found[0]
        time.sleep(0.1)
    raise AssertionError(f"study {study} with {instances} instances was not found; last answer {found}")


def get_study(archive: Address, study: str, folder: Path) -> list[Path]:
    """The files that DCMTK's getscu writes, bit for bit as they came over the network."""
    run(
        "getscu", "-S", "-B", "-aec", "SAGITTAL", "-od", folder, "-k", "QueryRetrieveLevel=STUDY",
        "-k", f"StudyInstanceUID={study}", "127.0.0.1", str(archive.query_port),
    )  # fmt: skip
    return list(folder.iterdir())


def elements(path: Path) -> dict[str, str]:
    """Every element of a file but its trailing padding, by tag, as text."""
    return {str(element.tag): repr(element.value) for element in dcmread(path) if element.tag != 0xFFFCFFFC}


def test_dcmtk_stores_finds_and_gets(archive: Address, received: Path) -> None:
    source = next(path for path in storable_files() if path.name == "CT_small.dcm")
    header = dcmread(source, stop_before_pixels=True)
    run("storescu", "-R", "-aec", "SAGITTAL", "127.0.0.1", str(archive.store_port), source)
    wait_found(archive, header.StudyInstanceUID)
    answer = run(
        "findscu", "-S", "-aec", "SAGITTAL", "-k", "QueryRetrieveLevel=STUDY", "-k", "PatientID=1CT1",
        "-k", "StudyInstanceUID", "127.0.0.1", str(archive.query_port),
    )  # fmt: skip
    assert header.StudyInstanceUID in answer.stdout + answer.stderr
    files = get_study(archive, header.StudyInstanceUID, received)
    assert len(files) == 1
    # storescu writes sequence lengths of its own and leaves padding out: elements are compared here, bytes below.
    assert elements(files[0]) == elements(source)


def test_getscu_brings_back_byte_for_byte_what_was_sent(archive: Address, received: Path) -> None:
    source = next(path for path in storable_files() if path.name == "MR_small.dcm")
    study = dcmread(source, stop_before_pixels=True).StudyInstanceUID
    assert store_all(archive, [source]) == {source.name: 0}
    wait_found(archive, study)
    files = get_study(archive, study, received)
    assert [dataset_bytes(path) for path in files] == [dataset_bytes(source)]


def store_all(archive: Address, paths: list[Path]) -> dict[str, int]:
    """Send the files as they are, in their own transfer syntaxes; the status by file name."""
    statuses: dict[str, int] = {}
    pynetdicom_settings.STORE_SEND_CHUNKED_DATASET = True  # the file's own bytes, not decoded and encoded again
    for path in paths:
        header = dcmread(path, stop_before_pixels=True)
        ae = AE("TESTER")
        ae.add_requested_context(header.SOPClassUID, header.file_meta.TransferSyntaxUID)
        association = ae.associate("127.0.0.1", archive.store_port, ae_title="SAGITTAL")
        assert association.is_established, path.name
        statuses[path.name] = int(association.send_c_store(path).Status)
        association.release()
    return statuses


def test_every_test_file_of_pydicom_comes_back_as_it_was(archive: Address) -> None:
    paths = storable_files()
    assert len(paths) >= 30
    statuses = store_all(archive, paths)
    assert {name: status for name, status in statuses.items() if status != 0} == {}
    headers = {path: dcmread(path, stop_before_pixels=True) for path in paths}
    per_study: dict[str, int] = {}
    for header in headers.values():
        per_study[header.StudyInstanceUID] = per_study.get(header.StudyInstanceUID, 0) + 1
    for study, count in per_study.items():
        wait_found(archive, study, count)

    for path, header in headers.items():
        keys = Dataset()
        keys.QueryRetrieveLevel = "IMAGE"
        keys.StudyInstanceUID = header.StudyInstanceUID
        keys.SeriesInstanceUID = header.SeriesInstanceUID
        keys.SOPInstanceUID = header.SOPInstanceUID
        taken = retrieve(archive, keys, header.SOPClassUID, header.file_meta.TransferSyntaxUID)
        sent = dataset_bytes(path)
        # A deflated stream of odd length is padded with one NUL on the network (PS3.5 A.5).
        assert list(taken.values()) == [sent + bytes(len(sent) % 2)], path.name


def test_health_readiness_and_metrics_answer(archive: Address) -> None:
    for port in archive.http_ports:
        for path in ("/healthz", "/readyz", "/metrics"):
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
                assert answer.status == 200
