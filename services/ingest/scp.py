"""The DIMSE door: C-STORE of the Storage Service Class (PS3.4 Annex B) and C-ECHO (PS3.4 Annex A)."""

from __future__ import annotations

import structlog
from prometheus_client import Counter
from pydicom._uid_dict import UID_dictionary
from pydicom.uid import (
    AllTransferSyntaxes,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from libs.common.errors import Invalid, Unavailable
from libs.dimse import SUCCESS, Caller, Scp, Status, StoreRequest
from services.ingest.handlers import Shelves, store_instance
from services.ingest.model.refusal import CannotUnderstand, Duplicate

log = structlog.get_logger()

INSTANCES = Counter("sagittal_ingest_instances_total", "Instances received by C-STORE, by result.", ["result"])
BYTES = Counter("sagittal_ingest_bytes_total", "Bytes of datasets that were stored.")

VERIFICATION = "1.2.840.10008.1.1"

# PS3.4 table B.2-1, and PS3.7 Annex C for what that table leaves to it.
OUT_OF_RESOURCES = 0xA700
DOES_NOT_MATCH_SOP_CLASS = 0xA900
CANNOT_UNDERSTAND = 0xC000
DUPLICATE_SOP_INSTANCE = 0x0111
PROCESSING_FAILURE = 0x0110

_LONGEST_COMMENT = 64
"""Error Comment (0000,0902) is LO."""

NOT_OF_A_PATIENT = frozenset(
    {
        "1.2.840.10008.5.1.4.38.1",
        "1.2.840.10008.5.1.4.39.1",
        "1.2.840.10008.5.1.4.43.1",
        "1.2.840.10008.5.1.4.44.1",
        "1.2.840.10008.5.1.4.45.1",
        "1.2.840.10008.5.1.4.1.1.200.1",
        "1.2.840.10008.5.1.4.1.1.200.3",
        "1.2.840.10008.5.1.4.1.1.200.7",
        "1.2.840.10008.5.1.4.1.1.201.1",
    }
)
"""Non-Patient Object Storage (PS3.4 Annex GG): templates and protocols that belong to no study."""

_NOT_YET_NAMED = (
    "1.2.840.10008.5.1.4.1.1.9.100.1",
    "1.2.840.10008.5.1.4.1.1.9.100.2",
    "1.2.840.10008.5.1.4.1.1.66.7",
    "1.2.840.10008.5.1.4.1.1.66.8",
)
"""Storage SOP classes of the standard that are newer than pydicom's dictionary."""

_WITHOUT_PIXELS = ("1.2.840.10008.1.2.4.94", "1.2.840.10008.1.2.4.95", "1.2.840.10008.1.2.4.204")
_RETIRED_JPEG = tuple(f"1.2.840.10008.1.2.4.{number}" for number in (*range(52, 57), *range(58, 67)))
_ENCAPSULATED_UNCOMPRESSED = "1.2.840.10008.1.2.1.98"


def storage_sop_classes() -> frozenset[str]:
    """Every storage SOP class of the standard whose instances belong to a study, retired and trial ones too."""
    named = (
        uid
        for uid, (name, kind, *_) in UID_dictionary.items()
        if kind == "SOP Class" and "Storage" in name and "Commitment" not in name and "Media" not in name
    )
    return frozenset((*named, *_NOT_YET_NAMED)) - NOT_OF_A_PATIENT


def storage_transfer_syntaxes() -> tuple[str, ...]:
    """Every transfer syntax of a stored dataset, best first: plain, then compressed and video, then the odd ones.

    Not those that leave the pixels elsewhere (JPIP, SMPTE ST 2110): an archive that takes a link keeps nothing.
    """
    last = (DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian)
    first = (ExplicitVRLittleEndian, ImplicitVRLittleEndian)
    rest = [
        uid
        for uid in AllTransferSyntaxes
        if uid not in (*first, *last)
        and not uid.startswith(("1.2.840.10008.1.2.7.", "1.2.840.10008.1.2.4.205"))
        and uid not in _WITHOUT_PIXELS
    ]
    return tuple(map(str, (*first, *rest, *_RETIRED_JPEG, _ENCAPSULATED_UNCOMPRESSED, *last)))


def _answer(code: int, reason: str) -> Status:
    return Status(code, reason.encode("ascii", "replace").decode()[:_LONGEST_COMMENT])


class IngestScp:
    """Translates C-STORE requests into ``store_instance`` and its outcome into a status."""

    def __init__(self, shelves: Shelves) -> None:
        self._shelves = shelves

    def scp(self) -> Scp:
        """What this role answers on the DIMSE port."""
        ingest = self._shelves.ingest
        return Scp(
            name="ingest",
            abstract_syntaxes=storage_sop_classes() | {VERIFICATION} | frozenset(ingest.more_sop_classes),
            transfer_syntaxes=storage_transfer_syntaxes(),
            accept_any_abstract_syntax=ingest.accept_any_sop_class,
            echo=self.echo,
            store=self.store,
        )

    async def echo(self, _caller: Caller) -> Status:
        return SUCCESS

    async def store(self, request: StoreRequest) -> Status:
        """Success only when the instance and its event are durable."""
        facts = {"correlation_id": request.caller.association_id, "calling": request.caller.calling_ae_title}
        try:
            await store_instance(request, self._shelves)
        except Unavailable as error:
            INSTANCES.labels("unavailable").inc()
            log.warning("ingest.unavailable", reason=str(error), **facts)
            return _answer(OUT_OF_RESOURCES, str(error))
        except Duplicate as refusal:
            INSTANCES.labels("duplicate").inc()
            log.warning("ingest.duplicate", **facts)
            return _answer(DUPLICATE_SOP_INSTANCE, str(refusal))
        except Invalid as refusal:
            INSTANCES.labels("quarantined").inc()
            log.warning("ingest.quarantined", reason=str(refusal), **facts)
            code = CANNOT_UNDERSTAND if isinstance(refusal, CannotUnderstand) else DOES_NOT_MATCH_SOP_CLASS
            return _answer(code, str(refusal))
        except Exception as error:
            INSTANCES.labels("failed").inc()
            # Not the message: what an unknown error says may come from the dataset.
            log.error("ingest.failed", error=type(error).__name__, **facts)
            return _answer(PROCESSING_FAILURE, "the archive failed; its log says why")
        INSTANCES.labels("stored").inc()
        BYTES.inc(request.dataset.size)
        return SUCCESS
