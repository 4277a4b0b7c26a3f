"""``sagittal up``: the whole archive from one command, with its own mongod beside it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import structlog
from rich.console import Console

from cli.servers.mongod import Mongod
from cli.workers import Worker, revive
from libs.common.config import Settings
from libs.common.errors import Invalid
from libs.common.runtime import bind

log = structlog.get_logger()
STATE = Path("run") / "archive.json"


@contextlib.contextmanager
def _only_one(data: Path) -> Iterator[None]:
    """Two archives must not share a data folder. Raises Invalid when another one runs on it."""
    data.mkdir(parents=True, exist_ok=True)
    with (data / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise Invalid(
                f"another archive runs on {data}; stop it, or give this one its own folder (SAGITTAL_DATA)"
            ) from error
        yield


class Archive:
    """The processes of an embedded archive: mongod, one with the doors, one with the reactions."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.data = settings.data.resolve()
        self._mongod: Mongod | None = None
        self.workers: list[Worker] = []
        self.dimse_port = 0
        self.http_port = 0

    def start(self) -> None:
        """Start everything and wait until it serves. Raises Invalid or Unavailable with what to do."""
        dimse = bind(self.settings.host, self.settings.dimse_port, "DIMSE")
        http = bind(self.settings.host, self.settings.http_port, "HTTP")
        self.dimse_port, self.http_port = dimse.getsockname()[1], http.getsockname()[1]
        metrics = self.data / "run" / "metrics"
        metrics.mkdir(parents=True, exist_ok=True)
        for old in metrics.glob("*.db"):
            old.unlink()
        mongo_url = self.settings.mongo_url
        if not mongo_url:
            self._mongod = Mongod.start(self.data / "db")
            mongo_url = self._mongod.url
        environment = {
            "SAGITTAL_MONGO_URL": mongo_url,
            "SAGITTAL_DATA": str(self.data),
            "PROMETHEUS_MULTIPROC_DIR": str(metrics),
        }
        self._write_state(mongo_url)
        doors = self._worker("doors", ["--doors"], environment, dimse, http)
        reactions = self._worker("reactions", ["--reactions"], environment)
        self.workers = [doors, reactions]
        for worker in self.workers:
            worker.start()
        for worker in self.workers:
            worker.wait_ready()
        dimse.close()
        http.close()

    def _worker(self, name: str, role: list[str], environment: dict[str, str], *sockets: socket.socket) -> Worker:
        arguments = ["worker", *role]
        fds = []
        for flag, given in zip(("--dimse-fd", "--http-fd"), sockets, strict=False):
            fd = os.dup(given.fileno())  # kept open here, so that a restarted process gets the same listening socket
            os.set_inheritable(fd, True)
            fds.append(fd)
            arguments += [flag, str(fd)]
        return Worker(name, arguments, environment, fds)

    def _write_state(self, mongo_url: str) -> None:
        state = {
            "pid": os.getpid(),
            "mongo_url": mongo_url,
            "dimse_port": self.dimse_port,
            "http_port": self.http_port,
        }
        path = self.data / STATE
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(state))
        temporary.replace(path)

    def watch(self, last: dict[str, float]) -> None:
        """One look: what ended by itself is started again."""
        if self._mongod is not None and not self._mongod.running:
            log.error("mongod.restarted")
            self._mongod.restart()
        for name in revive(self.workers, last):
            log.error("worker.restarted", worker=name)

    def stop(self) -> None:
        """Drain the processes, then stop mongod."""
        for worker in self.workers:
            worker.stop(self.settings.drain_seconds + 10)
        if self._mongod is not None:
            self._mongod.stop()
        (self.data / STATE).unlink(missing_ok=True)


def up(settings: Settings, console: Console) -> None:
    """Run the embedded archive in the foreground until SIGINT or SIGTERM."""
    stop = False

    def ask(_number: int, _frame: object) -> None:
        nonlocal stop
        stop = True

    with _only_one(settings.data.resolve()):
        archive = Archive(settings)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, ask)
        try:
            archive.start()
            _greet(archive, console)
            last: dict[str, float] = {}
            while not stop:
                archive.watch(last)
                time.sleep(0.2)
            console.print("Stopping: finishing what is in hand ...")
        finally:
            archive.stop()
        console.print("Stopped.")


def _greet(archive: Archive, console: Console) -> None:
    settings = archive.settings
    host = settings.host
    console.print(f"[bold]Sagittal is up[/bold]  data in {archive.data}")
    console.print(f"  DICOM   {settings.ae_title} at {host}:{archive.dimse_port}")
    console.print(f"  HTTP    http://{host}:{archive.http_port}/readyz  (metrics at /metrics)")
    console.print("  Try it, in another terminal:")
    console.print(f"    storescu -aec {settings.ae_title} {host} {archive.dimse_port} image.dcm", soft_wrap=True)
    console.print(
        f"    findscu -S -aec {settings.ae_title} -k QueryRetrieveLevel=STUDY -k StudyInstanceUID -k PatientName "
        f"{host} {archive.dimse_port}",
        soft_wrap=True,
    )
    console.print("  Ctrl-C stops it.")


def attach(settings: Settings) -> Settings:
    """The settings with the MongoDB of the embedded archive that runs on the data folder, when none is configured.

    Raises Invalid when there is neither.
    """
    if settings.mongo_url:
        return settings
    path = settings.data.resolve() / STATE
    try:
        state = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise Invalid(
            f"no archive runs on {settings.data.resolve()}: start one with `sagittal up`, name its folder with "
            "SAGITTAL_DATA, or set SAGITTAL_MONGO_URL"
        ) from error
    return settings.model_copy(
        update={
            "mongo_url": state["mongo_url"],
            "dimse_port": state["dimse_port"],
            "http_port": state["http_port"],
        }
    )
