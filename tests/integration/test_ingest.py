"""Ingest with its real neighbours: DCMTK sends, files and MongoDB keep."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydicom
import pytest
from motor.motor_asyncio import AsyncIOMotorClient, AsyncIOMotorDatabase
from pydicom.data import get_testdata_file

from libs.common.bus.memory import MemoryBus
from libs.common.config import Settings
from libs.common.dicom.part10 import split_part10
from libs.common.errors import Unavailable
from libs.common.events import InstanceRejected, InstanceStored
from libs.common.objects.filesystem import FilesystemObjects
from libs.common.runtime import Resources
from libs.common.security import caller_policy
from libs.dimse.acceptor import Acceptor, serve
from services.ingest.repository import MongoCurrentVersions
from services.ingest.service import build

Documents = AsyncIOMotorDatabase[dict[str, Any]]


@dataclass
class Room:
    """A running ingest and what it works with."""

    acceptor: Acceptor
    objects: FilesystemObjects
    bus: MemoryBus
    database: Documents

    async def send(self, *arguments: str, called: str = "SAGITTAL") -> tuple[int, str]:
        """DCMTK's storescu: exit code and output."""
        process = await asyncio.create_subprocess_exec(
            "storescu", "-v", "-aec", called, *arguments[:-1], "127.0.0.1", str(self.acceptor.port), arguments[-1],
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
            env={**os.environ, "TCP_NODELAY": "1"},
        )  # fmt: skip
        output, _ = await asyncio.wait_for(process.communicate(), 60)
        return process.returncode or 0, output.decode(errors="replace")


@pytest.fixture
async def room(database: Documents, tmp_path: Path) -> AsyncIterator[Room]:
    objects, bus, settings = FilesystemObjects(tmp_path / "objects"), MemoryBus(), Settings(data=tmp_path)
    await objects.start()
    service = build(Resources(settings, database, objects, bus))
    spool = tmp_path / "spool"
    spool.mkdir()
    acceptor = await serve(
        service.scp,
        ae_title="SAGITTAL",
        host="127.0.0.1",
        port=0,
        policy=caller_policy(settings),
        spool_dir=spool,
        spool_threshold=200_000,
    )
    yield Room(acceptor, objects, bus, database)
    await acceptor.stop(5)
    await objects.stop()
    assert not list(spool.iterdir())


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("CT_small.dcm", "-x="),
        ("MR_small_implicit.dcm", "-xi"),
        ("MR_small_bigendian.dcm", "-xb"),
        ("JPEG2000.dcm", "-xw"),
        ("MR_small_RLE.dcm", "-xr"),
        ("SC_rgb_jpeg_dcmtk.dcm", "-xy"),
        ("examples_overlay.dcm", "-x="),
        ("examples_rgb_color.dcm", "-x="),
    ],
)
async def test_what_dcmtk_sends_is_kept(room: Room, name: str, option: str) -> None:
    path = Path(str(get_testdata_file(name)))
    code, output = await room.send(option, str(path))
    assert code == 0, output
    (event,) = room.bus.published
    assert isinstance(event, InstanceStored)
    content = await room.objects.get(event.reference.key)
    stored = pydicom.dcmread(as_file(content))
    original = pydicom.dcmread(path)
    assert stored.PixelData == original.PixelData
    assert stored.SOPInstanceUID == original.SOPInstanceUID
    assert event.reference.transfer_syntax_uid == stored.file_meta.TransferSyntaxUID
    assert split_part10(content)[0].transfer_syntax_uid == event.reference.transfer_syntax_uid


def as_file(content: bytes) -> Any:
    return pydicom.filebase.DicomBytesIO(content)


async def test_twice_is_one_object(room: Room) -> None:
    path = str(get_testdata_file("CT_small.dcm"))
    assert (await room.send(path))[0] == 0
    assert (await room.send(path))[0] == 0
    assert len([stat async for stat in room.objects.list("instances/")]) == 1


async def test_without_a_study_it_goes_to_quarantine(room: Room, tmp_path: Path) -> None:
    dataset = pydicom.dcmread(str(get_testdata_file("CT_small.dcm")))
    del dataset.StudyInstanceUID
    dataset.save_as(tmp_path / "bad.dcm")
    for _ in range(2):
        _, output = await room.send("-d", str(tmp_path / "bad.dcm"))
        assert "(0020,000D) is missing" in output
        assert "0xa900" in output.lower()
    assert isinstance(room.bus.published[0], InstanceRejected)
    (entry,) = [document async for document in room.database["quarantine"].find()]
    assert entry["reason"].startswith("Study Instance UID")
    assert entry["times"] == 2
    assert (await room.objects.stat(entry["key"])).size == entry["size"]
    assert not [stat async for stat in room.objects.list("instances/")]


async def test_another_called_ae_title_is_rejected(room: Room) -> None:
    code, output = await room.send(str(get_testdata_file("CT_small.dcm")), called="SOMEONE")
    assert code != 0
    assert "Called AE Title Not Recognized" in output


async def test_the_index_knows_the_current_version(room: Room) -> None:
    versions = MongoCurrentVersions(room.database)
    assert await versions.current_digest("1.2") is None
    await room.database["instances"].insert_one({"_id": "1.2", "reference": {"sha256": "ab"}})
    assert await versions.current_digest("1.2") == "ab"
    gone: AsyncIOMotorClient[dict[str, Any]] = AsyncIOMotorClient("mongodb://127.0.0.1:1", serverSelectionTimeoutMS=50)
    with pytest.raises(Unavailable):
        await MongoCurrentVersions(gone["ingest"]).current_digest("1.2")
    gone.close()
