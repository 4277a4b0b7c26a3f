"""Answers the DIMSE requests on an accepted association (PS3.7 9 and 10) by the handlers of its services."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING

import structlog
from pydicom.dataset import Dataset

from libs.common.errors import Invalid, NotFound, Unavailable
from libs.dimse import wire
from libs.dimse.datasets import read_dataset, write_dataset
from libs.dimse.model import (
    CANCEL,
    PENDING,
    SUCCESS,
    Caller,
    DimseError,
    GetHandler,
    MoveHandler,
    NormalizedRequest,
    NormalizedResponse,
    Progress,
    QueryRequest,
    ReportProgress,
    RetrieveResult,
    Scp,
    SendInstance,
    Status,
    StoreRequest,
)
from libs.dimse.negotiation import AcceptedContext
from libs.dimse.pdata import Message
from libs.dimse.spool import Spool
from libs.dimse.suboperations import SubOperations

if TYPE_CHECKING:
    from libs.dimse.association import Association

log = structlog.get_logger()

# Status codes that this layer gives by itself (PS3.7 Annex C; PS3.4 B.2.3 and C.4).
PROCESSING_FAILURE = 0x0110
NO_SUCH_INSTANCE = 0x0112
INVALID_ATTRIBUTE_VALUE = 0x0106
SOP_CLASS_NOT_SUPPORTED = 0x0122
UNRECOGNISED_OPERATION = 0x0211
RESOURCE_LIMITATION = 0x0213
OUT_OF_RESOURCES = 0xA700
DOES_NOT_MATCH_SOP_CLASS = 0xA900
CANNOT_UNDERSTAND = 0xC000

_NORMALIZED = {
    wire.N_EVENT_REPORT: "N-EVENT-REPORT",
    wire.N_GET: "N-GET",
    wire.N_SET: "N-SET",
    wire.N_ACTION: "N-ACTION",
    wire.N_CREATE: "N-CREATE",
    wire.N_DELETE: "N-DELETE",
}
_RESPONSES_PER_TURN = 16
"""C-FIND responses sent before others, and a C-CANCEL on this association, get their turn."""


class Responder:
    """One request at a time, in the order they came. Raises only DimseError: everything else becomes a status."""

    def __init__(self, association: Association, caller: Caller) -> None:
        self._association = association
        self._caller = caller

    async def answer(self, message: Message, spool: Spool | None) -> None:
        """Answer one request. A spooled dataset is completed first; its file is the caller's to delete."""
        context = self._association.contexts[message.context_id]
        operation = message.number(wire.COMMAND_FIELD) or 0
        invalid = {
            wire.C_STORE: CANNOT_UNDERSTAND,
            wire.C_FIND: DOES_NOT_MATCH_SOP_CLASS,
            wire.C_MOVE: DOES_NOT_MATCH_SOP_CLASS,
            wire.C_GET: DOES_NOT_MATCH_SOP_CLASS,
        }.get(operation, INVALID_ATTRIBUTE_VALUE)
        try:
            if spool is not None and message.dataset is not None:
                await spool.finish(message.dataset)
            await self._dispatch(operation, message, context)
            return
        except DimseError:
            if not self._association.is_open:
                return
            raise
        except Invalid as error:
            status = Status(invalid, str(error))
        except NotFound as error:
            status = Status(NO_SUCH_INSTANCE, str(error))
        except Unavailable as error:
            status = Status(RESOURCE_LIMITATION if operation in _NORMALIZED else OUT_OF_RESOURCES, str(error))
        except Exception as error:
            # Neither its message nor its traceback's values: they may come from a dataset.
            log.error(
                "dimse.handler_failed",
                operation=f"{operation:04X}",
                error=type(error).__name__,
                where=_where(error),
                association_id=self._caller.association_id,
            )
            status = Status(PROCESSING_FAILURE, "the archive failed; its log says why")
        if self._association.is_open:
            await self._respond(message, status)

    async def _dispatch(self, operation: int, message: Message, context: AcceptedContext) -> None:
        scp = context.scp
        if operation == wire.N_EVENT_REPORT:
            # Comes from the SCP of the peer's side: on a context where we are the SCU, if it negotiated roles.
            scp = context.sender or context.scp
        if scp is None:
            await self._respond(message, Status(SOP_CLASS_NOT_SUPPORTED, "The SCU role was not negotiated"))
            return
        if operation in _NORMALIZED:
            await self._normalized(operation, message, context, scp)
            return
        if message.text(wire.AFFECTED_SOP_CLASS_UID) != context.abstract_syntax:
            await self._respond(message, Status(SOP_CLASS_NOT_SUPPORTED, "Not the SOP class of the context"))
        elif operation == wire.C_ECHO:
            await self._respond(message, SUCCESS if scp.echo is None else await scp.echo(self._caller))
        elif operation == wire.C_STORE and scp.store is not None:
            await self._store(message, context, scp)
        elif operation == wire.C_FIND and scp.find is not None:
            await self._find(message, context, scp)
        elif operation == wire.C_MOVE and scp.move is not None:
            await self._retrieve(message, context, scp.move)
        elif operation == wire.C_GET and scp.get is not None:
            sub_operations = SubOperations(self._association, message.number(wire.PRIORITY) or 0)
            await self._retrieve(message, context, _sending(scp.get, sub_operations.send))
        else:
            await self._respond(message, Status(UNRECOGNISED_OPERATION, "Not an operation of this SOP class"))

    async def _store(self, message: Message, context: AcceptedContext, scp: Scp) -> None:
        instance_uid = message.text(wire.AFFECTED_SOP_INSTANCE_UID)
        if not instance_uid:
            status = Status(CANNOT_UNDERSTAND, "No Affected SOP Instance UID", (wire.AFFECTED_SOP_INSTANCE_UID,))
        elif message.dataset is None or not message.dataset.size:
            status = Status(CANNOT_UNDERSTAND, "No dataset", (wire.DATA_SET_TYPE,))
        else:
            assert scp.store is not None
            status = await scp.store(
                StoreRequest(
                    caller=self._caller,
                    message_id=message.number(wire.MESSAGE_ID) or 0,
                    sop_class_uid=context.abstract_syntax,
                    sop_instance_uid=instance_uid,
                    transfer_syntax_uid=context.transfer_syntax,
                    priority=message.number(wire.PRIORITY) or 0,
                    dataset=message.dataset,
                    move_originator_ae_title=message.text(wire.MOVE_ORIGINATOR_AE_TITLE),
                    move_originator_message_id=message.number(wire.MOVE_ORIGINATOR_MESSAGE_ID),
                )
            )
        await self._respond(message, status)

    def _query(self, message: Message, context: AcceptedContext, cancelled: asyncio.Event) -> QueryRequest:
        if message.dataset is None or not message.dataset.size:
            raise Invalid("The request has no identifier")
        # What was agreed, by position (PS3.4 C.5.1.1.1): relational, combined date and time, fuzzy names.
        agreed = [flag == 1 for flag in self._association.extended.get(context.abstract_syntax, b"")[:3]]
        relational, combined, fuzzy = [*agreed, False, False, False][:3]
        return QueryRequest(
            caller=self._caller,
            message_id=message.number(wire.MESSAGE_ID) or 0,
            sop_class_uid=context.abstract_syntax,
            transfer_syntax_uid=context.transfer_syntax,
            priority=message.number(wire.PRIORITY) or 0,
            identifier=read_dataset(message.dataset, context.transfer_syntax),
            cancelled=cancelled,
            relational=relational,
            fuzzy_names=fuzzy,
            combined_date_time=combined,
            move_destination=message.text(wire.MOVE_DESTINATION),
        )

    async def _find(self, message: Message, context: AcceptedContext, scp: Scp) -> None:
        assert scp.find is not None
        with self._association.cancellable(message.number(wire.MESSAGE_ID) or 0) as cancelled:
            matches = scp.find(self._query(message, context, cancelled))
            final = await self._send_matches(message, context, matches, cancelled)
        await self._respond(message, final)

    async def _send_matches(
        self,
        message: Message,
        context: AcceptedContext,
        matches: AsyncIterator[tuple[Status, Dataset | bytes | None]],
        cancelled: asyncio.Event,
    ) -> Status:
        count = 0
        try:
            async for status, identifier in matches:
                if not status.is_pending:
                    return status
                if cancelled.is_set():
                    return CANCEL
                if identifier is None:
                    continue
                if isinstance(identifier, Dataset):
                    identifier = write_dataset(identifier, context.transfer_syntax)
                await self._respond(message, status, dataset=identifier)
                count += 1
                if not count % _RESPONSES_PER_TURN:
                    await asyncio.sleep(0)
        finally:
            close = getattr(matches, "aclose", None)
            if close is not None:
                await close()
        return SUCCESS

    async def _retrieve(self, message: Message, context: AcceptedContext, handler: MoveHandler) -> None:
        with self._association.cancellable(message.number(wire.MESSAGE_ID) or 0) as cancelled:

            async def report(progress: Progress) -> None:
                await self._respond(message, PENDING, _counts(progress, with_remaining=True))

            result: RetrieveResult = await handler(self._query(message, context, cancelled), report)
        identifier = None
        if result.failed_sop_instance_uids:
            failed = Dataset()
            failed.FailedSOPInstanceUIDList = list(result.failed_sop_instance_uids)
            identifier = write_dataset(failed, context.transfer_syntax)
        # Remaining is of the pending and cancelled responses only (PS3.4 C.4.2.1.6).
        counts = _counts(result.progress, with_remaining=result.status.code == CANCEL.code)
        await self._respond(message, result.status, counts, identifier)

    async def _normalized(self, operation: int, message: Message, context: AcceptedContext, scp: Scp) -> None:
        if scp.normalized is None:
            await self._respond(message, Status(UNRECOGNISED_OPERATION, "Not an operation of this SOP class"))
            return
        name = _NORMALIZED[operation]
        affected = operation in (wire.N_EVENT_REPORT, wire.N_CREATE)
        class_tag = wire.AFFECTED_SOP_CLASS_UID if affected else wire.REQUESTED_SOP_CLASS_UID
        instance_tag = wire.AFFECTED_SOP_INSTANCE_UID if affected else wire.REQUESTED_SOP_INSTANCE_UID
        type_tag = {wire.N_EVENT_REPORT: wire.EVENT_TYPE_ID, wire.N_ACTION: wire.ACTION_TYPE_ID}.get(operation)
        type_id = message.number(type_tag) if type_tag is not None else None
        attributes = message.command.get(wire.ATTRIBUTE_IDENTIFIER_LIST, ())
        dataset = None
        if message.dataset is not None and message.dataset.size:
            dataset = read_dataset(message.dataset, context.transfer_syntax)
        response: NormalizedResponse = await scp.normalized(
            NormalizedRequest(
                caller=self._caller,
                operation=name,
                message_id=message.number(wire.MESSAGE_ID) or 0,
                sop_class_uid=message.text(class_tag) or context.abstract_syntax,
                sop_instance_uid=message.text(instance_tag),
                transfer_syntax_uid=context.transfer_syntax,
                type_id=type_id,
                dataset=dataset,
                attribute_identifiers=attributes if isinstance(attributes, tuple) else (),
            )
        )
        extra: dict[int, wire.CommandValue] = {}
        if type_tag is not None and type_id is not None:
            extra[type_tag] = type_id
        if response.sop_instance_uid:
            extra[wire.AFFECTED_SOP_INSTANCE_UID] = response.sop_instance_uid
        encoded = None if response.dataset is None else write_dataset(response.dataset, context.transfer_syntax)
        await self._respond(message, response.status, extra, encoded)

    async def _respond(
        self,
        message: Message,
        status: Status,
        extra: Mapping[int, wire.CommandValue] | None = None,
        dataset: bytes | None = None,
    ) -> None:
        if not self._association.is_open:
            return
        elements: dict[int, wire.CommandValue] = {
            wire.COMMAND_FIELD: (message.number(wire.COMMAND_FIELD) or 0) | wire.RESPONSE,
            wire.MESSAGE_ID_RESPONDED_TO: message.number(wire.MESSAGE_ID) or 0,
            wire.DATA_SET_TYPE: wire.NO_DATASET if dataset is None else wire.WITH_DATASET,
            wire.STATUS: status.code,
        }
        class_uid = message.text(wire.AFFECTED_SOP_CLASS_UID) or message.text(wire.REQUESTED_SOP_CLASS_UID)
        instance_uid = message.text(wire.AFFECTED_SOP_INSTANCE_UID) or message.text(wire.REQUESTED_SOP_INSTANCE_UID)
        if class_uid:
            elements[wire.AFFECTED_SOP_CLASS_UID] = class_uid
        if instance_uid:
            elements[wire.AFFECTED_SOP_INSTANCE_UID] = instance_uid
        if status.comment:
            elements[wire.ERROR_COMMENT] = status.comment
        if status.offending_elements:
            elements[wire.OFFENDING_ELEMENT] = status.offending_elements
        if status.error_id is not None:
            elements[wire.ERROR_ID] = status.error_id
        if extra:
            elements |= extra
        command = wire.encode_command(elements)
        await self._association.send(message.context_id, command, None if dataset is None else (dataset,))


def _sending(get: GetHandler, send: SendInstance) -> MoveHandler:
    async def handler(request: QueryRequest, report: ReportProgress) -> RetrieveResult:
        return await get(request, report, send)

    return handler


def _counts(progress: Progress, *, with_remaining: bool) -> dict[int, wire.CommandValue]:
    counts: dict[int, wire.CommandValue] = {
        wire.COMPLETED: _short(progress.completed),
        wire.FAILED: _short(progress.failed),
        wire.WARNING: _short(progress.warning),
    }
    if with_remaining:
        counts[wire.REMAINING] = _short(progress.remaining)
    return counts


def _short(count: int) -> int:
    """Counts are US: a retrieve of more instances says 65535 until fewer remain."""
    return max(0, min(count, 0xFFFF))


def _where(error: BaseException) -> str:
    """The innermost line of the traceback, without the values in it."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}" if trace is not None else ""
