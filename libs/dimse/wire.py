"""The bytes of the DICOM upper layer (PS3.8 9.3) and of DIMSE command sets (PS3.7 6.3), for both ends."""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence

from pynetdicom import build_context
from pynetdicom.pdu import A_ASSOCIATE_AC, A_ASSOCIATE_RJ, A_ASSOCIATE_RQ
from pynetdicom.pdu_primitives import (
    A_ASSOCIATE,
    AsynchronousOperationsWindowNegotiation,
    ImplementationClassUIDNotification,
    ImplementationVersionNameNotification,
    MaximumLengthNotification,
    SCP_SCU_RoleSelectionNegotiation,
    SOPClassCommonExtendedNegotiation,
    SOPClassExtendedNegotiation,
    UserIdentityNegotiation,
)

from libs.dimse.model import ProtocolError, Rejection, UserIdentity

UserInformation = (
    MaximumLengthNotification
    | ImplementationClassUIDNotification
    | ImplementationVersionNameNotification
    | AsynchronousOperationsWindowNegotiation
    | SCP_SCU_RoleSelectionNegotiation
    | SOPClassExtendedNegotiation
    | UserIdentityNegotiation
    | SOPClassCommonExtendedNegotiation
)
Bytes = bytes | bytearray | memoryview
CommandValue = int | str | tuple[int, ...]

IMPLEMENTATION_CLASS_UID = "2.25.151434187291020559089297029536204408544"
IMPLEMENTATION_VERSION_NAME = "SAGITTAL"
APPLICATION_CONTEXT_NAME = "1.2.840.10008.3.1.1.1"

# PDU types (PS3.8 Table 9-1).
ASSOCIATE_RQ, ASSOCIATE_AC, ASSOCIATE_RJ, P_DATA, RELEASE_RQ, RELEASE_RP, ABORT = 1, 2, 3, 4, 5, 6, 7

# Command fields (PS3.7 Annex E.1); a response has the top bit set.
RESPONSE = 0x8000
C_STORE, C_GET, C_FIND, C_MOVE, C_ECHO, C_CANCEL = 0x0001, 0x0010, 0x0020, 0x0021, 0x0030, 0x0FFF
N_EVENT_REPORT, N_GET, N_SET, N_ACTION, N_CREATE, N_DELETE = 0x0100, 0x0110, 0x0120, 0x0130, 0x0140, 0x0150

# Command elements (PS3.7 Annex E.1).
AFFECTED_SOP_CLASS_UID, REQUESTED_SOP_CLASS_UID = 0x00000002, 0x00000003
COMMAND_FIELD, MESSAGE_ID, MESSAGE_ID_RESPONDED_TO = 0x00000100, 0x00000110, 0x00000120
MOVE_DESTINATION, PRIORITY, DATA_SET_TYPE = 0x00000600, 0x00000700, 0x00000800
STATUS, OFFENDING_ELEMENT, ERROR_COMMENT, ERROR_ID = 0x00000900, 0x00000901, 0x00000902, 0x00000903
AFFECTED_SOP_INSTANCE_UID, REQUESTED_SOP_INSTANCE_UID = 0x00001000, 0x00001001
EVENT_TYPE_ID, ATTRIBUTE_IDENTIFIER_LIST, ACTION_TYPE_ID = 0x00001002, 0x00001005, 0x00001008
REMAINING, COMPLETED, FAILED, WARNING = 0x00001020, 0x00001021, 0x00001022, 0x00001023
MOVE_ORIGINATOR_AE_TITLE, MOVE_ORIGINATOR_MESSAGE_ID = 0x00001030, 0x00001031

NO_DATASET = 0x0101
"""Data Set Type of a message without a dataset; any other value says that one follows."""
WITH_DATASET = 0x0001

UNLIMITED_PDU = 256 * 1024
"""What we send to a peer that names no maximum: larger PDUs gain nothing and cost memory at both ends."""
SMALLEST_PDU = 128
LARGEST_COMMAND = 64 * 1024
"""No command set of the standard comes near this; a longer one is an attack or an error."""

