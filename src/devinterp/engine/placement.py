"""Where chains run: one after another, side by side in worker processes, or in one vmap. Decided by sizes, never by timing."""

import contextlib
import logging
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from devinterp.engine.chain import Plan
from devinterp.engine.stopping import SECONDS_TO_STOP, no_signals

logger = logging.getLogger(__name__)

LONG_RUN = 3e11
"""Floating-point operations from which starting worker processes (their imports take seconds) pays"""
TINY_STEP = 2e7
"""Operations of a step on a batch up to which operators of a chain alone are all overhead on a CPU"""
TINY_STEP_ELSEWHERE = 2e10
MANY_CHAINS = 8
"""from which a CPU gains by one vmap"""
WORKER_IDLE_SECONDS = 300

SECONDS_BETWEEN_LOOKS = 0.2


@dataclass(frozen=True)
class Step:
    """What a task yields between two of its steps."""

    count: int = 1
    """rows that the progress display is to count"""
    note: str = ""


Task = TypeVar("Task")
Work = Callable[[Task], Generator[Step, None, Any]]
"""Does a task, yields after every step, and returns an outcome. Closed between two steps, it keeps what was done."""


@dataclass(frozen=True)
class Placement:
    """How the chains of a run are computed. Kept with the store: threads and vmap change the last digits of numbers."""

    way: str
    """"processes", "vmap" or "sequential"; the first and the last give equal numbers"""
    threads: int
    """of each chain"""

    def chains_per_walker(self, chains: Sequence[int]) -> list[tuple[int, ...]]:
        """Chains that share every operator."""
        if self.way == "vmap":
            return [tuple(chains)] if chains else []
        return [(chain,) for chain in chains]


def decide(asked: str, plan: Plan, num_runs: int = 1) -> Placement:
    """`chains_together`; for "auto" by this rule:

    - in one vmap where a step of one chain is so small that its operators are all overhead (on a CPU: at least
      `MANY_CHAINS` chains and at most `TINY_STEP` operations a step);
    - otherwise on a CPU in processes, where there are several cores and chains, the run is longer than `LONG_RUN` operations
      and half of the memory holds a copy of the model for each;
    - otherwise one after another.
    """
    threads, chains = torch.get_num_threads(), plan.settings.num_chains
    if asked == "auto":
        asked = _rule(plan, num_runs)
    if asked == "processes":
        threads = max(1, num_cores() // min(num_cores(), chains * num_runs))
    return Placement(asked, threads)


def _rule(plan: Plan, num_runs: int) -> str:
    on_cpu, chains = plan.selection.device.type == "cpu", plan.settings.num_chains
    step, whole = operations(plan)
    many, tiny = (MANY_CHAINS, TINY_STEP) if on_cpu else (2, TINY_STEP_ELSEWHERE)
    if chains >= many and step <= tiny and not plan.settings.train_mode:
        return "vmap"
    long = whole * num_runs > LONG_RUN
    if on_cpu and chains * num_runs > 1 and num_cores() > 1 and long and _fits(plan, chains * num_runs):
        return "processes"
    return "sequential"


def operations(plan: Plan) -> tuple[float, float]:
    """Floating-point operations of one step of one chain, and of all chains: 2 forward and 4 backward per weight and token."""
    settings = plan.settings
    weights = sum(p.numel() for p in plan.checkpoint.parameters.values())
    tokens = settings.batch_size * settings.gradient_accumulation_steps * plan.batches.tokens.length
    step = 6.0 * weights * tokens
    draw = 2.0 * weights * sum(observable.ids.size for observable in plan.observables)
    return step, settings.num_chains * (settings.num_steps * step + settings.num_draws * draw)


def _fits(plan: Plan, chains: int) -> bool:
    """Whether every worker can have a copy of the model, and its vectors, in half of the memory."""
    if "SC_PHYS_PAGES" not in os.sysconf_names:
        return True
    model = sum(p.numel() * p.element_size() for p in plan.checkpoint.parameters.values())
    each = model + 4 * (3 + plan.sampler.traits.vectors) * plan.selection.size
    return min(num_cores(), chains) * each < 0.5 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def num_cores() -> int:
    """Cores that this process may use."""
    from loky import cpu_count

    return int(cpu_count())


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Torch's number of threads for the length of the block."""
    before = torch.get_num_threads()
    try:
        if count != before:
            torch.set_num_threads(count)
        yield
    finally:
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)


