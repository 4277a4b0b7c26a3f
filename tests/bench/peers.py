"""The archives that are measured: each started fresh on free ports with its data in a folder of its own."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import psutil

from cli.cluster import Cluster
from tests.e2e.archives import Up, address_of

ENVIRONMENT = {**os.environ, "TCP_NODELAY": "1"}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def wait_port(port: int, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise TimeoutError(f"nothing listens on {port}")


class Peer(Protocol):
    name: str
    ae_title: str
    store_port: int
    query_port: int

    def start(self, folder: Path) -> None: ...

    def stop(self) -> None: ...

    def memory(self) -> int:
        """Resident bytes of all its processes."""


def tree_memory(pid: int) -> int:
    """Proportional bytes (pages that processes share are counted once) of a process and its children."""
    root = psutil.Process(pid)
    total = 0
    for process in [root, *root.children(recursive=True)]:
        try:
            total += process.memory_full_info().pss
        except psutil.NoSuchProcess:
            continue
    return total


@dataclass
class Embedded:
    name: str = "sagittal up"
    ae_title: str = "SAGITTAL"
    store_port: int = 0
    query_port: int = 0

    def start(self, folder: Path) -> None:
        self._up = Up(folder / "data")
        address = self._up.start()
        self.store_port = self.query_port = address.store_port

    def stop(self) -> None:
        self._up.interrupt()

    def memory(self) -> int:
        return tree_memory(self._up.process.pid)


@dataclass
class Distributed:
    name: str = "sagittal cluster"
    ae_title: str = "SAGITTAL"
    store_port: int = 0
    query_port: int = 0

    def start(self, folder: Path) -> None:
        self._cluster = Cluster(folder)
        self._cluster.start()
        address = address_of(self._cluster)
        self.store_port, self.query_port = address.store_port, address.query_port

    def stop(self) -> None:
        self._cluster.stop()

    def memory(self) -> int:
        return sum(tree_memory(worker.pid) for worker in self._cluster.workers.values())


@dataclass
class Orthanc:
    name: str = "Orthanc"
    ae_title: str = "ORTHANC"
    store_port: int = 0
    query_port: int = 0

    def start(self, folder: Path) -> None:
        binary = shutil.which("Orthanc") or "/usr/sbin/Orthanc"
        self.store_port = self.query_port = free_port()
        http = free_port()
        configuration = folder / "orthanc.json"
        configuration.write_text(
            json.dumps(
                {
                    "StorageDirectory": str(folder / "db"),
                    "IndexDirectory": str(folder / "db"),
                    "DicomPort": self.store_port,
                    "HttpPort": http,
                    "RemoteAccessAllowed": False,
                    "AuthenticationEnabled": False,
                    "DicomAlwaysAllowFind": True,
                    "DicomAlwaysAllowGet": True,
                    "DicomThreadsCount": 16,
                    "Plugins": [],
                }
            )
        )
        with (folder / "log").open("wb") as output:
            self._process = subprocess.Popen(
                [binary, str(configuration)], env=ENVIRONMENT, stdout=output, stderr=output
            )
        wait_port(self.store_port)
        wait_port(http)

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(30)

    def memory(self) -> int:
        return tree_memory(self._process.pid)


@dataclass
class Storescp:
    """Only receives: no database, no fsync, nothing to find. The ceiling of what DCMTK itself takes."""

    name: str = "storescp"
    ae_title: str = "STORESCP"
    store_port: int = 0
    query_port: int = 0

    def start(self, folder: Path) -> None:
        self.store_port = free_port()
        target = folder / "out"
        target.mkdir()
        self._process = subprocess.Popen(
            ["storescp", "--fork", "-od", str(target), "-aet", self.ae_title, str(self.store_port)],
            env=ENVIRONMENT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wait_port(self.store_port)

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(30)

    def memory(self) -> int:
        return tree_memory(self._process.pid)
