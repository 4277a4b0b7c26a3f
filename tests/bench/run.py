"""Sagittal beside Orthanc and storescp: same machine, same files, same run; medians and ratios.

``python -m tests.bench.run [--rounds 3] [--quick] [--peers embedded,cluster,orthanc,storescp] [--json FILE]``
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path

from pydicom.dataset import Dataset
from pynetdicom import AE
from rich.console import Console
from rich.table import Table

from tests.bench.peers import ENVIRONMENT, Distributed, Embedded, Orthanc, Peer, Storescp
from tests.bench.work import ROOT, make_series
from tests.e2e.archives import STUDY_ROOT_FIND

PEERS: dict[str, type[Embedded] | type[Distributed] | type[Orthanc] | type[Storescp]] = {
    "embedded": Embedded,
    "cluster": Distributed,
    "orthanc": Orthanc,
    "storescp": Storescp,
}
Results = dict[str, dict[str, list[float]]]


def send(peer: Peer, folders: list[Path]) -> float:
    """Seconds until the last of the parallel storescu processes had its last success."""
    began = time.perf_counter()
    senders = [
        subprocess.Popen(
            ["storescu", "-R", "-aec", peer.ae_title, "+sd", "127.0.0.1", str(peer.store_port), str(folder)],
            env=ENVIRONMENT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        for folder in folders
    ]
    for sender in senders:
        _, errors = sender.communicate(timeout=300)
        if sender.returncode != 0:
            raise RuntimeError(f"storescu to {peer.name} failed: {errors.decode()[-500:]}")
    return time.perf_counter() - began


def find(peer: Peer, **keys: str) -> list[Dataset]:
    ae = AE("BENCH")
    ae.add_requested_context(STUDY_ROOT_FIND)
    association = ae.associate("127.0.0.1", peer.query_port, ae_title=peer.ae_title)
    if not association.is_established:
        raise RuntimeError(f"{peer.name} took no association for C-FIND")
    identifier = Dataset()
    identifier.QueryRetrieveLevel = "STUDY"
    for name, value in {"StudyInstanceUID": "", "PatientID": "", "PatientName": "", **keys}.items():
        setattr(identifier, name, value)
    try:
        answers = association.send_c_find(identifier, STUDY_ROOT_FIND)
        return [found for _, found in answers if found is not None]
    finally:
        association.release()


def wait_findable(peer: Peer, study: str, count: int, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = find(peer, StudyInstanceUID=study, NumberOfStudyRelatedInstances="")
        if found and int(found[0].NumberOfStudyRelatedInstances or 0) >= count:
            return
        time.sleep(0.02)
    raise TimeoutError(f"{peer.name} did not find {count} instances of {study}")


class MemoryWatch:
    """The highest memory of a peer while it is watched."""

    def __init__(self, peer: Peer) -> None:
        self.peer, self.peak = peer, 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._end.wait(0.25):
            self.peak = max(self.peak, self.peer.memory())

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()


def measure(peer: Peer, work: dict[str, tuple[str, int, list[Path]]], folder: Path, results: Results) -> None:
    """One round of one peer, with a fresh archive."""
    folder.mkdir(parents=True)
    peer.start(folder)
    row = results[peer.name]
    try:
        for name, (study, count, folders) in work.items():
            began = time.perf_counter()
            with MemoryWatch(peer) as watch:
                acknowledged = send(peer, folders)
                if peer.query_port:
                    wait_findable(peer, study, count)
            row[f"{name} acknowledged/s"].append(count / acknowledged)
            if peer.query_port:
                row[f"{name} findable/s"].append(count / (time.perf_counter() - began))
            row["peak memory MB"].append(watch.peak / 1e6)
        if peer.query_port:
            retrieve(peer, work, folder, row)
    finally:
        peer.stop()


def retrieve(
    peer: Peer, work: dict[str, tuple[str, int, list[Path]]], folder: Path, row: dict[str, list[float]]
) -> None:
    study, count, _ = next(value for name, value in work.items() if name.startswith("CT"))
    for name, keys in (
        ("C-FIND patient id ms", {"PatientID": f"BENCH-{study.rsplit('.', 1)[-1]}"}),
        ("C-FIND date range ms", {"StudyDate": "20260101-20260110"}),
        ("C-FIND name prefix ms", {"PatientName": "Bench*"}),
    ):
        times = []
        for _ in range(20):
            began = time.perf_counter()
            assert find(peer, **keys)
            times.append(time.perf_counter() - began)
        row[name].append(statistics.median(times) * 1000)
    target = folder / "get"
    target.mkdir()
    began = time.perf_counter()
    subprocess.run(
        ["getscu", "-S", "-B", "-aec", peer.ae_title, "-od", str(target), "-k", "QueryRetrieveLevel=STUDY", "-k",
         f"StudyInstanceUID={study}", "127.0.0.1", str(peer.query_port)],
        env=ENVIRONMENT, check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    row["C-GET of the CT s"].append(time.perf_counter() - began)
    assert len(list(target.iterdir())) == count


def show(results: Results, console: Console) -> None:
    names = list(results)
    table = Table("measure", *names, *[f"{name} / Orthanc" for name in names if "sagittal" in name])
    measures = sorted({m for row in results.values() for m in row})
    for measure_name in measures:
        medians = {n: statistics.median(results[n][measure_name]) for n in names if results[n].get(measure_name)}
        cells = [f"{medians[n]:.1f}" if n in medians else "-" for n in names]
        reference = medians.get("Orthanc")
        ratios = [
            f"{medians[n] / reference:.2f}" if reference and n in medians else "-" for n in names if "sagittal" in n
        ]
        table.add_row(measure_name, *cells, *ratios)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a fifth of the work, one round")
    parser.add_argument("--peers", default="embedded,cluster,orthanc,storescp")
    parser.add_argument("--associations", default="1,4,16")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rounds, divisor = (1, 5) if options.quick else (options.rounds, 1)
    console = Console(width=180)
    results: Results = defaultdict(lambda: defaultdict(list))
    with tempfile.TemporaryDirectory(prefix="sagittal-bench-") as name:
        base = Path(name)
        work: dict[str, tuple[str, int, list[Path]]] = {}
        for number, shares in enumerate(int(part) for part in options.associations.split(",")):
            for kind, count, side in (("CT", 500 // divisor, 512), ("small", 2000 // divisor, 64)):
                study = f"{ROOT}.{number + 1}{0 if kind == 'CT' else 1}"
                folders = make_series(base / f"{kind}{shares}", study, count, side, shares)
                work[f"{kind} x{shares}"] = (study, count, folders)
        for turn in range(rounds):
            for key in options.peers.split(","):
                console.print(f"round {turn + 1}: {key}")
                measure(PEERS[key](), work, base / f"{key}{turn}", results)
        show(results, console)
    if options.json:
        options.json.write_text(json.dumps({name: dict(row) for name, row in results.items()}, indent=2))


if __name__ == "__main__":
    main()
