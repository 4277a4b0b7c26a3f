"""The wiring of ingest: the storage role on the DIMSE port over the object store and the bus."""

from __future__ import annotations

from libs.common.runtime import Resources, Service
from services.ingest.config import IngestSettings
from services.ingest.handlers import Shelves
from services.ingest.repository import MongoCurrentVersions, MongoQuarantine
from services.ingest.scp import IngestScp


def build(resources: Resources) -> Service:
    """The service, ready to be hosted by ``libs.common.runtime.run``."""
    shelves = Shelves(
        settings=resources.settings,
        ingest=IngestSettings(),
        objects=resources.objects,
        bus=resources.bus,
        quarantine=MongoQuarantine(resources.database),
        versions=MongoCurrentVersions(resources.database),
    )
    return Service(name="ingest", scp=[IngestScp(shelves).scp()])
