"""Listens for associations (PS3.8) and answers them by the services it was given."""

from __future__ import annotations

import asyncio
import socket
import ssl as tls
from collections.abc import Sequence
from pathlib import Path

from libs.dimse.association import Association, Room, Terms
from libs.dimse.model import CallerPolicy, Scp


class Acceptor:
    """A listener and its associations; made by ``serve``."""

    def __init__(self, server: asyncio.Server, room: Room) -> None:
        self._server = server
        self._room = room
        self.port: int = server.sockets[0].getsockname()[1]

    @property
    def associations(self) -> int:
        """How many associations are established."""
        return self._room.established

    @property
    def held_bytes(self) -> int:
        """Bytes of datasets in memory, of all associations."""
        return self._room.held

    async def stop(self, drain: float) -> None:
        """Stop accepting, let what is in hand finish for up to ``drain`` seconds, then abort the rest.

        Idle associations are released; so is every other one when its handler is done.
        """
        self._room.draining = True
        self._server.close()
        for association in list(self._room.connections):
            association.drain()
        ending = [asyncio.create_task(association.ended.wait()) for association in self._room.connections]
        if ending:
            await asyncio.wait(ending, timeout=drain)
        for task in ending:
            task.cancel()
        await asyncio.gather(*(association.end() for association in list(self._room.connections)))


async def serve(
    scps: Sequence[Scp],
    *,
    ae_title: str,
    host: str,
    port: int = 0,
    sock: socket.socket | None = None,
    policy: CallerPolicy | None = None,
    max_associations: int = 200,
    max_pdu: int = 262144,
    spool_threshold: int = 32 << 20,
    spool_dir: Path | None = None,
    memory_limit: int = 256 << 20,
    artim: float = 30,
    idle_timeout: float = 600,
    dimse_timeout: float = 60,
    ssl: tls.SSLContext | None = None,
    reuse_port: bool = False,
) -> Acceptor:
    """Listen on ``host`` and ``port`` (0: a free one), or on ``sock`` when given. Times are seconds, sizes bytes.

    ``max_pdu`` is the maximum length we advertise. A dataset above ``spool_threshold`` goes to a file in ``spool_dir``
    (None: the system's); above ``memory_limit`` for all associations together every one larger than 1 MiB does.
    ``policy`` decides about each caller, called AE title included; without one every caller is accepted under any
    name, since ``ae_title`` only names us. Raises OSError when the address cannot be had.
    """
    if max_pdu < 4096:
        raise ValueError("the maximum PDU length must be 4096 bytes or more")
    room = Room()
    terms = Terms(
        scps=tuple(scps),
        policy=policy,
        max_associations=max_associations,
        max_pdu=max_pdu,
        spool_threshold=spool_threshold,
        spool_dir=spool_dir,
        memory_limit=memory_limit,
        artim=artim,
        idle_timeout=idle_timeout,
        dimse_timeout=dimse_timeout,
    )
    loop = asyncio.get_running_loop()

    def associate() -> Association:
        return Association(terms, room)

    handshake = artim if ssl is not None else None
    if sock is not None:
        server = await loop.create_server(associate, sock=sock, backlog=512, ssl=ssl, ssl_handshake_timeout=handshake)
    else:
        server = await loop.create_server(
            associate,
            host,
            port,
            backlog=512,
            ssl=ssl,
            ssl_handshake_timeout=handshake,
            reuse_address=True,
            reuse_port=reuse_port or None,
        )
    return Acceptor(server, room)