def do(work: Work[Task], tasks: Sequence[Task], placement: Placement) -> Generator[Step, None, list[Any]]:
    """Do tasks where they are placed; yields the steps of all, and returns their outcomes in order.

    The outcome of a task whose worker process died is a `BrokenProcessPool`.
    """
    if placement.way == "processes" and len(tasks) > 1 and _may_start_workers():
        return (yield from _in_processes(work, tasks, placement.threads))
    with threads(placement.threads):
        outcomes: list[Any] = []
        for task in tasks:
            outcome = yield from work(task)
            outcomes.append(outcome)
    return outcomes


def _may_start_workers() -> bool:
    """Not from within a worker of `multiprocessing.Pool`, for one: there chains run one after another, with equal numbers."""
    if multiprocessing.current_process().daemon:
        logger.info("a daemonic process may start no workers: chains run one after another")
        return False
    return True


def _in_processes(work: Work[Task], tasks: Sequence[Task], num_threads: int) -> Generator[Step, None, list[Any]]:
    """Workers import nothing of the user's script, and stay for the next run; they count their steps in a shared file."""
    workers = min(len(tasks), max(1, num_cores() // num_threads))
    outcomes: list[Any] = [None] * len(tasks)
    with tempfile.TemporaryDirectory(prefix="devinterp-") as folder:
        counts = Counts(Path(folder) / "steps", len(tasks), create=True)

        def attempt(numbers: Sequence[int], count: int) -> Generator[Step, None, list[int]]:
            """Do some of the tasks; returns those whose worker died."""
            from loky import get_reusable_executor

            executor = get_reusable_executor(max_workers=count, timeout=WORKER_IDLE_SECONDS)
            futures: dict[Future[Any], int] = {}
            with _stopped_if_left(executor, futures, counts):
                for i in numbers:
                    futures[executor.submit(_exhaust, work, tasks[i], counts.path, i, len(tasks), num_threads, os.getpid())] = i
                yield from _watched(futures, counts)
            for future, i in futures.items():
                error = future.exception()
                if error is not None and not isinstance(error, BrokenProcessPool):
                    raise error
                outcomes[i] = error or future.result()
            return [i for i in numbers if isinstance(outcomes[i], BrokenProcessPool)]

        # one death breaks all that were under way: each of them is tried once more, alone
        for i in (yield from attempt(range(len(tasks)), workers)):
            yield from attempt([i], 1)
    return outcomes


@contextlib.contextmanager
def _stopped_if_left(executor: Any, futures: Mapping[Future[Any], int], counts: "Counts") -> Iterator[None]:
    """When the block is interrupted, workers end their step and keep what was done; then they are killed."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, GeneratorExit | OSError):
            counts.stop()
            for future in futures:
                future.cancel()
            wait([future for future in futures if not future.cancelled()], timeout=SECONDS_TO_STOP)
        executor.shutdown(wait=True, kill_workers=True)
        raise


def _watched(futures: Mapping[Future[Any], int], counts: "Counts") -> Iterator[Step]:
    """The steps that were counted, now and then, until all is done; an error of the machine ends it at once."""
    seen, waiting = 0, set(futures)
    while waiting:
        done, waiting = wait(waiting, timeout=SECONDS_BETWEEN_LOOKS, return_when=FIRST_COMPLETED)
        total = counts.total()
        yield Step(total - seen)
        seen = total
        for future in done:
            error = future.exception()
            if isinstance(error, OSError):
                raise error


class Counts:
    """Steps taken by each task, and whether all are to stop, in a file that worker processes map into memory."""

    def __init__(self, path: Path, size: int, create: bool = False):
        self.path = path
        self._steps = np.memmap(path, dtype=np.int64, mode="w+" if create else "r+", shape=(size + 1,))

    def add(self, task: int, count: int) -> None:
        self._steps[task] += count

    def total(self) -> int:
        return int(self._steps[:-1].sum())

    def stop(self) -> None:
        self._steps[-1] = 1

    @property
    def stopped(self) -> bool:
        return bool(self._steps[-1])


def _exhaust(work: Work[Task], task: Task, path: Path, number: int, size: int, num_threads: int, parent: int) -> Any:
    """In a worker: do one task to its end, or until it is told to stop."""
    torch.set_num_threads(num_threads)
    counts, steps = Counts(path, size), work(task)
    with no_signals(), contextlib.closing(steps):
        while True:
            try:
                step = next(steps)
            except StopIteration as end:
                return end.value
            counts.add(number, step.count)
            if counts.stopped:
                return None
            if os.name == "posix" and os.getppid() != parent:
                os._exit(1)  # nobody waits for it, and another run may have taken over
