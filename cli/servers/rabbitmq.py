"""A private RabbitMQ node with its own name, folders, cookie and port mapper."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
from pathlib import Path

from cli.servers.process import Server, free_port
from libs.common.errors import Unavailable

BINARY = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")


class RabbitMQ(Server):
    """``url`` is what clients connect to."""

    name = "RabbitMQ"

    def __init__(self, data: Path) -> None:
        if not BINARY.exists():
            raise Unavailable("no RabbitMQ here: install the package `rabbitmq-server`, or set RABBITMQ_URL")
        self.port = free_port()
        self.url = f"amqp://guest:guest@127.0.0.1:{self.port}/"
        self._epmd_port = free_port()
        configuration = data / "rabbitmq.conf"
        configuration.write_text(
            f"listeners.tcp.default = 127.0.0.1:{self.port}\n"
            "vm_memory_high_watermark.absolute = 1GB\n"
            "disk_free_limit.absolute = 50MB\n"
        )
        environment = {
            "HOME": str(data),
            "RABBITMQ_NODENAME": f"sagittal{self.port}@localhost",
            "RABBITMQ_MNESIA_BASE": str(data / "mnesia"),
            "RABBITMQ_LOG_BASE": str(data / "log"),
            "RABBITMQ_CONFIG_FILE": str(configuration),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(data / "enabled_plugins"),
            "RABBITMQ_PID_FILE": str(data / "pid"),
            "RABBITMQ_DIST_PORT": str(free_port()),
            "ERL_EPMD_PORT": str(self._epmd_port),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "+S 1:1 -kernel inet_dist_use_interface {127,0,0,1}",
        }
        super().__init__([str(BINARY)], data / "server.log", environment)

    @classmethod
    def start(cls, data: Path) -> RabbitMQ:
        """Start on the data folder (made when absent) and wait until it speaks AMQP. Raises Unavailable."""
        data.mkdir(parents=True, exist_ok=True)
        (data / "enabled_plugins").write_text("[].\n")
        server = cls(data.resolve())
        server.restart()
        return server

    def restart(self) -> None:
        """Start again on the same folder, port and node name."""
        self.launch(self._speaks)

    def _speaks(self) -> bool:
        """Whether a connection is greeted with AMQP's Connection.Start frame."""
        try:
            with socket.create_connection(("127.0.0.1", self.port), 2) as connection:
                connection.sendall(b"AMQP\x00\x00\x09\x01")
                connection.settimeout(2)
                return connection.recv(1) == b"\x01"
        except OSError:
            return False

    def kill(self) -> None:
        super().kill()
        # The port mapper daemon has left the process group: end it too, by asking the process table for its port.
        with contextlib.suppress(FileNotFoundError, AttributeError):
            listed = subprocess.run(["pgrep", "-x", "epmd"], capture_output=True, text=True, check=False).stdout
            for pid in listed.split():
                with contextlib.suppress(OSError):
                    environment = Path(f"/proc/{pid}/environ").read_bytes()
                    if f"ERL_EPMD_PORT={self._epmd_port}".encode() in environment.split(b"\0"):
                        os.kill(int(pid), signal.SIGKILL)
