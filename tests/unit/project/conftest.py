"""The files that say how Sagittal is deployed, read once."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from tests.unit.project.reality import ROOT


@pytest.fixture(scope="session")
def compose() -> dict[str, Any]:
    return dict(yaml.safe_load((ROOT / "docker-compose.yml").read_text()))


@pytest.fixture(scope="session")
def manifests() -> dict[tuple[str, str], dict[str, Any]]:
    """Every object of the kustomize base by kind and name."""
    base = ROOT / "deploy/k8s/base"
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for name in yaml.safe_load((base / "kustomization.yaml").read_text())["resources"]:
        for document in yaml.safe_load_all((base / name).read_text()):
            found[document["kind"], document["metadata"]["name"]] = document
    return found
