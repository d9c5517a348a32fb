"""When and what the parts of a run commit: now and then, when interrupted, and at their end."""

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from filelock import FileLock
from torch import Tensor

from devinterp.engine.chain import Walk
from devinterp.engine.state import restore, state_of
from devinterp.errors import StoreError
from devinterp.store.folder import FINAL_STATE_BYTES, Digests, Part, Progress
from devinterp.store.writer import Rows, StoreWriter

logger = logging.getLogger("devinterp")

SHORT_SECONDS = 5.0
"""What took no longer is not synced by itself: the end of the run does it, and a power failure before it costs no more"""
WAIT_SECONDS = 120.0
"""for a worker of an interrupted run to end the step that it was in"""


class Commits(ABC):
    """Of one part. A run without a path of its own commits nothing: it ends with its process.

    As a context it holds the part against workers of an earlier, killed run that have not noticed yet, and commits when it
    is closed between two steps.
    """

    def __init__(self, store: StoreWriter, part: Part | None, chains: tuple[int, ...], every: float):
        self.store, self.part, self.every = store, part, every
        self.progress = Progress(chains)
        self._last = time.monotonic()
        self._was_durable = False
        self._unsynced: list[Path] = []
        self._digests: Digests = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        if self.part is not None:
            self.part.folder.mkdir(parents=True, exist_ok=True)
            self._stack.enter_context(FileLock(self.part.folder / "lock", timeout=WAIT_SECONDS))
            known = self.part.progress()
            if known is not None and known.chains == self.progress.chains:
                self.progress, self._digests, self._was_durable = known, dict(known.digests), True
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._stack:
            if kind is GeneratorExit and self.part is not None:
                self.commit()

    def commit_if_due(self) -> None:
        """Between two steps."""
        if self.part is None:
            return
        if any(rows.has_written for rows in self._rows()) if self.every == 0 else time.monotonic() - self._last >= self.every:
            self.commit()

    def commit(self) -> None:
        """Everything up to the last step, on the disk."""
        self.settle()
        tensors, numbers = self._state()
        self._put(tensors, self._steps_taken(), numbers, finished=False, durable=True)

    def settle(self) -> None:
        """Wait for the chunks that are being written."""
        written = [path for rows in self._rows() for path in rows.written()]
        if self.part is not None:
            self._unsynced += written
            self._digests |= self.store.digests(written)

    def _put(
        self, tensors: Mapping[str, Tensor], steps_taken: int, numbers: Mapping[str, Any], finished: bool, durable: bool
    ) -> None:
        if self.part is None:
            return
        progress = Progress(self.progress.chains, steps_taken, finished, dict(self._digests), numbers)
        self.progress = self.part.commit(progress, tensors, self._unsynced, durable)
        self._last = time.monotonic()
        self._was_durable |= durable
        self._unsynced = [] if durable else self._unsynced

    def _end(self, tensors: Mapping[str, Tensor], steps_taken: int, numbers: Mapping[str, Any], files: Iterable[Path]) -> None:
        if self.part is not None:
            files = list(files)
            self._unsynced += files
            self._digests |= self.store.digests(files)
            long = self._was_durable or time.monotonic() - self._last > SHORT_SECONDS
            self._put(tensors, steps_taken, numbers, finished=True, durable=long)

    @abstractmethod
    def _rows(self) -> Iterable[Rows]:
        """Rows on their way to the store."""

    @abstractmethod
    def _state(self) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
        """The tensors and numbers to go on from."""

    @abstractmethod
    def _steps_taken(self) -> int:
        """Steps that are behind."""


