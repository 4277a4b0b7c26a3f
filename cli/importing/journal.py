"""What earlier imports have stored, so that a second run goes on where the first one ended."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import TracebackType
from typing import TextIO

from libs.common.errors import Invalid

NAME = ".sagittal-import.jsonl"


class Journal:
    """One line per stored candidate and destination. Paths can name patients, so only digests of them are written.

    With ``forget`` nothing from before counts; what is stored now is remembered all the same.
    """

    def __init__(self, folder: Path, destination: str, *, forget: bool = False) -> None:
        self.path = folder / NAME
        self._destination = destination
        self._forget = forget
        self._known: set[str] = set()
        self._file: TextIO | None = None

    def __enter__(self) -> Journal:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists() and not self._forget:
                for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
                    try:
                        self._known.add(str(json.loads(line)["stored"]))
                    except (ValueError, KeyError, TypeError):
                        continue  # the torn last line of a run that was killed
            self._file = self.path.open("a", encoding="utf-8")
            if self.path.stat().st_size:
                self._file.write("\n")  # ends a torn line; empty lines are read over
        except OSError as error:
            raise Invalid(f"the import journal {self.path} cannot be written: {error.strerror}") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def knows(self, identity: str) -> bool:
        """Whether this destination has stored it."""
        return self._key(identity) in self._known

    def add(self, identity: str) -> None:
        """Remember that this destination has stored it."""
        key = self._key(identity)
        self._known.add(key)
        if self._file is not None:
            self._file.write(json.dumps({"stored": key}) + "\n")
            self._file.flush()

    def _key(self, identity: str) -> str:
        return hashlib.sha256(f"{self._destination}|{identity}".encode("utf-8", "surrogateescape")).hexdigest()
