"""``python -m cli.servers.install NAME...``: brings the servers and peers that tests need, or says what is missing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from cli.servers.mongod import find_mongod
from cli.servers.rabbitmq import BINARY
from cli.servers.s3 import CACHE, find_minio, find_rclone
from libs.common.errors import Unavailable

MINIO = "github.com/minio/minio@v0.0.0-20260212201848-7aac2a2c5b7c"
_POLICY = Path("/usr/sbin/policy-rc.d")
_updated = False


def _apt(package: str) -> str | None:
    """Install a Debian package without starting its service; None when that went well, else why not."""
    global _updated
    if shutil.which("apt-get") is None or os.geteuid() != 0:
        return f"install the package `{package}` (this user may not, or this is no Debian)"
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    guard = not _POLICY.exists()
    if guard:  # the packages would start their system services; the tests start private ones
        _POLICY.write_text("#!/bin/sh\nexit 101\n")
        _POLICY.chmod(0o755)
    try:
        if not _updated:
            subprocess.run(["apt-get", "update", "-q"], env=environment, check=False, stdout=subprocess.DEVNULL)
            _updated = True
        command = ["apt-get", "install", "-y", "-q", "--no-install-recommends", package]
        done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    finally:
        if guard:
            _POLICY.unlink()
    return None if done.returncode == 0 else f"apt-get install {package} failed: {done.stderr[-500:]}"


def _rabbitmq() -> str | None:
    return None if BINARY.exists() else _apt("rabbitmq-server")


def _mongod() -> str | None:
    if os.environ.get("MONGO_URL"):
        return None
    try:
        find_mongod()
    except Unavailable as error:
        return str(error)
    return None


def _s3() -> str | None:
    if os.environ.get("S3_URL") or find_minio() is not None:
        return None
    if shutil.which("go") is not None:
        CACHE.mkdir(parents=True, exist_ok=True)
        print("building MinIO once (a few minutes) ...", flush=True)
        environment = {**os.environ, "GOBIN": str(CACHE)}
        done = subprocess.run(["go", "install", MINIO], env=environment, check=False, capture_output=True, text=True)
        if done.returncode == 0:
            return None
        print(f"MinIO could not be built: {done.stderr[-300:]}", flush=True)
    if find_rclone() is not None:
        print("using rclone's S3 server instead of MinIO", flush=True)
        return None
    return "an S3 server: put `minio` on PATH, install Go so that it can be built, or set S3_URL"


def _command(package: str, *programs: str) -> Callable[[], str | None]:
    def ensure() -> str | None:
        paths = f"{os.environ.get('PATH', '')}:/usr/sbin"
        if all(shutil.which(program, path=paths) for program in programs):
            return None
        return _apt(package)

    return ensure


PARTS: dict[str, Callable[[], str | None]] = {
    "rabbitmq": _rabbitmq,
    "mongod": _mongod,
    "s3": _s3,
    "dcmtk": _command("dcmtk", "storescu", "findscu", "getscu", "movescu", "storescp", "dcmqrscp"),
    "orthanc": _command("orthanc", "Orthanc"),
}


def main(names: list[str]) -> int:
    """Ensure the named parts (all for none); the exit code is 1 when one cannot be had."""
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        print(f"unknown: {', '.join(unknown)}; there are: {', '.join(PARTS)}")
        return 2
    missing = {name: why for name in names or PARTS if (why := PARTS[name]()) is not None}
    for name, why in missing.items():
        print(f"missing {name}: {why}")
    if not missing:
        print(f"here: {', '.join(names or PARTS)}; S3 by {'MinIO' if find_minio() else 'rclone or S3_URL'}")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
