"""The DIMSE door: C-FIND, C-MOVE and C-GET of the Query/Retrieve service class (PS3.4 Annex C)."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

import structlog
from pydicom._uid_dict import UID_dictionary
from pydicom.dataset import Dataset
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from libs.common.config import Peer
from libs.common.errors import Invalid, Unavailable
from libs.dimse import Progress, QueryRequest, RetrieveResult, Scp, SendInstance, Status
from libs.dimse.model import ReportProgress
from services.query.config import QuerySettings
from services.query.handlers import find as finding
from services.query.handlers import retrieve as retrieving
from services.query.handlers.promises import Catalog, Stored
from services.query.model.query import (
    PATIENT_ROOT,
    PATIENT_STUDY_ONLY,
    STUDY_ROOT,
    InformationModel,
    Query,
    parse_query,
    parse_retrieve,
)
from services.query.scu import DimseDestination

log = structlog.get_logger()

FIND: dict[str, InformationModel] = {
    "1.2.840.10008.5.1.4.1.2.1.1": PATIENT_ROOT,
    "1.2.840.10008.5.1.4.1.2.2.1": STUDY_ROOT,
    "1.2.840.10008.5.1.4.1.2.3.1": PATIENT_STUDY_ONLY,
}
MOVE: dict[str, InformationModel] = {
    "1.2.840.10008.5.1.4.1.2.1.2": PATIENT_ROOT,
    "1.2.840.10008.5.1.4.1.2.2.2": STUDY_ROOT,
    "1.2.840.10008.5.1.4.1.2.3.2": PATIENT_STUDY_ONLY,
}
GET: dict[str, InformationModel] = {
    "1.2.840.10008.5.1.4.1.2.1.3": PATIENT_ROOT,
    "1.2.840.10008.5.1.4.1.2.2.3": STUDY_ROOT,
    "1.2.840.10008.5.1.4.1.2.3.3": PATIENT_STUDY_ONLY,
}

IDENTIFIER_SYNTAXES: tuple[str, ...] = (
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
)

# The status codes of PS3.4 C.4.1.1.4, C.4.2.1.5 and C.4.3.1.4 that this door gives by itself.
OUT_OF_RESOURCES = 0xA700
CANNOT_COUNT_MATCHES = 0xA701
UNKNOWN_DESTINATION = 0xA801
DOES_NOT_MATCH_SOP_CLASS = 0xA900
UNABLE_TO_PROCESS = 0xC001

NOTHING = Progress(0, 0, 0, 0)


_NEWER_STORAGE = frozenset(f"1.2.840.10008.5.1.4.1.1.{rest}" for rest in ("66.7", "66.8", "9.100.1", "9.100.2"))
"""Label map and height map segmentation, and the waveform presentation states: newer than pydicom's dictionary."""


def storage_sop_classes() -> frozenset[str]:
    """Every storage SOP class of the standard, retired ones too: what a C-GET may bring."""
    return _NEWER_STORAGE | {
        uid
        for uid, (name, kind, *_) in UID_dictionary.items()
        if kind == "SOP Class" and "Storage" in name and "Commitment" not in name and "Media" not in name
    }


def transfer_syntaxes() -> tuple[str, ...]:
    """Every transfer syntax that pixels can be stored in; first the uncompressed ones, into which all can be turned."""
    others = [
        uid
        for uid, (_, kind, *_) in UID_dictionary.items()
        if kind == "Transfer Syntax" and uid not in IDENTIFIER_SYNTAXES
    ]
    return (*IDENTIFIER_SYNTAXES, *others)


def negotiate_query(requested: bytes) -> bytes:
    """C-FIND extended negotiation (PS3.4 C.5.1.1): relational queries and combined date-time matching are granted.

    Fuzzy matching is not: names are compared without case and accents in any case.
    """
    flags = [value == 1 for value in requested[:2]] + [False, False]
    return bytes((flags[0], flags[1])) + bytes(len(requested[2:]))


def negotiate_retrieve(requested: bytes) -> bytes:
    """C-MOVE and C-GET extended negotiation (PS3.4 C.5.2.1): relational retrieval is granted, conversions are not."""
    return bytes((requested[:1] == b"\1",)) + bytes(len(requested[1:]))