_UIDS = frozenset({0x0002, 0x0003, 0x1000, 0x1001})
_TEXTS = frozenset({0x0600, 0x0902, 0x1030})
_TAG_LISTS = frozenset({0x0901, 0x1005})
_SHORTS = frozenset(
    {0x0100, 0x0110, 0x0120, 0x0700, 0x0800, 0x0900, 0x0903, 0x1002, 0x1008, 0x1020, 0x1021, 0x1022, 0x1023, 0x1031}
)

_ELEMENT = struct.Struct("<HHL")
_SHORT = struct.Struct("<H")
_LONG = struct.Struct("<L")
_PDU = struct.Struct(">BxL")
_P_DATA = struct.Struct(">BxLLBB")
_PDV_OVERHEAD = 6
_PADDING = memoryview(b"\0")
"""What ends a dataset of odd length: only a deflated one can be, and this is how it is made even (PS3.5 A.5)."""

RELEASE_RQ_PDU = bytes((RELEASE_RQ, 0, 0, 0, 0, 4, 0, 0, 0, 0))
RELEASE_RP_PDU = bytes((RELEASE_RP, 0, 0, 0, 0, 4, 0, 0, 0, 0))


def pdu_header(pdu_type: int, length: int) -> bytes:
    """The six bytes before every PDU body (PS3.8 9.3.1)."""
    return _PDU.pack(pdu_type, length)


def abort_pdu(source: int = 0, reason: int = 0) -> bytes:
    """A-ABORT (PS3.8 9.3.8): source 0 is the service user, 2 the provider; reason as in Table 9-26."""
    return bytes((ABORT, 0, 0, 0, 0, 4, 0, 0, source, reason))


def reject_pdu(rejection: Rejection) -> bytes:
    """A-ASSOCIATE-RJ (PS3.8 9.3.4)."""
    return bytes((ASSOCIATE_RJ, 0, 0, 0, 0, 4, 0, rejection.result, rejection.source, rejection.reason))


def fragment_size(max_pdu: int) -> int:
    """Bytes of a message in one PDU for a peer that takes PDUs of ``max_pdu`` bytes (0: no limit).

    Always even: DCMTK aborts at a fragment of odd length.
    """
    return ((min(max(max_pdu, SMALLEST_PDU), UNLIMITED_PDU) if max_pdu else UNLIMITED_PDU) - _PDV_OVERHEAD) & ~1


def _p_data_header(context_id: int, length: int, control: int) -> bytes:
    return _P_DATA.pack(P_DATA, length + _PDV_OVERHEAD, length + 2, context_id, control)


def _fragments(context_id: int, is_command: int, pieces: Iterable[Bytes], size: int) -> Iterator[Bytes]:
    views = [memoryview(piece).cast("B") for piece in pieces if len(piece)]
    left = sum(map(len, views))
    if left & 1:
        views.append(_PADDING)
        left += 1
    if not left:
        yield _p_data_header(context_id, 0, is_command | 2)
        return
    room = 0
    for view in views:
        offset = 0
        while offset < len(view):
            if not room:
                room = min(size, left)
                left -= room
                yield _p_data_header(context_id, room, is_command | (0 if left else 2))
            part = view[offset : offset + room]
            offset += len(part)
            room -= len(part)
            yield part


def fragment_message(context_id: int, command: Bytes, dataset: Sequence[Bytes] | None, max_pdu: int) -> Iterator[Bytes]:
    """A DIMSE message as P-DATA-TF PDUs (PS3.8 9.3.5, Annex E), each with one fragment: what to write, in order.

    ``dataset`` pieces are sliced, never copied; None when the message has no dataset. ``max_pdu`` is the peer's
    maximum length, 0 for none.
    """
    size = fragment_size(max_pdu)
    yield from _fragments(context_id, 1, (command,), size)
    if dataset is not None:
        yield from _fragments(context_id, 0, dataset, size)


