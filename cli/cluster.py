"""``sagittal cluster``: the distributed form on one machine without containers: real servers, a process per service."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import structlog
from rich.console import Console

from cli.composition import SERVICES
from cli.servers.mongod import Mongod
from cli.servers.rabbitmq import RabbitMQ
from cli.servers.s3 import S3
from cli.workers import Worker, revive
from libs.common.config import Settings

log = structlog.get_logger()


class Cluster:
    """Private RabbitMQ, mongod and S3 servers on free ports and one process per service.

    Services are reached by ``workers[name].ports`` (``dimse`` and ``http``). ``environment`` is what they were told.
    """

    def __init__(self, data: Path, settings: Settings | None = None, extra: dict[str, str] | None = None) -> None:
        self.data = data.resolve()
        self.settings = settings or Settings()
        self.extra = extra or {}
        self.environment: dict[str, str] = {}
        self.workers: dict[str, Worker] = {}
        self.mongod: Mongod
        self.rabbitmq: RabbitMQ
        self.s3: S3

    def start(self) -> None:
        """Start the servers, then the services; returns when all are ready. Raises Unavailable."""
        self.data.mkdir(parents=True, exist_ok=True)
        (self.data / "logs").mkdir(exist_ok=True)
        try:
            self.mongod = Mongod.start(self.data / "mongod")
            self.rabbitmq = RabbitMQ.start(self.data / "rabbitmq")
            self.s3 = S3.start(self.data / "s3")
            self.environment = {
                "SAGITTAL_BUS": "rabbitmq",
                "SAGITTAL_OBJECTS": "s3",
                "SAGITTAL_MONGO_URL": self.mongod.url,
                "SAGITTAL_RABBITMQ_URL": self.rabbitmq.url,
                "SAGITTAL_S3_URL": self.s3.url,
                "SAGITTAL_S3_ACCESS_KEY": self.s3.access_key,
                "SAGITTAL_S3_SECRET_KEY": self.s3.secret_key,
                "SAGITTAL_DIMSE_PORT": "0",
                "SAGITTAL_HTTP_PORT": "0",
                **self.extra,
            }
            for name in SERVICES:
                log_file = self.data / "logs" / f"{name}.log"
                self.workers[name] = Worker(name, ["run", name], self.environment, log=log_file)
                self.workers[name].start()
            for name, worker in self.workers.items():
                ports = worker.wait_ready()
                # From now on a restarted process comes back on the ports that its callers know.
                worker.environment = {
                    **worker.environment,
                    "SAGITTAL_DIMSE_PORT": str(ports["dimse"]),
                    "SAGITTAL_HTTP_PORT": str(ports["http"]),
                }
                log.info("cluster.service", service=name, **ports)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Drain the services, then stop the servers."""
        for worker in self.workers.values():
            worker.stop()
        for name in ("rabbitmq", "s3", "mongod"):
            server = getattr(self, name, None)
            if server is not None:
                server.stop()


def run_cluster(data: Path, settings: Settings, console: Console) -> None:
    """Run a cluster in the foreground until SIGINT or SIGTERM; services that end are started again."""
    stop = False

    def ask(_number: int, _frame: object) -> None:
        nonlocal stop
        stop = True

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, ask)
    cluster = Cluster(data, settings)
    cluster.start()
    try:
        console.print(f"[bold]Sagittal cluster is up[/bold]  data in {cluster.data}  S3 by {cluster.s3.kind}")
        for name, worker in cluster.workers.items():
            dimse = f"DICOM {settings.ae_title} at 127.0.0.1:{worker.ports['dimse']}  " if worker.ports["dimse"] else ""
            console.print(f"  {name:<10}{dimse}http://127.0.0.1:{worker.ports['http']}/readyz")
        console.print("  Ctrl-C stops it.")
        last: dict[str, float] = {}
        while not stop:
            for name in revive(list(cluster.workers.values()), last):
                log.error("service.restarted", service=name)
            time.sleep(0.2)
        console.print("Stopping ...")
    finally:
        cluster.stop()
