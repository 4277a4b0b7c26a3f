"""The TCP connection under an association that we requested: PDUs out with back-pressure, bounded messages in."""

from __future__ import annotations

import asyncio
import contextlib
import os
import ssl
import tempfile
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import BinaryIO, cast

from libs.dimse import wire
from libs.dimse.model import ConnectionRefused, Payload, ProtocolError, TimedOut

READ_CHUNK = 1 << 20
LARGEST_CONTROL_PDU = 1 << 20
"""Bound of every PDU that is not P-DATA; P-DATA is read fragment by fragment and needs no bound."""
LARGEST_IDENTIFIER = 64 << 20
"""Bound of a dataset that is not an instance: identifiers and attribute lists are small."""
_PARTS_PER_WRITE = 256


@dataclass
class Message:
    """A DIMSE message: its presentation context, its command set and its dataset when it has one."""

    context_id: int
    command: dict[int, wire.CommandValue]
    dataset: Payload | None

    def number(self, tag: int) -> int:
        value = self.command.get(tag, 0)
        return value if isinstance(value, int) else 0

    def text(self, tag: int) -> str:
        value = self.command.get(tag, "")
        return value if isinstance(value, str) else ""

    def discard(self) -> None:
        """Delete the file of a spooled dataset."""
        if self.dataset is not None and self.dataset.path is not None:
            self.dataset.path.unlink(missing_ok=True)