@dataclass(frozen=True)
class QueryScp:
    """Translates requests, calls a handler, translates its outcome."""

    catalog: Catalog
    objects: Stored
    settings: QuerySettings
    ae_title: str
    peers: Sequence[Peer]

    def scp(self) -> Scp:
        """What to offer on the DIMSE port."""
        return Scp(
            name="query",
            abstract_syntaxes=frozenset((*FIND, *MOVE, *GET)),
            transfer_syntaxes=IDENTIFIER_SYNTAXES,
            scu_abstract_syntaxes=storage_sop_classes(),
            scu_transfer_syntaxes=transfer_syntaxes(),
            find=self.find,
            move=self.move,
            get=self.get,
            extended_negotiation={
                **dict.fromkeys(FIND, negotiate_query),
                **dict.fromkeys((*MOVE, *GET), negotiate_retrieve),
            },
        )

    async def find(self, request: QueryRequest) -> AsyncIterator[tuple[Status, Dataset | bytes | None]]:
        count = 0
        status = Status(UNABLE_TO_PROCESS)
        level = ""
        try:
            query = parse_query(
                request.identifier,
                FIND[request.sop_class_uid],
                relational=request.relational,
                combined_date_time=request.combined_date_time,
                strict=self.settings.strict_hierarchy,
            )
            level = query.level
            at_most = self.settings.find_instance_limit if level == "IMAGE" else self.settings.find_limit
            async for status, identifier in finding.find(
                query,
                catalog=self.catalog,
                ae_title=self.ae_title,
                transfer_syntax_uid=request.transfer_syntax_uid,
                limit=at_most,
                cancelled=request.cancelled,
            ):
                count += identifier is not None
                yield status, identifier
        except Invalid as error:
            status = Status(DOES_NOT_MATCH_SOP_CLASS, str(error))
            yield status, None
        except Unavailable as error:
            status = Status(OUT_OF_RESOURCES, str(error))
            yield status, None
        finally:
            write = log.info if status.code in (0x0000, 0xFE00, 0xFF00, 0xFF01) else log.warning
            write("find.answered", level=level, matches=count, **_outcome(request, status))

    async def move(self, request: QueryRequest, report: ReportProgress) -> RetrieveResult:
        destination_title = request.move_destination.strip()
        peer = next((peer for peer in self.peers if peer.ae_title.strip() == destination_title), None)
        if peer is None:
            comment = f"No peer with AE title {destination_title} is configured"
            return self._finish("move", request, RetrieveResult(Status(UNKNOWN_DESTINATION, comment), NOTHING))
        destination = DimseDestination(
            peer,
            calling_ae_title=self.ae_title,
            originator_ae_title=request.caller.calling_ae_title,
            message_id=request.message_id,
        )
        try:
            query = self._parse(request, MOVE[request.sop_class_uid])
            result = await retrieving.move(
                query,
                catalog=self.catalog,
                objects=self.objects,
                destination=destination,
                report=report,
                cancelled=request.cancelled,
                pace=self._pace(),
            )
        except (Invalid, Unavailable) as error:
            result = _failure(error)
        return self._finish("move", request, result)

    async def get(self, request: QueryRequest, report: ReportProgress, send: SendInstance) -> RetrieveResult:
        try:
            query = self._parse(request, GET[request.sop_class_uid])
            result = await retrieving.get(
                query,
                catalog=self.catalog,
                objects=self.objects,
                send=send,
                report=report,
                cancelled=request.cancelled,
                pace=self._pace(),
            )
        except (Invalid, Unavailable) as error:
            result = _failure(error)
        return self._finish("get", request, result)

    def _parse(self, request: QueryRequest, model: InformationModel) -> Query:
        return parse_retrieve(
            request.identifier, model, relational=request.relational, strict=self.settings.strict_hierarchy
        )

    def _pace(self) -> retrieving.Pace:
        settings = self.settings
        return retrieving.Pace(settings.read_ahead, settings.read_whole, settings.progress_interval)

    def _finish(self, operation: str, request: QueryRequest, result: RetrieveResult) -> RetrieveResult:
        progress = result.progress
        write = log.info if result.status.code in (0x0000, 0xFE00) else log.warning
        write(
            f"{operation}.finished",
            completed=progress.completed,
            failed=progress.failed,
            with_warning=progress.warning,
            remaining=progress.remaining,
            destination=request.move_destination,
            **_outcome(request, result.status),
        )
        return result


def _failure(error: Invalid | Unavailable) -> RetrieveResult:
    code = DOES_NOT_MATCH_SOP_CLASS if isinstance(error, Invalid) else CANNOT_COUNT_MATCHES
    return RetrieveResult(Status(code, str(error)), NOTHING)


def _outcome(request: QueryRequest, status: Status) -> dict[str, str]:
    return {
        "status": f"{status.code:04X}",
        "reason": status.comment,
        "calling_ae_title": request.caller.calling_ae_title,
        "host": request.caller.host,
        "correlation_id": request.caller.association_id,
    }
