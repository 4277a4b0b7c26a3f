"""The archive keeps its word while its processes and neighbours die: every acknowledged instance is there, once."""

from __future__ import annotations

import hashlib
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import pymongo
import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian
from pymongo.database import Database
from pynetdicom import AE

from cli.cluster import Cluster
from tests.builders import create_instance
from tests.e2e.archives import Address, address_of, retrieve


@dataclass
class Sender:
    """A modality that keeps sending one study's instances, again and again until each got success."""

    port: Callable[[], int]
    study: str
    instances: list[Dataset]
    acknowledged: dict[str, bytes] = field(default_factory=dict)
    stop: threading.Event = field(default_factory=threading.Event)
    failures: int = 0

    def run(self) -> None:
        remaining = list(self.instances)
        ae = AE("SENDER")
        ae.acse_timeout = ae.dimse_timeout = ae.network_timeout = 20
        ae.connection_timeout = 5
        ae.add_requested_context(self.instances[0].SOPClassUID, ExplicitVRLittleEndian)
        while remaining and not self.stop.is_set():
            association = ae.associate("127.0.0.1", self.port(), ae_title="SAGITTAL")
            if not association.is_established:
                self.failures += 1
                time.sleep(0.2)
                continue
            while remaining and association.is_established and not self.stop.is_set():
                instance = remaining[0]
                try:
                    status = association.send_c_store(instance)
                except (RuntimeError, ValueError):
                    break
                if "Status" in status and status.Status == 0:
                    self.acknowledged[instance.SOPInstanceUID] = bytes(instance.PixelData)
                    remaining.pop(0)
                    time.sleep(0.02)  # a modality that acquires, so that the sending spans all the failures
                else:
                    self.failures += 1
                    time.sleep(0.2)
            if association.is_established:
                association.release()
            else:
                association.abort()


def build_study(number: int, count: int) -> list[Dataset]:
    study, series = f"1.2.826.0.1.3680043.8.498.9{number}", f"1.2.826.0.1.3680043.8.498.9{number}.1"
    return [
        create_instance(
            StudyInstanceUID=study,
            SeriesInstanceUID=series,
            SOPInstanceUID=f"{series}.{index + 1}",
            PatientID=f"LOST{number}",
            PixelData=hashlib.sha256(f"{number}/{index}".encode()).digest() * 64,
            Rows=32,
            Columns=32,
        )
        for index in range(count)
    ]


def check(cluster: Cluster, archive: Address, senders: list[Sender]) -> None:
    """Everything acknowledged is indexed once, its bytes match, counts are right and nothing waits or is dead."""
    database: Database[dict[str, Any]] = pymongo.MongoClient(cluster.mongod.url)["sagittal"]
    expected = {uid for sender in senders for uid in sender.acknowledged}
    studies = [sender.study for sender in senders]
    deadline = time.monotonic() + 90
    found: set[str] = set()
    while time.monotonic() < deadline:
        found = {d["_id"] for d in database["instances"].find({"study_instance_uid": {"$in": studies}}, {"_id": 1})}
        if expected <= found and database["outbox"].estimated_document_count() == 0:
            break
        time.sleep(0.3)
    assert expected <= found, f"{len(expected - found)} acknowledged instances are missing"
    for sender in senders:
        count = database["instances"].count_documents({"study_instance_uid": sender.study})
        study = database["studies"].find_one({"_id": sender.study})
        assert study is not None
        assert study["instance_count"] == count
        sizes = database["instances"].find({"study_instance_uid": sender.study}, {"reference": 1})
        assert study["size"] == sum(d["reference"]["length"] for d in sizes)
        assert all(
            len(d["versions"]) <= 1
            for d in database["instances"].find({"study_instance_uid": sender.study}, {"versions": 1})
        )
    for sender in senders:
        assert pixels(archive, sender) == sender.acknowledged


def pixels(archive: Address, sender: Sender) -> dict[str, bytes]:
    """The pixel data of every instance of a sender's study, by C-GET."""
    keys = Dataset()
    keys.QueryRetrieveLevel = "STUDY"
    keys.StudyInstanceUID = sender.study
    taken = retrieve(archive, keys, sender.instances[0].SOPClassUID, ExplicitVRLittleEndian)
    read = {uid: dcmread(BytesIO(encoded), force=True) for uid, encoded in taken.items()}
    return {uid: bytes(dataset.PixelData) for uid, dataset in read.items()}


def kill_service(name: str) -> Callable[[Cluster], None]:
    def action(cluster: Cluster) -> None:
        worker = cluster.workers[name]
        worker.kill()
        worker.start()
        worker.wait_ready()

    return action


def stop_server(name: str) -> Callable[[Cluster], None]:
    def action(cluster: Cluster) -> None:
        server = getattr(cluster, name)
        server.kill()
        time.sleep(2)  # an outage has a length: senders and services have to live through it
        server.restart()

    return action


FAILURES: dict[str, Callable[[Cluster], None]] = {
    "ingest killed": kill_service("ingest"),
    "indexing killed": kill_service("indexing"),
    "query killed": kill_service("query"),
    "mongod killed": stop_server("mongod"),
    "RabbitMQ killed": stop_server("rabbitmq"),
    "S3 killed": stop_server("s3"),
}


@pytest.mark.timeout(400)
def test_nothing_acknowledged_is_lost_when_each_part_dies_under_load(cluster: Cluster) -> None:
    senders = [
        Sender(lambda: address_of(cluster).store_port, instances[0].StudyInstanceUID, instances)
        for instances in (build_study(1, 400), build_study(2, 400))
    ]
    threads = [threading.Thread(target=sender.run, daemon=True) for sender in senders]
    for thread in threads:
        thread.start()
    try:
        for name, fail in FAILURES.items():
            before = [len(sender.acknowledged) for sender in senders]
            fail(cluster)
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:
                moved = [len(s.acknowledged) > b + 3 for s, b in zip(senders, before, strict=True)]
                done = [len(s.acknowledged) == len(s.instances) for s in senders]
                if all(m or d for m, d in zip(moved, done, strict=True)):
                    break
                time.sleep(0.2)
            else:
                raise AssertionError(f"after {name} the senders got no further success within a minute")
        for thread in threads:
            thread.join(120)
        assert all(len(sender.acknowledged) == len(sender.instances) for sender in senders)
    finally:
        for sender in senders:
            sender.stop.set()
    check(cluster, address_of(cluster), senders)


def test_a_sender_cut_in_the_middle_of_an_instance_leaves_nothing_behind(cluster: Cluster, tmp_path: Path) -> None:
    archive = address_of(cluster)
    instances = build_study(3, 3)
    ae = AE("SENDER")
    ae.add_requested_context(instances[0].SOPClassUID, ExplicitVRLittleEndian)
    association = ae.associate("127.0.0.1", archive.store_port, ae_title="SAGITTAL")
    assert association.is_established
    assert association.send_c_store(instances[0]).Status == 0
    connection: Any = association.dul.socket.socket  # type: ignore[union-attr]
    # The start of a P-DATA-TF that promises 1 MiB, a few bytes of it, then the cable is pulled.
    connection.sendall(b"\x04\x00\x00\x10\x00\x00" + b"\x00\x0f\xff\xf0\x01\x00" + b"\x00" * 1000)
    connection.shutdown(socket.SHUT_RDWR)
    association.abort()
    sender = Sender(lambda: archive.store_port, instances[0].StudyInstanceUID, instances[:1])
    sender.acknowledged[instances[0].SOPInstanceUID] = bytes(instances[0].PixelData)
    check(cluster, archive, [sender])
