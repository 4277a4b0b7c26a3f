"""Commands for those who run an archive: ``status``, ``dead-letters`` and ``rebuild``."""

from __future__ import annotations

import asyncio
import json
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn
from rich.table import Table

from cli.composition import builders
from cli.embedded import attach
from libs.common import database as databases
from libs.common.bus import open_bus
from libs.common.config import Settings
from libs.common.errors import NotFound
from libs.common.objects import open_objects
from libs.common.runtime import Resources
from services.indexing.service import rebuild as rebuild_index

console = Console(highlight=False)


@asynccontextmanager
async def _resources(settings: Settings) -> AsyncIterator[Resources]:
    database = databases.connect(settings.mongo_url, settings.mongo_database)
    objects = open_objects(settings)
    bus = open_bus(settings, database, owner="cli")
    try:
        await objects.start()
        await bus.start()
        resources = Resources(settings, database, objects, bus)
        # RabbitMQ tells only of queues that are named: name those of every service.
        for build in builders([]):
            for subscription in build(resources).subscriptions:
                await bus.declare(subscription)
        yield resources
    finally:
        await bus.stop()
        await objects.stop()
        database.client.close()


def _run(load: Callable[[], Settings], action: Callable[[Resources], Awaitable[None]]) -> None:
    async def main() -> None:
        async with _resources(attach(load())) as resources:
            await action(resources)

    asyncio.run(main())


def _ready(settings: Settings) -> str:
    if not settings.http_port:
        return "not asked (set SAGITTAL_HTTP_PORT to the port of the service to ask)"
    url = f"http://{settings.host}:{settings.http_port}/readyz"
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return str(json.load(answer)["status"])
    except urllib.error.HTTPError as error:
        return "not ready: " + "; ".join(json.load(error).get("missing", []))
    except OSError as error:
        return f"does not answer at {url} ({error})"


async def _counts(resources: Resources) -> dict[str, int]:
    names = ("patients", "studies", "series", "instances", "quarantine", "outbox")
    counted = await asyncio.gather(*(resources.database[name].estimated_document_count() for name in names))
    return dict(zip(names, counted, strict=True))


async def _status(resources: Resources, as_json: bool) -> None:
    queues = await resources.bus.queues()
    counts = await _counts(resources)
    free = await resources.objects.free_bytes()
    ready = await asyncio.to_thread(_ready, resources.settings)
    if as_json:
        rows = [vars(q) if hasattr(q, "__dict__") else q for q in queues]
        console.print_json(json.dumps({"ready": ready, "queues": rows, "counts": counts, "free_bytes": free}))
        return
    console.print(f"Archive {resources.settings.ae_title}: {ready}")
    table = Table("queue", "ready", "in hand", "delayed", "dead letters")
    for queue in queues:
        table.add_row(queue.queue, str(queue.ready), str(queue.in_flight), str(queue.delayed), str(queue.dead))
    console.print(table)
    console.print("  ".join(f"{name} {count}" for name, count in counts.items()))
    if free is not None:
        console.print(f"free disk {free / 1e9:.1f} GB")


async def _find_dead(resources: Resources, identifier: str) -> Any:
    for letter in await resources.bus.dead_letters(limit=100_000):
        if letter.id == identifier:
            return letter
    raise NotFound(f"no dead letter {identifier}; `sagittal dead-letters list` shows them")


def register(app: typer.Typer, load: Callable[[], Settings]) -> None:
    """Add the commands to the application."""

    @app.command()
    def status(as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False) -> None:
        """Services, queues, dead letters, counts and disk of a running archive."""
        _run(load, lambda resources: _status(resources, as_json))

    @app.command()
    def rebuild(yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False) -> None:
        """Drop the image index in MongoDB and build it again from the object store."""
        if not yes:
            typer.confirm("Drop the image index and rebuild it from the stored objects?", abort=True)

        async def action(resources: Resources) -> None:
            with Progress(SpinnerColumn(), TextColumn("{task.completed} instances indexed"), console=console) as bar:
                task = bar.add_task("rebuild", total=None)
                count = await rebuild_index(resources, lambda done: bar.update(task, completed=done))
            console.print(f"Rebuilt the index of {count} instances.")

        _run(load, action)

    letters = typer.Typer(no_args_is_help=True, help="Events that were given up: look, replay, discard.")
    app.add_typer(letters, name="dead-letters")

    @letters.command("list")
    def list_letters(queue: str = "", limit: int = 100) -> None:
        """Dead letters with their reasons, oldest first."""

        async def action(resources: Resources) -> None:
            table = Table("id", "queue", "event", "attempts", "failed at", "reason")
            for letter in await resources.bus.dead_letters(queue or None, limit):
                when = letter.failed_at.isoformat(timespec="seconds")
                table.add_row(letter.id, letter.queue, letter.event_key, str(letter.attempts), when, letter.reason)
            console.print(table)

        _run(load, action)

    @letters.command()
    def show(identifier: str) -> None:
        """One dead letter, whole."""

        async def action(resources: Resources) -> None:
            letter = await _find_dead(resources, identifier)
            console.print(f"{letter.queue}: {letter.reason} (after {letter.attempts} attempts)")
            console.print_json(json.dumps(letter.document, default=str))

        _run(load, action)

    @letters.command()
    def replay(identifier: str) -> None:
        """Offer a dead letter to its queue again; `all` replays every one."""

        async def action(resources: Resources) -> None:
            if identifier == "all":
                chosen = [letter.id for letter in await resources.bus.dead_letters(limit=100_000)]
            else:
                chosen = [(await _find_dead(resources, identifier)).id]
            done = sum([await resources.bus.replay(one) for one in chosen])
            console.print(f"{done} replayed")

        _run(load, action)

    @letters.command()
    def discard(identifier: str) -> None:
        """Delete a dead letter for good."""

        async def action(resources: Resources) -> None:
            letter = await _find_dead(resources, identifier)
            await resources.bus.discard(letter.id)
            console.print("discarded")

        _run(load, action)
