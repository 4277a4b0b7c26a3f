"""The two forms of the archive, running for real."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cli.cluster import Cluster
from tests.e2e.archives import Address, Up, address_of


@pytest.fixture(scope="session")
def embedded_archive(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Address]:
    up = Up(tmp_path_factory.mktemp("embedded") / "data")
    try:
        yield up.start()
    finally:
        assert up.interrupt() == 0


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("cluster"), extra={"SAGITTAL_INDEXING_QUIET_SECONDS": "2"})
    cluster.start()
    try:
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(params=["embedded", "cluster"])
def archive(request: pytest.FixtureRequest) -> Address:
    """Every test that takes this runs against both forms."""
    if request.param == "embedded":
        address: Address = request.getfixturevalue("embedded_archive")
        return address
    return address_of(request.getfixturevalue("cluster"))


@pytest.fixture
def received(tmp_path: Path) -> Path:
    folder = tmp_path / "received"
    folder.mkdir()
    return folder
