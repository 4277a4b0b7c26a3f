"""What a service is, and how any set of services runs in one process."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
import uvicorn
from fastapi import APIRouter, FastAPI
from fastapi.responses import JSONResponse, Response
from motor.motor_asyncio import AsyncIOMotorDatabase

from libs.common import database as databases
from libs.common.bus import open_bus
from libs.common.bus.port import Bus, Subscription
from libs.common.config import Settings
from libs.common.errors import Invalid, NotFound, Unavailable
from libs.common.objects import open_objects
from libs.common.objects.port import Objects
from libs.common.telemetry import render_metrics
from libs.dimse import CallerPolicy, Scp
from libs.dimse.acceptor import Acceptor, serve

log = structlog.get_logger()


@dataclass(frozen=True)
class Job:
    """Periodic work: ``run`` is called every ``every`` seconds, never twice at the same time in one process."""

    name: str
    every: float
    run: Callable[[], Awaitable[None]]


@dataclass(frozen=True)
class Resources:
    """What the process lends to the services it hosts."""

    settings: Settings
    database: AsyncIOMotorDatabase[dict[str, Any]]
    objects: Objects
    bus: Bus


@dataclass(frozen=True)
class Service:
    """All that a service says about itself. ``start`` runs before its doors open, ``stop`` after they closed."""

    name: str
    scp: Sequence[Scp] = ()
    http: APIRouter | None = None
    subscriptions: Sequence[Subscription] = ()
    jobs: Sequence[Job] = ()
    start: Callable[[], Awaitable[None]] | None = None
    stop: Callable[[], Awaitable[None]] | None = None


Build = Callable[[Resources], Service]


@dataclass(frozen=True)
class Share:
    """What part of its services a process takes on, and the sockets it was given (None: it binds its own)."""

    doors: bool = True
    reactions: bool = True
    dimse_socket: socket.socket | None = None
    http_socket: socket.socket | None = None


@dataclass
class Running:
    """The addresses of a running process; ports are 0 where it opened none."""

    dimse_port: int = 0
    http_port: int = 0


def bind(host: str, port: int, what: str) -> socket.socket:
    """A listening TCP socket. Raises Invalid with what to do when the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(512)
    except OSError as error:
        listener.close()
        raise Invalid(
            f"cannot listen on {host}:{port} for {what} ({error.strerror}); stop what uses it or set "
            f"SAGITTAL_{what}_PORT (0 picks a free one)"
        ) from error
    listener.setblocking(False)
    return listener


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # the runtime handles signals, so that everything drains in order


def _web(services: Sequence[Service], resources: Resources) -> FastAPI:
    app = FastAPI(title="Sagittal", docs_url=None, redoc_url=None, openapi_url="/openapi.json")

    @app.get("/healthz", include_in_schema=False)
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/readyz", include_in_schema=False)
    async def readyz() -> JSONResponse:
        missing = await _missing(resources)
        body = {"status": "ready" if not missing else "not ready", "missing": missing}
        return JSONResponse(body, status_code=200 if not missing else 503)

    @app.get("/metrics", include_in_schema=False)
    async def metrics() -> Response:
        content, content_type = render_metrics()
        return Response(content, media_type=content_type)

    for failure, code in ((Invalid, 400), (NotFound, 404), (Unavailable, 503)):

        async def answer(_request: Any, error: Exception, code: int = code) -> JSONResponse:
            headers = {"Retry-After": "5"} if code == 503 else None
            return JSONResponse({"error": str(error)}, status_code=code, headers=headers)

        app.add_exception_handler(failure, answer)
    for service in services:
        if service.http is not None:
            app.include_router(service.http)
    return app


async def _missing(resources: Resources) -> list[str]:
    missing = []
    try:
        await asyncio.wait_for(resources.database.command("ping"), 3)
    except Exception:
        missing.append("MongoDB does not answer")
    try:
        if not await asyncio.wait_for(resources.bus.healthy(), 3):
            missing.append("the event bus is away (events wait in the outbox)")
    except Exception:
        missing.append("the event bus does not answer")
    try:
        await asyncio.wait_for(resources.objects.free_bytes(), 5)
    except Exception:
        missing.append("the object store does not answer")
    return missing


async def _repeat(job: Job) -> None:
    """Run one job for ever; a failure is logged and the next turn comes as planned."""
    while True:
        began = time.monotonic()
        try:
            await job.run()
        except Unavailable as error:
            log.warning("job.delayed", job=job.name, reason=str(error))
        except Exception:
            log.exception("job.failed", job=job.name)
        await asyncio.sleep(max(0.05, job.every - (time.monotonic() - began)))


