"""Storing one instance: what is kept, what is told, what is refused and why."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from pydicom.data import get_testdata_file

from libs.common.bus.memory import MemoryBroker, MemoryBus
from libs.common.config import Settings, Site
from libs.common.dicom.part10 import build_file_meta, split_part10
from libs.common.errors import Unavailable
from libs.common.events import InstanceRejected, InstanceStored
from libs.common.objects.memory import MemoryObjects
from libs.common.objects.port import Content, ObjectStat
from libs.dimse import Caller, Payload, StoreRequest
from services.ingest.config import IngestSettings
from services.ingest.handlers import Quarantined, Shelves, store_instance
from services.ingest.model.refusal import CannotUnderstand, DoesNotMatch, Duplicate
from services.ingest.scp import IngestScp

CT = Path(str(get_testdata_file("CT_small.dcm"))).read_bytes()
META, OFFSET = split_part10(CT)
DATASET = CT[OFFSET:]


class Rooms:
    """Fakes of all that ingest works with."""

    def __init__(self, **ingest: object) -> None:
        self.objects = MemoryObjects()
        self.broker = MemoryBroker()
        self.bus = MemoryBus(self.broker)
        self.entries: dict[str, Quarantined] = {}
        self.digests: dict[str, str] = {}
        self.asked = 0
        site = Site(code="NORTH", called_ae_titles=("NORTH_PACS",))
        self.shelves = Shelves(
            settings=Settings(site="MAIN", sites=(site,)),
            ingest=IngestSettings.model_validate(ingest),
            objects=self.objects,
            bus=self.bus,
            quarantine=self,
            versions=self,
        )

    async def add(self, entry: Quarantined) -> None:
        self.entries[entry.id] = entry

    async def current_digest(self, sop_instance_uid: str) -> str | None:
        self.asked += 1
        return self.digests.get(sop_instance_uid)

    async def keys(self) -> list[str]:
        return sorted([stat.key async for stat in self.objects.list()])


def request(
    data: bytes = DATASET,
    *,
    instance: str = META.sop_instance_uid,
    sop_class: str = META.sop_class_uid,
    syntax: str = META.transfer_syntax_uid,
    spool: Path | None = None,
    called: str = "SAGITTAL",
) -> StoreRequest:
    payload = Payload(len(data), [data[:1000], memoryview(data)[1000:]])
    if spool is not None:
        spool.write_bytes(data)
        payload = Payload(len(data), path=spool)
    caller = Caller("association-1", "MODALITY", called, "10.0.0.5", 4242)
    return StoreRequest(caller, 1, sop_class, instance, syntax, 0, payload)


async def test_stored_as_received_behind_our_file_meta() -> None:
    rooms = Rooms()
    reference = await store_instance(request(), rooms.shelves)
    content = await rooms.objects.get(reference.key)
    assert content == build_file_meta(META.sop_class_uid, META.sop_instance_uid, META.transfer_syntax_uid) + DATASET
    assert reference.sha256 == hashlib.sha256(content).hexdigest()
    assert reference.length == len(content)
    (event,) = rooms.bus.published
    assert isinstance(event, InstanceStored)
    assert event.reference == reference
    assert event.correlation_id == "association-1"
    assert event.site == "MAIN"
    assert reference.key == (
        f"instances/{event.study_instance_uid}/{event.series_instance_uid}/{META.sop_instance_uid}"
        f"/{reference.sha256[:16]}.dcm"
    )
    assert rooms.asked == 0


async def test_a_spooled_dataset_gives_the_same_object(tmp_path: Path) -> None:
    rooms = Rooms()
    small = await store_instance(request(), rooms.shelves)
    content = await rooms.objects.get(small.key)
    await rooms.objects.delete(small.key)
    large = await store_instance(request(spool=tmp_path / "spooled"), rooms.shelves)
    assert large == small
    assert await rooms.objects.get(large.key) == content
    assert [path.name for path in tmp_path.iterdir()] == ["spooled"]


async def test_the_same_again_is_no_new_object() -> None:
    rooms = Rooms()
    first = await store_instance(request(), rooms.shelves)
    assert await store_instance(request(), rooms.shelves) == first
    assert await rooms.keys() == [first.key]
    assert len(rooms.bus.published) == 2


async def test_the_site_comes_from_the_called_ae_title() -> None:
    rooms = Rooms()
    await store_instance(request(called="NORTH_PACS"), rooms.shelves)
    assert rooms.bus.published[0].site == "NORTH"


@pytest.mark.parametrize("policy", ["replace", "keep"])
async def test_other_bytes_become_another_object(policy: str) -> None:
    rooms = Rooms(on_conflict=policy)
    await store_instance(request(), rooms.shelves)
    await store_instance(request(DATASET[:-2] + b"\1\1"), rooms.shelves)
    assert len(await rooms.keys()) == 2
    events = rooms.bus.published
    assert [event.on_conflict for event in events if isinstance(event, InstanceStored)] == [policy, policy]


async def test_reject_refuses_other_bytes_and_takes_the_same() -> None:
    rooms = Rooms(on_conflict="reject")
    reference = await store_instance(request(), rooms.shelves)
    rooms.digests[META.sop_instance_uid] = reference.sha256
    await store_instance(request(), rooms.shelves)
    with pytest.raises(Duplicate):
        await store_instance(request(DATASET[:-2] + b"\1\1"), rooms.shelves)
    assert await rooms.keys() == [reference.key]
    status = await IngestScp(rooms.shelves).store(request(DATASET[:-2] + b"\1\1"))
    assert status.code == 0x0111


def replaced(old: bytes, new: bytes) -> bytes:
    assert DATASET.count(old) >= 1
    assert len(old) == len(new)
    return DATASET.replace(old, new, 1)


@pytest.mark.parametrize(
    ("asked", "reason", "code"),
    [
        (request(instance="1.2.3"), "SOP Instance UID (0008,0018) differs", 0xA900),
        (request(sop_class="1.2.840.10008.5.1.4.1.1.4"), "SOP Class UID (0008,0016) differs", 0xA900),
        (request(replaced(b"\x20\x00\x0d\x00UI", b"\x20\x00\x0c\x00UI")), "(0020,000D) is missing", 0xA900),
        (request(replaced(b"\x20\x00\x0e\x00UI", b"\x20\x00\x0f\x00UI")), "(0020,000E) is missing", 0xA900),
        (request(b"this is no dataset at all, whatever it says"), "no VR", 0xC000),
        (request(DATASET[:100]), "ends in the middle", 0xC000),
        (request(b""), "is missing", 0xA900),
    ],
)
async def test_unusable_data_is_kept_with_its_reason_and_refused(asked: StoreRequest, reason: str, code: int) -> None:
    rooms = Rooms()
    with pytest.raises((DoesNotMatch, CannotUnderstand)):
        await store_instance(asked, rooms.shelves)
    ((identifier, entry),) = rooms.entries.items()
    assert reason in entry.reason
    assert entry.key == f"quarantine/{identifier}.bin"
    assert await rooms.objects.get(entry.key) == asked.dataset.read()
    (event,) = rooms.bus.published
    assert isinstance(event, InstanceRejected)
    assert event.quarantine_id == identifier
    status = await IngestScp(rooms.shelves).store(asked)
    assert status.code == code
    assert reason in status.comment
    assert len(rooms.entries) == 1, "the same bytes again fill one place"


@pytest.mark.parametrize(
    "uid", [b"1.2/../../../etc/passwd", b"1.2.3 4", b"../../x", b".1.2", b"1" * 66, b"..", b"1.2\0.3"]
)
async def test_a_uid_that_could_leave_its_place_never_reaches_a_key(uid: bytes) -> None:
    at = DATASET.index(b"\x20\x00\x0d\x00UI")
    length = int.from_bytes(DATASET[at + 6 : at + 8], "little")
    value = uid + b"\0" * (len(uid) % 2)
    data = DATASET[: at + 6] + len(value).to_bytes(2, "little") + value + DATASET[at + 8 + length :]
    rooms = Rooms()
    with pytest.raises(DoesNotMatch, match="not a UID"):
        await store_instance(request(data), rooms.shelves)
    assert [key.partition("/")[0] for key in await rooms.keys()] == ["quarantine"]


async def test_uids_behind_a_long_private_element_are_found(tmp_path: Path) -> None:
    private = b"\x09\x00\x01\x10OB\0\0" + (300_000).to_bytes(4, "little") + bytes(300_000)
    at = DATASET.index(b"\x10\x00\x10\x00PN")
    data = DATASET[:at] + private + DATASET[at:]
    rooms = Rooms()
    await store_instance(request(data), rooms.shelves)
    await store_instance(request(data, spool=tmp_path / "spooled"), rooms.shelves)
    with pytest.raises(DoesNotMatch, match="not within the first"):
        await store_instance(request(data), Rooms(max_head_bytes=65536).shelves)


class AwayObjects(MemoryObjects):
    async def put(self, key: str, content: Content, *, sha256: str | None = None) -> ObjectStat:
        raise Unavailable("the object store is away")


async def test_store_away_is_out_of_resources_and_nothing_is_told() -> None:
    rooms = Rooms()
    shelves = Shelves(**{**vars(rooms.shelves), "objects": AwayObjects()})
    assert (await IngestScp(shelves).store(request())).code == 0xA700
    assert (await IngestScp(shelves).store(request(b"garbage that cannot be kept"))).code == 0xA700
    assert rooms.bus.published == []


async def test_no_event_no_success() -> None:
    rooms = Rooms()
    rooms.broker.away = True
    assert (await IngestScp(rooms.shelves).store(request())).code == 0xA700
    rooms.broker.away = False
    assert (await IngestScp(rooms.shelves).store(request())).code == 0x0000
