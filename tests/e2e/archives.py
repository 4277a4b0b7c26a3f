"""A running archive as a tester sees it: addresses, and files to send."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydicom import dcmread
from pydicom.data import data_manager
from pydicom.dataset import Dataset
from pydicom.filereader import read_file_meta_info
from pydicom.uid import UID
from pynetdicom import AE, evt
from pynetdicom.pdu_primitives import SCP_SCU_RoleSelectionNegotiation

from cli.cluster import Cluster

STUDY_ROOT_FIND = "1.2.840.10008.5.1.4.1.2.2.1"
STUDY_ROOT_GET = "1.2.840.10008.5.1.4.1.2.2.3"


@dataclass
class Address:
    """Where an archive takes images in and where it gives them out."""

    store_port: int
    query_port: int
    http_ports: list[int]
    environment: dict[str, str] = field(default_factory=dict)


class Up:
    """``sagittal up`` as a child process."""

    def __init__(self, data: Path, environment: dict[str, str] | None = None) -> None:
        self.data = data
        self.environment = {
            **os.environ,
            "SAGITTAL_DATA": str(data),
            "SAGITTAL_DIMSE_PORT": "0",
            "SAGITTAL_HTTP_PORT": "0",
            "SAGITTAL_INDEXING_QUIET_SECONDS": "2",
            **(environment or {}),
        }
        self.environment.pop("MONGO_URL", None)
        self.log = data.parent / f"{data.name}.log"
        self.process: subprocess.Popen[bytes]

    def start(self, seconds: float = 90) -> Address:
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "cli.main", "up"], env=self.environment, stdout=output, stderr=output
            )
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise AssertionError(f"sagittal up ended: {self.log.read_text()[-3000:]}")
            if "Ctrl-C stops it" in self.log.read_text():
                state = json.loads((self.data / "run" / "archive.json").read_text())
                return Address(
                    state["dimse_port"], state["dimse_port"], [state["http_port"]], {"SAGITTAL_DATA": str(self.data)}
                )
            time.sleep(0.1)
        raise AssertionError(f"sagittal up was not ready in {seconds} s: {self.log.read_text()[-3000:]}")

    def interrupt(self, seconds: float = 60) -> int:
        """Ctrl-C; gives the exit code."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(seconds)


def address_of(cluster: Cluster) -> Address:
    return Address(
        cluster.workers["ingest"].ports["dimse"],
        cluster.workers["query"].ports["dimse"],
        [worker.ports["http"] for worker in cluster.workers.values()],
        cluster.environment,
    )


def storable_files() -> list[Path]:
    """pydicom's own test files that are instances an archive must take: class, instance, study and series UIDs."""
    found: dict[str, Path] = {}
    # SC_rgb_jpeg.dcm is encoded with implicit VRs under a syntax that has explicit ones: rightly refused.
    # Only what the wheel carries: pydicom would download the rest.
    for path in sorted((Path(data_manager.__file__).parent / "test_files").glob("*.dcm")):
        if path.name == "SC_rgb_jpeg.dcm":
            continue
        try:
            dataset = dcmread(path, stop_before_pixels=True)
            uid = dataset.file_meta.MediaStorageSOPInstanceUID
            if uid != dataset.SOPInstanceUID or dataset.SOPClassUID != dataset.file_meta.MediaStorageSOPClassUID:
                continue
            if dataset.StudyInstanceUID and dataset.SeriesInstanceUID and dataset.file_meta.TransferSyntaxUID:
                found.setdefault(str(uid), path)
        except Exception:
            continue
    return list(found.values())


def dataset_bytes(path: Path) -> bytes:
    """The encoded dataset of a Part 10 file, without preamble and file meta."""
    meta = read_file_meta_info(path)
    start = 132 + 12 + int(meta.FileMetaInformationGroupLength)
    return path.read_bytes()[start:]


def retrieve(archive: Address, keys: Dataset, sop_class: str, transfer_syntax: str) -> dict[str, bytes]:
    """The encoded datasets that a C-GET by pynetdicom brings, by SOP Instance UID; it must end with success."""
    taken: dict[str, bytes] = {}

    def keep(event: evt.Event) -> int:
        request: Any = event.request
        taken[str(request.AffectedSOPInstanceUID)] = request.DataSet.getvalue()
        return 0

    ae = AE("TESTER")
    ae.add_requested_context(STUDY_ROOT_GET)
    ae.add_requested_context(sop_class, transfer_syntax)
    role = SCP_SCU_RoleSelectionNegotiation()
    role.sop_class_uid = UID(sop_class)
    role.scu_role, role.scp_role = False, True
    association = ae.associate(
        "127.0.0.1",
        archive.query_port,
        ae_title="SAGITTAL",
        ext_neg=[role],
        evt_handlers=[(evt.EVT_C_STORE, keep)],
    )
    assert association.is_established
    try:
        final = [status for status, _ in association.send_c_get(keys, STUDY_ROOT_GET)][-1]
    finally:
        association.release()
    assert final.Status == 0
    return taken