class Link:
    """One connection. Every method raises the three kinds of DimseError and nothing else of the network."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        *,
        timeout: float,
        spool_threshold: int,
        spool_directory: Path | None,
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._timeout = timeout
        self._spool_threshold = spool_threshold
        self._spool_directory = spool_directory
        self._left_in_pdu = 0
        self.peer_max_pdu = 0

    @classmethod
    async def open(
        cls,
        host: str,
        port: int,
        *,
        tls: ssl.SSLContext | None,
        connect_timeout: float,
        timeout: float,
        spool_threshold: int,
        spool_directory: Path | None,
    ) -> Link:
        """Connect. Raises ConnectionRefused and TimedOut."""
        try:
            async with asyncio.timeout(connect_timeout):
                reader, writer = await asyncio.open_connection(host, port, ssl=tls, limit=READ_CHUNK)
        except TimeoutError as error:
            raise TimedOut(f"{host}:{port} did not answer within {connect_timeout:g} s.") from error
        except ssl.SSLError as error:
            raise ConnectionRefused(f"TLS with {host}:{port} failed: {error.reason or error}.") from error
        except OSError as error:
            # asyncio words its own OSError: the system's words for the number say more to a person.
            number = error.errno or 0
            reason = os.strerror(number) if number > 0 else str(error.strerror or error)
            raise ConnectionRefused(f"No connection to {host}:{port}: {reason.lower()}.") from error
        writer.transport.set_write_buffer_limits(high=READ_CHUNK)
        return cls(reader, writer, timeout=timeout, spool_threshold=spool_threshold, spool_directory=spool_directory)

    @property
    def is_closing(self) -> bool:
        return self._writer.is_closing()

    def socket_port(self) -> int:
        """The peer's TCP port."""
        name = self._writer.get_extra_info("peername")
        return int(name[1]) if name else 0

    async def write(self, parts: Iterable[wire.Bytes]) -> None:
        """Write, and wait while the peer takes it slower than we give it."""
        iterator = iter(parts)
        try:
            while block := list(islice(iterator, _PARTS_PER_WRITE)):
                self._writer.writelines(block)
                async with asyncio.timeout(self._timeout):
                    await self._writer.drain()
        except TimeoutError as error:
            raise TimedOut(f"The peer took no data for {self._timeout:g} s.") from error
        except OSError as error:
            raise ProtocolError("The peer closed the connection in the middle.") from error

    async def send(
        self,
        context_id: int,
        command: bytes,
        dataset: Sequence[wire.Bytes] | None = None,
    ) -> None:
        await self.write(wire.fragment_message(context_id, command, dataset, self.peer_max_pdu))

    async def send_stream(self, context_id: int, command: bytes, dataset: AsyncIterator[bytes]) -> bool:
        """Send a message whose dataset arrives in pieces. An error of the pieces passes through unchanged."""
        async for block in wire.fragment_stream(context_id, command, dataset, self.peer_max_pdu):
            await self.write(block)
        return True

    async def read_pdu(self, timeout: float) -> tuple[int, bytes]:
        """A PDU as type and body. The body of P-DATA, which may still come while we wait for an end, is dropped."""
        header = await self._exactly(6, timeout)
        pdu_type, length = header[0], int.from_bytes(header[2:], "big")
        if pdu_type == wire.P_DATA:
            while length:
                length -= len(await self._exactly(min(length, READ_CHUNK), timeout))
            return pdu_type, b""
        if length > LARGEST_CONTROL_PDU:
            raise ProtocolError(f"The peer sent a PDU of type {pdu_type} with a length of {length} bytes.")
        return pdu_type, await self._exactly(length, timeout)

    async def read_message(self) -> Message:
        """The next DIMSE message. Instances above the threshold are spooled to a file that the caller deletes."""
        command = bytearray()
        context_id, last = await self._fragment(command, wire.LARGEST_COMMAND)
        while not last:
            following, last = await self._fragment(command, wire.LARGEST_COMMAND)
            if following != context_id:
                raise ProtocolError("The peer mixed the fragments of two messages.")
        elements = wire.decode_command(command)
        dataset = None
        if wire.has_dataset(elements):
            dataset = await self._dataset(context_id, spool=elements[wire.COMMAND_FIELD] == wire.C_STORE)
        return Message(context_id, elements, dataset)

    async def _fragment(self, command: bytearray, limit: int) -> tuple[int, bool]:
        context_id, control, length = await self._fragment_header()
        if not control & 1:
            raise ProtocolError("The peer sent a dataset without a command.")
        if len(command) + length > limit:
            raise ProtocolError("The peer sent a command set longer than any in the standard.")
        command += await self._exactly(length, self._timeout)
        return context_id, bool(control & 2)

    async def _dataset(self, context_id: int, *, spool: bool) -> Payload:
        payload = Payload(0)
        file: BinaryIO | None = None
        held = 0
        try:
            last = False
            while not last:
                following, control, length = await self._fragment_header()
                if control & 1 or following != context_id:
                    raise ProtocolError("The peer mixed the fragments of two messages.")
                last = bool(control & 2)
                payload.size += length
                if not spool and payload.size > LARGEST_IDENTIFIER:
                    raise ProtocolError("The peer sent an identifier that is far too long.")
                while length:
                    piece = await self._exactly(min(length, READ_CHUNK), self._timeout)
                    length -= len(piece)
                    held += len(piece)
                    payload.pieces.append(piece)
                if spool and payload.size > self._spool_threshold and (held >= 4 * READ_CHUNK or last):
                    if file is None:
                        file = cast(
                            BinaryIO,
                            tempfile.NamedTemporaryFile(  # noqa: SIM115 -- lives as long as the message
                                dir=self._spool_directory, suffix=".dataset", delete=False
                            ),
                        )
                        payload.path = Path(file.name)
                    await asyncio.to_thread(file.writelines, payload.pieces)
                    payload.pieces, held = [], 0
        except BaseException:
            if payload.path is not None:
                payload.path.unlink(missing_ok=True)
            raise
        finally:
            if file is not None:
                await asyncio.to_thread(file.close)
        return payload

    async def _fragment_header(self) -> tuple[int, int, int]:
        """Context id, message control header and length of the next fragment (PS3.8 9.3.5.1, Annex E.2)."""
        while not self._left_in_pdu:
            header = await self._exactly(6, self._timeout)
            length = int.from_bytes(header[2:], "big")
            if header[0] == wire.P_DATA:
                if length < 6:
                    raise ProtocolError("The peer sent a P-DATA PDU without a fragment.")
                self._left_in_pdu = length
            else:
                await self._unexpected(header[0], length)
        if self._left_in_pdu < 6:
            raise ProtocolError("The peer sent a P-DATA PDU that ends in the middle of a fragment.")
        header = await self._exactly(6, self._timeout)
        length = int.from_bytes(header[:4], "big") - 2
        self._left_in_pdu -= 6
        if length < 0 or length > self._left_in_pdu:
            raise ProtocolError("The peer sent a fragment that does not fit in its PDU.")
        if not length and not header[5] & 2:
            raise ProtocolError("The peer sent an empty fragment.")
        self._left_in_pdu -= length
        return header[4], header[5], length

    async def _unexpected(self, pdu_type: int, length: int) -> None:
        if length > LARGEST_CONTROL_PDU:
            raise ProtocolError(f"The peer sent a PDU of type {pdu_type} with a length of {length} bytes.")
        body = await self._exactly(length, self._timeout)
        if pdu_type == wire.ABORT:
            self.close()
            raise ProtocolError(f"The peer aborted the association, {wire.abort_reason(body)}.")
        if pdu_type == wire.RELEASE_RQ:
            await self.write([wire.RELEASE_RP_PDU])
            self.close()
            raise ProtocolError("The peer released the association in the middle.")
        raise ProtocolError(f"The peer sent a PDU of type {pdu_type} that has no place here.")

    async def _exactly(self, length: int, timeout: float) -> bytes:
        try:
            async with asyncio.timeout(timeout):
                return await self._reader.readexactly(length)
        except TimeoutError as error:
            raise TimedOut(f"The peer sent nothing for {timeout:g} s.") from error
        except (asyncio.IncompleteReadError, OSError) as error:
            raise ProtocolError("The peer closed the connection in the middle.") from error

    def abort(self, source: int = 0, reason: int = 0) -> None:
        """A-ABORT and close, without waiting for anything still to be written."""
        if self._writer.is_closing():
            return
        transport = self._writer.transport
        stuck = transport.get_write_buffer_size() > 0
        with contextlib.suppress(OSError, RuntimeError):
            self._writer.write(wire.abort_pdu(source, reason))
        if stuck:
            # The peer does not read: close() would wait for it for ever.
            transport.abort()
        else:
            self._writer.close()

    def close(self) -> None:
        self._writer.close()

    async def wait_closed(self) -> None:
        """Give the last bytes a moment to leave, then let the connection go whatever the peer does."""
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(2):
                await self._writer.wait_closed()
        self._writer.transport.abort()
