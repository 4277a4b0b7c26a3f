"""What an acceptor answers to an A-ASSOCIATE-RQ: contexts, roles, extended negotiation (PS3.8 7.1, PS3.7 D.3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pydicom._uid_dict import UID_dictionary
from pynetdicom.pdu_primitives import (
    A_ASSOCIATE,
    AsynchronousOperationsWindowNegotiation,
    ImplementationClassUIDNotification,
    ImplementationVersionNameNotification,
    MaximumLengthNotification,
    SCP_SCU_RoleSelectionNegotiation,
    SOPClassExtendedNegotiation,
    UserIdentityNegotiation,
)
from pynetdicom.presentation import PresentationContext

from libs.dimse import wire
from libs.dimse.model import Scp, UserIdentity

VERIFICATION = "1.2.840.10008.1.1"
_UNCOMPRESSED = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1")
_OF_THE_STANDARD = "1.2.840.10008."
_STORAGE = "1.2.840.10008.5.1.4.1.1."

# Results of a presentation context (PS3.8 Table 9-18).
ACCEPTED, USER_REJECTION, NO_ABSTRACT_SYNTAX, NO_TRANSFER_SYNTAX = 0, 1, 3, 4


@dataclass(frozen=True)
class AcceptedContext:
    """A presentation context in use. ``scp`` answers requests on it; ``sender`` may send requests on it (C-GET)."""

    context_id: int
    abstract_syntax: str
    transfer_syntax: str
    scp: Scp | None
    sender: Scp | None = None


@dataclass
class Proposal:
    """What the requestor said about itself in its A-ASSOCIATE-RQ. ``max_pdu`` 0 means that it takes any length."""

    max_pdu: int = 0
    implementation_class_uid: str = ""
    implementation_version_name: str = ""
    user_identity: UserIdentity | None = None
    window_proposed: bool = False
    roles: dict[str, tuple[bool, bool]] = field(default_factory=dict)
    """SOP class: whether the requestor would be its SCU, and its SCP."""
    extended: dict[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class Agreement:
    """The outcome: accepted contexts by id, answers to extended negotiation by SOP class, and the A-ASSOCIATE-AC."""

    contexts: Mapping[int, AcceptedContext]
    extended: Mapping[str, bytes]
    accept_pdu: bytes


def read_proposal(request: A_ASSOCIATE) -> Proposal:
    """The user information of an A-ASSOCIATE-RQ (PS3.7 D.3.3)."""
    proposal = Proposal()
    for item in request.user_information:
        if isinstance(item, MaximumLengthNotification):
            proposal.max_pdu = int(item.maximum_length_received or 0)
        elif isinstance(item, ImplementationClassUIDNotification):
            proposal.implementation_class_uid = str(item.implementation_class_uid or "")
        elif isinstance(item, ImplementationVersionNameNotification):
            proposal.implementation_version_name = str(item.implementation_version_name or "")
        elif isinstance(item, AsynchronousOperationsWindowNegotiation):
            proposal.window_proposed = True
        elif isinstance(item, SCP_SCU_RoleSelectionNegotiation):
            proposal.roles[str(item.sop_class_uid)] = (bool(item.scu_role), bool(item.scp_role))
        elif isinstance(item, SOPClassExtendedNegotiation):
            proposal.extended[str(item.sop_class_uid)] = bytes(item.service_class_application_information or b"")
        elif isinstance(item, UserIdentityNegotiation):
            proposal.user_identity = UserIdentity(
                int(item.user_identity_type or 0),
                bytes(item.primary_field or b""),
                bytes(item.secondary_field or b""),
                bool(item.positive_response_requested),
            )
    return proposal


def negotiate(request: A_ASSOCIATE, proposal: Proposal, scps: Sequence[Scp], max_pdu: int) -> Agreement:
    """Answer every proposed context. ``max_pdu`` is the maximum length we advertise, in bytes."""
    contexts: dict[int, AcceptedContext] = {}
    results: list[PresentationContext] = []
    granted: dict[str, tuple[bool, bool]] = {}
    for proposed in request.presentation_context_definition_list:
        abstract_syntax = str(proposed.abstract_syntax)
        syntaxes = [str(uid) for uid in proposed.transfer_syntax]
        scp, sender, result = _match(abstract_syntax, proposal.roles.get(abstract_syntax), scps)
        chosen = None
        if result == ACCEPTED:
            chosen = _choose(syntaxes, scp, sender)
            result = ACCEPTED if chosen is not None else NO_TRANSFER_SYNTAX
        answer = PresentationContext()
        answer.context_id = proposed.context_id
        answer.result = result
        # Not significant when refused, and yet the item has to be there (PS3.8 Table 9-18).
        answer.transfer_syntax = [chosen or (syntaxes[0] if syntaxes else _UNCOMPRESSED[0])]
        results.append(answer)
        if chosen is not None and proposed.context_id is not None:
            contexts[proposed.context_id] = AcceptedContext(proposed.context_id, abstract_syntax, chosen, scp, sender)
            if abstract_syntax in proposal.roles:
                granted[abstract_syntax] = (scp is not None, sender is not None)
    extended = _extended(proposal, contexts)
    response = A_ASSOCIATE()
    response.application_context_name = wire.APPLICATION_CONTEXT_NAME
    response.called_ae_title = request.called_ae_title
    response.calling_ae_title = request.calling_ae_title
    response.result = 0x00
    response.result_source = 0x01
    response.presentation_context_definition_results_list = results
    response.user_information = wire.user_information(max_pdu) + _answers(proposal, granted, extended)
    return Agreement(contexts, extended, wire.build_associate_ac(response))


def _match(
    abstract_syntax: str, roles: tuple[bool, bool] | None, scps: Sequence[Scp]
) -> tuple[Scp | None, Scp | None, int]:
    """Who answers on the context, who sends on it, and its result so far (PS3.7 D.3.3.4)."""
    scp = next((scp for scp in scps if abstract_syntax in scp.abstract_syntaxes), None)
    sender = next((scp for scp in scps if abstract_syntax in scp.scu_abstract_syntaxes), None)
    if scp is None and sender is None and _may_be_anything(abstract_syntax):
        scp = next((scp for scp in scps if scp.accept_any_abstract_syntax), None)
        if scp is not None:
            # What is taken under a private class must also be handed back.
            sender = next((other for other in scps if other.scu_abstract_syntaxes), None)
    if scp is None and abstract_syntax == VERIFICATION:
        scp = Scp("verification", frozenset((VERIFICATION,)), _UNCOMPRESSED)
    if scp is None and sender is None:
        return None, None, NO_ABSTRACT_SYNTAX
    as_scu, as_scp = roles if roles is not None else (True, False)
    known_as_scp = scp is not None
    scp = scp if as_scu else None
    sender = sender if as_scp else None
    if scp is None and sender is None:
        return None, None, USER_REJECTION if known_as_scp or roles is not None else NO_ABSTRACT_SYNTAX
    return scp, sender, ACCEPTED


def _may_be_anything(abstract_syntax: str) -> bool:
    """Private classes, and storage classes newer than our dictionary; not services that nobody here offers."""
    if abstract_syntax in UID_dictionary:
        return False
    return not abstract_syntax.startswith(_OF_THE_STANDARD) or abstract_syntax.startswith(_STORAGE)


def _choose(proposed: Sequence[str], scp: Scp | None, sender: Scp | None) -> str | None:
    """The transfer syntax of a context.

    For instances the requestor's order counts, since it knows how they are encoded; for everything else ours does.
    """
    acceptable = set(proposed)
    if scp is not None:
        acceptable &= set(scp.transfer_syntaxes)
    if sender is not None:
        acceptable &= set(sender.scu_transfer_syntaxes or sender.transfer_syntaxes)
    if sender is None and scp is not None and scp.store is None:
        return next((uid for uid in scp.transfer_syntaxes if uid in acceptable), None)
    return next((uid for uid in proposed if uid in acceptable), None)


def _extended(proposal: Proposal, contexts: Mapping[int, AcceptedContext]) -> dict[str, bytes]:
    answers: dict[str, bytes] = {}
    for context in contexts.values():
        asked = proposal.extended.get(context.abstract_syntax)
        answering = context.scp.extended_negotiation.get(context.abstract_syntax) if context.scp is not None else None
        if asked is not None and answering is not None:
            answer = answering(asked)
            if answer is not None:
                answers[context.abstract_syntax] = answer
    return answers


def _answers(
    proposal: Proposal, granted: Mapping[str, tuple[bool, bool]], extended: Mapping[str, bytes]
) -> list[wire.UserInformation]:
    items: list[wire.UserInformation] = []
    if proposal.window_proposed:
        window = AsynchronousOperationsWindowNegotiation()
        window.maximum_number_operations_invoked = 1
        window.maximum_number_operations_performed = 1
        items.append(window)
    for uid, (as_scu, as_scp) in granted.items():
        role = SCP_SCU_RoleSelectionNegotiation()
        role.sop_class_uid = uid
        role.scu_role, role.scp_role = as_scu, as_scp
        items.append(role)
    for uid, value in extended.items():
        answer = SOPClassExtendedNegotiation()
        answer.sop_class_uid = uid
        answer.service_class_application_information = value
        items.append(answer)
    identity = proposal.user_identity
    if identity is not None and identity.response_requested:
        accepted = UserIdentityNegotiation()
        # A name is answered with an empty response; kinds 3 to 5 may carry one, and we have none to give.
        accepted.server_response = b""
        items.append(accepted)
    return items
