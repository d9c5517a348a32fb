"""How far each task has come, and whether all are to stop: small files in a folder that workers and their caller share.

A task that starts again elsewhere takes its place on the board; a worker that was given up too early sees that and ends.
"""

import json
import os
import time
import uuid
from contextlib import suppress
from pathlib import Path

SECONDS_BETWEEN_LOOKS = 0.2


class Board:
    """As the caller sees it."""

    def __init__(self, folder: Path, num_tasks: int):
        self.folder, self.num_tasks = folder, num_tasks
        folder.mkdir(parents=True, exist_ok=True)

    def total(self) -> int:
        """Steps taken by all tasks, those that were taken twice counted twice."""
        return sum(steps for _, steps in map(self._read, range(self.num_tasks)))

    def has_begun(self, task: int) -> bool:
        return self._read(task)[0] != ""

    def stop(self) -> None:
        """Ask all tasks to end after the step that they are in."""
        (self.folder / "stop").touch()

    def _read(self, task: int) -> tuple[str, int]:
        return read_place(self.folder / f"task-{task}")


class Place:
    """One task's, as its worker sees it."""

    def __init__(self, folder: Path, task: int):
        self._file, self._stop = folder / f"task-{task}", folder / "stop"
        self._token = uuid.uuid4().hex
        self._steps = read_place(self._file)[1]
        self._looked = time.monotonic()
        self._write()

    def add(self, steps: int) -> bool:
        """Count steps; whether to go on."""
        self._steps += steps
        if time.monotonic() - self._looked < SECONDS_BETWEEN_LOOKS:
            return True
        return self.look()

    def look(self) -> bool:
        """Tell the number of steps; False when the caller asks to stop, is gone, or has given the task to another worker."""
        self._looked = time.monotonic()
        if self._stop.exists() or read_place(self._file)[0] != self._token:
            return False
        self._write()
        return True

    def _write(self) -> None:
        partial = self._file.with_name(f"{self._file.name}.{self._token}")
        with suppress(FileNotFoundError):  # the board was taken down: seen at the next look
            partial.write_text(json.dumps([self._token, self._steps]))
            os.replace(partial, self._file)


def read_place(file: Path) -> tuple[str, int]:
    try:
        token, steps = json.loads(file.read_text())
        return str(token), int(steps)
    except (OSError, ValueError):
        return "", 0
