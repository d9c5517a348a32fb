"""One chain: a pure function of the plan and the chain's number. The only place where weights change."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from devinterp.engine.batches import Batches
from devinterp.engine.checkpoint import Checkpoint
from devinterp.engine.posterior import Posterior
from devinterp.engine.seeds import noise_generator
from devinterp.engine.selection import Block, Selection
from devinterp.engine.settings import Settings
from devinterp.engine.tokens import Ids, Observable
from devinterp.errors import ChainDiverged
from devinterp.samplers import Move, Sampler

BLOCK = {"cpu": 2**16}
BLOCK_ELSEWHERE = 2**24
"""Elements updated at once: small enough for a CPU's cache, few launches on a GPU. Noise is drawn block by block, so these
are part of what a chain is a function of."""

METRICS = (
    "scaled_grad",
    "unscaled_grad",
    "localization",
    "weight_decay",
    "noise",
    "distance",
    "dot_grad_prior",
    "dot_grad_noise",
    "dot_prior_noise",
)


@dataclass(frozen=True)
class Plan:
    """All that a chain is a function of, apart from its number."""

    settings: Settings
    sampler: Sampler
    checkpoint: Checkpoint
    selection: Selection
    batches: Batches
    observables: tuple[Observable, ...]
    purpose: str = "noise"
    """keeps the noise of the pilot apart from that of the run"""


@dataclass(frozen=True)
class Snapshot:
    """A chain after `steps_taken` steps, all of it at the same weights."""

    steps_taken: int
    losses: Tensor
    """per-token losses on the next step's batch, shape (batch, token_pos)"""
    draw: int | None
    observables: dict[str, Tensor]
    """at draws: per-token losses, shape (batch_{obs}, token_pos)"""
    metrics: dict[str, float] | None
    """of the step that follows"""


def run_chain(plan: Plan, chain: int) -> Iterator[Snapshot]:
    """Walk one chain; yields after 0, 1, ... num_steps steps.

    The loss of the next step's batch is recorded with the weights that it is taken at: it costs nothing except after the
    last step, where one forward pass is made for it.

    Raises:
        ChainDiverged: a loss is not finite.
    """
    walker = Walker(plan, chain)
    for t in range(plan.settings.num_steps + 1):
        last = t == plan.settings.num_steps
        losses = walker.losses(t) if last else walker.differentiate(t)
        draw = plan.settings.draw_at(t)
        observables = walker.observe() if draw is not None else {}
        if not all(map(is_finite, (losses, *observables.values()))):
            raise ChainDiverged(chain, t, plan.sampler.lr)
        metrics = None if last else walker.step()
        yield Snapshot(t, losses, draw, observables, metrics)


def update_blocks(selection: Selection) -> list[Block]:
    """The stretches of the flat vector that are updated at once."""
    return list(selection.blocks(BLOCK.get(selection.device.type, BLOCK_ELSEWHERE)))


def is_finite(losses: Tensor) -> bool:
    return math.isfinite(losses.sum(dtype=torch.float64).item())


