"""Who may open an association: the rules over AE titles and addresses that every DIMSE door shares."""

from __future__ import annotations

import ipaddress

from libs.common.config import Settings
from libs.dimse import Caller, CallerPolicy, Rejection

# A-ASSOCIATE-RJ, permanent, by the service user (PS3.8 table 9-21).
_PERMANENT = 1
_SERVICE_USER = 1
_CALLING_AE_TITLE_NOT_RECOGNISED = 3
_CALLED_AE_TITLE_NOT_RECOGNISED = 7


def caller_policy(settings: Settings) -> CallerPolicy:
    """The policy of this archive.

    The called AE title must be ours or one that a site lists. A calling AE title is known when a peer or a site has
    it; an unknown one is let in always, never, or from this machine only (``accept_unknown_callers``). AE titles are
    claims and not proofs: what must be proven is proven by TLS.
    """
    called = {settings.ae_title, *(title for site in settings.sites for title in site.called_ae_titles)}
    known = {
        *(peer.ae_title for peer in settings.peers),
        *(title for site in settings.sites for title in site.calling_ae_titles),
    }

    async def decide(caller: Caller) -> Rejection | None:
        if caller.called_ae_title.strip() not in called:
            return Rejection(
                _PERMANENT,
                _SERVICE_USER,
                _CALLED_AE_TITLE_NOT_RECOGNISED,
                f"called AE title {caller.called_ae_title!r} is not ours",
            )
        if caller.calling_ae_title.strip() in known or settings.accept_unknown_callers == "always":
            return None
        if settings.accept_unknown_callers == "loopback" and is_loopback(caller.host):
            return None
        return Rejection(
            _PERMANENT,
            _SERVICE_USER,
            _CALLING_AE_TITLE_NOT_RECOGNISED,
            f"calling AE title {caller.calling_ae_title!r} is not known; add it to peers or to a site",
        )

    return decide


def is_loopback(host: str) -> bool:
    """Whether an address is this machine's own loopback; IPv4 addresses mapped into IPv6 count as what they map."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback
