"""How the chains of a run are computed: one after another, side by side, or in one vmap. Decided by sizes, never by timing."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from devinterp.engine.checkpoint import is_spread
from devinterp.engine.walker import Plan

LONG_RUN = 3e11
"""Floating-point operations from which starting worker processes (their imports take seconds) pays"""
TINY_STEP = 2e7
"""Operations of a step on a batch up to which operators of a chain alone are all overhead on a CPU"""
TINY_STEP_ELSEWHERE = 2e10
MANY_CHAINS = 8
"""from which a CPU gains by one vmap"""


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


def decide(asked: str, plan: Plan, num_runs: int = 1, handed_out: bool = False) -> Placement:
    """`chains_together`; for "auto" by this rule:

    - in one vmap where a step of one chain is so small that its operators are all overhead (on a CPU: at least
      `MANY_CHAINS` chains and at most `TINY_STEP` operations a step);
    - otherwise on a CPU in processes, where there are several cores and chains, the run is longer than `LONG_RUN` operations
      and half of the memory holds a copy of the model for each;
    - otherwise one after another.

    Chains that are `handed_out` to workers of an executor have one thread each, whatever those workers' machines are, and
    "auto" is one vmap or "processes".
    """
    threads, chains = torch.get_num_threads(), plan.settings.num_chains
    if asked == "auto":
        asked = _rule(plan, num_runs)
        asked = "processes" if handed_out and asked == "sequential" else asked
    if asked == "processes":
        threads = 1 if handed_out else max(1, num_cores() // min(num_cores(), chains * num_runs))
    return Placement(asked, threads)


def _rule(plan: Plan, num_runs: int) -> str:
    on_cpu, chains = plan.selection.device.type == "cpu", plan.settings.num_chains
    if is_spread(plan.checkpoint.model):
        return "sequential"
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
    tokens = settings.batch_size * settings.gradient_accumulation_steps * plan.batches.rows.length
    step = 6.0 * weights * tokens
    draw = 2.0 * weights * sum(observable.tokens for observable in plan.observables)
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
