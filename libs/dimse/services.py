"""The DIMSE services on an accepted association (PS3.7 9 and 10): each request to its handler, its answer back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from io import BytesIO
from typing import TYPE_CHECKING

import structlog
from pydicom.dataset import Dataset
from pydicom.uid import UID
from pynetdicom.dsutils import decode, encode

from libs.common.errors import Invalid, NotFound, Unavailable
from libs.dimse import wire
from libs.dimse.model import (
    SUCCESS,
    NormalizedRequest,
    NormalizedResponse,
    OutgoingInstance,
    Progress,
    ProtocolError,
    QueryRequest,
    RetrieveResult,
    Status,
    StoreRequest,
)
from libs.dimse.pdata import Message

if TYPE_CHECKING:
    from libs.dimse.association import AcceptedAssociation
    from libs.dimse.negotiation import AcceptedContext

log = structlog.get_logger()

_SOP_CLASS_NOT_SUPPORTED, _PROCESSING_FAILURE, _UNRECOGNISED_OPERATION = 0x0122, 0x0110, 0x0211
_NAMES = {
    wire.N_EVENT_REPORT: "N-EVENT-REPORT",
    wire.N_GET: "N-GET",
    wire.N_SET: "N-SET",
    wire.N_ACTION: "N-ACTION",
    wire.N_CREATE: "N-CREATE",
    wire.N_DELETE: "N-DELETE",
}
_QUERIES = (wire.C_FIND, wire.C_MOVE, wire.C_GET)


def status_of(error: Exception, invalid: int) -> Status:
    """The status of a handler that failed. Sentences of our own errors travel as Error Comment."""
    if isinstance(error, Invalid):
        return Status(invalid, str(error))
    if isinstance(error, NotFound):
        return Status(0x0112, str(error))
    if isinstance(error, Unavailable):
        log.warning("dimse.unavailable", reason=str(error))
        return Status(0xA700, str(error))
    log.error("dimse.handler_failed", exc_info=error)
    return Status(_PROCESSING_FAILURE, "internal error; see the archive's log")


def status_elements(status: Status) -> dict[int, wire.CommandValue]:
    """The elements of a response that carry a status (PS3.7 Annex C)."""
    elements: dict[int, wire.CommandValue] = {wire.STATUS: status.code}
    if status.comment:
        elements[wire.ERROR_COMMENT] = status.comment
    if status.offending_elements:
        elements[wire.OFFENDING_ELEMENT] = status.offending_elements
    if status.error_id is not None:
        elements[wire.ERROR_ID] = status.error_id
    return elements


class Dispatcher:
    """Answers the messages of one association, one at a time."""

    def __init__(self, association: AcceptedAssociation) -> None:
        self._association = association
        self._running: tuple[int, asyncio.Event] | None = None
        self._waiting: dict[int, asyncio.Future[Status]] = {}
        self._next_message_id = 0

    def interrupt(self, message: Message) -> bool:
        """Take what must not wait in line: C-CANCEL, and answers to our own sub-operations. True when taken."""
        field = message.number(wire.COMMAND_FIELD) or 0
        if field == wire.C_CANCEL:
            if self._running and self._running[0] == message.number(wire.MESSAGE_ID_RESPONDED_TO):
                self._running[1].set()
            return True
        if field & wire.RESPONSE:
            waiting = self._waiting.pop(message.number(wire.MESSAGE_ID_RESPONDED_TO) or 0, None)
            if waiting is not None and not waiting.done():
                comment = message.text(wire.ERROR_COMMENT)
                waiting.set_result(Status(message.number(wire.STATUS) or 0, comment))
            return True
        return False

    def connection_lost(self) -> None:
        """Nobody listens any more: cancel the query in hand and fail what waits for an answer."""
        if self._running:
            self._running[1].set()
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(ConnectionResetError("the peer is gone"))
        self._waiting.clear()

    async def answer(self, message: Message) -> None:
        """Call the handler of a request and send its response."""
        context = self._association.contexts[message.context_id]
        field = message.number(wire.COMMAND_FIELD) or 0
        if field == wire.C_STORE:
            await self._store(message, context)
        elif field == wire.C_ECHO:
            await self._echo(message, context)
        elif field in _QUERIES:
            await self._query(field, message, context)
        elif field in _NAMES:
            await self._normalized(field, message, context)
        else:
            raise ProtocolError(f"{field:#06x} is no request of DIMSE")

    async def _respond(
        self,
        message: Message,
        status: Status,
        more: dict[int, wire.CommandValue] | None = None,
        dataset: bytes | None = None,
    ) -> None:
        elements: dict[int, wire.CommandValue] = {
            wire.COMMAND_FIELD: (message.number(wire.COMMAND_FIELD) or 0) | wire.RESPONSE,
            wire.MESSAGE_ID_RESPONDED_TO: message.number(wire.MESSAGE_ID) or 0,
            wire.DATA_SET_TYPE: wire.NO_DATASET if dataset is None else wire.WITH_DATASET,
            **status_elements(status),
            **(more or {}),
        }
        sop_class = message.text(wire.AFFECTED_SOP_CLASS_UID)
        if sop_class:
            elements.setdefault(wire.AFFECTED_SOP_CLASS_UID, sop_class)
        await self._association.send(message.context_id, elements, None if dataset is None else [dataset])

    async def _echo(self, message: Message, context: AcceptedContext) -> None:
        status = SUCCESS
        if context.scp is not None and context.scp.echo is not None:
            status = await context.scp.echo(self._association.caller)
        await self._respond(message, status)

    async def _store(self, message: Message, context: AcceptedContext) -> None:
        sop_instance = message.text(wire.AFFECTED_SOP_INSTANCE_UID)
        sop_class = message.text(wire.AFFECTED_SOP_CLASS_UID)
        status: Status
        if context.scp is None or context.scp.store is None:
            status = Status(_SOP_CLASS_NOT_SUPPORTED)
        elif message.dataset is None or not sop_instance or not sop_class:
            status = Status(0xC000, "a C-STORE needs a dataset and its SOP class and instance UIDs")
        else:
            request = StoreRequest(
                caller=self._association.caller,
                message_id=message.number(wire.MESSAGE_ID) or 0,
                sop_class_uid=sop_class,
                sop_instance_uid=sop_instance,
                transfer_syntax_uid=context.transfer_syntax,
                priority=message.number(wire.PRIORITY) or 0,
                dataset=message.dataset,
                move_originator_ae_title=message.text(wire.MOVE_ORIGINATOR_AE_TITLE),
                move_originator_message_id=(
                    message.number(wire.MOVE_ORIGINATOR_MESSAGE_ID)
                    if wire.MOVE_ORIGINATOR_MESSAGE_ID in message.command
                    else None
                ),
            )
            try:
                status = await context.scp.store(request)
            except Exception as error:
                status = status_of(error, invalid=0xC000)
        more: dict[int, wire.CommandValue] = {wire.AFFECTED_SOP_INSTANCE_UID: sop_instance} if sop_instance else {}
        await self._respond(message, status, more)

    # --- queries and retrievals -------------------------------------------------------------------------------

    async def _query(self, field: int, message: Message, context: AcceptedContext) -> None:
        scp = context.scp
        supported = scp is not None and {
            wire.C_FIND: scp.find, wire.C_MOVE: scp.move, wire.C_GET: scp.get
        }[field] is not None  # fmt: skip
        if scp is None or not supported:
            await self._respond(message, Status(_SOP_CLASS_NOT_SUPPORTED))
            return
        try:
            identifier = _decoded(message, context)
        except Invalid as error:
            await self._respond(message, Status(0xA900, str(error)))
            return
        flags = self._association.extended.get(context.abstract_syntax, b"")
        request = QueryRequest(
            caller=self._association.caller,
            message_id=message.number(wire.MESSAGE_ID) or 0,
            sop_class_uid=context.abstract_syntax,
            transfer_syntax_uid=context.transfer_syntax,
            priority=message.number(wire.PRIORITY) or 0,
            identifier=identifier,
            cancelled=asyncio.Event(),
            relational=flags[0:1] == b"\x01",
            combined_date_time=flags[1:2] == b"\x01",
            fuzzy_names=flags[2:3] == b"\x01",
            move_destination=message.text(wire.MOVE_DESTINATION),
        )
        self._running = (request.message_id, request.cancelled)
        try:
            if field == wire.C_FIND:
                await self._find(message, request, context)
            else:
                await self._retrieve(field, message, request, context)
        finally:
            self._running = None

    async def _find(self, message: Message, request: QueryRequest, context: AcceptedContext) -> None:
        assert context.scp is not None
        assert context.scp.find is not None
        final = SUCCESS
        try:
            async for status, identifier in context.scp.find(request):
                if not status.is_pending:
                    final = status
                    break
                dataset = identifier if isinstance(identifier, bytes) else _encoded(identifier or Dataset(), context)
                await self._respond(message, status, dataset=dataset)
        except ConnectionError:
            raise
        except Exception as error:
            final = status_of(error, invalid=0xA900)
        await self._respond(message, final)

    async def _retrieve(self, field: int, message: Message, request: QueryRequest, context: AcceptedContext) -> None:
        scp = context.scp
        assert scp is not None

        async def report(progress: Progress) -> None:
            await self._respond(message, Status(0xFF00), _counts(progress, with_remaining=True))

        result: RetrieveResult
        try:
            if field == wire.C_MOVE and scp.move is not None:
                result = await scp.move(request, report)
            else:
                assert scp.get is not None
                result = await scp.get(request, report, self._send_instance)
        except ConnectionError:
            raise
        except Exception as error:
            result = RetrieveResult(status_of(error, invalid=0xA900), Progress(0, 0, 0, 0))
        dataset = None
        if result.failed_sop_instance_uids:
            failed = Dataset()
            failed.FailedSOPInstanceUIDList = list(result.failed_sop_instance_uids)
            dataset = _encoded(failed, context)
        canceled = result.status.code == 0xFE00
        await self._respond(message, result.status, _counts(result.progress, with_remaining=canceled), dataset)

    async def _send_instance(self, instance: OutgoingInstance) -> Status:
        """A C-STORE sub-operation of a C-GET on this association."""
        usable = [
            context
            for context in self._association.contexts.values()
            if context.sender is not None and context.abstract_syntax == instance.sop_class_uid
        ]
        if not usable:
            return Status(0xA900, "no presentation context was accepted for this SOP class")
        same = next((c for c in usable if c.transfer_syntax == instance.transfer_syntax_uid), None)
        pieces: list[wire.Bytes] | None = None
        context = same
        if context is None:
            if instance.convert is None:
                return Status(0xA900, "no presentation context was accepted for this transfer syntax")
            try:
                syntax, converted = await instance.convert(tuple(c.transfer_syntax for c in usable))
            except Invalid as error:
                return Status(0xA900, str(error))
            context = next(c for c in usable if c.transfer_syntax == syntax)
            pieces = [converted]
        self._next_message_id = self._next_message_id % 0xFFFF + 1
        number = self._next_message_id
        command = wire.encode_command(
            {
                wire.AFFECTED_SOP_CLASS_UID: instance.sop_class_uid,
                wire.COMMAND_FIELD: wire.C_STORE,
                wire.MESSAGE_ID: number,
                wire.PRIORITY: 0,
                wire.DATA_SET_TYPE: wire.WITH_DATASET,
                wire.AFFECTED_SOP_INSTANCE_UID: instance.sop_instance_uid,
            }
        )
        answered: asyncio.Future[Status] = asyncio.get_running_loop().create_future()
        self._waiting[number] = answered
        association = self._association
        try:
            if pieces is not None:
                parts = wire.fragment_message(context.context_id, command, pieces, association.peer_max_pdu)
                await association.write(parts)
            else:
                stream = _as_stream(instance.read())
                async for block in wire.fragment_stream(context.context_id, command, stream, association.peer_max_pdu):
                    await association.write(block)
            async with asyncio.timeout(association.terms.dimse_timeout):
                return await answered
        except TimeoutError as error:
            association.abort(0, 0)
            raise ConnectionResetError("the peer did not answer a sub-operation") from error
        except (NotFound, Unavailable):
            # A part of the message is out: the only honest end is to abort.
            association.abort(2, 0)
            raise
        finally:
            self._waiting.pop(number, None)

    # --- N-services -------------------------------------------------------------------------------------------

    async def _normalized(self, field: int, message: Message, context: AcceptedContext) -> None:
        sop_class = message.text(wire.REQUESTED_SOP_CLASS_UID) or message.text(wire.AFFECTED_SOP_CLASS_UID)
        sop_instance = message.text(wire.REQUESTED_SOP_INSTANCE_UID) or message.text(wire.AFFECTED_SOP_INSTANCE_UID)
        type_tag = wire.EVENT_TYPE_ID if field == wire.N_EVENT_REPORT else wire.ACTION_TYPE_ID
        attributes = message.command.get(wire.ATTRIBUTE_IDENTIFIER_LIST, ())
        response: NormalizedResponse
        if context.scp is None or context.scp.normalized is None:
            response = NormalizedResponse(Status(_UNRECOGNISED_OPERATION))
        else:
            try:
                request = NormalizedRequest(
                    caller=self._association.caller,
                    operation=_NAMES[field],
                    message_id=message.number(wire.MESSAGE_ID) or 0,
                    sop_class_uid=sop_class,
                    sop_instance_uid=sop_instance,
                    transfer_syntax_uid=context.transfer_syntax,
                    type_id=message.number(type_tag) if type_tag in message.command else None,
                    dataset=_decoded(message, context) if message.dataset is not None else None,
                    attribute_identifiers=attributes if isinstance(attributes, tuple) else (),
                )
                response = await context.scp.normalized(request)
            except Exception as error:
                response = NormalizedResponse(status_of(error, invalid=_PROCESSING_FAILURE))
        more: dict[int, wire.CommandValue] = {}
        if sop_class:
            more[wire.AFFECTED_SOP_CLASS_UID] = sop_class
        if response.sop_instance_uid or sop_instance:
            more[wire.AFFECTED_SOP_INSTANCE_UID] = response.sop_instance_uid or sop_instance
        if type_tag in message.command and field in (wire.N_EVENT_REPORT, wire.N_ACTION):
            more[type_tag] = message.number(type_tag) or 0
        dataset = None if response.dataset is None else _encoded(response.dataset, context)
        await self._respond(message, response.status, more, dataset)


async def _as_stream(pieces: AsyncIterator[bytes]) -> AsyncIterator[wire.Bytes]:
    async for piece in pieces:
        yield piece


def _counts(progress: Progress, with_remaining: bool) -> dict[int, wire.CommandValue]:
    counts: dict[int, wire.CommandValue] = {
        wire.COMPLETED: progress.completed,
        wire.FAILED: progress.failed,
        wire.WARNING: progress.warning,
    }
    if with_remaining:
        counts[wire.REMAINING] = progress.remaining
    return counts


def _decoded(message: Message, context: AcceptedContext) -> Dataset:
    """The dataset of a message. Raises Invalid when it cannot be read."""
    if message.dataset is None:
        raise Invalid("the request has no identifier")
    syntax = UID(context.transfer_syntax)
    try:
        dataset = decode(
            BytesIO(message.dataset.read()), syntax.is_implicit_VR, syntax.is_little_endian, syntax.is_deflated
        )
        # Decode everything now: pydicom reads lazily, and what is broken must be refused here.
        dataset.decode()
        for _ in dataset.iterall():
            pass
    except Exception as error:
        raise Invalid("the dataset cannot be read in its transfer syntax") from error
    return dataset


def _encoded(dataset: Dataset, context: AcceptedContext) -> bytes:
    syntax = UID(context.transfer_syntax)
    encoded = encode(dataset, syntax.is_implicit_VR, syntax.is_little_endian, syntax.is_deflated)
    if encoded is None:
        raise ValueError("an answer of ours cannot be encoded")
    return encoded
