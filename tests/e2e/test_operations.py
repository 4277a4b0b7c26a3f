"""What those who run the archive do: start, stop, two side by side, status, import, rebuild."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pymongo
import pytest
from pymongo.database import Database

from tests.e2e.archives import Address, Up, storable_files
from tests.e2e.test_first_light import wait_found


def sagittal(archive: Address, *arguments: str, code: int = 0) -> str:
    environment = {**os.environ, **archive.environment, "COLUMNS": "200"}
    command = [sys.executable, "-m", "cli.main", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def mongo_url(archive: Address) -> str:
    import json

    if "SAGITTAL_MONGO_URL" in archive.environment:
        return archive.environment["SAGITTAL_MONGO_URL"]
    state = Path(archive.environment["SAGITTAL_DATA"]) / "run" / "archive.json"
    return str(json.loads(state.read_text())["mongo_url"])


def index_of(archive: Address, studies: set[str]) -> dict[str, Any]:
    """The image index of the named studies without what depends on the moment of indexing."""
    database: Database[dict[str, Any]] = pymongo.MongoClient(mongo_url(archive))["sagittal"]
    moment = {"created_at": 0, "updated_at": 0, "stable": 0, "stable_revision": 0}
    keys = list(studies)
    wanted = {"studies": {"_id": {"$in": keys}}, "series": {"study_instance_uid": {"$in": keys}}}
    found: dict[str, Any] = {
        name: sorted(database[name].find(query, moment), key=lambda d: str(d["_id"])) for name, query in wanted.items()
    }
    fields = {"json": 1, "names": 1, "study_instance_uid": 1, "series_instance_uid": 1, "reference": 1}
    instances = database["instances"].find({"study_instance_uid": {"$in": keys}}, fields)
    found["instances"] = sorted(instances, key=lambda d: str(d["_id"]))
    return found


@pytest.fixture
def imported(archive: Address, tmp_path: Path) -> dict[str, int]:
    """Instances per study after `sagittal import` of pydicom's files."""
    from pydicom import dcmread

    folder = tmp_path / "files"
    folder.mkdir()
    counts: dict[str, int] = {}
    for index, path in enumerate(storable_files()):
        (folder / f"{index}.dcm").write_bytes(path.read_bytes())
        study = str(dcmread(path, stop_before_pixels=True).StudyInstanceUID)
        counts[study] = counts.get(study, 0) + 1
    target = f"127.0.0.1:{archive.store_port}"
    output = sagittal(archive, "import", "--to", target, str(folder))
    assert "stored" in output
    for study, count in counts.items():
        wait_found(archive, study, count)
    return counts


def test_rebuild_gives_the_same_index(archive: Address, imported: dict[str, int]) -> None:
    before = index_of(archive, set(imported))
    assert len(before["instances"]) == sum(imported.values())
    sagittal(archive, "rebuild", "--yes")
    assert index_of(archive, set(imported)) == before


def test_status_names_queues_and_counts(archive: Address, imported: dict[str, int]) -> None:
    output = sagittal(archive, "status")
    assert "indexing.instances" in output
    assert "instances" in output
    assert "dead" in sagittal(archive, "dead-letters", "--help")


def test_two_archives_side_by_side_and_never_on_one_folder(tmp_path: Path) -> None:
    first, second = Up(tmp_path / "one"), Up(tmp_path / "two")
    try:
        a, b = first.start(), second.start()
        assert {a.store_port, a.http_ports[0]}.isdisjoint({b.store_port, b.http_ports[0]})
        refused = subprocess.run(
            [sys.executable, "-m", "cli.main", "up"], env=first.environment, capture_output=True, text=True, timeout=60
        )
        assert refused.returncode == 2
        assert "another archive runs on" in refused.stderr
    finally:
        codes = [up.interrupt() for up in (first, second)]
    assert codes == [0, 0]


def test_a_port_in_use_is_said_plainly(embedded_archive: Address, tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "SAGITTAL_DATA": str(tmp_path / "other"),
        "SAGITTAL_DIMSE_PORT": str(embedded_archive.store_port),
        "SAGITTAL_HTTP_PORT": "0",
    }
    done = subprocess.run(
        [sys.executable, "-m", "cli.main", "up"], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert "SAGITTAL_DIMSE_PORT" in done.stderr


def test_an_archive_killed_in_the_middle_starts_again_with_everything(tmp_path: Path) -> None:
    up = Up(tmp_path / "data")
    archive = up.start()
    path = next(p for p in storable_files() if p.name == "CT_small.dcm")
    sagittal(archive, "import", "--to", f"127.0.0.1:{archive.store_port}", str(path))
    up.process.kill()
    up.process.wait()
    up.log.write_text("")
    again = up.start()
    try:
        from pydicom import dcmread

        wait_found(again, dcmread(path).StudyInstanceUID)
    finally:
        assert up.interrupt() == 0
