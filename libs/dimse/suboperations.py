"""The C-STORE sub-operations of a C-GET, sent on the association it came on (PS3.4 C.4.3)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from libs.common.errors import Invalid
from libs.dimse import wire
from libs.dimse.model import OutgoingInstance, Status, TimedOut
from libs.dimse.negotiation import AcceptedContext

if TYPE_CHECKING:
    from libs.dimse.association import Association

NOT_ACCEPTED = 0xA900


class SubOperations:
    """Sends instances one at a time, since a window of one operation was negotiated."""

    def __init__(self, association: Association, priority: int) -> None:
        self._association = association
        self._priority = priority
        self._turn = asyncio.Lock()
        self._message_id = 0

    async def send(self, instance: OutgoingInstance) -> Status:
        """The peer's status, or 0xA900 when it took no context for the instance and nothing was sent.

        Raises ProtocolError and TimedOut when the association is over; errors of ``instance.read`` pass through.
        """
        contexts = [
            context
            for context in self._association.contexts.values()
            if context.sender is not None and context.abstract_syntax == instance.sop_class_uid
        ]
        if not contexts:
            return Status(NOT_ACCEPTED, "The peer does not take this SOP class")
        context = next((c for c in contexts if c.transfer_syntax == instance.transfer_syntax_uid), None)
        if context is not None:
            return await self._send(context, instance, instance.read())
        if instance.convert is None:
            return Status(NOT_ACCEPTED, "The peer does not take this transfer syntax")
        try:
            syntax, data = await instance.convert(tuple(context.transfer_syntax for context in contexts))
        except Invalid as error:
            return Status(NOT_ACCEPTED, f"No conversion for the peer: {error}")
        context = next(c for c in contexts if c.transfer_syntax == syntax)
        return await self._send(context, instance, _whole(data))

    async def _send(self, context: AcceptedContext, instance: OutgoingInstance, data: AsyncIterator[bytes]) -> Status:
        async with self._turn:
            self._message_id = self._message_id % 0xFFFF + 1
            command = wire.encode_command(
                {
                    wire.AFFECTED_SOP_CLASS_UID: instance.sop_class_uid,
                    wire.COMMAND_FIELD: wire.C_STORE,
                    wire.MESSAGE_ID: self._message_id,
                    wire.PRIORITY: self._priority,
                    wire.DATA_SET_TYPE: wire.WITH_DATASET,
                    wire.AFFECTED_SOP_INSTANCE_UID: instance.sop_instance_uid,
                }
            )
            with self._association.expecting(self._message_id) as response:
                await self._association.send_stream(context.context_id, command, data)
                timeout = self._association.dimse_timeout
                try:
                    async with asyncio.timeout(timeout):
                        answer = await response
                except TimeoutError as error:
                    self._association.abort(f"no response to a sub-operation within {timeout:g} s")
                    raise TimedOut(f"The peer did not answer within {timeout:g} s.") from error
        return Status(answer.number(wire.STATUS) or 0, answer.text(wire.ERROR_COMMENT))


async def _whole(data: bytes) -> AsyncIterator[bytes]:
    yield data
