"""The ``sagittal`` command."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
from pathlib import Path
from typing import Annotated

import typer
import uvloop
from pydantic import ValidationError
from rich.console import Console

from cli import importing, operations, scu
from cli.cluster import run_cluster
from cli.composition import SERVICES, builders
from cli.embedded import up as run_up
from libs.common.config import Settings
from libs.common.errors import Invalid, SagittalError
from libs.common.runtime import Running, Share, run
from libs.common.security import caller_policy
from libs.common.telemetry import configure_logging

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Sagittal: an archive for medical images.")
console = Console(highlight=False)


def load_settings() -> Settings:
    """The settings of this process. Raises Invalid that names the setting to correct."""
    try:
        return Settings()
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors(include_input=False))
        raise Invalid(f"the settings (SAGITTAL_... or sagittal.toml) are not right: {problems}") from None


@app.command()
def up(
    data: Annotated[Path | None, typer.Option(help="Folder for everything that is kept.")] = None,
    dimse_port: Annotated[int | None, typer.Option(help="DICOM port; 0 picks a free one.")] = None,
    http_port: Annotated[int | None, typer.Option(help="HTTP port; 0 picks a free one.")] = None,
) -> None:
    """Run the whole archive here, with a mongod of its own; nothing else to install."""
    for name, value in (("DATA", data), ("DIMSE_PORT", dimse_port), ("HTTP_PORT", http_port)):
        if value is not None:
            os.environ[f"SAGITTAL_{name}"] = str(value)
    settings = load_settings()
    configure_logging(settings, "up")
    run_up(settings, console)


@app.command("run")
def run_services(
    services: Annotated[list[str], typer.Argument(help=f"Any of: {', '.join(SERVICES)}.")],
    ready_fd: Annotated[int, typer.Option(hidden=True)] = -1,
) -> None:
    """Host one or more services in this process (the distributed form)."""
    settings = load_settings()
    configure_logging(settings, "+".join(services))
    _host(services, settings, Share(), ready_fd)


@app.command(hidden=True)
def worker(
    doors: Annotated[bool, typer.Option("--doors")] = False,
    reactions: Annotated[bool, typer.Option("--reactions")] = False,
    dimse_fd: Annotated[int, typer.Option()] = -1,
    http_fd: Annotated[int, typer.Option()] = -1,
    ready_fd: Annotated[int, typer.Option()] = -1,
) -> None:
    """One process of the embedded archive."""
    settings = load_settings()
    configure_logging(settings, "doors" if doors else "reactions")
    share = Share(
        doors=doors,
        reactions=reactions,
        dimse_socket=socket.socket(fileno=dimse_fd) if dimse_fd >= 0 else None,
        http_socket=socket.socket(fileno=http_fd) if http_fd >= 0 else None,
    )
    _host([], settings, share, ready_fd)


def _host(services: list[str], settings: Settings, share: Share, ready_fd: int) -> None:
    if not settings.mongo_url:
        raise Invalid("no MongoDB: set SAGITTAL_MONGO_URL (or MONGO_URL), or use `sagittal up`, which starts its own")

    def on_ready(running: Running) -> None:
        if ready_fd >= 0:
            os.write(ready_fd, json.dumps({"dimse": running.dimse_port, "http": running.http_port}).encode())
            os.close(ready_fd)

    chosen = builders(services)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run(chosen, settings, share=share, policy=caller_policy(settings), on_ready=on_ready))


@app.command()
def cluster(
    data: Annotated[Path, typer.Option(help="Folder for everything that is kept.")] = Path(".run/cluster"),
) -> None:
    """Run the distributed form on this machine: RabbitMQ, mongod, S3, and one process per service."""
    settings = load_settings()
    configure_logging(settings, "cluster")
    run_cluster(data, settings, console)


operations.register(app, load_settings)
importing.register(app)
scu.register(app)


def main() -> None:
    """Run the command; a failure is one sentence on standard error and exit code 2."""
    try:
        app()
    except SagittalError as error:
        Console(stderr=True, highlight=False).print(f"sagittal: {error}", style="red", soft_wrap=True, markup=False)
        sys.exit(2)


if __name__ == "__main__":
    main()
