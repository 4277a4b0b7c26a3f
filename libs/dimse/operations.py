"""The DIMSE operations of an association that we requested (PS3.7 9 and 10), as an async client."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import Final

from pydicom.dataset import Dataset
from pydicom.uid import UID
from pynetdicom.dsutils import decode, encode

from libs.common.errors import Invalid, NotFound, Unavailable
from libs.dimse import wire
from libs.dimse.link import Link, Message
from libs.dimse.model import (
    Caller,
    DimseError,
    NormalizedResponse,
    OutgoingInstance,
    Payload,
    Progress,
    ProtocolError,
    Status,
    StoreHandler,
    StoreRequest,
)

VERIFICATION: Final = "1.2.840.10008.1.1"

NOT_ACCEPTED: Final = 0xA900
UNRECOGNISED_OPERATION: Final = 0x0211


@dataclass(frozen=True)
class AcceptedContext:
    """A presentation context that the peer took. ``as_scp``: it granted us the SCP role we proposed (C-GET)."""

    context_id: int
    abstract_syntax: str
    transfer_syntax: str
    as_scp: bool


class RequestorAssociation:
    """An accepted association. One operation at a time: asynchronous operations are not negotiated.

    Every operation raises TimedOut and ProtocolError, after which the association is over. Operations that give an
    async iterator end the peer's work with C-CANCEL when the iterator is closed early: use ``contextlib.aclosing``.
    A status of the peer, also a failure, is a result and no exception; the last item of an iterator is the final one.
    """

    def __init__(self, link: Link, accepted: tuple[AcceptedContext, ...], caller: Caller, acse_timeout: float) -> None:
        self.accepted = accepted
        self.peer = caller
        self._link = link
        self._acse_timeout = acse_timeout
        self._message_id = 0
        self._busy = False
        self._open = True

    @property
    def is_open(self) -> bool:
        return self._open and not self._link.is_closing

    async def echo(self) -> Status:
        """C-ECHO (PS3.7 9.1.5)."""
        context = self._context(VERIFICATION)
        with self._operation() as message_id:
            await self._request(context, wire.C_ECHO, message_id, {wire.AFFECTED_SOP_CLASS_UID: VERIFICATION})
            return _status(await self._response(context, wire.C_ECHO, message_id))

    def context_for(self, instance: OutgoingInstance) -> AcceptedContext | None:
        """The context that takes the instance as it is."""
        for context in self.accepted:
            if (
                context.abstract_syntax == instance.sop_class_uid
                and context.transfer_syntax == instance.transfer_syntax_uid
            ):
                return context
        return None

    async def store(
        self,
        instance: OutgoingInstance,
        *,
        priority: int = 0,
        move_originator_ae_title: str = "",
        move_originator_message_id: int | None = None,
    ) -> Status:
        """C-STORE (PS3.7 9.1.1) in the context of the instance's syntax, else converted to one that was accepted.

        An instance that no accepted context takes gives status 0xA900 and nothing is sent. An error raised by
        ``instance.read`` passes through; when part of the dataset was sent by then, the association is aborted.
        """
        context = self.context_for(instance)
        converted: bytes | None = None
        if context is None:
            offered = {c.transfer_syntax: c for c in self.accepted if c.abstract_syntax == instance.sop_class_uid}
            if not offered:
                return Status(NOT_ACCEPTED, "The peer does not take this SOP class")
            if instance.convert is None:
                return Status(NOT_ACCEPTED, "The peer does not take this transfer syntax")
            try:
                syntax, converted = await instance.convert(tuple(offered))
            except Invalid as error:
                return Status(NOT_ACCEPTED, f"No conversion for the peer: {error}")
            context = offered[syntax]
        elements: dict[int, wire.CommandValue] = {
            wire.AFFECTED_SOP_CLASS_UID: instance.sop_class_uid,
            wire.AFFECTED_SOP_INSTANCE_UID: instance.sop_instance_uid,
            wire.PRIORITY: priority,
        }
        if move_originator_ae_title:
            elements[wire.MOVE_ORIGINATOR_AE_TITLE] = move_originator_ae_title
        if move_originator_message_id is not None:
            elements[wire.MOVE_ORIGINATOR_MESSAGE_ID] = move_originator_message_id
        with self._operation() as message_id:
            command = _command(wire.C_STORE, message_id, elements, with_dataset=True)
            if converted is not None:
                await self._link.send(context.context_id, command, [converted])
            else:
                started = False
                try:
                    async for block in wire.fragment_stream(
                        context.context_id, command, instance.read(), self._link.peer_max_pdu
                    ):
                        started = True
                        await self._link.write(block)
                except (Invalid, NotFound, Unavailable):
                    if not started:
                        # Nothing went out: the association is as good as before, and the operation never was.
                        self._busy = False
                    raise
            return _status(await self._response(context, wire.C_STORE, message_id))

    async def find(
        self, sop_class_uid: str, identifier: Dataset, *, priority: int = 0
    ) -> AsyncGenerator[tuple[Status, Dataset | None], None]:
        """C-FIND (PS3.7 9.1.2): each match with its pending status, and last the final status with None."""
        context = self._context(sop_class_uid)
        with self._operation() as message_id:
            await self._request(
                context,
                wire.C_FIND,
                message_id,
                {wire.AFFECTED_SOP_CLASS_UID: sop_class_uid, wire.PRIORITY: priority},
                identifier,
            )
            final = False
            try:
                while not final:
                    message = await self._response(context, wire.C_FIND, message_id)
                    status = _status(message)
                    final = not status.is_pending
                    yield status, _decode(message.dataset, context.transfer_syntax)
            except GeneratorExit:
                if not final:
                    await self._cancel(context, wire.C_FIND, message_id)
                raise

    async def move(
        self, sop_class_uid: str, identifier: Dataset, destination: str, *, priority: int = 0
    ) -> AsyncGenerator[tuple[Status, Progress, Dataset | None], None]:
        """C-MOVE (PS3.7 9.1.4) to the AE title ``destination``: status, counts and the identifier of each response."""
        context = self._context(sop_class_uid)
        elements: dict[int, wire.CommandValue] = {
            wire.AFFECTED_SOP_CLASS_UID: sop_class_uid,
            wire.PRIORITY: priority,
            wire.MOVE_DESTINATION: destination,
        }
        with self._operation() as message_id:
            await self._request(context, wire.C_MOVE, message_id, elements, identifier)
            final = False
            try:
                while not final:
                    message = await self._response(context, wire.C_MOVE, message_id)
                    status = _status(message)
                    final = not status.is_pending
                    yield status, _progress(message), _decode(message.dataset, context.transfer_syntax)
            except GeneratorExit:
                if not final:
                    await self._cancel(context, wire.C_MOVE, message_id)
                raise

    async def get(
        self, sop_class_uid: str, identifier: Dataset, on_store: StoreHandler, *, priority: int = 0
    ) -> AsyncGenerator[tuple[Status, Progress, Dataset | None], None]:
        """C-GET (PS3.7 9.1.3): ``on_store`` answers every instance that arrives; responses as for ``move``.

        The contexts of the storage classes must have been proposed with ``roles``.
        """
        context = self._context(sop_class_uid)
        with self._operation() as message_id:
            await self._request(
                context,
                wire.C_GET,
                message_id,
                {wire.AFFECTED_SOP_CLASS_UID: sop_class_uid, wire.PRIORITY: priority},
                identifier,
            )
            final = False
            try:
                while not final:
                    message = await self._response(context, wire.C_GET, message_id, on_store)
                    status = _status(message)
                    final = not status.is_pending
                    yield status, _progress(message), _decode(message.dataset, context.transfer_syntax)
            except GeneratorExit:
                if not final:
                    await self._cancel(context, wire.C_GET, message_id)
                raise

    async def n_event_report(
        self, sop_class_uid: str, sop_instance_uid: str, event_type_id: int, information: Dataset | None = None
    ) -> NormalizedResponse:
        """N-EVENT-REPORT (PS3.7 10.1.1)."""
        extra: dict[int, wire.CommandValue] = {
            wire.AFFECTED_SOP_CLASS_UID: sop_class_uid,
            wire.AFFECTED_SOP_INSTANCE_UID: sop_instance_uid,
            wire.EVENT_TYPE_ID: event_type_id,
        }
        return await self._normalized(sop_class_uid, wire.N_EVENT_REPORT, extra, information)

    async def n_action(
        self, sop_class_uid: str, sop_instance_uid: str, action_type_id: int, information: Dataset | None = None
    ) -> NormalizedResponse:
        """N-ACTION (PS3.7 10.1.4)."""
        extra = _requested(sop_class_uid, sop_instance_uid) | {wire.ACTION_TYPE_ID: action_type_id}
        return await self._normalized(sop_class_uid, wire.N_ACTION, extra, information)

    async def n_create(
        self, sop_class_uid: str, sop_instance_uid: str, attributes: Dataset | None = None
    ) -> NormalizedResponse:
        """N-CREATE (PS3.7 10.1.5); an empty instance UID lets the peer choose one."""
        extra: dict[int, wire.CommandValue] = {wire.AFFECTED_SOP_CLASS_UID: sop_class_uid}
        if sop_instance_uid:
            extra[wire.AFFECTED_SOP_INSTANCE_UID] = sop_instance_uid
        return await self._normalized(sop_class_uid, wire.N_CREATE, extra, attributes)

    async def n_set(self, sop_class_uid: str, sop_instance_uid: str, modifications: Dataset) -> NormalizedResponse:
        """N-SET (PS3.7 10.1.3)."""
        extra = _requested(sop_class_uid, sop_instance_uid)
        return await self._normalized(sop_class_uid, wire.N_SET, extra, modifications)

    async def n_get(
        self, sop_class_uid: str, sop_instance_uid: str, attribute_identifiers: tuple[int, ...] = ()
    ) -> NormalizedResponse:
        """N-GET (PS3.7 10.1.2); no attribute identifiers asks for all."""
        extra = _requested(sop_class_uid, sop_instance_uid)
        if attribute_identifiers:
            extra[wire.ATTRIBUTE_IDENTIFIER_LIST] = attribute_identifiers
        return await self._normalized(sop_class_uid, wire.N_GET, extra, None)

    async def n_delete(self, sop_class_uid: str, sop_instance_uid: str) -> NormalizedResponse:
        """N-DELETE (PS3.7 10.1.6)."""
        return await self._normalized(sop_class_uid, wire.N_DELETE, _requested(sop_class_uid, sop_instance_uid), None)

    async def release(self) -> None:
        """A-RELEASE (PS3.8 7.2), also when both sides ask for it at once. Never fails: all work is done by then."""
        if not self.is_open:
            return
        self._open = False
        try:
            await self._link.write([wire.RELEASE_RQ_PDU])
            while True:
                pdu_type, _ = await self._link.read_pdu(self._acse_timeout)
                if pdu_type == wire.RELEASE_RQ:
                    # Collision: as the requestor we answer first (PS3.8 9.2.3, state 9).
                    await self._link.write([wire.RELEASE_RP_PDU])
                elif pdu_type != wire.P_DATA:
                    break
        except DimseError:
            self._link.abort()
        self._link.close()

    async def abort(self) -> None:
        """A-ABORT (PS3.8 7.3): end the association at once."""
        self._open = False
        self._link.abort()
        await self._link.wait_closed()

    def _context(self, abstract_syntax: str) -> AcceptedContext:
        for context in self.accepted:
            if context.abstract_syntax == abstract_syntax:
                return context
        raise Invalid(f"{self.peer.calling_ae_title} did not accept {UID(abstract_syntax).name}.")

    @contextlib.contextmanager
    def _operation(self) -> Iterator[int]:
        """One message exchange. One that ends by anything but its answer leaves a peer we no longer understand."""
        if self._busy:
            raise RuntimeError("an association does one operation at a time")
        if not self.is_open:
            raise ProtocolError("The association is over.")
        self._busy = True
        self._message_id = self._message_id % 0xFFFF + 1
        try:
            yield self._message_id
        except GeneratorExit:
            raise
        except BaseException as error:
            if self._busy:
                self._open = False
                self._link.abort(*((2, 2) if isinstance(error, ProtocolError) else (0, 0)))
            raise
        finally:
            self._busy = False

    async def _request(
        self,
        context: AcceptedContext,
        operation: int,
        message_id: int,
        extra: dict[int, wire.CommandValue],
        dataset: Dataset | None = None,
    ) -> None:
        command = _command(operation, message_id, extra, with_dataset=dataset is not None)
        encoded = None if dataset is None else [_encode(dataset, context.transfer_syntax)]
        await self._link.send(context.context_id, command, encoded)

    async def _response(
        self, context: AcceptedContext, operation: int, message_id: int, on_store: StoreHandler | None = None
    ) -> Message:
        while True:
            message = await self._link.read_message()
            field = message.number(wire.COMMAND_FIELD)
            if not field & wire.RESPONSE:
                await self._answer(message, on_store)
                continue
            responds_to = message.number(wire.MESSAGE_ID_RESPONDED_TO)
            if field != operation | wire.RESPONSE or responds_to != message_id or wire.STATUS not in message.command:
                raise ProtocolError(
                    f"The peer answered 0x{operation:04X} with 0x{field:04X} for message {responds_to}."
                )
            return message

    async def _answer(self, message: Message, on_store: StoreHandler | None) -> None:
        """Answer a request of the peer: a sub-operation of C-GET; anything else is not for a requestor."""
        field = message.number(wire.COMMAND_FIELD)
        if field == wire.C_CANCEL:
            return
        if field == wire.C_STORE and on_store is not None:
            status = await self._stored(message, on_store)
        else:
            message.discard()
            status = Status(UNRECOGNISED_OPERATION)
        elements: dict[int, wire.CommandValue] = {
            wire.COMMAND_FIELD: field | wire.RESPONSE,
            wire.MESSAGE_ID_RESPONDED_TO: message.number(wire.MESSAGE_ID),
            wire.DATA_SET_TYPE: wire.NO_DATASET,
            wire.STATUS: status.code,
        }
        for tag in (wire.AFFECTED_SOP_CLASS_UID, wire.AFFECTED_SOP_INSTANCE_UID):
            if text := message.text(tag):
                elements[tag] = text
        if status.comment:
            elements[wire.ERROR_COMMENT] = status.comment
        if status.offending_elements:
            elements[wire.OFFENDING_ELEMENT] = status.offending_elements
        await self._link.send(message.context_id, wire.encode_command(elements))

    async def _stored(self, message: Message, on_store: StoreHandler) -> Status:
        context = next((c for c in self.accepted if c.context_id == message.context_id), None)
        if context is None or message.dataset is None:
            message.discard()
            raise ProtocolError("The peer sent an instance on a context that was not accepted, or without a dataset.")
        request = StoreRequest(
            caller=self.peer,
            message_id=message.number(wire.MESSAGE_ID),
            sop_class_uid=message.text(wire.AFFECTED_SOP_CLASS_UID),
            sop_instance_uid=message.text(wire.AFFECTED_SOP_INSTANCE_UID),
            transfer_syntax_uid=context.transfer_syntax,
            priority=message.number(wire.PRIORITY),
            dataset=message.dataset,
        )
        try:
            return await on_store(request)
        except Invalid as error:
            return Status(NOT_ACCEPTED, str(error))
        except NotFound as error:
            return Status(0x0112, str(error))
        except Unavailable as error:
            return Status(0xA700, str(error))
        finally:
            message.discard()

    async def _cancel(self, context: AcceptedContext, operation: int, message_id: int) -> None:
        """C-CANCEL-RQ (PS3.7 9.3.2.3), then read on to the final response; instances that still come are refused."""
        try:
            command = wire.encode_command(
                {
                    wire.COMMAND_FIELD: wire.C_CANCEL,
                    wire.MESSAGE_ID_RESPONDED_TO: message_id,
                    wire.DATA_SET_TYPE: wire.NO_DATASET,
                }
            )
            await self._link.send(context.context_id, command)
            while _status(await self._response(context, operation, message_id, _refuse)).is_pending:
                pass
        except BaseException:
            self._open = False
            self._link.abort()
            raise

    async def _normalized(
        self, sop_class_uid: str, operation: int, extra: dict[int, wire.CommandValue], dataset: Dataset | None
    ) -> NormalizedResponse:
        context = self._context(sop_class_uid)
        with self._operation() as message_id:
            await self._request(context, operation, message_id, extra, dataset)
            message = await self._response(context, operation, message_id)
            return NormalizedResponse(
                _status(message),
                _decode(message.dataset, context.transfer_syntax),
                message.text(wire.AFFECTED_SOP_INSTANCE_UID),
            )


async def _refuse(request: StoreRequest) -> Status:
    return Status(0xA700, "The retrieve was cancelled")


def _command(operation: int, message_id: int, extra: Mapping[int, wire.CommandValue], *, with_dataset: bool) -> bytes:
    elements: dict[int, wire.CommandValue] = {
        wire.COMMAND_FIELD: operation,
        wire.MESSAGE_ID: message_id,
        wire.DATA_SET_TYPE: wire.WITH_DATASET if with_dataset else wire.NO_DATASET,
    }
    return wire.encode_command(elements | dict(extra))


def _requested(sop_class_uid: str, sop_instance_uid: str) -> dict[int, wire.CommandValue]:
    return {wire.REQUESTED_SOP_CLASS_UID: sop_class_uid, wire.REQUESTED_SOP_INSTANCE_UID: sop_instance_uid}


def _status(message: Message) -> Status:
    offending = message.command.get(wire.OFFENDING_ELEMENT, ())
    return Status(
        message.number(wire.STATUS),
        message.text(wire.ERROR_COMMENT),
        offending if isinstance(offending, tuple) else (),
        message.number(wire.ERROR_ID) if wire.ERROR_ID in message.command else None,
    )


def _progress(message: Message) -> Progress:
    return Progress(*(message.number(tag) for tag in (wire.REMAINING, wire.COMPLETED, wire.FAILED, wire.WARNING)))


def _encode(dataset: Dataset, transfer_syntax: str) -> bytes:
    syntax = UID(transfer_syntax)
    encoded = encode(dataset, syntax.is_implicit_VR, syntax.is_little_endian, syntax.is_deflated)
    if encoded is None:
        raise Invalid("The dataset of the request cannot be encoded.")
    return encoded


def _decode(payload: Payload | None, transfer_syntax: str) -> Dataset | None:
    if payload is None or not payload.size:
        return None
    syntax = UID(transfer_syntax)
    try:
        return decode(BytesIO(payload.read()), syntax.is_implicit_VR, syntax.is_little_endian, syntax.is_deflated)
    except Exception as error:  # the codec fails in as many ways as there are malformed datasets
        raise ProtocolError("The peer sent a dataset that cannot be read.") from error