async def fragment_stream(
    context_id: int, command: Bytes, dataset: AsyncIterator[Bytes], max_pdu: int
) -> AsyncIterator[list[Bytes]]:
    """The same for a dataset that arrives in pieces: lists of bytes to write together, each one or more whole PDUs.

    Holds one fragment and the piece at hand.
    """
    size = fragment_size(max_pdu)
    ready: list[Bytes] = list(_fragments(context_id, 1, (command,), size))
    held: list[memoryview] = []
    length = 0
    async for piece in dataset:
        view = memoryview(piece).cast("B")
        # One byte beyond a full fragment proves that the fragment is not the last one.
        while length + len(view) > size:
            part = view[: size - length]
            ready.append(_p_data_header(context_id, size, 0))
            ready.extend(held)
            ready.append(part)
            view = view[len(part) :]
            held, length = [], 0
        if view:
            held.append(view)
            length += len(view)
        if len(ready) > 2:
            yield ready
            ready = []
    if length & 1:
        held.append(_PADDING)
        length += 1
    ready.append(_p_data_header(context_id, length, 2))
    ready.extend(held)
    yield ready


def encode_command(elements: Mapping[int, CommandValue]) -> bytes:
    """A command set in Implicit VR Little Endian with its group length (PS3.7 6.3.1), elements in order of tag.

    Integers are US, texts UI, AE or LO by tag, tuples of integers AT. Empty texts are left out by the caller.
    """
    body = bytearray()
    for tag in sorted(elements):
        value = elements[tag]
        number = tag & 0xFFFF
        if number in _SHORTS and isinstance(value, int):
            data = _SHORT.pack(value)
        elif isinstance(value, str):
            # Error comments may hold anything we said; only what LO can carry goes out (PS3.5 6.2).
            data = value.encode("ascii", "replace")
            if number == 0x0902:
                data = data.replace(b"\\", b"/")[:64]
            if len(data) & 1:
                data += b"\0" if number in _UIDS else b" "
        elif isinstance(value, tuple):
            data = b"".join(struct.pack("<HH", item >> 16, item & 0xFFFF) for item in value)
        else:
            raise ValueError(f"element {tag:08X} has no place in a command set")
        body += _ELEMENT.pack(0, number, len(data))
        body += data
    return _ELEMENT.pack(0, 0, 4) + _LONG.pack(len(body)) + body


def decode_command(data: Bytes) -> dict[int, CommandValue]:
    """The elements of a command set by tag. Unknown and retired elements are skipped. Raises ProtocolError."""
    if len(data) > LARGEST_COMMAND:
        raise ProtocolError("The peer sent a command set longer than any in the standard.")
    view = memoryview(data).cast("B")
    elements: dict[int, CommandValue] = {}
    offset, end = 0, len(view)
    while offset < end:
        if end - offset < 8:
            raise ProtocolError("The peer sent a command set that ends in the middle of an element.")
        group, number, length = _ELEMENT.unpack_from(view, offset)
        offset += 8
        if group:
            raise ProtocolError("The peer sent a command set with an element that is not a command element.")
        if length > end - offset:
            raise ProtocolError("The peer sent a command set with an element longer than the set.")
        value = view[offset : offset + length]
        offset += length
        if number in _SHORTS:
            if length == 2:
                elements[number] = _SHORT.unpack(value)[0]
            elif length:
                raise ProtocolError(f"The peer sent command element (0000,{number:04X}) with a wrong length.")
        elif number in _UIDS or number in _TEXTS:
            elements[number] = bytes(value).decode("ascii", "replace").strip(" \0")
        elif number in _TAG_LISTS:
            if length % 4:
                raise ProtocolError(f"The peer sent command element (0000,{number:04X}) with a wrong length.")
            words = struct.unpack(f"<{length // 2}H", value)
            elements[number] = tuple(words[i] << 16 | words[i + 1] for i in range(0, len(words), 2))
    if COMMAND_FIELD not in elements:
        raise ProtocolError("The peer sent a command set without a command field.")
    return elements


def has_dataset(command: Mapping[int, CommandValue]) -> bool:
    """Whether a dataset follows the command (Data Set Type, PS3.7 E.1)."""
    return command.get(DATA_SET_TYPE, NO_DATASET) != NO_DATASET


