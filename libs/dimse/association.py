"""One association that a peer requested: its states (PS3.8 9.2), timers, back-pressure and the messages on it."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import socket
import uuid
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import cast

import structlog
from pynetdicom.pdu_primitives import A_ASSOCIATE

from libs.dimse import pdata, wire
from libs.dimse.model import Caller, CallerPolicy, DimseError, ProtocolError, Rejection, Scp, TimedOut
from libs.dimse.negotiation import AcceptedContext, Agreement, Proposal, negotiate, read_proposal
from libs.dimse.pdata import ControlPdu, Event, Message, PduReader, Violation
from libs.dimse.responder import Responder
from libs.dimse.spool import Spool

log = structlog.get_logger()

_PARTS_PER_WRITE = 128
_WRITE_BUFFER = 1 << 20
_QUEUED_MESSAGES = 8
_QUEUED_BYTES = 4 << 20
"""What may wait behind a message in hand: a window of one operation was negotiated, so it is a peer in error."""
_SPOOL_STEP = 1 << 20
_RELEASE_GRACE = 3.0

_LOCAL_LIMIT = Rejection(2, 3, 2, "local limit exceeded")
_CONGESTION = Rejection(2, 3, 1, "temporary congestion")
_APPLICATION_CONTEXT = Rejection(1, 1, 2, "application context name not supported")
_PROTOCOL_VERSION = Rejection(1, 2, 2, "protocol version not supported")


@dataclass(frozen=True)
class Terms:
    """What all associations of an acceptor share and never change; times in seconds, sizes in bytes."""

    scps: Sequence[Scp]
    policy: CallerPolicy | None
    max_associations: int
    max_pdu: int
    spool_threshold: int
    spool_dir: Path | None
    memory_limit: int
    artim: float
    idle_timeout: float
    dimse_timeout: float


@dataclass
class Room:
    """What the associations of an acceptor occupy together."""

    connections: set[Association] = field(default_factory=set)
    established: int = 0
    held: int = 0
    """Bytes of datasets in memory, of all associations."""
    draining: bool = False


class _State(enum.Enum):
    AWAITING_REQUEST = enum.auto()
    NEGOTIATING = enum.auto()
    OPEN = enum.auto()
    RELEASING = enum.auto()
    COLLIDED = enum.auto()
    AWAITING_CLOSE = enum.auto()
    CLOSED = enum.auto()


class Association(asyncio.Protocol):
    """Lives from the TCP connection to its end. A fault of the peer ends this association and nothing else."""

    def __init__(self, terms: Terms, room: Room) -> None:
        self.association_id = uuid.uuid4().hex
        self.caller: Caller | None = None
        self.contexts: Mapping[int, AcceptedContext] = {}
        self.extended: Mapping[str, bytes] = {}
        self.ended = asyncio.Event()
        self._terms = terms
        self._room = room
        self._state = _State.AWAITING_REQUEST
        self._reader = PduReader(terms.max_pdu)
        self._transport: asyncio.Transport | None = None
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._last_activity = self._since = self._loop.time()
        self._peer_max_pdu = 0
        self._queue: deque[tuple[Message, Spool | None]] = deque()
        self._queued_bytes = 0
        self._in_hand_bytes = 0
        self._held = 0
        self._busy = False
        self._work_arrived = asyncio.Event()
        self._worker: asyncio.Task[None] | None = None
        self._negotiation: asyncio.Task[None] | None = None
        self._spool: Spool | None = None
        self._spooled = 0
        self._spooling: asyncio.Task[None] | None = None
        self._reading_paused = False
        self._sending = asyncio.Lock()
        self._writable: asyncio.Future[None] | None = None
        self._write_paused = False
        self._query: tuple[int, asyncio.Event] | None = None
        self._awaited: tuple[int, asyncio.Future[Message]] | None = None
        self._release_requested = False
        self._counted = False

    # -- asyncio.Protocol --

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports do not inherit from asyncio's.
        transport = self._transport = cast(asyncio.Transport, transport)
        self._room.connections.add(self)
        transport.set_write_buffer_limits(high=_WRITE_BUFFER)
        if self._room.draining or len(self._room.connections) > 2 * self._terms.max_associations + 64:
            transport.abort()
            return
        connection = transport.get_extra_info("socket")
        with contextlib.suppress(OSError):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._watch()

    def data_received(self, data: bytes) -> None:
        if self._state in (_State.AWAITING_CLOSE, _State.CLOSED):
            return
        self._last_activity = self._loop.time()
        events = self._reader.feed(data)
        for event in events:
            if self._state in (_State.AWAITING_CLOSE, _State.CLOSED):
                return
            self._handle(event)
        self._account()
        self._control_reading()

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        if self._state in (_State.OPEN, _State.NEGOTIATING, _State.RELEASING, _State.COLLIDED):
            self._log("association.lost", warning=True)
        self._leave(_State.CLOSED)
        self._room.connections.discard(self)
        if self._timer is not None:
            self._timer.cancel()
        if self._worker is None:
            self.ended.set()

    def pause_writing(self) -> None:
        self._write_paused = True

    def resume_writing(self) -> None:
        self._write_paused = False
        if self._writable is not None and not self._writable.done():
            self._writable.set_result(None)

    # -- what the responder uses --

    @property
    def is_open(self) -> bool:
        return self._state in (_State.OPEN, _State.RELEASING)

    @property
    def dimse_timeout(self) -> float:
        return self._terms.dimse_timeout

    async def send(self, context_id: int, command: bytes, dataset: Sequence[wire.Bytes] | None = None) -> None:
        """Send a message with back-pressure. Raises ProtocolError when the association is over, TimedOut."""
        async with self._sending:
            await self._write(wire.fragment_message(context_id, command, dataset, self._peer_max_pdu))

    async def send_stream(self, context_id: int, command: bytes, dataset: AsyncIterator[bytes]) -> None:
        """Send a message whose dataset comes in pieces. What ``dataset`` raises passes through.

        When part of the message had been sent by then the association is aborted: it cannot be taken back.
        """
        async with self._sending:
            begun = False
            try:
                async for block in wire.fragment_stream(context_id, command, dataset, self._peer_max_pdu):
                    begun = True
                    await self._write(block)
            except DimseError:
                raise
            except BaseException:
                if begun:
                    self.abort("an instance could not be read to its end")
                raise

    @contextlib.contextmanager
    def cancellable(self, message_id: int) -> Iterator[asyncio.Event]:
        """The event that a C-CANCEL-RQ for the message sets, or the end of the association."""
        event = asyncio.Event()
        self._query = (message_id, event)
        if not self.is_open:
            event.set()
        try:
            yield event
        finally:
            self._query = None

    @contextlib.contextmanager
    def expecting(self, message_id: int) -> Iterator[asyncio.Future[Message]]:
        """The response to a request of ours. The future fails with ProtocolError when the association ends."""
        future: asyncio.Future[Message] = self._loop.create_future()
        if not self.is_open:
            raise ProtocolError("The association is over.")
        self._awaited = (message_id, future)
        try:
            yield future
        finally:
            self._awaited = None
            if not future.done():
                future.cancel()
            elif not future.cancelled():
                future.exception()  # seen, whether or not anybody waited for it

    def abort(self, text: str, *, source: int = 0, reason: int = 0) -> None:
        """A-ABORT (PS3.8 9.3.8), then wait for the peer to close so that it can read why."""
        if self._state in (_State.AWAITING_CLOSE, _State.CLOSED) or self._transport is None:
            return
        self._log("association.aborted", warning=True, reason=text)
        self._leave(_State.AWAITING_CLOSE)
        stuck = self._transport.get_write_buffer_size() > 0
        self._transport.write(wire.abort_pdu(source, reason))
        if stuck:
            # A peer that does not read what we sent will not read this either.
            self._transport.abort()
            return
        self._resume_reading()
        with contextlib.suppress(OSError, NotImplementedError, RuntimeError):
            if self._transport.can_write_eof():
                self._transport.write_eof()
        self._watch()

    # -- what the acceptor uses --

    def drain(self) -> None:
        """End when what is in hand is done: release, or close where there is no association yet."""
        if self._transport is None:
            return
        if self._state is _State.AWAITING_REQUEST:
            self._transport.close()
        elif self._state is _State.OPEN and not self._busy and not self._queue and self._reader.is_idle:
            self._state = _State.RELEASING
            self._transport.write(wire.RELEASE_RQ_PDU)
            self._loop.call_later(_RELEASE_GRACE, self.abort, "the peer did not answer our release")

    async def end(self) -> None:
        """Abort and cancel what is in hand."""
        self.abort("the archive stops")
        for task in (self._negotiation, self._worker, self._spooling):
            if task is not None:
                task.cancel()
        if self._transport is not None:
            self._transport.abort()
        await self.ended.wait()

    # -- events --

    def _handle(self, event: Event) -> None:
        if isinstance(event, Message):
            self._on_message(event)
        elif isinstance(event, Violation):
            self.abort(f"the peer sent {event.text}", source=2, reason=event.reason)
        else:
            self._on_pdu(event)

    def _on_pdu(self, pdu: ControlPdu) -> None:
        assert self._transport is not None
        if pdu.kind == wire.ABORT:
            self._log("association.aborted", warning=True, reason=f"the peer aborted {wire.abort_reason(pdu.body)}")
            self._leave(_State.AWAITING_CLOSE)
            self._transport.close()
        elif pdu.kind == wire.ASSOCIATE_RQ and self._state is _State.AWAITING_REQUEST:
            self._state = _State.NEGOTIATING
            self._negotiation = self._loop.create_task(self._negotiate(pdu.body))
        elif pdu.kind == wire.RELEASE_RQ and self._state is _State.OPEN:
            self._release_requested = True
            if self._query is not None:
                self._query[1].set()
            if not self._busy and not self._queue:
                self._answer_release()
        elif pdu.kind == wire.RELEASE_RQ and self._state is _State.RELEASING:
            # Release collision (PS3.8 9.2.3, AR-8): the acceptor waits for the requestor's answer first.
            self._state = _State.COLLIDED
        elif pdu.kind == wire.RELEASE_RP and self._state is _State.RELEASING:
            self._log("association.released")
            self._leave(_State.AWAITING_CLOSE)
            self._transport.close()
        elif pdu.kind == wire.RELEASE_RP and self._state is _State.COLLIDED:
            self._answer_release()
        else:
            self.abort(f"a PDU of type {pdu.kind} had no place here", source=2, reason=pdata.UNEXPECTED_PDU)

    def _answer_release(self) -> None:
        assert self._transport is not None
        self._transport.write(wire.RELEASE_RP_PDU)
        self._log("association.released")
        self._leave(_State.AWAITING_CLOSE)
        self._watch()

    def _on_message(self, message: Message) -> None:
        spool, self._spool, self._spooled = self._spool, None, 0
        command = message.number(wire.COMMAND_FIELD) or 0
        if command == wire.C_CANCEL:
            if self._query is not None and self._query[0] == message.number(wire.MESSAGE_ID_RESPONDED_TO):
                self._query[1].set()
        elif command & wire.RESPONSE:
            awaited = self._awaited
            if awaited is None or awaited[0] != message.number(wire.MESSAGE_ID_RESPONDED_TO) or awaited[1].done():
                self.abort("a response to no request", source=2, reason=pdata.UNEXPECTED_PDU)
            else:
                awaited[1].set_result(message)
        else:
            self._queue.append((message, spool))
            self._queued_bytes += _in_memory(message)
            self._work_arrived.set()
            return
        if spool is not None:
            spool.discard()

    # -- negotiation --

    async def _negotiate(self, body: bytes) -> None:
        try:
            try:
                request = wire.parse_associate_rq(wire.pdu_header(wire.ASSOCIATE_RQ, len(body)) + body)
                proposal = read_proposal(request)
            except ProtocolError as error:
                self.abort(str(error), source=2, reason=pdata.INVALID_PARAMETER)
                return
            self.caller = self._identify(request, proposal)
            rejection = await self._judge(body, request, self.caller)
            if self._state is not _State.NEGOTIATING:
                return
            if rejection is not None:
                self._reject(rejection)
                return
            agreement = negotiate(request, proposal, self._terms.scps, self._terms.max_pdu)
        except Exception:
            log.exception("association.failed", association_id=self.association_id)
            self.abort("an A-ASSOCIATE-RQ could not be answered", source=2, reason=pdata.INVALID_PARAMETER)
            return
        self._establish(proposal, agreement)

    async def _judge(self, body: bytes, request: A_ASSOCIATE, caller: Caller) -> Rejection | None:
        if not int.from_bytes(body[:2], "big") & 1:
            return _PROTOCOL_VERSION
        if str(request.application_context_name) != wire.APPLICATION_CONTEXT_NAME:
            return _APPLICATION_CONTEXT
        if self._room.draining:
            return _CONGESTION
        if self._room.established >= self._terms.max_associations:
            return _LOCAL_LIMIT
        # Counted before the policy is asked: many at once would all pass the limit otherwise.
        self._counted = True
        self._room.established += 1
        if self._terms.policy is None:
            return None
        try:
            return await self._terms.policy(caller)
        except Exception:
            log.exception("association.policy_failed", association_id=self.association_id)
            return _CONGESTION

    def _identify(self, request: A_ASSOCIATE, proposal: Proposal) -> Caller:
        assert self._transport is not None
        peer = self._transport.get_extra_info("peername") or ("", 0)
        certificate = self._transport.get_extra_info("peercert") or {}
        subject = ",".join(f"{name}={value}" for part in certificate.get("subject", ()) for name, value in part)
        return Caller(
            association_id=self.association_id,
            calling_ae_title=str(request.calling_ae_title or "").strip(),
            called_ae_title=str(request.called_ae_title or "").strip(),
            host=str(peer[0]),
            port=int(peer[1]),
            tls_subject=subject,
            user_identity=proposal.user_identity,
            implementation_class_uid=proposal.implementation_class_uid,
            implementation_version_name=proposal.implementation_version_name,
        )

    def _reject(self, rejection: Rejection) -> None:
        assert self._transport is not None
        self._log("association.rejected", warning=True, reason=rejection.text, result=rejection.result)
        self._transport.write(wire.reject_pdu(rejection))
        self._leave(_State.AWAITING_CLOSE)
        self._watch()

    def _establish(self, proposal: Proposal, agreement: Agreement) -> None:
        assert self._transport is not None and self.caller is not None
        self.contexts, self.extended = agreement.contexts, agreement.extended
        self._peer_max_pdu = proposal.max_pdu
        self._reader.context_ids = frozenset(agreement.contexts)
        self._state = _State.OPEN
        self._last_activity = self._loop.time()
        self._worker = self._loop.create_task(self._work(Responder(self, self.caller)))
        self._transport.write(agreement.accept_pdu)
        self._log("association.accepted", contexts=len(agreement.contexts))
        self._watch()
        if self._room.draining:
            self.drain()

    # -- work --

    async def _work(self, responder: Responder) -> None:
        structlog.contextvars.bind_contextvars(correlation_id=self.association_id)
        try:
            while True:
                while not self._queue:
                    if not self.is_open:
                        return
                    self._work_arrived.clear()
                    await self._work_arrived.wait()
                message, spool = self._queue.popleft()
                await self._answer(responder, message, spool)
                self._after_work()
        finally:
            self._account()
            if self._state is _State.CLOSED:
                self.ended.set()
            self._worker = None

    async def _answer(self, responder: Responder, message: Message, spool: Spool | None) -> None:
        self._busy = True
        self._in_hand_bytes = _in_memory(message)
        self._queued_bytes -= self._in_hand_bytes
        try:
            await responder.answer(message, spool)
        except TimedOut as error:
            self.abort(str(error))
        except ProtocolError as error:
            self.abort(str(error), source=2)
        except Exception:
            log.exception("association.failed", association_id=self.association_id)
            self.abort("a request could not be answered")
        finally:
            if spool is not None:
                spool.discard()
            self._busy = False
            self._in_hand_bytes = 0

    def _after_work(self) -> None:
        self._last_activity = self._loop.time()
        self._account()
        if self._state is _State.OPEN and not self._queue:
            if self._release_requested:
                self._answer_release()
                return
            if self._room.draining:
                self.drain()
        self._control_reading()

    # -- writing --

    async def _write(self, parts: Iterable[wire.Bytes]) -> None:
        iterator = iter(parts)
        while block := list(islice(iterator, _PARTS_PER_WRITE)):
            if not self.is_open or self._transport is None or self._transport.is_closing():
                raise ProtocolError("The association is over.")
            self._transport.writelines(block)
            if self._write_paused:
                await self._drain()

    async def _drain(self) -> None:
        while self._write_paused and self.is_open:
            self._writable = self._loop.create_future()
            try:
                async with asyncio.timeout(self._terms.dimse_timeout):
                    await self._writable
            except TimeoutError as error:
                raise TimedOut(f"The peer took no data for {self._terms.dimse_timeout:g} s.") from error
            finally:
                self._writable = None

    # -- reading, memory and time --

    def _account(self) -> None:
        arriving = self._reader.dataset
        held = self._queued_bytes + self._in_hand_bytes
        if arriving is not None:
            held += arriving.size - self._spooled
        self._room.held += held - self._held
        self._held = held

    def _control_reading(self) -> None:
        """Pause while more waits than may; resume when it does not."""
        if self._state not in (_State.OPEN, _State.RELEASING):
            return
        arriving = self._reader.dataset
        arrived = arriving.size - self._spooled if arriving is not None else 0
        crowded = self._room.held > self._terms.memory_limit
        if self._spooling is None and arrived > (
            min(_SPOOL_STEP, self._terms.spool_threshold) if crowded or self._spooled else self._terms.spool_threshold
        ):
            self._spooling = self._loop.create_task(self._spool_arrived())
        waiting = self._busy and (len(self._queue) >= _QUEUED_MESSAGES or self._queued_bytes + arrived > _QUEUED_BYTES)
        if waiting and self._query is not None:
            # Pausing here could wait for ever: the responses to a C-GET's sub-operations come on the same stream.
            self.abort("more requests than the one operation at a time that was negotiated")
        elif waiting or self._spooling is not None:
            self._pause_reading()
        else:
            self._resume_reading()

    async def _spool_arrived(self) -> None:
        try:
            if self._spool is None:
                self._spool = Spool(self._terms.spool_dir)
            pieces = self._reader.take_pieces()
            taken = sum(map(len, pieces))
            spool = self._spool
            await spool.add(pieces)
            if self._spool is spool:
                self._spooled += taken
        finally:
            self._spooling = None
            self._account()
            self._control_reading()

    def _pause_reading(self) -> None:
        if not self._reading_paused and self._transport is not None and not self._transport.is_closing():
            self._reading_paused = True
            self._transport.pause_reading()

    def _resume_reading(self) -> None:
        if self._reading_paused and self._transport is not None:
            self._reading_paused = False
            self._last_activity = self._loop.time()
            if not self._transport.is_closing():
                self._transport.resume_reading()

    def _watch(self) -> None:
        """Look at the time limits of the state, and come back when the next one may have passed."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._state is _State.CLOSED or self._transport is None:
            return
        now = self._loop.time()
        terms = self._terms
        if self._state in (_State.AWAITING_REQUEST, _State.AWAITING_CLOSE):
            left = self._since + terms.artim - now
            if left <= 0:
                self._transport.abort()
                return
        elif self._state is not _State.OPEN or self._busy or self._queue or self._reading_paused:
            left = min(terms.dimse_timeout, terms.idle_timeout)
        else:
            limit = terms.idle_timeout if self._reader.is_idle else terms.dimse_timeout
            left = self._last_activity + limit - now
            if left <= 0:
                self.abort(f"the peer sent nothing for {limit:g} s")
                return
        # A message may begin, with its shorter limit, while we sleep.
        self._timer = self._loop.call_later(max(0.01, min(left, terms.dimse_timeout / 4)), self._watch)

    def _leave(self, state: _State) -> None:
        """End the association for all that wait on it; the connection may live on for a moment."""
        self._state = state
        self._since = self._loop.time()
        if self._counted:
            self._counted = False
            self._room.established -= 1
        if self._query is not None:
            self._query[1].set()
        if self._awaited is not None and not self._awaited[1].done():
            self._awaited[1].set_exception(ProtocolError("The association ended in the middle."))
        if self._writable is not None and not self._writable.done():
            self._writable.set_result(None)
        for _message, spool in self._queue:
            if spool is not None:
                spool.discard()
        self._queue.clear()
        self._queued_bytes = 0
        self._reader = PduReader(self._terms.max_pdu)
        if self._spool is not None:
            self._spool.discard()
        self._spool, self._spooled = None, 0
        self._account()
        self._work_arrived.set()

    def _log(self, event: str, *, warning: bool = False, **facts: object) -> None:
        if self.caller is not None:
            facts["calling_ae_title"] = self.caller.calling_ae_title
            facts["host"] = self.caller.host
        (log.warning if warning else log.info)(event, association_id=self.association_id, **facts)


def _in_memory(message: Message) -> int:
    return sum(map(len, message.dataset.pieces)) if message.dataset is not None else 0