class ChainCommits(Commits):
    """Of chains that step together."""

    def __init__(self, store: StoreWriter, walk: Walk, every: float):
        part = None if store.folder is None else store.folder.part(walk.chains[0])
        super().__init__(store, part, walk.chains, every)
        self.walk = walk
        self._final: tuple[Mapping[str, Tensor], Mapping[str, Any]] = {}, {}

    def begin(self, rows: dict[int, Rows]) -> dict[int, Rows]:
        """Put the walk and its rows where the last commit left them."""
        self.rows = rows
        if self.part is None:
            return rows
        tensors = self.part.state(self.progress)
        if tensors is not None:
            self._restore(tensors)
            logger.info("chains %s go on after %d steps", list(self.walk.chains), self.walk.steps_taken)
            return rows
        # which chains step together is kept from the start
        self._digests = {}
        self._put({}, 0, {}, finished=False, durable=False)
        self._was_durable = False
        return rows

    def _restore(self, tensors: Mapping[str, Tensor]) -> None:
        device = self.walk.plan.selection.device
        own = {name: tensor for name, tensor in tensors.items() if not name.startswith("rows.")}
        try:
            restore(self.walk, self.progress.steps_taken, own, self.progress.numbers)
        except StoreError:
            if self.part is not None:
                self.part.forget()
            raise
        for chain, rows in self.rows.items():
            start = f"rows.{chain}."
            held = {name.removeprefix(start): t.to(device) for name, t in tensors.items() if name.startswith(start)}
            rows.restore(held, self.progress.numbers["rows"][str(chain)])

        self._keep_final()

    def commit_if_due(self) -> None:
        super().commit_if_due()
        self._keep_final()

    def _keep_final(self) -> None:
        """What more draws would go on from: before the last look."""
        if self.part is not None and self.walk.steps_taken == self.walk.plan.settings.num_steps:
            self.settle()
            self._final = self._state()

    def finish(self) -> None:
        """After the last row."""
        files = [file for chain in self.walk.chains for file in self.store.files(("chain_status", "diverged_at"), chain)]
        tensors, numbers = self._final
        diverged = {str(chain): at for chain, at in self.walk.watch.diverged.items()}
        numbers = dict(numbers) | {"diverged": diverged}
        if sum(t.numel() * t.element_size() for t in tensors.values()) > FINAL_STATE_BYTES:
            tensors = {}
        self._end(tensors, self.walk.plan.settings.num_steps, numbers, files)

    def _rows(self) -> Iterable[Rows]:
        return self.rows.values()

    def _steps_taken(self) -> int:
        return self.walk.steps_taken

    def _state(self) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
        tensors, numbers = state_of(self.walk)
        counts = {}
        for chain, rows in self.rows.items():
            held, counts[str(chain)] = rows.state()
            tensors |= {f"rows.{chain}.{name}": tensor for name, tensor in held.items()}
        return tensors, numbers | {"rows": counts, "whole": sorted(self._digests)}


class BaselineCommits(Commits):
    """Of the baseline: a row depends on no other, so it goes on after the last whole chunk."""

    def __init__(self, store: StoreWriter, names: Iterable[str], every: float):
        super().__init__(store, None if store.folder is None else store.folder.part("baseline"), (), every)
        self.names = list(names)
        self.rows: dict[int, Rows] = {}

    def begin(self, rows: Rows, stream: int) -> Rows:
        rows.restore({}, {"baseline_loss": self.draws(stream)})
        self.rows[stream] = rows
        return rows

    def draws(self, stream: int) -> int:
        """Whole chunks of draws that are there already."""
        return int(self.progress.numbers.get(str(stream), 0))

    def finish(self, copied: Iterable[Path] = ()) -> None:
        self.settle()
        self._end({}, 0, self._state()[1], [*self.store.files(self.names), *copied])

    def _rows(self) -> Iterable[Rows]:
        return self.rows.values()

    def _steps_taken(self) -> int:
        return 0

    def _state(self) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
        chunk = self.store.array("baseline_loss").chunks[-3]
        counts = {stream: rows.state()[1].get("baseline_loss", 0) for stream, rows in self.rows.items()}
        return {}, dict(self.progress.numbers) | {str(stream): count // chunk * chunk for stream, count in counts.items()}
