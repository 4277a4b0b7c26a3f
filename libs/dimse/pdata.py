"""Reads the bytes of an association we accepted: PDUs (PS3.8 9.3) and, from P-DATA, whole DIMSE messages."""

from __future__ import annotations

from dataclasses import dataclass, field

from libs.dimse import wire
from libs.dimse.model import Payload, ProtocolError

LARGEST_CONTROL_PDU = 512 * 1024
"""128 contexts with 60 transfer syntaxes each and a SAML assertion fit; nothing the standard describes is larger."""
LARGEST_IDENTIFIER = 64 << 20
"""Bound of a dataset that is not an instance."""
_SMALL = 1024
"""Shorter pieces are copied together: an object for each would cost more memory than the bytes it holds."""
_HEADER = 6

# Reasons of an A-ABORT by the provider (PS3.8 Table 9-26).
NOT_SPECIFIED, UNRECOGNISED_PDU, UNEXPECTED_PDU = 0, 1, 2
UNEXPECTED_PARAMETER, INVALID_PARAMETER = 5, 6


@dataclass(frozen=True)
class ControlPdu:
    """A PDU other than P-DATA; ``body`` is what follows its six bytes of header."""

    kind: int
    body: bytes


@dataclass
class Message:
    """A whole DIMSE message. ``dataset`` is None when its command says that none follows."""

    context_id: int
    command: dict[int, wire.CommandValue]
    dataset: Payload | None = None

    def number(self, tag: int) -> int | None:
        value = self.command.get(tag)
        return value if isinstance(value, int) else None

    def text(self, tag: int) -> str:
        value = self.command.get(tag)
        return value if isinstance(value, str) else ""


@dataclass(frozen=True)
class Violation:
    """The peer broke the protocol: the last thing a reader gives. ``reason`` is that of the A-ABORT."""

    reason: int
    text: str


Event = ControlPdu | Message | Violation


class _Broken(Exception):
    def __init__(self, reason: int, text: str) -> None:
        super().__init__(text)
        self.violation = Violation(reason, text)