def build_associate_rq(
    *,
    called_ae_title: str,
    calling_ae_title: str,
    contexts: Sequence[tuple[int, str, Sequence[str]]],
    max_pdu: int,
    scp_roles: Iterable[str] = (),
    extended_negotiation: Mapping[str, bytes] | None = None,
    user_identity: UserIdentity | None = None,
) -> bytes:
    """A-ASSOCIATE-RQ (PS3.8 9.3.2) proposing (context id, abstract syntax, transfer syntaxes)."""
    primitive = A_ASSOCIATE()
    primitive.application_context_name = APPLICATION_CONTEXT_NAME
    primitive.called_ae_title = called_ae_title
    primitive.calling_ae_title = calling_ae_title
    proposed = []
    for context_id, abstract_syntax, transfer_syntaxes in contexts:
        context = build_context(abstract_syntax, list(transfer_syntaxes))
        context.context_id = context_id
        proposed.append(context)
    primitive.presentation_context_definition_list = proposed
    information = user_information(max_pdu)
    for abstract_syntax in scp_roles:
        role = SCP_SCU_RoleSelectionNegotiation()
        role.sop_class_uid = abstract_syntax
        role.scu_role, role.scp_role = False, True
        information.append(role)
    for abstract_syntax, value in (extended_negotiation or {}).items():
        extended = SOPClassExtendedNegotiation()
        extended.sop_class_uid = abstract_syntax
        extended.service_class_application_information = value
        information.append(extended)
    if user_identity is not None:
        identity = UserIdentityNegotiation()
        identity.user_identity_type = user_identity.kind
        identity.primary_field = user_identity.primary
        if user_identity.kind == 2:
            identity.secondary_field = user_identity.secondary
        identity.positive_response_requested = user_identity.response_requested
        information.append(identity)
    primitive.user_information = information
    return bytes(A_ASSOCIATE_RQ(primitive).encode())


def user_information(max_pdu: int) -> list[UserInformation]:
    """The user information items that every A-ASSOCIATE-RQ and -AC of ours carries (PS3.7 D.3.3.1, D.3.3.2)."""
    length = MaximumLengthNotification()
    length.maximum_length_received = max_pdu
    class_uid = ImplementationClassUIDNotification()
    class_uid.implementation_class_uid = IMPLEMENTATION_CLASS_UID
    version = ImplementationVersionNameNotification()
    version.implementation_version_name = IMPLEMENTATION_VERSION_NAME
    return [length, class_uid, version]


def build_associate_ac(primitive: A_ASSOCIATE) -> bytes:
    """A-ASSOCIATE-AC (PS3.8 9.3.3) of a primitive with its results list and user information set."""
    return bytes(A_ASSOCIATE_AC(primitive).encode())


def parse_associate_rq(pdu: bytes) -> A_ASSOCIATE:
    """An A-ASSOCIATE-RQ, header included, as pynetdicom's primitive. Raises ProtocolError."""
    return _parse(A_ASSOCIATE_RQ, pdu)


def parse_associate_ac(pdu: bytes) -> A_ASSOCIATE:
    """An A-ASSOCIATE-AC, header included, as pynetdicom's primitive. Raises ProtocolError."""
    return _parse(A_ASSOCIATE_AC, pdu)


def _parse(kind: type[A_ASSOCIATE_RQ] | type[A_ASSOCIATE_AC], pdu: bytes) -> A_ASSOCIATE:
    parsed = kind()
    try:
        parsed.decode(bytes(pdu))
        return parsed.to_primitive()
    except Exception as error:  # the codec fails in as many ways as there are malformed PDUs
        raise ProtocolError("The peer sent an association PDU that cannot be read.") from error


def parse_reject(body: bytes) -> Rejection:
    """The body of an A-ASSOCIATE-RJ with its reason in words."""
    if len(body) < 4:
        raise ProtocolError("The peer sent an A-ASSOCIATE-RJ that is too short.")
    parsed = A_ASSOCIATE_RJ()
    parsed.result, parsed.source, parsed.reason_diagnostic = body[1:4]
    try:
        text = str(parsed.reason_str)
    except ValueError:
        text = f"reason {body[3]} of source {body[2]}"
    return Rejection(body[1], body[2], body[3], text)


def abort_reason(body: bytes) -> str:
    """The body of an A-ABORT in words (PS3.8 Table 9-26)."""
    if len(body) < 4 or body[2] != 2:
        return "by its user"
    reasons = {
        0: "no reason given",
        1: "unrecognised PDU",
        2: "unexpected PDU",
        4: "unrecognised PDU parameter",
        5: "unexpected PDU parameter",
        6: "invalid PDU parameter value",
    }
    return f"by its DICOM upper layer: {reasons.get(body[3], f'reason {body[3]}')}"
