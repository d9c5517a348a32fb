"""What is done every so often beside a run: leases are renewed, commits are copied to an object store."""

import threading
from collections.abc import Callable
from typing import Any


class Regularly:
    """Does all that it holds, in one thread of this process that runs while there is anything."""

    def __init__(self, seconds: float, name: str) -> None:
        self.seconds, self.name = seconds, name
        self._held: dict[Any, Callable[[], None]] = {}
        self._guard = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def add(self, key: Any, action: Callable[[], None]) -> None:
        """`action` raises nothing."""
        with self._guard:
            self._held[key] = action
            if self._thread is None:
                self._stop = threading.Event()
                self._thread = threading.Thread(target=self._run, name=self.name, daemon=True)
                self._thread.start()

    def remove(self, key: Any) -> None:
        """From when this returns, it is not being done."""
        with self._guard:
            self._held.pop(key, None)
            if not self._held and self._thread is not None:
                self._stop.set()
                self._thread = None

    def _run(self) -> None:
        stop = self._stop
        while not stop.wait(self.seconds):
            with self._guard:
                for action in self._held.values():
                    action()
