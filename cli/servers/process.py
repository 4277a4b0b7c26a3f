"""One server process: started in a session of its own, gone when its parent is gone."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import queue
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from libs.common.errors import Unavailable

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None
_living: weakref.WeakSet[Server] = weakref.WeakSet()


def free_port() -> int:
    """A TCP port of the loopback address that nothing uses at this moment. Raises Unavailable when there is none.

    It lies below the range from which the kernel takes ports for outgoing connections: otherwise a server that is
    down for a moment could find a client's connection on its port when it comes back.
    """
    for port in random.sample(range(18000, 32000), 200):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", port))
                return port
    raise Unavailable("no free TCP port was found between 18000 and 32000")


class _Launcher:
    """Starts children from one thread that lives as long as the process.

    Linux sends the death signal when the *thread* that forked ends, not the process: a child started by a
    short-lived worker thread would be killed with it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pid = 0
        self._work: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()

    def start(self, make: Callable[[], subprocess.Popen[bytes]]) -> subprocess.Popen[bytes]:
        with self._lock:
            if self._pid != os.getpid():  # first use, or after a fork, which takes no threads along
                self._pid = os.getpid()
                self._work = queue.SimpleQueue()
                threading.Thread(target=self._run, args=(self._work,), name="launcher", daemon=True).start()
        answer: queue.SimpleQueue[subprocess.Popen[bytes] | BaseException] = queue.SimpleQueue()

        def task() -> None:
            try:
                answer.put(make())
            except BaseException as error:
                answer.put(error)

        self._work.put(task)
        result = answer.get()
        if isinstance(result, BaseException):
            raise result
        return result

    @staticmethod
    def _run(work: queue.SimpleQueue[Callable[[], None]]) -> None:
        while True:
            work.get()()


_launcher = _Launcher()


def _die_with(parent: int) -> None:
    """Runs in the child. SIGKILL, because a server that hangs in its shutdown would stay for ever."""
    if _libc is not None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


class Server:
    """A server process with its output in a log file. ``command`` and ``environment`` serve every start."""

    name = "server"

    def __init__(self, command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> None:
        self.command = list(command)
        self.log = log
        self.environment = {**os.environ, **(environment or {})}
        self._process: subprocess.Popen[bytes] | None = None

    def launch(self, ready: Callable[[], bool], seconds: float = 90.0) -> None:
        """Start and wait until ``ready`` says so. Raises Unavailable, with the end of the log, when it never does."""
        if self.running:
            return
        Server.kill(self)  # what the last run may have left of its children
        self.log.parent.mkdir(parents=True, exist_ok=True)
        parent = os.getpid()

        def make() -> subprocess.Popen[bytes]:
            with self.log.open("ab") as output:
                return subprocess.Popen(
                    self.command,
                    env=self.environment,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,  # a terminal's Ctrl-C must not reach it before its clients have drained
                    preexec_fn=lambda: _die_with(parent),
                )

        try:
            self._process = _launcher.start(make)
        except OSError as error:
            raise Unavailable(f"{self.name} cannot be started: {error}") from error
        _living.add(self)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if not self.running:
                break
            if ready():
                return
            time.sleep(0.05)
        self.kill()
        tail = self.log.read_text(errors="replace")[-1500:]
        raise Unavailable(f"{self.name} did not start; the end of {self.log}:\n{tail}")

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """The process id, 0 when it was never started or was ended by us."""
        return self._process.pid if self._process is not None else 0

    def _signal(self, number: int) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, number)

    def stop(self, seconds: float = 30.0) -> None:
        """Ask it to end, and end it by force when it does not."""
        if self._process is None:
            return
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(seconds)
        self.kill()

    def kill(self) -> None:
        """kill -9, children included."""
        self._signal(signal.SIGKILL)
        if self._process is not None:
            self._process.wait()
            self._process = None
        _living.discard(self)


def answers(port: int) -> bool:
    """Whether something accepts connections on the loopback port."""
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


@atexit.register
def _end_all() -> None:
    for server in list(_living):
        server.stop(5.0)
