"""Association requestor: connect to a DICOM peer and negotiate (PS3.8 7.1), or send many instances to it."""

from __future__ import annotations

import contextlib
import ssl
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from pynetdicom.pdu_primitives import A_ASSOCIATE, SCP_SCU_RoleSelectionNegotiation

from libs.common.errors import Invalid, NotFound, Unavailable
from libs.dimse import wire
from libs.dimse.link import Link
from libs.dimse.model import (
    Caller,
    ConnectionRefused,
    Contexts,
    OutgoingInstance,
    ProtocolError,
    Status,
    TimedOut,
    UserIdentity,
)
from libs.dimse.operations import VERIFICATION, AcceptedContext, RequestorAssociation

__all__ = ["VERIFICATION", "AcceptedContext", "RequestorAssociation", "connect", "plan_associations", "store_many"]

IMPLICIT_LITTLE_ENDIAN: Final = "1.2.840.10008.1.2"
EXPLICIT_LITTLE_ENDIAN: Final = "1.2.840.10008.1.2.1"
UNCOMPRESSED: Final = (EXPLICIT_LITTLE_ENDIAN, IMPLICIT_LITTLE_ENDIAN)
MOST_CONTEXTS: Final = 128
"""Presentation context ids are the odd numbers up to 255 (PS3.8 9.3.2.2)."""
UNREADABLE: Final = 0xC001
"""What ``store_many`` reports for an instance that could not be read on our side."""


@contextlib.asynccontextmanager
async def connect(
    host: str,
    port: int,
    *,
    called_ae_title: str,
    calling_ae_title: str,
    contexts: Contexts,
    roles: Iterable[str] = (),
    extended_negotiation: Mapping[str, bytes] | None = None,
    user_identity: UserIdentity | None = None,
    ssl: ssl.SSLContext | None = None,
    connect_timeout: float = 10.0,
    acse_timeout: float = 30.0,
    dimse_timeout: float = 60.0,
    max_pdu: int = 262144,
    spool_threshold: int = 32 << 20,
    spool_directory: Path | None = None,
) -> AsyncIterator[RequestorAssociation]:
    """An association for the time of the block; released at its end, aborted when it ends by an exception.

    ``roles`` are the abstract syntaxes for which we propose to be the SCP: what a C-GET brings. Times are in seconds:
    until the TCP connection stands, for each answer of the association control, and the longest silence within a DIMSE
    operation. ``max_pdu`` is what the peer may send to us (0: no limit). Instances that a C-GET brings and that are
    larger than ``spool_threshold`` bytes go to files in ``spool_directory``.

    Raises ConnectionRefused, TimedOut, ProtocolError, and Invalid for more than 128 contexts or none.
    """
    proposed = [(2 * i + 1, str(a), tuple(map(str, ts))) for i, (a, ts) in enumerate(contexts)]
    if not 1 <= len(proposed) <= MOST_CONTEXTS:
        raise Invalid(f"An association needs 1 to {MOST_CONTEXTS} presentation contexts, not {len(proposed)}.")
    try:
        request = wire.build_associate_rq(
            called_ae_title=called_ae_title,
            calling_ae_title=calling_ae_title,
            contexts=proposed,
            max_pdu=max_pdu,
            scp_roles=roles,
            extended_negotiation=extended_negotiation,
            user_identity=user_identity,
        )
    except (ValueError, TypeError) as error:
        raise Invalid(f"The association request cannot be encoded: {error}.") from error
    link = await Link.open(
        host,
        port,
        tls=ssl,
        connect_timeout=connect_timeout,
        timeout=dimse_timeout,
        spool_threshold=spool_threshold,
        spool_directory=spool_directory,
    )
    try:
        association = await _negotiate(link, request, proposed, called_ae_title, host, port, acse_timeout)
        try:
            yield association
        except GeneratorExit:
            # The block is a generator that was closed early: no error of the association.
            await association.release()
            raise
        else:
            await association.release()
    finally:
        # Whatever way the block ended: an association that is still open by now is aborted.
        link.abort()
        await link.wait_closed()


