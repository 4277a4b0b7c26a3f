"""``make k8s-check``: build the manifests, and offer them to an API server where one can be reached."""

# ruff: noqa: T201  (a command: what it prints is its result)

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import yaml

HERE = Path(__file__).resolve().parent
FOLDERS = [HERE / "base", *sorted(p.parent for p in HERE.glob("overlays/*/kustomization.yaml"))]


def _run(*command: str, text: str | None = None) -> tuple[int, str]:
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=120, check=False)
    return done.returncode, (done.stdout if done.returncode == 0 else done.stderr or done.stdout).strip()


def _builder() -> list[str] | None:
    if shutil.which("kubectl"):
        return ["kubectl", "kustomize"]
    if shutil.which("kustomize"):
        return ["kustomize", "build"]
    return None


def _files_exist(folder: Path) -> list[str]:
    """What a build would stumble over first: files that the kustomization names and that are not there or not YAML."""
    problems = []
    plan = yaml.safe_load((folder / "kustomization.yaml").read_text())
    named = [*plan.get("resources", []), *(p["path"] for p in plan.get("patches", []) if "path" in p)]
    for name in named:
        path = folder / name
        if path.is_dir():
            path = path / "kustomization.yaml"
        if not path.is_file():
            problems.append(f"{folder.name}: {name} is not there")
        elif not all(isinstance(d, dict) and "kind" in d for d in yaml.safe_load_all(path.read_text())):
            problems.append(f"{folder.name}: {name} holds something that is no Kubernetes object")
    return problems


def main() -> int:
    """Exit code 0 when everything that could be checked here is right."""
    failed = False
    builder = _builder()
    server = False
    if shutil.which("kubectl"):
        server = _run("kubectl", "get", "--raw", "/version", "--request-timeout=5s")[0] == 0
    for folder in FOLDERS:
        name = str(folder.relative_to(HERE))
        for problem in _files_exist(folder):
            failed = True
            print(f"FAILED  {problem}")
        if builder is None:
            print(f"partly  {name}: files exist and are YAML; not built, neither kubectl nor kustomize is here")
            continue
        code, built = _run(*builder, str(folder))
        if code != 0:
            failed = True
            print(f"FAILED  {name}: {built}")
            continue
        kinds = [d["kind"] for d in yaml.safe_load_all(built)]
        print(f"ok      {name}: built with {builder[0]}, {len(kinds)} objects ({', '.join(sorted(set(kinds)))})")
        if not server:
            continue
        code, answer = _run("kubectl", "apply", "--dry-run=server", "-f", "-", text=built)
        # The server cannot try objects in a namespace that the same dry run would only have made.
        if code != 0 and "not found" in answer and "namespaces" in answer:
            print(f"partly  {name}: its namespace is not on the API server yet, so only the build was checked")
        elif code != 0:
            failed = True
            print(f"FAILED  {name}: the API server refuses it: {answer}")
        else:
            print(f"ok      {name}: accepted by the API server (dry run)")
    if not server:
        print("not checked: no Kubernetes API server can be reached, so nothing was applied with --dry-run=server")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