class Walker:
    """The weights of one chain, and all that moves them."""

    def __init__(self, plan: Plan, chain: int):
        self.plan, self.chain = plan, chain
        settings, selection = plan.settings, plan.selection
        self.posterior = Posterior.of(settings)
        self.rng = noise_generator(selection.device, settings.init_seed, chain, plan.purpose)
        self.blocks = update_blocks(selection)
        self.weights = selection.initial()
        self.gradient = torch.zeros_like(self.weights)
        self.leaves = selection.leaves(self.weights, self.gradient)
        self.buffers = plan.checkpoint.buffers()
        if settings.init_noise:
            start = noise_generator(selection.device, settings.init_seed, chain, "init_noise")
            for block in self.blocks:
                self.weights[block.where] += settings.init_noise * self._normal(block, start)
        self.states: list[Any] = [
            plan.sampler.init(self.weights[block.where], self._normal(block, self.rng)) for block in self.blocks
        ]

    def _normal(self, block: Block, rng: torch.Generator) -> Tensor:
        length = block.where.stop - block.where.start
        return torch.randn(length, generator=rng, dtype=self.weights.dtype, device=self.weights.device)

    def differentiate(self, t: int) -> Tensor:
        """Losses on the batch of step t, and the gradient of their mean, averaged over micro-batches."""
        micro_batches = self.plan.batches.step(self.chain, t)
        self.gradient.zero_()
        losses = []
        for j, ids in enumerate(micro_batches):
            per_token = self._forward(ids, t, j)
            # adds into self.gradient in place: the leaves' .grad are views of it
            torch.autograd.backward(per_token.mean() / len(micro_batches), inputs=self.leaves)
            losses.append(per_token.detach())
        return torch.cat(losses)

    @torch.no_grad()
    def losses(self, t: int) -> Tensor:
        """Losses on the batch of step t."""
        return torch.cat([self._forward(ids, t, j) for j, ids in enumerate(self.plan.batches.step(self.chain, t))])

    def _forward(self, ids: Ids, t: int, micro: int) -> Tensor:
        checkpoint = self.plan.checkpoint
        moved = self.plan.selection.place(self.leaves)
        seed = dropout_seed(self.plan, self.chain, t, micro)
        return checkpoint.losses(moved, checkpoint.ids(ids), self.buffers, seed)

    @torch.no_grad()
    def observe(self) -> dict[str, Tensor]:
        """Per-token losses of every observable at the present weights."""
        moved = self.plan.selection.place(self.leaves)
        return {obs.name: observable_losses(self.plan, moved, obs) for obs in self.plan.observables}

    @torch.no_grad()
    def step(self) -> dict[str, float] | None:
        """Move the weights once; with `save_metrics` tell what the move was made of."""
        box, sums = self.plan.settings.bounding_box_size, Sums() if self.plan.settings.save_metrics else None
        for i, block in enumerate(self.blocks):
            w, anchor = self.weights[block.where], block.anchor
            force = self.posterior.force(w, anchor, self.gradient[block.where])
            move, state = self.plan.sampler.step(force, self.states[i], self._normal(block, self.rng))
            self.states[i] = kept_in_place(self.states[i], state)
            if sums is not None:
                sums.add(self.posterior, w, anchor, self.gradient[block.where], move)
            w += move.drift  # the only writes to weights in the library
            w += move.noise
            if box is not None:
                w.clamp_(anchor - box, anchor + box)
        return sums.metrics() if sums is not None else None


def kept_in_place(old: Any, new: Any) -> Any:
    """The new state in the old one's memory: tensors that change hands at every step would fragment it."""
    if new is None:
        return None
    tensors = {item.name: getattr(new, item.name) for item in fields(new)}
    return replace(new, **{name: getattr(old, name).copy_(t) for name, t in tensors.items() if isinstance(t, Tensor)})


def observable_losses(plan: Plan, moved: dict[str, Tensor], observable: Observable) -> Tensor:
    """Per-token losses of one observable, shape (batch_{obs}, token_pos)."""
    size, checkpoint = plan.settings.batch_size, plan.checkpoint
    starts = range(0, len(observable.ids), size)
    # fresh buffers: in train_mode an observable must not feed the running statistics of the chain
    buffers = checkpoint.buffers()
    return torch.cat([checkpoint.losses(moved, checkpoint.ids(observable.ids[i : i + size]), buffers, seed=i) for i in starts])


def dropout_seed(plan: Plan, chain: int, t: int, micro: int) -> str:
    """Chains that share batches share dropout masks too, and so does their baseline: only the noise differs."""
    return f"{plan.settings.init_seed} {plan.batches.stream(chain)} {t} {micro}"


class Sums:
    """Squares and products of the parts of a move, summed over blocks in float64."""

    def __init__(self) -> None:
        self.totals = dict.fromkeys(METRICS, 0.0)

    def add(self, posterior: Posterior, w: Tensor, anchor: Tensor, gradient: Tensor, move: Move) -> None:
        displacement = w - anchor
        grad = -move.gain * posterior.n_beta * gradient
        localization = -move.gain * posterior.localization * displacement
        weight_decay = -move.gain * posterior.weight_decay * w
        prior = localization + weight_decay
        products = {
            "scaled_grad": (grad, grad),
            "unscaled_grad": (gradient, gradient),
            "localization": (localization, localization),
            "weight_decay": (weight_decay, weight_decay),
            "noise": (move.noise, move.noise),
            "distance": (displacement, displacement),
            "dot_grad_prior": (grad, prior),
            "dot_grad_noise": (grad, move.noise),
            "dot_prior_noise": (prior, move.noise),
        }
        for name, (a, b) in products.items():
            self.totals[name] += torch.dot(a.double(), b.double()).item()

    def metrics(self) -> dict[str, float]:
        return {name: value if name.startswith("dot_") else value**0.5 for name, value in self.totals.items()}