async def _started(what: str, action: Callable[[], Awaitable[None]], patience: float = 60.0) -> None:
    """Call ``action`` until it works: neighbours may come up after us. Raises Unavailable after ``patience`` s."""
    deadline = time.monotonic() + patience
    while True:
        try:
            await action()
            return
        except Unavailable as error:
            if time.monotonic() > deadline:
                raise
            log.warning("runtime.waiting", what=what, reason=str(error))
            await asyncio.sleep(1.0)


async def run(
    builders: Sequence[Build],
    settings: Settings,
    *,
    share: Share | None = None,
    policy: CallerPolicy | None = None,
    on_ready: Callable[[Running], None] | None = None,
    until: asyncio.Event | None = None,
) -> None:
    """Host the services until SIGTERM or SIGINT (or ``until`` is set), then drain them and return.

    Draining: stop accepting, finish what is in hand, acknowledge, disconnect. Raises Unavailable when MongoDB, the
    bus or the object store cannot be reached within a minute at the start.
    """
    share = share or Share()
    stopping = until or asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        with contextlib.suppress(NotImplementedError, ValueError, RuntimeError):
            loop.add_signal_handler(number, stopping.set)
    database = databases.connect(settings.mongo_url, settings.mongo_database)
    objects = open_objects(settings)
    bus = open_bus(settings, database, owner=f"{socket.gethostname()}:{os.getpid()}")
    resources = Resources(settings, database, objects, bus)
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(database.client.close)
        await _started("the object store", objects.start)
        stack.push_async_callback(objects.stop)
        await _started("the event bus", bus.start)
        stack.push_async_callback(bus.stop)
        services = [build(resources) for build in builders]
        for service in services:
            for subscription in service.subscriptions:
                await bus.declare(subscription)
            if service.start is not None:
                await _started(service.name, service.start)
            if service.stop is not None:
                stack.push_async_callback(service.stop)
        if share.reactions:
            await _react(services, bus, stack)
        running = Running()
        if share.doors:
            await _open_doors(services, resources, share, policy, stack, running)
        log.info("runtime.ready", services=[s.name for s in services], doors=share.doors, reactions=share.reactions)
        if on_ready is not None:
            on_ready(running)
        await stopping.wait()
        log.info("runtime.draining")
    log.info("runtime.stopped")


async def _react(services: Sequence[Service], bus: Bus, stack: contextlib.AsyncExitStack) -> None:
    for service in services:
        for subscription in service.subscriptions:
            await bus.subscribe(subscription)
    jobs = [asyncio.create_task(_repeat(job), name=job.name) for service in services for job in service.jobs]

    async def end_jobs() -> None:
        for task in jobs:
            task.cancel()
        await asyncio.gather(*jobs, return_exceptions=True)

    stack.push_async_callback(end_jobs)


async def _open_doors(
    services: Sequence[Service],
    resources: Resources,
    share: Share,
    policy: CallerPolicy | None,
    stack: contextlib.AsyncExitStack,
    running: Running,
) -> None:
    settings = resources.settings
    config = uvicorn.Config(
        _web(services, resources),
        log_config=None,
        access_log=False,
        lifespan="off",
        timeout_graceful_shutdown=int(settings.drain_seconds) or 1,
    )
    server = _Server(config)
    http = share.http_socket or bind(settings.host, settings.http_port, "HTTP")
    serving = asyncio.create_task(server.serve(sockets=[http]), name="http")

    async def end_http() -> None:
        server.should_exit = True
        await serving

    stack.push_async_callback(end_http)
    running.http_port = http.getsockname()[1]
    roles = [scp for service in services for scp in service.scp]
    if not roles:
        return
    spool = Path(tempfile.mkdtemp(prefix="sagittal-spool-"))
    stack.callback(lambda: spool.rmdir() if not any(spool.iterdir()) else None)
    acceptor: Acceptor = await serve(
        roles,
        ae_title=settings.ae_title,
        host=settings.host,
        port=settings.dimse_port,
        sock=share.dimse_socket or bind(settings.host, settings.dimse_port, "DIMSE"),
        policy=policy,
        max_associations=settings.max_associations,
        spool_dir=spool,
    )
    stack.push_async_callback(lambda: acceptor.stop(settings.drain_seconds))
    running.dimse_port = acceptor.port
