"""Progress that a person can read: a bar on a terminal or in a notebook, a log line now and then elsewhere."""

import logging
import sys
import time
from typing import Any, Self

from tqdm.auto import tqdm

logger = logging.getLogger("devinterp")

SECONDS_BETWEEN_LINES = 30.0


class Progress:
    """Counts up to `total` under a description."""

    def __init__(self, total: int, description: str, enabled: bool = True):
        self.total, self.description, self.enabled = total, description, enabled
        self._done, self._started, self._said = 0, time.monotonic(), time.monotonic()
        watched = sys.stderr.isatty() or "ipykernel" in sys.modules
        self._bar: Any = tqdm(total=total, desc=description) if enabled and watched else None

    def update(self, note: str = "") -> None:
        self._done += 1
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update()
        elif self.enabled and time.monotonic() - self._said > SECONDS_BETWEEN_LINES:
            self._say(note)

    def _say(self, note: str) -> None:
        self._said = time.monotonic()
        elapsed = self._said - self._started
        left = elapsed / self._done * (self.total - self._done)
        logger.info("%s: %d of %d, %.0f s left %s", self.description, self._done, self.total, left, note)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
