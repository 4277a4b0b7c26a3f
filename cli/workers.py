"""Child processes that host services: started with their settings, watched, and stopped in order."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from libs.common.errors import Unavailable

_PR_SET_PDEATHSIG = 1


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


@dataclass
class Worker:
    """One child process. ``arguments`` are those of the ``sagittal`` command; ``fds`` are the sockets it inherits."""

    name: str
    arguments: Sequence[str]
    environment: Mapping[str, str]
    fds: Sequence[int] = ()
    log: Path | None = None
    restarts: int = 0
    ports: dict[str, int] = field(default_factory=dict)
    _process: subprocess.Popen[bytes] | None = None
    _ready: int = -1

    def start(self) -> None:
        """Start the process. It lives in a session of its own, so that Ctrl-C reaches only its parent."""
        read, write = os.pipe()
        output = self.log.open("ab") if self.log else None
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "cli.main", *self.arguments, "--ready-fd", str(write)],
                env={**os.environ, **self.environment},
                pass_fds=[*self.fds, write],
                start_new_session=True,
                preexec_fn=_die_with_parent,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        finally:
            os.close(write)
            if output:
                output.close()
        self._close_ready()
        self._ready = read

    def wait_ready(self, seconds: float = 90.0) -> dict[str, int]:
        """Wait until it serves; gives its ports. Raises Unavailable when it ended or took longer."""
        readable, _, _ = select.select([self._ready], [], [], seconds)
        line = os.read(self._ready, 4096) if readable else b""
        self._close_ready()
        if not line:
            code = self._process.poll() if self._process else None
            where = f"; see {self.log}" if self.log else ""
            what = "did not become ready in time" if code is None else f"ended with code {code}"
            raise Unavailable(f"process {self.name} {what}{where}")
        self.ports = json.loads(line)
        return self.ports

    @property
    def pid(self) -> int:
        return self._process.pid if self._process else 0

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def kill(self) -> None:
        """kill -9."""
        if self._process:
            self._process.kill()
            self._process.wait()

    def stop(self, seconds: float = 40.0) -> int:
        """SIGTERM, wait for the drain, SIGKILL at the end of ``seconds``. Gives the exit code."""
        if self._process is None:
            return 0
        if self.running:
            self._process.terminate()
            try:
                self._process.wait(seconds)
            except subprocess.TimeoutExpired:
                self._process.kill()
        self._close_ready()
        return self._process.wait()

    def _close_ready(self) -> None:
        if self._ready >= 0:
            with contextlib.suppress(OSError):
                os.close(self._ready)
            self._ready = -1


def revive(workers: Sequence[Worker], last: dict[str, float]) -> list[str]:
    """Start again those that ended by themselves, each at most once in two seconds; gives their names."""
    revived = []
    for worker in workers:
        if not worker.running and time.monotonic() - last.get(worker.name, 0.0) > 2.0:
            last[worker.name] = time.monotonic()
            worker.restarts += 1
            worker.start()
            revived.append(worker.name)
    return revived
