"""Losses at the checkpoint itself, on the very tokens of the draws: what every estimate is measured against."""

from collections.abc import Iterator

import torch
from torch import Tensor

from devinterp.engine.batch import joined_counted, marked
from devinterp.engine.observables import Observable
from devinterp.engine.walker import Plan, dropout_seed, observed_rows


@torch.no_grad()
def init_loss(plan: Plan, chain: int) -> tuple[Tensor, Tensor]:
    """Mean loss per position over the first batches of the chain's sampling stream, and of how many it is: (token_pos,)."""
    settings = plan.settings
    total, count = torch.zeros(()), torch.zeros((), dtype=torch.float64)
    for t in range(settings.num_init_loss_batches):
        losses, counted = _losses(plan, chain, t)
        total = total.to(losses.device) + losses.sum(0, dtype=torch.float64)
        many = torch.full(losses.shape[1:], len(losses), device=losses.device) if counted is None else counted.sum(0)
        count = count.to(losses.device) + many
    return total / count, count.long()


@torch.no_grad()
def init_loss_of(plan: Plan, observable: Observable) -> Tensor:
    """Loss at the checkpoint on the observable's own rows, shape (batch_{obs}, token_pos); NaN where none counts."""
    forward = plan.forward
    buffers, parts = forward.checkpoint.buffers(), []
    for start, batch in observed_rows(plan, observable):
        with forward.observing():
            parts.append(marked(forward.losses({}, batch, buffers, start), batch.counted))
    return torch.cat(parts)


@torch.no_grad()
def baseline_losses(plan: Plan, chain: int, start: int = 0) -> Iterator[Tensor]:
    """For each draw from `start` on, the loss at the checkpoint on the batch of its `sampling_loss`: (batch, token_pos)."""
    for draw in range(start, plan.settings.num_draws):
        yield marked(*_losses(plan, chain, plan.settings.steps_before_draw(draw)))


def _losses(plan: Plan, chain: int, t: int) -> tuple[Tensor, Tensor | None]:
    """Of all micro-batches of a step, and which of them count."""
    forward, buffers = plan.forward, plan.checkpoint.buffers()
    batches = [plan.checkpoint.placed(batch) for batch in plan.batches.step(chain, t)]
    losses = [forward.losses({}, batch, buffers, dropout_seed(plan, chain, t, j)) for j, batch in enumerate(batches)]
    return torch.cat(losses), joined_counted(batches)