async def _negotiate(
    link: Link,
    request: bytes,
    proposed: list[tuple[int, str, tuple[str, ...]]],
    called_ae_title: str,
    host: str,
    port: int,
    acse_timeout: float,
) -> RequestorAssociation:
    await link.write([request])
    try:
        pdu_type, body = await link.read_pdu(acse_timeout)
    except TimedOut as error:
        raise TimedOut(f"{host}:{port} did not answer the association request within {acse_timeout:g} s.") from error
    except ProtocolError as error:
        if isinstance(error.__cause__, ssl.SSLError):
            # TLS 1.3 tells a client that its certificate was refused only after the handshake.
            raise ConnectionRefused(f"TLS with {host}:{port} was refused: {error.__cause__.reason}.") from error
        raise
    if pdu_type == wire.ASSOCIATE_RJ:
        rejection = wire.parse_reject(body)
        link.close()
        kind = "for now" if rejection.result == 2 else "for good"
        raise ConnectionRefused(
            f"{called_ae_title} at {host}:{port} rejected the association {kind}: {rejection.text.lower()}."
        )
    if pdu_type == wire.ABORT:
        link.close()
        raise ProtocolError(f"The peer aborted the association request, {wire.abort_reason(body)}.")
    if pdu_type != wire.ASSOCIATE_AC:
        link.abort(2, 2)
        raise ProtocolError(f"The peer answered the association request with a PDU of type {pdu_type}.")
    primitive = wire.parse_associate_ac(wire.pdu_header(pdu_type, len(body)) + body)
    link.peer_max_pdu = primitive.maximum_length_received or 0
    caller = Caller(
        association_id=uuid.uuid4().hex,
        calling_ae_title=called_ae_title,
        called_ae_title=str(primitive.calling_ae_title),
        host=host,
        port=port,
    )
    return RequestorAssociation(link, _accepted(primitive, proposed), caller, acse_timeout)


def _accepted(primitive: A_ASSOCIATE, proposed: list[tuple[int, str, tuple[str, ...]]]) -> tuple[AcceptedContext, ...]:
    offers = {context_id: (abstract, transfers) for context_id, abstract, transfers in proposed}
    granted = {
        str(item.sop_class_uid): bool(item.scp_role)
        for item in primitive.user_information
        if isinstance(item, SCP_SCU_RoleSelectionNegotiation)
    }
    accepted = []
    for context in primitive.presentation_context_definition_results_list:
        abstract, transfers = offers.get(context.context_id or 0, ("", ()))
        syntax = str(context.transfer_syntax[0]) if context.transfer_syntax else ""
        if context.result == 0 and syntax in transfers:
            accepted.append(
                AcceptedContext(context.context_id or 0, abstract, syntax, as_scp=granted.get(abstract, False))
            )
    return tuple(accepted)


Context = tuple[str, tuple[str, ...]]


def plan_associations(
    instances: Iterable[OutgoingInstance],
) -> list[tuple[list[Context], list[OutgoingInstance]]]:
    """The contexts to propose and the instances to send, for as few associations as 128 contexts each allow.

    Each pair of class and syntax gets its own context, since a peer takes one syntax of each; a class whose
    instances can be converted gets more with the uncompressed little endian syntaxes. The order is kept.
    """
    plan: list[tuple[list[Context], list[OutgoingInstance]]] = []
    for instance in instances:
        wanted: list[Context] = [(instance.sop_class_uid, (instance.transfer_syntax_uid,))]
        if instance.convert is not None:
            wanted.extend(
                (instance.sop_class_uid, (syntax,)) for syntax in UNCOMPRESSED if syntax != instance.transfer_syntax_uid
            )
        if plan:
            contexts, planned = plan[-1]
            missing = [context for context in wanted if context not in contexts]
            if len(contexts) + len(missing) <= MOST_CONTEXTS:
                contexts.extend(missing)
                planned.append(instance)
                continue
        plan.append((wanted, [instance]))
    return plan


async def store_many(
    host: str, port: int, instances: Iterable[OutgoingInstance], **options: Any
) -> AsyncGenerator[tuple[OutgoingInstance, Status], None]:
    """C-STORE each instance, over one association when the contexts fit, and give its status as soon as it is known.

    ``options`` are those of ``connect`` except the contexts. An instance that cannot be read gives status 0xC001 and
    the others go on. Raises ConnectionRefused, TimedOut, ProtocolError: what was given before that was sent.
    """
    for contexts, planned in plan_associations(instances):
        left = list(reversed(planned))
        while left:
            async with connect(host, port, contexts=contexts, **options) as association:
                while left and association.is_open:
                    instance = left.pop()
                    try:
                        status = await association.store(instance)
                    except (Invalid, NotFound, Unavailable) as error:
                        status = Status(UNREADABLE, str(error))
                    yield instance, status
