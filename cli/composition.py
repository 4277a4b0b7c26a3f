"""The services of this distribution by name: the one place that knows them all."""

from __future__ import annotations

from libs.common.errors import Invalid
from libs.common.runtime import Build
from services.indexing.service import build as build_indexing
from services.ingest.service import build as build_ingest
from services.query.service import build as build_query

SERVICES: dict[str, Build] = {
    "ingest": build_ingest,
    "indexing": build_indexing,
    "query": build_query,
}


def builders(names: list[str]) -> list[Build]:
    """The build functions of the named services; all of them for an empty list. Raises Invalid for another name."""
    unknown = [name for name in names if name not in SERVICES]
    if unknown:
        raise Invalid(f"no service named {', '.join(unknown)}; there are: {', '.join(SERVICES)}")
    return [SERVICES[name] for name in names or SERVICES]
