"""What the indexing service says about itself, and that its wiring carries an event to a document."""

from __future__ import annotations

from pathlib import Path

import pytest

from libs.common.config import Settings, Site
from services.indexing.config import IndexingSettings
from services.indexing.handlers import Reading
from services.indexing.repository import index_specs


def test_ids_get_the_issuer_of_their_site() -> None:
    settings = Settings(site="MAIN", sites=(Site(code="NORTH", issuer_of_patient_id="N-HOSPITAL"), Site(code="SOUTH")))
    reading = Reading.of(settings, IndexingSettings())
    assert [reading.issuer(site) for site in ("NORTH", "SOUTH", "", "ELSEWHERE")] == [
        "N-HOSPITAL",
        "SOUTH",
        "MAIN",
        "ELSEWHERE",
    ]


def test_settings_come_from_the_environment_and_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "sagittal.toml"
    file.write_text("[indexing]\nquiet_seconds = 5\nbatch_items = 7\n")
    monkeypatch.setenv("SAGITTAL_CONFIG", str(file))
    monkeypatch.setenv("SAGITTAL_INDEXING_BATCH_ITEMS", "9")
    settings = IndexingSettings()
    assert (settings.quiet_seconds, settings.batch_items, settings.header_bytes) == (5, 9, 65536)


def test_every_collection_has_indexes_of_different_names() -> None:
    for name, models in index_specs().items():
        names = [model.document["name"] for model in models]
        assert len(set(names)) == len(names), name
