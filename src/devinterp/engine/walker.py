"""How a chain moves: its weights, and one step of them. The only place where weights change.

A few chains can step together: they share the passes through frozen modules, and, of small models, every operator of the
others (`torch.func.vmap`). What a chain does is the same; a chain alone is a group of one.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from devinterp.engine.batch import Batch, joined_counted
from devinterp.engine.batches import Batches
from devinterp.engine.checkpoint import Checkpoint
from devinterp.engine.forward import Forward
from devinterp.engine.metrics import Sums
from devinterp.engine.observables import Observable
from devinterp.engine.posterior import Posterior
from devinterp.engine.prefix import Recorder
from devinterp.engine.seeds import noise_generator
from devinterp.engine.selection import Block, Selection
from devinterp.engine.settings import Settings
from devinterp.samplers import Sampler

BLOCK = {"cpu": 2**16}
BLOCK_ELSEWHERE = 2**24
"""Elements updated at once: small enough for a CPU's cache, few launches on a GPU. Noise is drawn block by block, so these
are part of what a chain is a function of."""


@dataclass(frozen=True)
class Plan:
    """All that a chain is a function of, apart from its number."""

    settings: Settings
    sampler: Sampler
    forward: Forward
    selection: Selection
    batches: Batches
    observables: tuple[Observable, ...]
    purpose: str = "noise"
    """keeps the noise of the pilot apart from that of the run"""
    metric: Tensor | None = None
    """of a sampler that takes one (`metric.py`)"""

    @property
    def checkpoint(self) -> Checkpoint:
        return self.forward.checkpoint


def update_blocks(selection: Selection) -> list[Block]:
    """The stretches of the flat vector that are updated at once."""
    return list(selection.blocks(BLOCK.get(selection.device.type, BLOCK_ELSEWHERE)))


class Walker:
    """The weights of one chain, or of several that step together, and all that moves them. Vectors are (chain, element)."""

    def __init__(self, plan: Plan, *chains: int, recorder: Recorder | None = None):
        self.plan, self.chains, self.recorder = plan, chains, recorder
        settings, selection = plan.settings, plan.selection
        self.posterior = Posterior.of(settings)
        self.rngs = self._generators(plan.purpose)
        self.blocks = update_blocks(selection)
        self.weights = selection.initial().expand(len(chains), -1)
        # one chain has the only copy already; of several each gets its own
        self.weights = self.weights.contiguous() if len(chains) == 1 else self.weights.clone()
        self.gradient = torch.zeros_like(self.weights)
        alone = len(chains) == 1
        self.leaves = selection.leaves(self._vector(self.weights), self._vector(self.gradient) if alone else None)
        self.buffers = plan.checkpoint.buffers()
        self.counted: Tensor | None = None
        """of the last step's batch, ([chain,] batch, token_pos); None = all losses count"""
        self.observed_counted = {observable.name: self._placed(observable.batch.counted) for observable in plan.observables}
        self._noise = self.weights.new_empty(len(chains), min(selection.size, max(b.length for b in self.blocks)))
        if settings.init_noise:
            start = self._generators("init_noise")
            for block in self.blocks:
                self.weights[:, block.where] += settings.init_noise * self._normal(block, start)
        self.kept: dict[str, Tensor] = {}
        """the tensors of the sampler's state, by name: vectors of which each block's are views"""
        self.states: list[Any] = [self._begun(block) for block in self.blocks]

    def _placed(self, counted: Tensor | None) -> Tensor | None:
        return None if counted is None else counted.to(self.plan.selection.device)

    def _begun(self, block: Block) -> Any:
        """The sampler's first state of a block."""
        state = self.plan.sampler.init(self.weights[:, block.where], self._normal(block, self.rngs))
        views = {}
        for name, tensor in _tensors(state).items():
            views[name] = self.kept.setdefault(name, torch.empty_like(self.weights))[:, block.where]
            views[name].copy_(tensor)
        return replace(state, **views) if views else state

    def _generators(self, purpose: str) -> list[torch.Generator]:
        device, seed = self.plan.selection.device, self.plan.settings.init_seed
        return [noise_generator(device, seed, chain, purpose) for chain in self.chains]

    def _vector(self, stacked: Tensor) -> Tensor:
        """Of a chain alone without the dim of chains, so that operators are those of the model itself."""
        return stacked[0] if len(self.chains) == 1 else stacked

    def _normal(self, block: Block, rngs: list[torch.Generator]) -> Tensor:
        """Noise for a block, in memory that the next call uses again."""
        noise = self._noise[:, : block.length]
        for row, rng in zip(noise, rngs, strict=True):
            row.normal_(generator=rng)
        return noise

    def differentiate(self, t: int) -> Tensor:
        """Losses on the batch of step t, shape (chain, batch, token_pos), 0 where none counts; and the gradient of their mean.

        The mean is over all losses of the step's micro-batches that count.
        """
        batches = [self._batch(t, j) for j in range(self.plan.settings.gradient_accumulation_steps)]
        self.counted = joined_counted(batches)
        self.gradient.zero_()
        losses = []
        for j, batch in enumerate(batches):
            per_token = self._on_batch(batch, t, j)
            # chains have no weights in common, so the gradient of the sum of their losses is each one's own
            self._add_gradient(self._share_of_mean(per_token, len(batches)))
            losses.append(per_token.detach())
        return torch.cat(losses, 1)

    def _share_of_mean(self, losses: Tensor, count: int) -> Tensor:
        """What these losses (chain, batch, token_pos) of one of `count` micro-batches add to the means, over the chains."""
        if self.counted is None:
            return losses.sum() / (losses[0].numel() * count)
        return (losses.sum((1, 2)) / self.counted.sum((-2, -1))).sum()

    def counted_of(self, i: int) -> Tensor | None:
        """Which losses of the last step's batch count for the i-th chain, shape (batch, token_pos); None = all."""
        return self.counted[i] if self.counted is not None and self.counted.dim() == 3 else self.counted

    def _add_gradient(self, loss: Tensor) -> None:
        if len(self.chains) == 1:  # in place, while the pass goes on: the leaf's .grad is a view of self.gradient
            torch.autograd.backward(loss, inputs=self.leaves)
            return
        gradients = torch.autograd.grad(loss, self.leaves, allow_unused=True)
        for piece, gradient in zip(self.plan.selection.pieces, gradients, strict=True):
            if gradient is not None:
                piece.shaped(self.gradient).add_(gradient)

    def _batch(self, t: int, micro: int) -> Batch:
        """A micro-batch on the device; of chains that do not share them, theirs stacked: (chain, batch, ...)."""
        batches, placed = self.plan.batches, self.plan.checkpoint.placed
        number = t * self.plan.settings.gradient_accumulation_steps + micro
        if self._shares:
            return placed(batches.micro(self.chains[0], number))
        return Batch.join([placed(batches.micro(chain, number)) for chain in self.chains], torch.stack)

    @property
    def _shares(self) -> bool:
        return self.plan.batches.shared or len(self.chains) == 1

    def _on_batch(self, batch: Batch, t: int, micro: int) -> Tensor:
        batches, forward = self.plan.batches, self.plan.forward
        seed = dropout_seed(self.plan, self.chains[0], t, micro)
        if not self._shares:
            return self._each(lambda moved, part: forward.losses(moved, batch.holding(part), self.buffers, seed), batch.tensors)
        key = batches.stream(self.chains[0]), t * self.plan.settings.gradient_accumulation_steps + micro
        recorded = None if self.recorder is None else self.recorder.on_batch(key, batch)
        return self._each(lambda moved: forward.losses(moved, batch, self.buffers, seed, recorded))

    def _each(self, losses: Callable[..., Tensor], *stacked: Any) -> Tensor:
        """Losses of every chain, from a function of its moved parameters (and its part of what is stacked)."""
        place = self.plan.selection.place
        if len(self.chains) == 1:
            return losses(place(self.leaves))[None]
        together: Tensor = torch.func.vmap(lambda leaves, *parts: losses(place(leaves), *parts))(self.leaves, *stacked)
        return together

    @torch.no_grad()
    def observe(self) -> dict[str, Tensor]:
        """Losses of every observable at the present weights: (chain, batch_{obs}, token_pos), 0 where none counts."""
        return {observable.name: self._observed(observable) for observable in self.plan.observables}

    def _observed(self, observable: Observable) -> Tensor:
        forward, recorder = self.plan.forward, self.recorder
        # fresh buffers: in train_mode an observable must not feed the running statistics of the chain
        buffers, parts = forward.checkpoint.buffers(), []
        for start, batch in observed_rows(self.plan, observable, len(self.chains)):
            with forward.observing():
                recorded = None if recorder is None else recorder.on_observable((observable.name, start, len(batch)), batch)
                parts.append(self._each(lambda moved, b=batch, s=start, r=recorded: forward.losses(moved, b, buffers, s, r)))
        return torch.cat(parts, 1)

    @torch.no_grad()
    def step(self) -> dict[str, Tensor] | None:
        """Move the weights once; with `save_metrics` tell what the move was made of, shape (chain,)."""
        box, sums = self.plan.settings.bounding_box_size, Sums() if self.plan.settings.save_metrics else None
        for i, block in enumerate(self.blocks):
            w, anchor, gradient = self.weights[:, block.where], block.anchor, self.gradient[:, block.where]
            force = self.posterior.force(w, anchor, gradient)
            if self.plan.metric is not None:
                force = replace(force, metric=self.plan.metric[block.where])
            move, state = self.plan.sampler.step(force, self.states[i], self._normal(block, self.rngs))
            self.states[i] = kept_in_place(self.states[i], state)
            if sums is not None:
                sums.add(self.posterior, w, anchor, gradient, move)
            w += move.drift  # the only writes to weights in the library
            w += move.noise
            if box is not None:
                w.clamp_(anchor - box, anchor + box)
        return sums.metrics() if sums is not None else None


def kept_in_place(old: Any, new: Any) -> Any:
    """The new state in the old one's memory: tensors that change hands at every step would fragment it."""
    views = {name: getattr(old, name).copy_(tensor) for name, tensor in _tensors(new).items()}
    return replace(new, **views) if views else new


def _tensors(state: Any) -> dict[str, Tensor]:
    found = {} if state is None else {item.name: getattr(state, item.name) for item in fields(state)}
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


def observed_rows(plan: Plan, observable: Observable, chains: int = 1) -> Iterator[tuple[int, Batch]]:
    """The rows of an observable as they go through the model: a batch at a time, or several joined; with the first's number."""
    rows = plan.forward.rows_at_once(plan.settings.batch_size, observable.elements, chains)
    for start in range(0, len(observable), rows):
        yield start, plan.checkpoint.placed(observable.batch[start : start + rows])


def dropout_seed(plan: Plan, chain: int, t: int, micro: int) -> str:
    """Chains that share batches share dropout masks too, and so does their baseline: only the noise differs."""
    return f"{plan.settings.init_seed} {plan.batches.stream(chain)} {t} {micro}"
