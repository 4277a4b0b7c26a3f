"""The wiring of query: one DIMSE role over the image index and the object store."""

from __future__ import annotations

from libs.common.runtime import Resources, Service
from services.query.config import QuerySettings
from services.query.repository import MongoCatalog
from services.query.scp import QueryScp


def build(resources: Resources) -> Service:
    """The service, ready to be hosted by ``libs.common.runtime.run``."""
    settings = resources.settings
    scp = QueryScp(
        catalog=MongoCatalog(resources.database),
        objects=resources.objects,
        settings=QuerySettings(),
        ae_title=settings.ae_title,
        peers=settings.peers,
    )
    return Service(name="query", scp=[scp.scp()])
