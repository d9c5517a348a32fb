"""What is left of runs as tasks for workers, and who steps together."""

from collections.abc import Sequence
from dataclasses import dataclass

from devinterp.engine.placement import Placement, num_cores
from devinterp.engine.walker import Plan
from devinterp.slt.requests import Request
from devinterp.store.mirror import Mirror
from devinterp.store.recording import Chains
from devinterp.store.writer import StoreWriter

RUNS_TOGETHER = 8
"""Restrictions that step together at most: they share passes through frozen layers, each with vectors of its own in memory"""


@dataclass(frozen=True)
class Run:
    """A run that is planned and has a store, of which this process is the only writer."""

    request: Request
    plan: Plan
    store: StoreWriter
    placement: Placement
    mirror: Mirror | None = None
    """copies it to its object store"""

    @property
    def finished(self) -> set[int]:
        """Chains of which nothing is left to do. What failed once, for lack of memory or disk, is run again."""
        return set() if self.store.folder is None else self.store.folder.finished_chains()

    @property
    def walkers(self) -> list[tuple[int, ...]]:
        """What is left to do: chains that have begun together go on together."""
        begun = [] if self.store.folder is None else self.store.folder.begun()
        known = self.finished.union(*begun)
        return begun + self.placement.chains_per_walker(
            [chain for chain in range(self.plan.settings.num_chains) if chain not in known]
        )

    @property
    def needs_baseline(self) -> bool:
        return self.store.folder is None or not self.store.folder.has_baseline()


def chain_tasks(
    runs: Sequence[Run], numbers: Sequence[int], walkers: Sequence[list[tuple[int, ...]]], placement: Placement
) -> list[tuple[list[int], Chains]]:
    """Who steps together: where modules are frozen, as many as share them, spread evenly over the workers."""
    workers = runs[numbers[0]].request.inputs.workers
    shared = [i for i in numbers if runs[i].plan.forward.prefix is not None and walkers[i]]
    groups: list[tuple[list[int], list[list[tuple[int, ...]]]]] = []
    if not workers.are_known:  # of no number that is known: one chain of a few runs each
        for start in range(0, len(shared), RUNS_TOGETHER):
            some = shared[start : start + RUNS_TOGETHER]
            for k in range(max(len(walkers[i]) for i in some)):
                members = [i for i in some if k < len(walkers[i])]
                groups.append((members, [[walkers[i][k]] for i in members]))
    else:
        at_once = len(workers.devices) or (max(1, num_cores() // placement.threads) if placement.way == "processes" else 1)
        groups += _spread(shared, walkers, at_once)
    groups += [([i], [[walker]]) for i in numbers if i not in shared for walker in walkers[i]]
    return [
        (
            members,
            Chains(
                tuple(runs[i].plan for i in members),
                tuple(runs[i].store for i in members),
                tuple(map(tuple, of_each)),
                stop_at_divergence=runs[members[0]].request.inputs.on_diverged == "raise",
                checkpoint_every=runs[members[0]].request.inputs.paths.checkpoint_every,
            ),
        )
        for members, of_each in groups
    ]  # fmt: skip


def _spread(
    shared: list[int], walkers: Sequence[list[tuple[int, ...]]], workers: int
) -> list[tuple[list[int], list[list[tuple[int, ...]]]]]:
    """Over a known number of workers: of one run, its chains; of several, whole runs."""
    if len(shared) == 1:
        (i,) = shared
        return [([i], [walkers[i][worker::workers]]) for worker in range(min(workers, len(walkers[i])))]
    if not shared:
        return []
    count = max(-(-len(shared) // RUNS_TOGETHER), min(workers, len(shared)))
    # each layer costs something else: dealt out in turn
    return [(shared[number::count], [walkers[i] for i in shared[number::count]]) for number in range(count)]
