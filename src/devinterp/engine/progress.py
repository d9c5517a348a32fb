"""Progress that a person can read: a bar on a terminal or in a notebook, a log line now and then elsewhere."""

import logging
import sys
import threading
import time
from typing import Any, Self

from tqdm.auto import tqdm

logger = logging.getLogger("devinterp")

SECONDS_BETWEEN_LINES = 30.0


class Progress:
    """Counts up to `total` under a description."""

    def __init__(self, total: int, description: str, enabled: bool = True):
        self.total, self.description, self.enabled, self.done, self.skipped = total, description, enabled, 0, 0
        self._first = 0
        self._started = self._said = time.monotonic()
        watched = sys.stderr.isatty() or "ipykernel" in sys.modules
        self._bar: Any = tqdm(total=total, desc=description) if enabled and watched else None

    def describe(self, description: str) -> None:
        """What is going on now."""
        self.description = description
        if self._bar is not None:
            self._bar.set_description_str(description, refresh=False)

    def update(self, count: int = 1, note: str = "") -> None:
        if count and not self.done:
            self._started = time.monotonic()  # what came before it tells nothing about the rest
            self._first = count
        self.done += count
        if self._bar is not None:
            if note:
                self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(count)
        elif self.enabled and time.monotonic() - self._said > SECONDS_BETWEEN_LINES:
            self._say(note)

    def skip(self, count: int) -> None:
        """Work that turned out not to be needed, so that the time left is that of real work."""
        self.total -= count
        self.skipped += count
        if self._bar is not None:
            self._bar.total = self.total
            self._bar.refresh()

    def _say(self, note: str) -> None:
        self._said = time.monotonic()
        elapsed = self._said - self._started
        timed = self.done - self._first
        left = f"{elapsed / timed * (self.total - self.done):.0f} s left" if timed > 0 else "begun"
        logger.info("%s: %d of %d, %s %s", self.description, self.done, self.total, left, note)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()


_COUNTING = threading.Lock()


class Part(Progress):
    """The share of one run in the display of several, which may be under way in threads of their own."""

    def __init__(self, whole: Progress, total: int, name: str):
        super().__init__(total, name, enabled=False)
        self.whole = whole

    def describe(self, description: str) -> None:
        with _COUNTING:
            self.whole.describe(f"{self.description}: {description}")

    def update(self, count: int = 1, note: str = "") -> None:
        super().update(count, note)
        with _COUNTING:
            self.whole.update(count, note)

    def skip(self, count: int) -> None:
        super().skip(count)
        with _COUNTING:
            self.whole.skip(count)

    def __exit__(self, *_: object) -> None:
        """What was not done will not be: the run has failed, or was there already."""
        self.skip(self.total - self.done)
