"""C-MOVE and C-GET: what is sent, counted, read ahead, cancelled and given up."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence

import pytest
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian

from libs.common.dicom.part10 import split_part10
from libs.common.errors import NotFound
from libs.common.events import ObjectReference
from libs.dimse.model import ConnectionRefused, OutgoingInstance, Progress, ProtocolError, SendInstance, Status
from services.query.handlers.promises import StoredInstance
from services.query.handlers.retrieve import Pace, get, move
from services.query.model.answer import Record
from services.query.model.query import Query
from tests.builders import create_file, uid

CT = "1.2.840.10008.5.1.4.1.1.2"
QUERY = Query("STUDY", {}, ())
EAGER = Pace(progress_interval=0)


class Shelf:
    """Objects and the catalog that lists them."""

    def __init__(self, count: int) -> None:
        self.contents = {f"k{n}": b"gap" + create_file(InstanceNumber=n) for n in range(count)}
        self.reads: list[str] = []

    async def get(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        self.reads.append(key)
        await asyncio.sleep(0)
        if key not in self.contents:
            raise NotFound("the object is gone")
        return self.contents[key][offset : None if length is None else offset + length]

    async def stream(
        self, key: str, offset: int = 0, length: int | None = None, chunk: int = 1 << 20
    ) -> AsyncIterator[bytes]:
        content = await self.get(key, offset, length)
        for start in range(0, len(content), 500):
            yield content[start : start + 500]

    async def stored(self, query: Query) -> list[StoredInstance]:
        return [
            StoredInstance(
                uid("sop", key),
                CT,
                ObjectReference(
                    key=key,
                    offset=3,
                    length=len(content) - 3,
                    sha256="0" * 64,
                    transfer_syntax_uid=ExplicitVRLittleEndian,
                ),
            )
            for key, content in self.contents.items()
        ]

    async def find(self, query: Query, limit: int) -> list[Record]:
        raise AssertionError("not asked here")


class Receiver:
    """Takes C-STORE sub-operations; ``answers`` are statuses or errors by turn, success when there are no more."""

    def __init__(self, *answers: int | Exception) -> None:
        self.answers = list(answers)
        self.taken: list[bytes] = []
        self.reports: list[Progress] = []

    async def send(self, instance: OutgoingInstance) -> Status:
        self.taken.append(b"".join([piece async for piece in instance.read()]))
        answer = self.answers.pop(0) if self.answers else 0
        if isinstance(answer, Exception):
            raise answer
        return Status(answer)

    async def report(self, progress: Progress) -> None:
        self.reports.append(progress)

    def plan(self, instances: Sequence[OutgoingInstance]) -> Sequence[Sequence[OutgoingInstance]]:
        return [group for group in (instances[:2], instances[2:]) if group]

    @contextlib.asynccontextmanager
    async def open(self, instances: Sequence[OutgoingInstance]) -> AsyncIterator[SendInstance]:
        yield self.send


@pytest.mark.parametrize("pace", [EAGER, Pace(read_whole=0, progress_interval=0), Pace(read_ahead=0)])
async def test_get_sends_every_dataset_without_its_file_meta(pace: Pace) -> None:
    shelf, receiver = Shelf(6), Receiver()
    result = await get(
        QUERY, catalog=shelf, objects=shelf, send=receiver.send, report=receiver.report,
        cancelled=asyncio.Event(), pace=pace,
    )  # fmt: skip
    files = [content[3:] for content in shelf.contents.values()]
    assert receiver.taken == [content[split_part10(content)[1] :] for content in files]
    assert (result.status.code, result.progress) == (0, Progress(0, 6, 0, 0))
    assert shelf.reads == list(shelf.contents)


async def test_pending_responses_count_down() -> None:
    shelf, receiver = Shelf(3), Receiver()
    await get(
        QUERY, catalog=shelf, objects=shelf, send=receiver.send, report=receiver.report,
        cancelled=asyncio.Event(), pace=EAGER,
    )  # fmt: skip
    assert receiver.reports == [Progress(2, 1, 0, 0), Progress(1, 2, 0, 0)]


@pytest.mark.parametrize(
    ("answers", "code", "failed"),
    [
        ((0, 0xA700, 0), 0xB000, [1]),
        ((0xB000, 0, 0), 0xB000, []),
        ((0xA700, 0xA900, 0xC000), 0xA702, [0, 1, 2]),
        ((0xA700, 0xA900, 0xB000), 0xB000, [0, 1]),
    ],
)
async def test_final_status_and_failed_instances(answers: tuple[int, ...], code: int, failed: list[int]) -> None:
    shelf, receiver = Shelf(3), Receiver(*answers)
    result = await get(
        QUERY, catalog=shelf, objects=shelf, send=receiver.send, report=receiver.report,
        cancelled=asyncio.Event(), pace=EAGER,
    )  # fmt: skip
    assert result.status.code == code
    assert result.failed_sop_instance_uids == tuple(uid("sop", f"k{n}") for n in failed)


async def test_an_object_that_is_gone_fails_alone() -> None:
    shelf, receiver = Shelf(3), Receiver()
    stored = await shelf.stored(QUERY)
    del shelf.contents["k1"]

    class Listing(Shelf):
        async def stored(self, query: Query) -> list[StoredInstance]:
            return stored

    result = await get(
        QUERY, catalog=Listing(0), objects=shelf, send=receiver.send, report=receiver.report,
        cancelled=asyncio.Event(), pace=EAGER,
    )  # fmt: skip
    assert (result.status.code, result.progress) == (0xB000, Progress(0, 2, 1, 0))


async def test_cancel_stops_and_says_what_remains() -> None:
    shelf, receiver, cancelled = Shelf(5), Receiver(), asyncio.Event()

    async def report(progress: Progress) -> None:
        if progress.completed == 2:
            cancelled.set()

    result = await get(
        QUERY, catalog=shelf, objects=shelf, send=receiver.send, report=report, cancelled=cancelled, pace=EAGER
    )
    assert (result.status.code, result.progress) == (0xFE00, Progress(3, 2, 0, 0))


async def test_nothing_found_is_a_success() -> None:
    shelf, receiver = Shelf(0), Receiver()
    result = await move(
        QUERY, catalog=shelf, objects=shelf, destination=receiver, report=receiver.report,
        cancelled=asyncio.Event(), pace=EAGER,
    )  # fmt: skip
    assert (result.status.code, result.progress) == (0, Progress(0, 0, 0, 0))


async def test_a_lost_association_fails_what_it_had_to_carry_and_the_next_goes_on() -> None:
    shelf, receiver = Shelf(4), Receiver(0, ProtocolError("the peer aborted"), 0, 0)
    result = await move(
        QUERY, catalog=shelf, objects=shelf, destination=receiver, report=receiver.report,
        cancelled=asyncio.Event(), pace=EAGER,
    )  # fmt: skip
    assert (result.status.code, result.progress) == (0xB000, Progress(0, 3, 1, 0))
    assert result.failed_sop_instance_uids == (uid("sop", "k1"),)


async def test_a_destination_that_is_down_fails_everything() -> None:
    class Down(Receiver):
        @contextlib.asynccontextmanager
        async def open(self, instances: Sequence[OutgoingInstance]) -> AsyncIterator[SendInstance]:
            raise ConnectionRefused("nothing listens there")
            yield self.send

    shelf, receiver = Shelf(3), Down()
    result = await move(
        QUERY, catalog=shelf, objects=shelf, destination=receiver, report=receiver.report,
        cancelled=asyncio.Event(), pace=EAGER,
    )  # fmt: skip
    assert (result.status.code, result.progress) == (0xA702, Progress(0, 0, 3, 0))


async def test_a_receiver_of_another_syntax_gets_a_conversion() -> None:
    shelf, converted = Shelf(2), list[tuple[str, bytes]]()

    async def send(instance: OutgoingInstance) -> Status:
        assert instance.convert is not None
        converted.append(await instance.convert((ImplicitVRLittleEndian,)))
        return Status(0)

    result = await get(
        QUERY, catalog=shelf, objects=shelf, send=send, report=Receiver().report, cancelled=asyncio.Event(), pace=EAGER
    )
    assert result.status.code == 0
    assert [syntax for syntax, _ in converted] == [ImplicitVRLittleEndian] * 2


async def test_a_receiver_of_compressed_syntaxes_only_is_a_failure_with_a_reason() -> None:
    shelf = Shelf(1)

    async def send(instance: OutgoingInstance) -> Status:
        assert instance.convert is not None
        await instance.convert(("1.2.840.10008.1.2.4.50",))
        return Status(0)

    result = await get(
        QUERY, catalog=shelf, objects=shelf, send=send, report=Receiver().report, cancelled=asyncio.Event(), pace=EAGER
    )
    assert result.status.code == 0xA702
