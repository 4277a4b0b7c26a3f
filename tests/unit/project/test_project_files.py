"""What the project says about itself is true: README, settings, targets, licence, rules of import."""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from libs.common.dicom import part10
from libs.dimse import wire
from tests.unit.project.reality import ROOT, service_names, setting_names

TEXT = {".py", ".md", ".toml", ".yml", ".yaml", ".cfg", ".txt", ".lock", ".example", ".json", ".sh", ""}
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


def _tracked() -> list[Path]:
    """Every text file of the project; outside of a git work tree, every one that looks like one."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    if listed.returncode == 0:
        paths = [ROOT / name for name in listed.stdout.decode().split("\0") if name]
    else:
        paths = [
            p for folder in ("cli", "libs", "services", "docs", "deploy", "tests") for p in (ROOT / folder).rglob("*")
        ]
    return [p for p in paths if p.is_file() and p.suffix in TEXT]


def _tree() -> list[Path]:
    """The paths that the tree in the README shows."""
    block = (ROOT / "README.md").read_text().split("## The tree")[1].split("```")[1]
    paths: list[Path] = []
    parents: list[str] = []
    for line in block.strip("\n").splitlines():
        indent = len(line) - len(line.lstrip())
        name = line.split()[0]
        parents = [*parents[: indent // 2], name]
        paths.append(Path(*parents))
    return paths


@pytest.mark.parametrize("path", _tree(), ids=str)
def test_readme_tree_is_there(path: Path) -> None:
    assert (ROOT / path).is_dir()


def test_readme_tree_shows_every_service_and_library() -> None:
    shown = {str(path) for path in _tree()}
    assert {f"services/{name}" for name in service_names()} <= shown
    assert {str(p.parent.relative_to(ROOT)) for p in ROOT.glob("libs/*/__init__.py")} <= shown


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_documents_point_at_files_that_are_there(document: Path) -> None:
    text = document.read_text()
    for link in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", text):
        assert (document.parent / link).exists(), f"{document.name} links to {link}"
    quoted = re.findall(r"`((?:cli|libs|services|deploy|docs|tests)/[\w./-]*)`", text)
    for path in quoted:
        assert (ROOT / path).exists(), f"{document.name} names {path}"
    for target in re.findall(r"`make ([a-z0-9-]+)", text):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), f"make {target}"
    for name in re.findall(r"\bSAGITTAL_[A-Z][A-Z0-9_]+\b", text):
        assert name in setting_names(), f"{document.name} names {name}"


def test_example_environment_is_every_setting_and_no_other() -> None:
    text = (ROOT / ".env.example").read_text()
    shown = set(re.findall(r"^(?:# )?([A-Z0-9_]+)=", text, re.MULTILINE))
    compose = set(re.findall(r"\$\{(\w+):[?]", (ROOT / "docker-compose.yml").read_text()))
    assert shown == setting_names() | compose


def test_example_environment_holds_no_password() -> None:
    for line in (ROOT / ".env.example").read_text().splitlines():
        if re.match(r"\w*(PASSWORD|SECRET_KEY|REPLICA_KEY)=", line):
            assert line.endswith("="), line


def test_what_compose_asks_for_is_in_the_example() -> None:
    text = (ROOT / ".env.example").read_text()
    for name in re.findall(r"\$\{(\w+)", (ROOT / "docker-compose.yml").read_text()):
        assert re.search(rf"^(?:# )?{name}=", text, re.MULTILINE), name


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not here")
def test_make_alone_lists_at_most_15_targets_and_all_of_them() -> None:
    listed = subprocess.run(["make", "-s"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    names = {line.split()[0] for line in listed.splitlines()}
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony is not None and names == set(phony[1].split())
    assert {"run", "test", "check", "cluster", "bench"} <= names
    assert len(names) <= 15


def test_ci_runs_what_people_run() -> None:
    script = ROOT / ".ci/run"
    assert script.stat().st_mode & 0o111
    assert {"make check", "make test"} <= {line.split(" ARGS")[0] for line in script.read_text().splitlines()}


def test_licence_is_apache_2() -> None:
    text = " ".join((ROOT / "LICENSE").read_text().split())
    assert text.startswith("Apache License Version 2.0, January 2004")
    assert text.endswith("limitations under the License.")
    assert "9. Accepting Warranty or Additional Liability." in text


def test_every_service_has_its_door_plate_and_its_rules_of_import() -> None:
    rules = configparser.ConfigParser()
    rules.read(ROOT / ".importlinter")
    rooms = rules["importlinter:contract:rooms"]
    assert sorted(rooms["containers"].split()) == [f"services.{name}" for name in service_names()]
    assert rooms["exhaustive"] == "True"
    for name in service_names():
        plate = (ROOT / "services" / name / "__init__.py").read_text()
        for word in ("Hears", "Tells", "Owns"):
            assert word in plate, f"services/{name}/__init__.py does not say what it {word}"


def test_conformance_statement_names_our_implementation() -> None:
    text = (ROOT / "docs/conformance.md").read_text()
    for name in (wire.IMPLEMENTATION_CLASS_UID, wire.IMPLEMENTATION_VERSION_NAME):
        assert f"`{name}`" in text
    for name in (part10.IMPLEMENTATION_CLASS_UID, part10.IMPLEMENTATION_VERSION_NAME):
        assert f"`{name}`" in text


def test_no_file_points_out_of_the_project() -> None:
    outside = re.compile("|".join([r"\.\./" + "shared", "/work/" + r"(shared|main|\.)", r"\." + "library/"]))
    for path in _tracked():
        found = outside.search(path.read_text(encoding="utf-8", errors="replace"))
        assert found is None, f"{path.relative_to(ROOT)}: {found[0] if found else ''}"
