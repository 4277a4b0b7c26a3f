"""A full disk refuses, loses nothing, and everything goes on when there is room again."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from pydicom.dataset import Dataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian
from pynetdicom import AE

from tests.builders import create_instance
from tests.e2e.archives import Address, Up, retrieve
from tests.e2e.test_first_light import wait_found

STUDY = "1.2.826.0.1.3680043.8.498.77"


def build(number: int) -> Dataset:
    return create_instance(
        StudyInstanceUID=STUDY,
        SeriesInstanceUID=f"{STUDY}.1",
        SOPInstanceUID=f"{STUDY}.1.{number}",
        rows=256,
        columns=256,
        pixels=os.urandom(256 * 256 * 2),
    )


def send(archive: Address, instances: list[Dataset]) -> list[int]:
    ae = AE("SENDER")
    ae.add_requested_context(CTImageStorage, ExplicitVRLittleEndian)
    association = ae.associate("127.0.0.1", archive.store_port, ae_title="SAGITTAL")
    assert association.is_established
    try:
        return [int(association.send_c_store(instance).Status) for instance in instances]
    finally:
        association.release()


def mount(*arguments: str | Path) -> None:
    subprocess.run(["mount", *map(str, arguments)], check=True, capture_output=True)


def test_a_full_disk_refuses_and_loses_nothing(tmp_path: Path) -> None:
    objects = tmp_path / "data" / "objects"
    objects.mkdir(parents=True)
    try:
        mount("-t", "tmpfs", "-o", "size=2m", "tmpfs", objects)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs the right to mount a small tmpfs")
    up = Up(tmp_path / "data")
    try:
        archive = up.start()
        instances = [build(number) for number in range(1, 31)]
        statuses = send(archive, instances)
        assert set(statuses) == {0x0000, 0xA700}
        taken = [i for i, status in zip(instances, statuses, strict=True) if status == 0]
        wait_found(archive, STUDY, len(taken))
        assert len(fetch(archive)) == len(taken)

        mount("-o", "remount,size=64m", objects)
        refused = [i for i, status in zip(instances, statuses, strict=True) if status != 0]
        assert send(archive, refused) == [0] * len(refused)
        wait_found(archive, STUDY, len(instances))
        found = fetch(archive)
        assert set(found) == {str(instance.SOPInstanceUID) for instance in instances}
        assert all(bytes(i.PixelData) in found[str(i.SOPInstanceUID)] for i in instances)
    finally:
        up.interrupt()
        subprocess.run(["umount", str(objects)], check=False)


def fetch(archive: Address) -> dict[str, bytes]:
    keys = Dataset()
    keys.QueryRetrieveLevel = "STUDY"
    keys.StudyInstanceUID = STUDY
    return retrieve(archive, keys, CTImageStorage, ExplicitVRLittleEndian)
