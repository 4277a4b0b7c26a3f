"""What the storage role offers, and who may call it."""

from __future__ import annotations

import pydicom.uid
import pytest
from pynetdicom import sop_class

from libs.common.config import Peer, Settings, Site
from libs.common.security import caller_policy, is_loopback
from libs.dimse import Caller
from services.ingest.model.placing import resolve_site
from services.ingest.scp import NOT_OF_A_PATIENT, storage_sop_classes, storage_transfer_syntaxes


def test_every_storage_class_that_pynetdicom_knows() -> None:
    known = {str(uid) for uid in sop_class._STORAGE_CLASSES.values()}
    assert known - NOT_OF_A_PATIENT <= storage_sop_classes()
    assert "1.2.840.10008.5.1.4.1.1.5" in storage_sop_classes(), "retired Nuclear Medicine"
    assert not storage_sop_classes() & {"1.2.840.10008.1.20.1", "1.2.840.10008.1.3.10", "1.2.840.10008.1.1"}


def test_transfer_syntaxes() -> None:
    syntaxes = storage_transfer_syntaxes()
    assert len(set(syntaxes)) == len(syntaxes)
    assert syntaxes[:2] == (pydicom.uid.ExplicitVRLittleEndian, pydicom.uid.ImplicitVRLittleEndian)
    wanted = {
        pydicom.uid.DeflatedExplicitVRLittleEndian,
        pydicom.uid.ExplicitVRBigEndian,
        pydicom.uid.JPEG2000Lossless,
        pydicom.uid.RLELossless,
        pydicom.uid.HTJ2KLossless,
        pydicom.uid.MPEG4HP41,
        pydicom.uid.HEVCMP51,
        pydicom.uid.JPEGLosslessSV1,
        pydicom.uid.JPEGLossless,
    }
    assert wanted <= set(syntaxes)
    assert not [uid for uid in syntaxes if "JPIP" in pydicom.uid.UID(uid).name or "SMPTE" in pydicom.uid.UID(uid).name]


def caller(calling: str = "SCANNER", called: str = "SAGITTAL", host: str = "10.1.2.3") -> Caller:
    return Caller("1", calling, called, host, 1)


SITES = (
    Site(code="A", called_ae_titles=("A_PACS",)),
    Site(code="B", calling_ae_titles=("B_CT",)),
    Site(code="C", networks=("10.1.0.0/16", "fd00::/8")),
)


@pytest.mark.parametrize(
    ("rule", "who", "reason"),
    [
        ("loopback", caller(host="127.0.0.1"), None),
        ("loopback", caller(host="::ffff:127.0.0.1"), None),
        ("loopback", caller(), 3),
        ("loopback", caller("B_CT"), None),
        ("loopback", caller("PEER"), None),
        ("never", caller(host="127.0.0.1"), 3),
        ("never", caller("PEER"), None),
        ("always", caller(), None),
        ("always", caller(called="OTHER"), 7),
        ("always", caller(called="A_PACS"), None),
    ],
)
async def test_caller_policy(rule: str, who: Caller, reason: int | None) -> None:
    peer = Peer(ae_title="PEER", host="h", port=1)
    settings = Settings.model_validate({"sites": SITES, "peers": (peer,), "accept_unknown_callers": rule})
    rejection = await caller_policy(settings)(who)
    assert (rejection.reason if rejection else None) == reason


def test_loopback_by_name_or_zone() -> None:
    assert is_loopback("::1")
    assert not is_loopback("fe80::1%eth0")
    assert not is_loopback("localhost.example")


@pytest.mark.parametrize(
    ("who", "site"),
    [
        (caller(host="192.0.2.1"), "MAIN"),
        (caller(called="A_PACS", host="10.1.2.3"), "A"),
        (caller("B_CT"), "B"),
        (caller(), "C"),
        (caller(host="::ffff:10.1.9.9"), "C"),
        (caller(host="fd00::1"), "C"),
        (caller(host="unknown"), "MAIN"),
    ],
)
def test_site(who: Caller, site: str) -> None:
    settings = Settings(site="MAIN", sites=SITES)
    found = resolve_site(
        settings, called_ae_title=who.called_ae_title, calling_ae_title=who.calling_ae_title, host=who.host
    )
    assert found == site
