"""What the handlers need from the shelves."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol

from libs.common.events import ObjectReference
from libs.dimse.model import OutgoingInstance, SendInstance
from services.query.model.answer import Record
from services.query.model.query import Query


@dataclass(frozen=True)
class StoredInstance:
    """One instance that can be handed back, and where its bytes are."""

    sop_instance_uid: str
    sop_class_uid: str
    reference: ObjectReference


class Catalog(Protocol):
    """The image index."""

    async def find(self, query: Query, limit: int) -> list[Record]:
        """At most ``limit`` matches. Raises Unavailable."""

    async def stored(self, query: Query) -> list[StoredInstance]:
        """Every instance under the entities that a retrieval names. Raises Unavailable."""


class Stored(Protocol):
    """The part of the object store that reading needs."""

    async def get(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        """Raises NotFound, Unavailable."""

    def stream(
        self, key: str, offset: int = 0, length: int | None = None, chunk: int = 1 << 20
    ) -> AsyncIterator[bytes]:
        """Raises NotFound, Unavailable."""


class Destination(Protocol):
    """Where a C-MOVE sends to."""

    def plan(self, instances: Sequence[OutgoingInstance]) -> Sequence[Sequence[OutgoingInstance]]:
        """The instances in as few groups as associations are needed, in their order."""

    def open(self, instances: Sequence[OutgoingInstance]) -> AbstractAsyncContextManager[SendInstance]:
        """An association for one group. Raises DimseError when it cannot be had or breaks."""
