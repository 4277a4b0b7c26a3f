"""`sagittal echo`, `send`, `find` and `get` against DCMTK's dcmqrscp."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from pydicom import dcmread
from pydicom.data import get_testdata_file
from typer.testing import CliRunner

from cli import scu


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture
def archive(tmp_path: Path) -> Iterator[str]:
    port = free_port()
    storage = tmp_path / "archive"
    storage.mkdir()
    config = tmp_path / "dcmqrscp.cfg"
    config.write_text(
        f"NetworkTCPPort = {port}\nMaxPDUSize = 16384\nMaxAssociations = 16\nHostTable BEGIN\nHostTable END\n"
        f"VendorTable BEGIN\nVendorTable END\nAETable BEGIN\nPEER {storage} RW (200, 1024mb) ANY\nAETable END\n"
    )
    process = subprocess.Popen(
        ["dcmqrscp", "-c", str(config)], env=os.environ | {"TCP_NODELAY": "1"}, stderr=subprocess.DEVNULL
    )
    try:
        end = time.monotonic() + 15
        while time.monotonic() < end:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.05)
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(10)


def run(*arguments: str) -> tuple[int, str]:
    app = typer.Typer()
    scu.register(app)
    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, result.output


def sample(name: str) -> str:
    path = get_testdata_file(name)
    assert isinstance(path, str)
    return path


def test_send_find_and_get(archive: str, tmp_path: Path) -> None:
    assert run("echo", archive, "--called", "PEER")[0] == 0
    assert run("send", archive, sample("CT_small.dcm"), sample("MR_small.dcm"), "--called", "PEER")[0] == 0
    code, output = run("find", archive, "--json", "-k", "PatientID=1CT1", "--called", "PEER")
    assert code == 0
    study = json.loads(output.strip().splitlines()[0])["0020000D"]["Value"][0]
    folder = tmp_path / "out"
    code, _ = run("get", archive, str(folder), "--study", study, "--called", "PEER")
    assert code == 0
    (path,) = folder.iterdir()
    assert dcmread(path).pixel_array.tolist() == dcmread(sample("CT_small.dcm")).pixel_array.tolist()


def test_what_is_not_taken_gives_exit_code_1(archive: str, tmp_path: Path) -> None:
    note = tmp_path / "note.txt"
    note.write_text("not an image")
    code, output = run("send", archive, sample("CT_small.dcm"), str(note), "--called", "PEER")
    assert (code, "1 stored, 1 not." in output) == (1, True)
    assert run("get", archive, str(tmp_path / "none"), "--study", "1.2.3.4", "--called", "PEER")[0] == 1
    assert run("find", archive, "-k", "NoSuchKeyword=1", "--called", "PEER")[0] == 1


def test_an_archive_that_is_away_is_told() -> None:
    assert run("echo", f"127.0.0.1:{free_port()}")[0] == 1
    assert run("send", f"127.0.0.1:{free_port()}", sample("CT_small.dcm"))[0] == 1
    assert run("echo", "nonsense")[0] == 1
