"""A private RabbitMQ node with its own name, folders, cookie and port mapper."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import socket
from pathlib import Path

from cli.servers.process import Server, answers, free_port
from libs.common.errors import Unavailable

_FOLDERS = ("/usr/lib/rabbitmq/bin", "/opt/rabbitmq/sbin", "/usr/local/sbin")


def find() -> Path:
    """The server script to run. Raises Unavailable with what to do.

    Debian's script on PATH is a wrapper that becomes the system's rabbitmq user and node, so the real one goes first.
    """
    for folder in _FOLDERS:
        path = Path(folder) / "rabbitmq-server"
        if os.access(path, os.X_OK):
            return path
    on_path = shutil.which("rabbitmq-server")
    if on_path:
        return Path(on_path)
    raise Unavailable(
        "no RabbitMQ here: install it (Debian, Ubuntu: apt install rabbitmq-server), or set SAGITTAL_RABBITMQ_URL to "
        "one that runs"
    )


def _find_epmd() -> str:
    on_path = shutil.which("epmd")
    if on_path is None:
        raise Unavailable("no epmd on PATH: install Erlang (Debian, Ubuntu: apt install erlang-base)")
    return on_path


class RabbitMQ(Server):
    """``url`` is what clients connect to."""

    name = "RabbitMQ"

    def __init__(self, data: Path, port: int) -> None:
        binary = find()
        self.port = port
        self.url = f"amqp://guest:guest@127.0.0.1:{port}/"
        self._epmd_port = free_port()
        self._write_files(data)
        node = hashlib.sha256(str(data).encode()).hexdigest()[:12]  # the folder's name: its queues belong to the node
        environment = {
            "HOME": str(data / "home"),
            "RABBITMQ_NODENAME": f"sagittal-{node}@localhost",
            "RABBITMQ_MNESIA_BASE": str(data / "mnesia"),
            "RABBITMQ_LOG_BASE": str(data / "log"),
            "RABBITMQ_CONFIG_FILE": str(data / "rabbitmq.conf"),
            "RABBITMQ_ADVANCED_CONFIG_FILE": str(data / "advanced.config"),
            "RABBITMQ_CONF_ENV_FILE": str(data / "rabbitmq-env.conf"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(data / "enabled_plugins"),
            "RABBITMQ_PID_FILE": str(data / "pid"),
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(port),
            "RABBITMQ_DIST_PORT": str(free_port()),
            "ERL_EPMD_PORT": str(self._epmd_port),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "ERL_CRASH_DUMP_SECONDS": "0",
            # Schedulers that spin while idle take the cores from everything else on a small machine.
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "+sbwt none +sbwtdcpu none +sbwtdio none "
            "-kernel inet_dist_use_interface {127,0,0,1}",
            # The script then becomes the Erlang VM instead of staying between it and our signals.
            "RUNNING_UNDER_SYSTEMD": "1",
        }
        super().__init__([str(binary)], data / "server.log", environment)
        # Erlang would start its port mapper as a daemon that outlives everything; a child of ours it finds instead.
        self._epmd = Server([_find_epmd(), "-port", str(self._epmd_port)], data / "epmd.log", environment)
        self._epmd.name = "epmd"

    def _write_files(self, data: Path) -> None:
        (data / "home").mkdir(parents=True, exist_ok=True)
        cookie = data / "home" / ".erlang.cookie"
        if not cookie.exists():
            cookie.write_text(secrets.token_hex(20).upper())
            cookie.chmod(0o400)
        (data / "enabled_plugins").write_text("[].\n")
        (data / "rabbitmq-env.conf").write_text("")
        (data / "rabbitmq.conf").write_text(
            f"listeners.tcp.1 = 127.0.0.1:{self.port}\n"
            "vm_memory_high_watermark.absolute = 1GB\n"
            "disk_free_limit.absolute = 50MB\n"
            "raft.wal_max_size_bytes = 67108864\n"  # 64 MB; the default, 512 MB, is for a machine of its own
        )

    @classmethod
    def start(cls, data: Path, port: int | None = None) -> RabbitMQ:
        """Start on the data folder (made when absent) and wait until it speaks AMQP. Raises Unavailable."""
        server = cls(data.resolve(), port or free_port())
        server.restart()
        return server

    def restart(self) -> None:
        """Start again on the same folder, port and node name."""
        try:
            self._epmd.launch(lambda: answers(self._epmd_port), 10.0)
            self.launch(self._speaks)
        except BaseException:
            self.kill()
            raise

    def _speaks(self) -> bool:
        """Whether a connection is greeted with AMQP's Connection.Start frame."""
        try:
            with socket.create_connection(("127.0.0.1", self.port), 2) as connection:
                connection.sendall(b"AMQP\x00\x00\x09\x01")
                connection.settimeout(2)
                return connection.recv(1) == b"\x01"
        except OSError:
            return False

    def stop(self, seconds: float = 30.0) -> None:
        super().stop(seconds)
        self._epmd.stop()

    def kill(self) -> None:
        super().kill()
        self._epmd.kill()
