"""One accepted association: its state machine (PS3.8 9.2), timers, back-pressure, and the messages on it."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import structlog

from libs.dimse import wire
from libs.dimse.model import Caller, CallerPolicy, ProtocolError, Rejection, Scp
from libs.dimse.negotiation import AcceptedContext, negotiate, read_proposal
from libs.dimse.pdata import (
    INVALID_PARAMETER,
    NOT_SPECIFIED,
    UNEXPECTED_PDU,
    ControlPdu,
    Message,
    PduReader,
    Violation,
)
from libs.dimse.services import Dispatcher
from libs.dimse.spool import Budget, Spool, discard

log = structlog.get_logger()
_WAITING_MESSAGES = 8
_PARTS_PER_WRITE = 256
_LOCAL_LIMIT = Rejection(2, 3, 2, "local limit exceeded")


@dataclass
class Terms:
    """What all associations of one acceptor share."""

    scps: Sequence[Scp]
    ae_title: str
    policy: CallerPolicy | None
    max_associations: int
    max_pdu: int
    spool_threshold: int
    spool_dir: Path | None
    artim: float
    idle_timeout: float
    dimse_timeout: float
    budget: Budget
    associations: set[AcceptedAssociation] = field(default_factory=set)
    stopping: bool = False


class AcceptedAssociation(asyncio.Protocol):
    """The acceptor's side of one connection. Everything a peer does wrong ends here and nowhere else."""

    def __init__(self, terms: Terms) -> None:
        self.terms = terms
        self.contexts: Mapping[int, AcceptedContext] = {}
        self.extended: Mapping[str, bytes] = {}
        self.caller: Caller
        self.peer_max_pdu = 0
        self.closed = asyncio.Event()
        self.busy = False
        self._reader = PduReader(terms.max_pdu)
        self._spool = Spool(terms.budget, terms.spool_threshold, terms.spool_dir)
        self._queue: deque[Message] = deque()
        self._wake = asyncio.Event()
        self._writable = asyncio.Event()
        self._writable.set()
        self._transport: asyncio.Transport
        self._worker: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._established = False
        self._requested = False
        self._ending = False
        self._paused = False
        self._release_asked = False
        self._last_heard = 0.0
        self._dispatcher = Dispatcher(self)
        self._loop = asyncio.get_running_loop()

    # --- connection -------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self.terms.associations.add(self)
        self._timer = self._loop.call_later(self.terms.artim, self._artim_expired)

    def connection_lost(self, exc: Exception | None) -> None:
        self.terms.associations.discard(self)
        self._ending = True
        if self._timer is not None:
            self._timer.cancel()
        self._dispatcher.connection_lost()
        self._writable.set()
        self._wake.set()
        if self._worker is not None and not self.busy:
            self._worker.cancel()
        self._spool.drop(self._reader.dataset)
        for message in self._queue:
            discard(message.dataset)
        self._queue.clear()
        self.closed.set()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def _artim_expired(self) -> None:
        """ARTIM (PS3.8 9.1.5): nobody asked for an association in time, or the peer does not close."""
        self._transport.abort()

    def _watch_idle(self) -> None:
        """Abort an association on which nothing happened for the idle time; being busy is not being idle."""
        quiet = self._loop.time() - self._last_heard
        if not self.busy and quiet >= self.terms.idle_timeout:
            log.info("association.idle", association=self.caller.association_id)
            self.abort(0, 0)
            return
        wait = max(0.05, self.terms.idle_timeout - (0 if self.busy else quiet))
        self._timer = self._loop.call_later(wait, self._watch_idle)

    # --- receiving --------------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        self._last_heard = self._loop.time()
        if self._ending:
            return
        try:
            for event in self._reader.feed(data):
                if isinstance(event, Message):
                    self._spool.finish(event.dataset)
                    self._message(event)
                elif isinstance(event, ControlPdu):
                    self._control(event)
                else:
                    self._violation(event)
                if self._ending:
                    return
            if self._reader.dataset is not None:
                self._spool.grow(self._reader.dataset, self._reader.take_pieces)
        except OSError as error:
            log.error("association.spool_failed", reason=error.strerror)
            self.abort(2, NOT_SPECIFIED)

    def _violation(self, violation: Violation) -> None:
        self._protocol_error(violation.text, violation.reason)

    def _control(self, pdu: ControlPdu) -> None:
        if pdu.kind == wire.ABORT:
            log.info("association.aborted", association=self._name(), reason=wire.abort_reason(pdu.body))
            self._ending = True
            self._transport.close()
        elif pdu.kind == wire.ASSOCIATE_RQ and not self._requested:
            self._requested = True
            self._transport.pause_reading()
            self._worker = self._loop.create_task(self._begin(pdu))
        elif pdu.kind == wire.RELEASE_RQ and self._established:
            self._release_asked = True
            self._wake.set()
        elif pdu.kind == wire.RELEASE_RP and self._established:
            self._ending = True  # the answer to our own A-RELEASE-RQ, or a collision that the peer resolved
            self._transport.close()
        else:
            self._protocol_error(f"PDU type {pdu.kind} has no place here", UNEXPECTED_PDU)

    def _message(self, message: Message) -> None:
        if self._dispatcher.interrupt(message):
            self._spool.release()
            return
        self._queue.append(message)
        self._wake.set()
        # A request is answered before the next is read (we agreed on one operation at a time); what a peer sends
        # ahead stays in its own memory. Queries keep reading: a C-CANCEL has to be heard.
        if message.number(wire.COMMAND_FIELD) == wire.C_STORE or len(self._queue) >= _WAITING_MESSAGES:
            self._pause()

    def _pause(self) -> None:
        if not self._paused and not self._transport.is_closing():
            self._paused = True
            self._transport.pause_reading()

    def _resume(self) -> None:
        if self._paused and not self._transport.is_closing():
            self._paused = False
            self._transport.resume_reading()

    def _protocol_error(self, reason: str, code: int) -> None:
        log.warning("association.protocol_error", association=self._name(), reason=reason)
        self.abort(2, code)

    def _name(self) -> str:
        return self.caller.association_id if hasattr(self, "caller") else ""

    # --- establishing -----------------------------------------------------------------------------------------

    async def _begin(self, pdu: ControlPdu) -> None:
        try:
            agreed = await self._negotiate(pdu)
        except ProtocolError as error:
            self._protocol_error(str(error), INVALID_PARAMETER)
            return
        except Exception:
            log.exception("association.negotiation_failed")
            self.abort(2, 0)
            return
        if agreed and not self._transport.is_closing():
            self._established = True
            if self._timer is not None:
                self._timer.cancel()
            self._last_heard = self._loop.time()
            self._timer = self._loop.call_later(self.terms.idle_timeout, self._watch_idle)
            self._transport.resume_reading()
            await self._serve()

    async def _negotiate(self, pdu: ControlPdu) -> bool:
        raw = wire.pdu_header(pdu.kind, len(pdu.body)) + pdu.body
        primitive = wire.parse_associate_rq(raw)
        proposal = read_proposal(primitive)
        peer = self._transport.get_extra_info("peername") or ("", 0)
        certificate = self._transport.get_extra_info("peercert") or {}
        self.caller = Caller(
            association_id=uuid.uuid4().hex,
            calling_ae_title=str(primitive.calling_ae_title).strip(),
            called_ae_title=str(primitive.called_ae_title).strip(),
            host=str(peer[0]),
            port=int(peer[1]),
            tls_subject=_subject(certificate),
            user_identity=proposal.user_identity,
            implementation_class_uid=proposal.implementation_class_uid,
            implementation_version_name=proposal.implementation_version_name,
        )
        if self.terms.stopping or len(self.terms.associations) > self.terms.max_associations:
            return self._reject(_LOCAL_LIMIT)
        if str(primitive.application_context_name) != wire.APPLICATION_CONTEXT_NAME:
            return self._reject(Rejection(1, 1, 2, "application context name not supported"))
        if self.terms.policy is not None:
            refusal = await self.terms.policy(self.caller)
            if refusal is not None:
                return self._reject(refusal)
        agreement = negotiate(primitive, proposal, self.terms.scps, self.terms.max_pdu)
        self.contexts, self.extended = agreement.contexts, agreement.extended
        self._reader.context_ids = frozenset(self.contexts)
        self.peer_max_pdu = proposal.max_pdu
        self._transport.write(agreement.accept_pdu)
        log.debug(
            "association.accepted",
            association=self.caller.association_id,
            calling=self.caller.calling_ae_title,
            called=self.caller.called_ae_title,
            contexts=len(self.contexts),
        )
        return True

    def _reject(self, rejection: Rejection) -> bool:
        log.warning(
            "association.rejected",
            calling=self.caller.calling_ae_title,
            called=self.caller.called_ae_title,
            host=self.caller.host,
            reason=rejection.text or f"{rejection.source}/{rejection.reason}",
        )
        self._ending = True
        self._transport.write(wire.reject_pdu(rejection))
        self._transport.resume_reading()
        self._close_soon()
        return False

    # --- serving ----------------------------------------------------------------------------------------------

    async def _serve(self) -> None:
        with structlog.contextvars.bound_contextvars(association=self.caller.association_id):
            while not self._transport.is_closing():
                if not self._queue:
                    if self._release_asked or self.terms.stopping:
                        self._finish()
                        return
                    self._wake.clear()
                    await self._wake.wait()
                    continue
                message = self._queue.popleft()
                self.busy = True
                try:
                    await self._dispatcher.answer(message)
                except ProtocolError as error:
                    self._protocol_error(str(error), INVALID_PARAMETER)
                except ConnectionError:
                    return
                except Exception:
                    log.exception("association.failed")
                    self.abort(2, 0)
                finally:
                    self.busy = False
                    self._last_heard = self._loop.time()
                    discard(message.dataset)
                    self._spool.release()
                if not self._queue:
                    self._resume()

    def _finish(self) -> None:
        """Answer an A-RELEASE-RQ, or end an association of an acceptor that stops."""
        self._ending = True
        if self._release_asked:
            self._transport.write(wire.RELEASE_RP_PDU)
            self._close_soon()
        else:
            self.abort(0, 0)

    def wake(self) -> None:
        """Look again at whether there is something to do (the acceptor stops)."""
        self._wake.set()

    def _close_soon(self) -> None:
        """The requestor closes after a release or a rejection; when it does not, ARTIM does (PS3.8 9.2)."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(min(self.terms.artim, 2.0), self._transport.close)
        if self._paused:
            self._resume()

    def abort(self, source: int, reason: int) -> None:
        """A-ABORT and the end of the connection, whatever the peer reads."""
        self._ending = True
        if not self._transport.is_closing():
            self._transport.write(wire.abort_pdu(source, reason))
            self._transport.close()
            self._loop.call_later(2.0, self._transport.abort)
        self._wake.set()

    # --- sending ----------------------------------------------------------------------------------------------

    async def write(self, parts: Iterable[wire.Bytes]) -> None:
        """Write, and wait while the peer takes it slower than we give it. Raises ConnectionError, TimeoutError."""
        iterator = iter(parts)
        while block := list(islice(iterator, _PARTS_PER_WRITE)):
            if self._transport.is_closing():
                raise ConnectionResetError("the peer is gone")
            self._transport.writelines(block)
            if not self._writable.is_set():
                try:
                    async with asyncio.timeout(self.terms.dimse_timeout):
                        await self._writable.wait()
                except TimeoutError as error:
                    log.warning("association.peer_reads_nothing")
                    self._transport.abort()
                    raise ConnectionResetError("the peer takes no data") from error

    async def send(
        self, context_id: int, command: dict[int, wire.CommandValue], dataset: Sequence[wire.Bytes] | None = None
    ) -> None:
        await self.write(wire.fragment_message(context_id, wire.encode_command(command), dataset, self.peer_max_pdu))

    async def until_closed(self) -> None:
        await self.closed.wait()


def _subject(certificate: dict[str, Any]) -> str:
    """The subject of a client certificate as ``CN=...,O=...``."""
    parts = []
    with contextlib.suppress(TypeError, ValueError):
        for rdn in certificate.get("subject", ()):
            parts += [f"{name}={value}" for name, value in rdn]
    return ",".join(parts)
