"""What the handlers need of a shelf: the promise of the image index."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime, timedelta
from typing import Protocol, TypeVar

from services.indexing.model import Collection, Document, State

Result = TypeVar("Result")

NAMESPACE = uuid.UUID("6e0d5c0a-52a5-4c3e-8f0b-0d4c2f5b7a11")
"""For ids that follow from what they name, so that doing a thing twice tells the same thing twice."""


class Index(Protocol):
    """The image index, whatever keeps it. Every method raises Unavailable when it is away."""

    async def change(self, wanted: Iterable[tuple[Collection, str]], decide: Callable[[State], Result]) -> Result:
        """Let the pure function ``decide`` change the wanted documents, all or nothing; it may be called again."""

    async def quarantine(self, document: Document) -> None:
        """Keep why something could not be indexed, once per ``_id``."""

    async def claim_quiet_study(self, quiet: timedelta, lease: timedelta, token: str) -> Document | None:
        """Lease one study that nothing arrived for."""

    async def announced(self, study: Document, token: str) -> Document | None:
        """The next revision of the leased study was announced; gives the study as it is now."""

    async def untold_changes(self, older_than: timedelta) -> list[Document]:
        """Studies that opened again without it having been told."""

    async def change_told(self, study: Document) -> None:
        """It has been told."""

    async def begin_rebuild(self) -> None:
        """Empty the image index, and keep what the objects do not say (who sent what, when, to which site) aside."""

    async def remembered(self, sop_instance_uids: Iterable[str]) -> Mapping[str, Document]:
        """What was put aside about versions of these instances, by object key."""

    async def end_rebuild(self, quiet_since: datetime) -> None:
        """Forget what was put aside; studies with something newer than ``quiet_since`` wait to become stable."""
