"""C-FIND: matches of a query, encoded for the caller."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from libs.dimse.model import CANCEL, PENDING, PENDING_UNSUPPORTED_KEYS, SUCCESS, Status
from services.query.handlers.promises import Catalog
from services.query.model.answer import Record, answer
from services.query.model.order import in_order
from services.query.model.query import Query

LIMIT_REACHED = 0xA700
"""Out of resources: PS3.4 C.4.1.1.4 has no warning for C-FIND, and a success would say that these were all."""


async def find(
    query: Query,
    *,
    catalog: Catalog,
    ae_title: str,
    transfer_syntax_uid: str,
    limit: int,
    cancelled: asyncio.Event,
) -> AsyncIterator[tuple[Status, bytes | None]]:
    """Pending responses and the final status (PS3.4 C.4.1). Raises Unavailable when the index is away."""
    records: list[Record] = await catalog.find(query, limit + 1)
    more = len(records) > limit
    pending = PENDING_UNSUPPORTED_KEYS if query.unsupported else PENDING
    for record in in_order(query.level, records[:limit]):
        if cancelled.is_set():
            yield CANCEL, None
            return
        yield pending, answer(query, record, ae_title, transfer_syntax_uid)
    if more:
        yield Status(LIMIT_REACHED, f"More than {limit} matches, the rest is left out"), None
    else:
        yield SUCCESS, None
