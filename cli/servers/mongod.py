"""A private mongod as a replica set of one, which gives transactions and journalled majority writes."""

from __future__ import annotations

import importlib.util
import os
import shutil
import stat
import sys
import time
from pathlib import Path
from typing import Any

import pymongo
from pymongo.errors import OperationFailure, PyMongoError

from cli.servers.process import Server, answers, free_port
from libs.common.errors import Unavailable


def find() -> Path:
    """The mongod to use: SAGITTAL_MONGOD, else one on PATH, else the one of the ``embedded`` extra.

    Raises Unavailable with what to do.
    """
    on_path = os.environ.get("SAGITTAL_MONGOD") or shutil.which("mongod")
    if on_path:
        return Path(on_path)
    spec = importlib.util.find_spec("fiftyone")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        binary = Path(folder) / "db" / "bin" / "mongod"
        if binary.exists():
            if not os.access(binary, os.X_OK):
                binary.chmod(binary.stat().st_mode | stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)
            return binary
    raise Unavailable(
        f"no mongod here: install MongoDB 6 or later so that `mongod` is on PATH (on {sys.platform} the `embedded` "
        "extra may have none), or set SAGITTAL_MONGO_URL to a running replica set"
    )


class Mongod(Server):
    """``url`` is what clients connect to."""

    name = "mongod"

    def __init__(self, data: Path, port: int, cache_gb: float) -> None:
        self.port = port
        self.url = f"mongodb://127.0.0.1:{port}/?replicaSet=rs0&directConnection=true"
        command = [
            str(find()), "--dbpath", str(data), "--port", str(port), "--bind_ip", "127.0.0.1",
            "--replSet", "rs0", "--oplogSize", "256", "--wiredTigerCacheSizeGB", str(cache_gb),
            "--setParameter", "diagnosticDataCollectionEnabled=false", "--nounixsocket",
            # Slow operations are logged with their values, and those are patient data.
            "--slowms", "2000000000", "--quiet",
        ]  # fmt: skip
        super().__init__(command, data / "mongod.log")

    @classmethod
    def start(cls, data: Path, port: int | None = None, cache_gb: float = 0.25) -> Mongod:
        """Start on the data folder (made when absent) and wait until it takes writes. Raises Unavailable.

        The folder may have run on another port before. ``cache_gb`` is WiredTiger's cache, at least 0.25 GB.
        """
        data = data.resolve()
        data.mkdir(parents=True, exist_ok=True)
        server = cls(data, port or free_port(), cache_gb)
        server.restart()
        return server

    def restart(self) -> None:
        """Start again on the same folder and port."""
        self.launch(lambda: answers(self.port))
        client: pymongo.MongoClient[dict[str, Any]] = pymongo.MongoClient(
            "127.0.0.1", self.port, directConnection=True, serverSelectionTimeoutMS=20_000
        )
        with client:
            self._configure(client)

    def _configure(self, client: pymongo.MongoClient[dict[str, Any]]) -> None:
        """Make the replica set, or give it today's port; then wait until this node is its primary."""
        host = f"127.0.0.1:{self.port}"
        try:
            configuration = client["local"]["system.replset"].find_one()
            if configuration is None:
                client.admin.command("replSetInitiate", {"_id": "rs0", "members": [{"_id": 0, "host": host}]})
            elif configuration["members"][0]["host"] != host:
                configuration["members"] = [{"_id": 0, "host": host}]
                configuration["version"] += 1
                client.admin.command("replSetReconfig", configuration, force=True)
        except OperationFailure as error:
            self.kill()
            raise Unavailable(f"mongod refused its replica set configuration: {error.details}") from error
        except PyMongoError as error:
            self.kill()
            raise Unavailable(f"mongod went away while it started ({type(error).__name__}); see {self.log}") from error
        for _ in range(600):
            try:
                hello = client.admin.command("hello")
                if hello.get("isWritablePrimary") and hello.get("me") == host:
                    return
            except PyMongoError:
                pass
            if not self.running:
                break
            time.sleep(0.05)
        self.kill()
        raise Unavailable(f"mongod did not become primary; see {self.log}")