@dataclass
class PduReader:
    """Incremental and bounded: whatever a peer sends, at most one dataset is held, and its pieces can be taken away.

    The pieces of a dataset are views of the bytes that were fed, not copies. ``max_pdu`` is the maximum length we
    advertised, in bytes. A length is checked before any byte of what it announces is awaited.
    """

    max_pdu: int
    context_ids: frozenset[int] = frozenset()
    """The accepted presentation contexts: empty before the association is established, when no P-DATA may come."""
    dataset: Payload | None = None
    """The dataset that is arriving: ``size`` counts all of it, ``pieces`` holds what was not taken yet."""
    _header: bytearray = field(default_factory=bytearray)
    _control: bytearray | None = None
    _control_kind: int = 0
    _control_left: int = 0
    _pdu_left: int = 0
    _fragment_left: int = 0
    _fragment_is_last: bool = False
    _in_fragment: bool = False
    _context_id: int = 0
    _command: bytearray = field(default_factory=bytearray)
    _message: Message | None = None
    _broken: bool = False

    @property
    def is_idle(self) -> bool:
        """Whether the last byte fed ended a PDU and a message."""
        return not (
            self._header or self._control is not None or self._pdu_left or self._command or self._message is not None
        )

    def take_pieces(self) -> list[bytes | bytearray | memoryview]:
        """The pieces of the arriving dataset that were not taken before."""
        if self.dataset is None:
            return []
        pieces, self.dataset.pieces = self.dataset.pieces, []
        return pieces

    def feed(self, data: bytes) -> list[Event]:
        """The next bytes of the stream, in any split, and what they complete. Bytes after a Violation are ignored."""
        events: list[Event] = []
        if not self._broken:
            try:
                self._feed(memoryview(data), events)
            except _Broken as error:
                self._broken = True
                self.dataset = None
                events.append(error.violation)
        return events

    def _feed(self, view: memoryview, events: list[Event]) -> None:
        position, end = 0, len(view)
        while position < end:
            if self._in_fragment:
                taken = min(self._fragment_left, end - position)
                self._take(view[position : position + taken])
                position += taken
                self._fragment_left -= taken
                if not self._fragment_left:
                    self._end_fragment(events)
            elif self._control is not None:
                taken = min(self._control_left, end - position)
                self._control += view[position : position + taken]
                position += taken
                self._control_left -= taken
                if not self._control_left:
                    self._end_control(events)
            else:
                taken = min(_HEADER - len(self._header), end - position)
                self._header += view[position : position + taken]
                position += taken
                if len(self._header) == _HEADER:
                    header = bytes(self._header)
                    self._header.clear()
                    if self._pdu_left:
                        self._begin_fragment(header, events)
                    else:
                        self._begin_pdu(header, events)

    def _begin_pdu(self, header: bytes, events: list[Event]) -> None:
        kind, length = header[0], int.from_bytes(header[2:], "big")
        if kind == wire.P_DATA:
            if not self.context_ids:
                raise _Broken(UNEXPECTED_PDU, "P-DATA on no association")
            if length > self.max_pdu:
                raise _Broken(INVALID_PARAMETER, f"a P-DATA PDU of {length} bytes, longer than the maximum we named")
            if length < _HEADER:
                raise _Broken(INVALID_PARAMETER, "a P-DATA PDU without a fragment")
            self._pdu_left = length
            return
        if not wire.ASSOCIATE_RQ <= kind <= wire.ABORT:
            raise _Broken(UNRECOGNISED_PDU, f"a PDU of the unknown type {kind}")
        # The four PDUs without items have one length only.
        largest = LARGEST_CONTROL_PDU if kind in (wire.ASSOCIATE_RQ, wire.ASSOCIATE_AC) else 4
        if length > largest or length < 4:
            raise _Broken(INVALID_PARAMETER, f"a PDU of type {kind} with a length of {length} bytes")
        self._control, self._control_kind, self._control_left = bytearray(), kind, length

    def _end_control(self, events: list[Event]) -> None:
        body, self._control = self._control, None
        events.append(ControlPdu(self._control_kind, bytes(body or b"")))

    def _begin_fragment(self, header: bytes, events: list[Event]) -> None:
        length, context_id, control = int.from_bytes(header[:4], "big") - 2, header[4], header[5]
        self._pdu_left -= _HEADER
        if length < 0 or length > self._pdu_left or 0 < self._pdu_left - length < _HEADER:
            raise _Broken(INVALID_PARAMETER, "a fragment that does not fit in its PDU")
        self._pdu_left -= length
        if context_id not in self.context_ids:
            raise _Broken(INVALID_PARAMETER, "a presentation context that was not accepted")
        is_command, is_last = bool(control & 1), bool(control & 2)
        if not length and not is_last:
            raise _Broken(INVALID_PARAMETER, "an empty fragment")
        if is_command == (self._message is not None):
            raise _Broken(UNEXPECTED_PARAMETER, "a fragment that does not belong to the message before it")
        if (self._command or self._message is not None) and context_id != self._context_id:
            raise _Broken(UNEXPECTED_PARAMETER, "the fragments of two messages mixed")
        if is_command and len(self._command) + length > wire.LARGEST_COMMAND:
            raise _Broken(INVALID_PARAMETER, "a command set longer than any in the standard")
        self._context_id = context_id
        self._fragment_left, self._fragment_is_last, self._in_fragment = length, is_last, True
        if not length:
            self._end_fragment(events)

    def _take(self, piece: memoryview) -> None:
        dataset = self.dataset
        if dataset is None:
            self._command += piece
            return
        dataset.size += len(piece)
        if len(piece) >= _SMALL:
            dataset.pieces.append(piece)
        elif dataset.pieces and isinstance(dataset.pieces[-1], bytearray):
            dataset.pieces[-1] += piece
        else:
            dataset.pieces.append(bytearray(piece))

    def _end_fragment(self, events: list[Event]) -> None:
        self._in_fragment = False
        message = self._message
        if message is not None:
            size = self.dataset.size if self.dataset is not None else 0
            # Checked per fragment: a fragment is no longer than the PDU we allowed.
            if size > LARGEST_IDENTIFIER and message.number(wire.COMMAND_FIELD) != wire.C_STORE:
                raise _Broken(NOT_SPECIFIED, "an identifier that is far too long")
            if self._fragment_is_last:
                self._message = self.dataset = None
                events.append(message)
            return
        if not self._fragment_is_last:
            return
        try:
            message = Message(self._context_id, wire.decode_command(self._command))
        except ProtocolError as error:
            raise _Broken(INVALID_PARAMETER, str(error)) from error
        self._command = bytearray()
        if wire.has_dataset(message.command):
            self._message = message
            self.dataset = message.dataset = Payload(0)
        else:
            events.append(message)
