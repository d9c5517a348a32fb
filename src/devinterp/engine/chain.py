"""Chains: each a pure function of the plan and its number, from the checkpoint to its last draw."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from devinterp.engine.batch import marked, mean_loss
from devinterp.engine.prefix import Recorder
from devinterp.engine.walker import Plan, Walker

PATIENCE = {"cpu": 1}
PATIENCE_ELSEWHERE = 64
"""Steps between two looks whether the losses are finite, which a GPU has to be waited for; draws are always looked at"""


@dataclass(frozen=True)
class Snapshot:
    """A chain after `steps_taken` steps, all of it at the same weights."""

    chain: int
    steps_taken: int
    losses: Tensor
    """on the next step's batch, shape (batch, token_pos); NaN where none counts"""
    mean_loss: Tensor
    """of those that count"""
    draw: int | None
    observables: dict[str, Tensor]
    """at draws: losses of shape (batch_{obs}, token_pos); NaN where none counts"""
    metrics: dict[str, Tensor] | None
    """of the step that follows"""


@dataclass(frozen=True)
class Diverged:
    """A chain whose loss was not finite after this many steps; nothing more comes from it."""

    chain: int
    steps_taken: int


class Walk:
    """Some chains on their way, side by side. Between two steps it is all that they are: it can be stored and gone on with."""

    def __init__(self, plan: Plan, chains: Sequence[int], recorder: Recorder | None = None):
        self.plan, self.chains = plan, tuple(chains)
        self.walker = Walker(plan, *chains, recorder=recorder)
        self.watch = Watch(chains, plan.selection.device)
        self.steps_taken = 0


def run_chains(walk: Walk) -> Iterator[list[Snapshot | Diverged]]:
    """Walk on to the end; yields what is seen of the chains after 0, 1, ... num_steps steps.

    The loss of the next step's batch is recorded with the weights that it is taken at: it costs nothing except after the
    last step, where a pass is made for it. Several chains in one walk must be of a model that `torch.func.vmap` can carry
    (`placement.py`); a diverged one leaves the others as they are.
    """
    plan, walker, watch = walk.plan, walk.walker, walk.watch
    for t in range(walk.steps_taken, plan.settings.num_steps + 1):
        last = t == plan.settings.num_steps
        # the gradient is not needed after the last step, but then its losses are those of a longer run to the last bit
        losses = walker.differentiate(t)
        draw = plan.settings.draw_at(t)
        observables = walker.observe() if draw is not None else {}
        seen: list[Snapshot | Diverged] = []
        seen += watch.look(t, [losses, *observables.values()], now=draw is not None or last)
        metrics = None if last or not watch.alive else walker.step()
        for i, chain in enumerate(walk.chains):
            if chain not in watch.diverged:
                observed = {name: marked(values[i], walker.observed_counted[name]) for name, values in observables.items()}
                told = None if metrics is None else {name: values[i] for name, values in metrics.items()}
                counted = walker.counted_of(i)
                own = marked(losses[i], counted), mean_loss(losses[i], counted)
                seen.append(Snapshot(chain, t, *own, draw, observed, told))
        walk.steps_taken = t + 1
        yield seen
        if not watch.alive:
            return


class Watch:
    """Which chains still have finite losses."""

    def __init__(self, chains: Sequence[int], device: torch.device):
        self.chains = tuple(chains)
        self.diverged: dict[int, int] = {}
        """steps taken, by chain"""
        self.patience = PATIENCE.get(device.type, PATIENCE_ELSEWHERE)
        self.unseen: list[tuple[int, Tensor]] = []
        """sums of the losses of steps that were not looked at yet"""

    @property
    def alive(self) -> tuple[int, ...]:
        return tuple(chain for chain in self.chains if chain not in self.diverged)

    def look(self, t: int, losses: Sequence[Tensor], now: bool) -> Iterator[Diverged]:
        """Chains found to have diverged; losses of shape (chain, ...)."""
        self.unseen.append((t, torch.stack([part.flatten(1).sum(1, dtype=torch.float64) for part in losses]).sum(0)))
        if not now and len(self.unseen) < self.patience:
            return
        sums = torch.stack([total for _, total in self.unseen]).tolist()
        for i, chain in enumerate(self.chains):
            first = next((at for (at, _), row in zip(self.unseen, sums, strict=True) if not math.isfinite(row[i])), None)
            if first is not None and chain not in self.diverged:
                self.diverged[chain] = first
                yield Diverged(chain, first)
        self.unseen.clear()
