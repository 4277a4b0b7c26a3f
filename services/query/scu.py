"""Associations to C-MOVE destinations."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence

from libs.common.config import Peer
from libs.dimse.model import OutgoingInstance, SendInstance, Status
from libs.dimse.requestor import connect, plan_associations


class DimseDestination:
    """A configured peer, as the receiver of the sub-operations of one C-MOVE request."""

    def __init__(self, peer: Peer, *, calling_ae_title: str, originator_ae_title: str, message_id: int) -> None:
        self._peer = peer
        self._calling_ae_title = calling_ae_title
        self._originator_ae_title = originator_ae_title
        self._message_id = message_id

    def plan(self, instances: Sequence[OutgoingInstance]) -> Sequence[Sequence[OutgoingInstance]]:
        """Groups that fit into the 128 presentation contexts of one association."""
        return [group for _, group in plan_associations(instances)]

    @contextlib.asynccontextmanager
    async def open(self, instances: Sequence[OutgoingInstance]) -> AsyncIterator[SendInstance]:
        """An association whose contexts fit the instances. Raises DimseError."""
        ((contexts, _),) = plan_associations(instances)
        async with connect(
            self._peer.host,
            self._peer.port,
            called_ae_title=self._peer.ae_title,
            calling_ae_title=self._calling_ae_title,
            contexts=contexts,
        ) as association:

            async def send(instance: OutgoingInstance) -> Status:
                return await association.store(
                    instance,
                    move_originator_ae_title=self._originator_ae_title,
                    move_originator_message_id=self._message_id,
                )

            yield send
