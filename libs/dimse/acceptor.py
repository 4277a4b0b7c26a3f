"""The listening side: takes connections, gives each to an association, and ends them in order."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl as tls
from collections.abc import Sequence
from pathlib import Path

from libs.dimse.association import AcceptedAssociation, Terms
from libs.dimse.model import CallerPolicy, Scp
from libs.dimse.spool import Budget

DEFAULT_BUDGET = 256 << 20


class Acceptor:
    """A running listener; made by ``serve``."""

    def __init__(self, server: asyncio.Server, terms: Terms) -> None:
        self._server = server
        self._terms = terms

    @property
    def port(self) -> int:
        return int(self._server.sockets[0].getsockname()[1])

    @property
    def associations(self) -> int:
        """Associations (and connections that have not asked for one yet) at this moment."""
        return len(self._terms.associations)

    async def stop(self, drain: float) -> None:
        """Stop accepting, let every request in hand be answered, end what is left after ``drain`` seconds."""
        self._terms.stopping = True
        self._server.close()
        open_now = list(self._terms.associations)
        for association in open_now:
            association.wake()
        if open_now:
            closing = [asyncio.ensure_future(association.until_closed()) for association in open_now]
            _, late = await asyncio.wait(closing, timeout=drain)
            for association in list(self._terms.associations):
                association.abort(0, 0)
            if late:
                await asyncio.wait(late, timeout=3.0)
            for one in late:
                one.cancel()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1.0):
                await self._server.wait_closed()


async def serve(
    scps: Sequence[Scp],
    *,
    ae_title: str,
    host: str = "127.0.0.1",
    port: int = 0,
    sock: socket.socket | None = None,
    policy: CallerPolicy | None = None,
    max_associations: int = 200,
    max_pdu: int = 262_144,
    spool_threshold: int = 32 << 20,
    spool_dir: Path | None = None,
    memory_budget: int = DEFAULT_BUDGET,
    artim: float = 30.0,
    idle_timeout: float = 600.0,
    dimse_timeout: float = 60.0,
    ssl: tls.SSLContext | None = None,
    reuse_port: bool = False,
) -> Acceptor:
    """Listen for associations and answer them by the handlers of ``scps``.

    ``max_pdu`` is the longest P-DATA PDU we take (PS3.8 D.1), in bytes. Datasets above ``spool_threshold`` bytes, and
    all above 1 MiB while the associations together hold more than ``memory_budget`` bytes, go to files in
    ``spool_dir``. Times are in seconds. ``ssl`` makes every connection TLS.
    """
    terms = Terms(
        scps=scps,
        ae_title=ae_title,
        policy=policy,
        max_associations=max_associations,
        max_pdu=max_pdu,
        spool_threshold=spool_threshold,
        spool_dir=spool_dir,
        artim=artim,
        idle_timeout=idle_timeout,
        dimse_timeout=dimse_timeout,
        budget=Budget(memory_budget),
    )
    loop = asyncio.get_running_loop()

    def factory() -> AcceptedAssociation:
        return AcceptedAssociation(terms)

    if sock is not None:
        server = await loop.create_server(factory, sock=sock, ssl=ssl, backlog=512)
    else:
        server = await loop.create_server(factory, host, port, ssl=ssl, backlog=512, reuse_port=reuse_port or None)
    return Acceptor(server, terms)
