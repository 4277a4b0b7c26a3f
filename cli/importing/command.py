"""The command: where to, how far, and what came of it."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cli.embedded import attach
from cli.importing.journal import Journal
from cli.importing.sending import Summary, Target, send_all
from cli.importing.sources import find
from libs.common.config import Settings
from libs.common.errors import Invalid, SagittalError

console = Console(highlight=False)
MOST_SHOWN = 20


def parse_address(text: str) -> tuple[str, int]:
    """HOST:PORT, with an IPv6 address in brackets. Raises Invalid."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise Invalid(f"{text!r} is not HOST:PORT")
    return host.strip("[]"), int(port)


def resolve_target(settings: Settings, to: str, called: str, calling: str, associations: int) -> Target:
    """The named archive, else the one that runs on the data folder, else the configured address."""
    if to:
        host, port = parse_address(to)
    else:
        try:
            port = attach(settings).dimse_port
        except Invalid:
            port = settings.dimse_port
        # An archive that listens on every address is reached on this machine's own.
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)  # noqa: S104
    return Target(host, port, called or settings.ae_title, calling, associations)


def register(app: typer.Typer) -> None:
    """Add the command to the application."""

    @app.command("import")
    def import_files(
        paths: Annotated[list[Path], typer.Argument(help="Files, folders, DICOMDIR or zip archives.")],
        to: Annotated[str, typer.Option(help="HOST:PORT of another archive.")] = "",
        called: Annotated[str, typer.Option(help="Its AE title.")] = "",
        calling: Annotated[str, typer.Option(help="Our AE title.")] = "SAGITTAL-IMPORT",
        associations: Annotated[int, typer.Option(min=1, max=32, help="How many to use at once.")] = 4,
        again: Annotated[bool, typer.Option("--again", help="Also send what an earlier import has stored.")] = False,
    ) -> None:
        """Bring DICOM files into an archive; run it again to go on after an interruption."""
        try:
            settings = Settings()
        except ValidationError as error:
            fields = ", ".join(".".join(map(str, e["loc"])) for e in error.errors(include_input=False))
            raise Invalid(f"the settings (SAGITTAL_... or sagittal.toml) are not right: {fields}") from None
        target = resolve_target(settings, to, called, calling, associations)
        began = time.monotonic()
        summary = run_import(paths, target, settings.data, again=again)
        report(summary, target, time.monotonic() - began)
        raise typer.Exit(1 if summary.refused else 0)


def run_import(paths: list[Path], target: Target, state: Path, *, again: bool = False) -> Summary:
    """Import with a progress bar on the console. Raises Invalid for a wrong path, DimseError when nobody answers."""
    total = sum(1 for _ in find(paths))
    columns = (
        TextColumn("import"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Journal(state, str(target), forget=again) as journal, Progress(*columns, console=console) as bar:
        task = bar.add_task("import", total=total, rate="")
        began = time.monotonic()

        def advance(summary: Summary) -> None:
            seconds = max(time.monotonic() - began, 1e-6)
            sent = summary.stored + summary.duplicate
            rate = f"{sent / seconds:.0f}/s {summary.size / seconds / 1e6:.1f} MB/s"
            bar.update(task, advance=1, rate=rate)

        try:
            return asyncio.run(send_all(find(paths), target, journal, advance))
        except* SagittalError as group:
            failure = _first(group)
        raise failure


def _first(group: BaseExceptionGroup[SagittalError]) -> SagittalError:
    """One failure stands for those of the other associations, which have the same cause."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, SagittalError)
    return error


def report(summary: Summary, target: Target, seconds: float) -> None:
    """The summary in words."""
    sent = summary.stored + summary.duplicate
    console.print(
        f"{target}: {summary.stored} stored ({summary.size / 1e6:.1f} MB in {seconds:.1f} s, "
        f"{sent / max(seconds, 1e-6):.0f}/s), {summary.duplicate} duplicate, {summary.skipped} stored before, "
        f"{len(summary.refused)} refused, {summary.not_dicom} not DICOM",
        soft_wrap=True,
        markup=False,
    )
    for reason, count in summary.reasons.most_common():
        console.print(f"  refused {count}: {reason}", soft_wrap=True, markup=False)
    for label, reason in summary.refused[:MOST_SHOWN]:
        console.print(f"    {label}: {reason}", soft_wrap=True, markup=False)
    if len(summary.refused) > MOST_SHOWN:
        console.print(f"    and {len(summary.refused) - MOST_SHOWN} more", markup=False)
