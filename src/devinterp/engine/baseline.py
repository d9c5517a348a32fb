"""Losses at the checkpoint itself, on the very tokens of the draws: what every estimate is measured against."""

from collections.abc import Iterator

import torch
from torch import Tensor

from devinterp.engine.chain import Plan, dropout_seed, observed_rows
from devinterp.engine.tokens import Observable


@torch.no_grad()
def init_loss(plan: Plan, chain: int) -> Tensor:
    """Mean loss per token position over the first batches of the chain's sampling stream, shape (token_pos,)."""
    settings = plan.settings
    total, count = torch.zeros(()), 0
    for t in range(settings.num_init_loss_batches):
        losses = _losses(plan, chain, t)
        total = total.to(losses.device) + losses.sum(0, dtype=torch.float64)
        count += len(losses)
    return total / count


@torch.no_grad()
def init_loss_of(plan: Plan, observable: Observable) -> Tensor:
    """Loss at the checkpoint on the observable's own tokens, shape (batch_{obs}, token_pos)."""
    forward = plan.forward
    buffers, parts = forward.checkpoint.buffers(), []
    for start, ids in observed_rows(plan, observable):
        with forward.observing():
            parts.append(forward.losses({}, ids, buffers, start))
    return torch.cat(parts)


@torch.no_grad()
def baseline_losses(plan: Plan, chain: int, start: int = 0) -> Iterator[Tensor]:
    """For each draw from `start` on, the loss at the checkpoint on the batch of its `sampling_loss`: (batch, token_pos)."""
    for draw in range(start, plan.settings.num_draws):
        yield _losses(plan, chain, plan.settings.steps_before_draw(draw))


def _losses(plan: Plan, chain: int, t: int) -> Tensor:
    forward, buffers = plan.forward, plan.checkpoint.buffers()
    return torch.cat(
        [
            forward.losses({}, forward.checkpoint.ids(ids), buffers, dropout_seed(plan, chain, t, j))
            for j, ids in enumerate(plan.batches.step(chain, t))
        ]
    )
