"""What earlier runs finished, kept inside .venv so that it goes when .venv goes."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any


def digest(*parts: str) -> str:
    """Short fingerprint of what a step depends on."""
    return hashlib.sha256('\0'.join(parts).encode()).hexdigest()[:16]


class State:
    """A small JSON file: step name -> what it was done for."""

    def __init__(self, file: Path) -> None:
        self.file = file
        try:
            self._done: dict[str, Any] = json.loads(file.read_text())
        except (OSError, ValueError):
            self._done = {}

    def get(self, step: str) -> Any:
        """Return what the step was last done for, None if it never was."""
        return self._done.get(step)

    def set(self, step: str, done_for: Any) -> None:
        """Record a finished step; the file is replaced at once, never half-written."""
        self._done[step] = done_for
        self._write()

    def forget(self, except_for: str = '') -> None:
        """Drop the record of every step but one."""
        self._done = {step: value for step, value in self._done.items() if step == except_for}
        if self.file.exists():
            self._write()

    def _write(self) -> None:
        fresh = self.file.with_suffix('.tmp')
        fresh.write_text(json.dumps(self._done, indent=2) + '\n')
        os.replace(fresh, self.file)
