"""What callers and handlers of the DICOM network layer see: requests, answers, and what a service offers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pydicom.dataset import Dataset

from libs.common.errors import SagittalError


class DimseError(SagittalError):
    """A failure on the network between us and a DICOM peer."""


class ConnectionRefused(DimseError):
    """Nothing listens there, or the peer answered A-ASSOCIATE-RJ; the message says which and why."""


class TimedOut(DimseError):
    """The peer did not connect, or did not answer, within the time allowed."""


class ProtocolError(DimseError):
    """The peer broke the protocol, aborted, or closed the connection in the middle."""


@dataclass(frozen=True)
class UserIdentity:
    """User Identity Negotiation (PS3.7 D.3.3.7): ``kind`` 1 name, 2 name and passcode, 3 Kerberos, 4 SAML, 5 JWT."""

    kind: int
    primary: bytes
    secondary: bytes = b""
    response_requested: bool = False


@dataclass(frozen=True)
class Caller:
    """Who is at the other end of an accepted association. ``association_id`` is the correlation id of its events."""

    association_id: str
    calling_ae_title: str
    called_ae_title: str
    host: str
    port: int
    tls_subject: str = ""
    user_identity: UserIdentity | None = None
    implementation_class_uid: str = ""
    implementation_version_name: str = ""


@dataclass
class Payload:
    """An encoded dataset as it came over the wire, in memory or spooled to ``path`` when it was large."""

    size: int
    pieces: list[bytes | bytearray | memoryview] = field(default_factory=list)
    path: Path | None = None

    def read(self) -> bytes:
        """The whole dataset as one bytes object (loads a spooled file: only for small ones)."""
        return self.path.read_bytes() if self.path is not None else b"".join(self.pieces)

    def head(self, length: int) -> bytes:
        """The first ``length`` bytes."""
        if self.path is not None:
            with self.path.open("rb") as file:
                return file.read(length)
        taken = bytearray()
        for piece in self.pieces:
            taken += piece[: length - len(taken)]
            if len(taken) >= length:
                break
        return bytes(taken)


@dataclass(frozen=True)
class Status:
    """A DIMSE status (PS3.7 Annex C) with what may travel beside it."""

    code: int
    comment: str = ""
    offending_elements: tuple[int, ...] = ()
    error_id: int | None = None

    @property
    def is_pending(self) -> bool:
        return self.code in (0xFF00, 0xFF01)


SUCCESS = Status(0x0000)
PENDING = Status(0xFF00)
PENDING_UNSUPPORTED_KEYS = Status(0xFF01)
CANCEL = Status(0xFE00)


@dataclass(frozen=True)
class StoreRequest:
    """A C-STORE-RQ. The dataset is never decoded; a spooled file is deleted after the handler returned."""

    caller: Caller
    message_id: int
    sop_class_uid: str
    sop_instance_uid: str
    transfer_syntax_uid: str
    priority: int
    dataset: Payload
    move_originator_ae_title: str = ""
    move_originator_message_id: int | None = None


@dataclass(frozen=True)
class QueryRequest:
    """A C-FIND-RQ, C-MOVE-RQ or C-GET-RQ. ``cancelled`` is set when a C-CANCEL-RQ for it arrived."""

    caller: Caller
    message_id: int
    sop_class_uid: str
    transfer_syntax_uid: str
    priority: int
    identifier: Dataset
    cancelled: asyncio.Event
    relational: bool = False
    fuzzy_names: bool = False
    combined_date_time: bool = False
    move_destination: str = ""


@dataclass(frozen=True)
class Progress:
    """Sub-operation counts of a C-MOVE or C-GET (PS3.7 9.1.3, 9.1.4)."""

    remaining: int
    completed: int
    failed: int
    warning: int


@dataclass(frozen=True)
class RetrieveResult:
    """The end of a C-MOVE or C-GET; ``failed_sop_instance_uids`` go into the identifier of the final response."""

    status: Status
    progress: Progress
    failed_sop_instance_uids: tuple[str, ...] = ()


@dataclass(frozen=True)
class NormalizedRequest:
    """An N-service request. ``operation`` is one of N-ACTION, N-EVENT-REPORT, N-CREATE, N-SET, N-GET, N-DELETE."""

    caller: Caller
    operation: str
    message_id: int
    sop_class_uid: str
    sop_instance_uid: str
    transfer_syntax_uid: str
    type_id: int | None
    dataset: Dataset | None
    attribute_identifiers: tuple[int, ...] = ()


@dataclass(frozen=True)
class NormalizedResponse:
    status: Status
    dataset: Dataset | None = None
    sop_instance_uid: str = ""


@dataclass(frozen=True)
class OutgoingInstance:
    """One instance to send. ``read`` gives the encoded dataset (no file meta) in the named transfer syntax in pieces;
    ``convert`` re-encodes it for a peer that took another syntax and raises Invalid when that cannot be done."""

    sop_class_uid: str
    sop_instance_uid: str
    transfer_syntax_uid: str
    read: Callable[[], AsyncIterator[bytes]]
    convert: Callable[[tuple[str, ...]], Awaitable[tuple[str, bytes]]] | None = None


SendInstance = Callable[[OutgoingInstance], Awaitable[Status]]
"""Sends one C-STORE sub-operation on the association of a C-GET. A context not accepted gives Status 0xA900."""

ReportProgress = Callable[[Progress], Awaitable[None]]

EchoHandler = Callable[[Caller], Awaitable[Status]]
StoreHandler = Callable[[StoreRequest], Awaitable[Status]]
FindHandler = Callable[[QueryRequest], AsyncIterator[tuple[Status, Dataset | bytes | None]]]
"""Yields pending responses (a Dataset, or bytes already encoded in the request's transfer syntax) and, last, the final
status with None. Ending without a final status means success."""
MoveHandler = Callable[[QueryRequest, ReportProgress], Awaitable[RetrieveResult]]
GetHandler = Callable[[QueryRequest, ReportProgress, SendInstance], Awaitable[RetrieveResult]]
NormalizedHandler = Callable[[NormalizedRequest], Awaitable[NormalizedResponse]]


@dataclass(frozen=True)
class Scp:
    """What one role of one service answers on the DIMSE port.

    ``transfer_syntaxes`` are accepted in the acceptor's order of preference for each proposed context.
    ``scu_abstract_syntaxes`` are contexts that we accept in order to send on them (C-GET), granted to a requestor
    that proposes the SCP role for itself.
    """

    name: str
    abstract_syntaxes: frozenset[str]
    transfer_syntaxes: tuple[str, ...]
    scu_abstract_syntaxes: frozenset[str] = frozenset()
    scu_transfer_syntaxes: tuple[str, ...] = ()
    accept_any_abstract_syntax: bool = False
    echo: EchoHandler | None = None
    store: StoreHandler | None = None
    find: FindHandler | None = None
    move: MoveHandler | None = None
    get: GetHandler | None = None
    normalized: NormalizedHandler | None = None
    extended_negotiation: Mapping[str, Callable[[bytes], bytes | None]] = field(default_factory=dict)


@dataclass(frozen=True)
class Rejection:
    """A-ASSOCIATE-RJ (PS3.8 9.3.4): ``result`` 1 permanent, 2 transient; source and reason as in the table there."""

    result: int
    source: int
    reason: int
    text: str = ""


CallerPolicy = Callable[[Caller], Awaitable[Rejection | None]]
"""Decides about a caller before its association is accepted; None lets it in."""

Contexts = Iterable[tuple[str, tuple[str, ...]]]
