"""Chains as tasks on workers that fail: a simulation, and the closed forms that it is compared with.

A worker fails at random (exponential, mean `between_failures`), at any moment, also while it loads. Its chain waits in front of the
queue and goes on, on the next free worker, from its last commit; the worker is back after `downtime`.
"""

import heapq
import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Failing:
    """Seconds all."""

    between_failures: float
    commit_every: float = 300.0
    commit: float = 1.0
    """what a commit takes from its chain"""
    restart: float = 60.0
    """after a failure, from a chain's start on another worker to its first step: noticed, imported, loaded, checked"""
    start: float = 5.0
    """of a new chain on a worker that is running"""
    downtime: float = 300.0
    """until a worker that failed is there again"""


def expected_worker_seconds(work: float, failing: Failing) -> float:
    """Of one chain, waiting in the queue and downtime not counted.

    Exact for exponential failures (as Daly 2006, Future Generation Computer Systems 22:303). A stretch of length s must go through
    without a failure. It is tried once, with what comes before it, B (the start of a new chain, else 0), and after a failure all
    over again with a restart R. With M the mean time between failures that takes

        M (1 - e^(-(B + s)/M)) e^((R + s)/M),        which is  M e^(R/M) (e^(s/M) - 1)  for B = 0.
    """
    mean, whole = failing.between_failures, math.floor(work / failing.commit_every)
    last = work - whole * failing.commit_every
    stretches = [failing.commit_every + failing.commit] * whole + ([last + failing.commit] if last > 0 else [])
    before = [failing.start] + [0.0] * len(stretches)
    return sum(
        -mean * math.expm1(-(b + s) / mean) * math.exp((failing.restart + s) / mean)
        for b, s in zip(before, stretches, strict=False)
    )


def first_order_overhead(failing: Failing) -> float:
    """Commits, half a stretch and a start for every failure (Young 1974)."""
    lost = failing.commit_every / 2 + failing.commit + failing.restart
    return failing.commit / failing.commit_every + lost / failing.between_failures


def best_commit_every(failing: Failing) -> float:
    """Where the first-order overhead is least (Young 1974)."""
    return math.sqrt(2 * failing.commit * failing.between_failures)


@dataclass(frozen=True)
class Simulated:
    makespan: float
    worker_seconds: float
    """in which a worker had a chain"""
    failures: int
    """that hit a chain"""


def simulate(work: np.ndarray, workers: int, failing: Failing, rng: np.random.Generator) -> Simulated:
    """`work`: seconds of each chain, in the order of the queue."""
    queue = list(range(len(work)))[::-1]  # the next one last
    done = np.zeros(len(work))
    begun = np.zeros(len(work), dtype=bool)
    free = [(0.0, worker) for worker in range(workers)]
    waiting: list[tuple[float, int]] = []
    """chains that come back at a time: they go first"""
    makespan = busy = 0.0
    failures = 0
    while queue or waiting:
        now, worker = heapq.heappop(free)
        if waiting and waiting[0][0] <= now:
            _, chain = heapq.heappop(waiting)
        elif queue:
            chain = queue.pop()
        else:  # it waits for a chain that will come back
            heapq.heappush(free, (waiting[0][0], worker))
            continue
        alive = rng.exponential(failing.between_failures)
        start, begun[chain] = failing.restart if begun[chain] else failing.start, True
        needed, committed = _until_done(work[chain] - done[chain], alive, start, failing)
        if needed <= alive:
            makespan, busy = max(makespan, now + needed), busy + needed
            heapq.heappush(free, (now + needed, worker))
            continue
        failures, busy = failures + 1, busy + alive
        done[chain] += committed
        heapq.heappush(waiting, (now + alive, chain))
        heapq.heappush(free, (now + alive + failing.downtime, worker))
    return Simulated(makespan, busy, failures)


def _until_done(left: float, alive: float, start: float, failing: Failing) -> tuple[float, float]:
    """Seconds to the end of a chain, and the work that is committed by the time of the failure."""
    count = math.ceil(left / failing.commit_every - 1e-12)
    needed = start + left + count * failing.commit
    stretches = max(0, math.floor((alive - start) / (failing.commit_every + failing.commit)))
    return needed, min(stretches * failing.commit_every, left)
