"""Where an instance belongs: its checked identity, its object key and its site."""

from __future__ import annotations

import ipaddress

from libs.common.config import Settings
from libs.common.dicom.uids import clean_uid, is_usable_uid
from services.ingest.model.refusal import DoesNotMatch
from services.ingest.model.scan import Identity


def check_identity(identity: Identity, *, sop_class_uid: str, sop_instance_uid: str) -> None:
    """Compare a dataset with its command and make sure that its UIDs can name things here.

    Raises DoesNotMatch with the tag that is wrong.
    """
    named = (
        ("SOP Class UID (0008,0016)", identity.sop_class_uid),
        ("SOP Instance UID (0008,0018)", identity.sop_instance_uid),
        ("Study Instance UID (0020,000D)", identity.study_instance_uid),
        ("Series Instance UID (0020,000E)", identity.series_instance_uid),
    )
    for name, uid in named:
        if not uid:
            raise DoesNotMatch(f"{name} is missing")
        if not is_usable_uid(uid) or uid.startswith("."):
            raise DoesNotMatch(f"{name} is not a UID")
    if identity.sop_class_uid != clean_uid(sop_class_uid):
        raise DoesNotMatch("SOP Class UID (0008,0016) differs from the C-STORE command")
    if identity.sop_instance_uid != clean_uid(sop_instance_uid):
        raise DoesNotMatch("SOP Instance UID (0008,0018) differs from the C-STORE command")


def object_key(identity: Identity, sha256: str) -> str:
    """The key of the Part 10 object with this digest (hex). The identity has passed ``check_identity``."""
    return (
        f"instances/{identity.study_instance_uid}/{identity.series_instance_uid}"
        f"/{identity.sop_instance_uid}/{sha256[:16]}.dcm"
    )


def quarantine_key(quarantine_id: str) -> str:
    """The key under which the bytes of something refused are kept."""
    return f"quarantine/{quarantine_id}.bin"


def resolve_site(settings: Settings, *, called_ae_title: str, calling_ae_title: str, host: str) -> str:
    """The code of the first site that lists the called AE title, the calling AE title or the address; else ours."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        address = None
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    for site in settings.sites:
        if called_ae_title in site.called_ae_titles or calling_ae_title in site.calling_ae_titles:
            return site.code
        if address is not None and any(address in ipaddress.ip_network(network) for network in site.networks):
            return site.code
    return settings.site
