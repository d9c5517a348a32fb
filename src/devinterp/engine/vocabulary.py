"""Losses of a language model without whole logits.

The pass is cut at the output embedding, and the cross-entropy taken a few positions at a time from the last hidden state: a
batch's logits (batch x token x vocabulary) would be the largest thing in memory, and most of the time is spent on passes
over them. The output embedding is found by trying, not by name, and used only where it is proven equal (`forward.py`).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from devinterp.engine.batch import Batch
from devinterp.engine.checkpoint import Checkpoint
from devinterp.engine.stand_ins import Cut, stand_ins

CHUNK_ELEMENTS = {"cpu": 2**23}
CHUNK_ELEMENTS_ELSEWHERE = 2**27
"""Logits that exist at once: few enough for a CPU's cache, many enough to fill a GPU"""
SATURATION = 1e6
"""A raw logit at which every soft cap has its limit"""


@dataclass(frozen=True)
class Head:
    """The module that turns hidden states into raw logits, and what the model does to them.

    logits = cap tanh(scale raw / cap), or scale raw without a cap;    raw = hidden W^T + b
    """

    module: nn.Module
    weight: str
    bias: str | None
    transposed: bool
    """W is stored as (hidden, vocabulary)"""
    scale: float = 1.0
    cap: float | None = None

    def stop(self, hidden: Tensor, *_: Any, **__: Any) -> None:
        """Stands in for the module's forward: all that the loss needs is known when it is called."""
        weight, bias = getattr(self.module, self.weight), getattr(self.module, self.bias) if self.bias else None
        raise Cut(hidden, weight.T if self.transposed else weight, bias)

    def losses(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, batch: Batch) -> Tensor:
        """Losses of the batch's targets, float32, shape (batch, token_pos); those that do not count are never computed."""
        if torch.is_autocast_enabled(hidden.device.type):
            dtype = torch.get_autocast_dtype(hidden.device.type)
            hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        targets, counted = batch.targets, batch.counted
        hidden = hidden[:, : targets.shape[1]]
        if counted is not None:
            hidden, targets = hidden[counted], targets[counted]
        arguments = hidden, weight, bias, targets, self.scale, self.cap
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (hidden, weight, bias)):
            losses: Tensor = _CrossEntropy.apply(*arguments)  # type: ignore[no-untyped-call]
        else:
            losses = _losses(*arguments)
        return losses if counted is None else losses.new_zeros(counted.shape).masked_scatter(counted, losses)


class _CrossEntropy(torch.autograd.Function):
    """Cross-entropy whose gradients are made in the forward pass, while each chunk of logits is there.

    That is possible because it is differentiated as a mean: every token has the same weight.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, scale: float, cap: float | None
    ) -> Tensor:
        wanted = ctx.needs_input_grad
        flat = hidden.reshape(-1, hidden.shape[-1])
        by_hidden = torch.empty_like(flat) if wanted[0] else None
        by_weight = torch.zeros_like(weight, memory_format=torch.contiguous_format) if wanted[1] else None
        by_bias = torch.zeros_like(bias) if bias is not None and wanted[2] else None
        losses = torch.empty(len(flat), dtype=torch.float32, device=flat.device)
        for rows, logits, picked in _chunks(flat, weight, bias, targets.reshape(-1), scale, cap):
            slope = None if cap is None else 1 - (logits / cap).square()
            total, log_total = _exponentials(logits)
            losses[rows] = log_total - picked
            by_logits = logits.div_(total)
            by_logits[torch.arange(len(picked), device=flat.device), targets.reshape(-1)[rows]] -= 1
            if slope is not None:
                by_logits *= slope
            if scale != 1:
                by_logits *= scale
            by_logits = by_logits.to(flat.dtype)
            if by_hidden is not None:
                torch.mm(by_logits, weight, out=by_hidden[rows])
            if by_weight is not None:
                by_weight.addmm_(by_logits.T, flat[rows])
            if by_bias is not None:
                by_bias += by_logits.sum(0)
        ctx.gradients = None if by_hidden is None else by_hidden.view(hidden.shape), by_weight, by_bias
        return losses.view(targets.shape)

    @staticmethod
    def backward(ctx: Any, by_loss: Tensor) -> tuple[Any, ...]:
        if any(by_loss.stride()) and not (by_loss == by_loss.flatten()[0]).all():
            raise RuntimeError("the chunked cross-entropy can only be differentiated as a mean or sum of all tokens")
        each = by_loss.flatten()[0]
        gradients, ctx.gradients = ctx.gradients, (None, None, None)  # scaled in place: for one backward pass
        return *(None if g is None else g.mul_(each.to(g.dtype)) for g in gradients), None, None, None


def _losses(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, scale: float, cap: float | None) -> Tensor:
    flat = hidden.reshape(-1, hidden.shape[-1])
    losses = torch.empty(len(flat), dtype=torch.float32, device=flat.device)
    for rows, logits, picked in _chunks(flat, weight, bias, targets.reshape(-1), scale, cap):
        losses[rows] = _exponentials(logits)[1] - picked
    return losses.view(targets.shape)


def _exponentials(logits: Tensor) -> tuple[Tensor, Tensor]:
    """exp(logits - the row's highest), in their place; its sums (row, 1), and log sum exp(logits) of each row."""
    highest = logits.amax(1, keepdim=True)
    total = logits.sub_(highest).exp_().sum(1, keepdim=True)
    return total, (total.log() + highest).squeeze(1)


def _chunks(
    flat: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, scale: float, cap: float | None
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Rows of `flat`, their float32 logits (to be overwritten), and the logits of the targets."""
    vocabulary = weight.shape[0]
    size = max(1, min(len(flat), CHUNK_ELEMENTS.get(flat.device.type, CHUNK_ELEMENTS_ELSEWHERE) // vocabulary))
    memory = torch.empty(size, vocabulary, dtype=flat.dtype, device=flat.device)
    for start in range(0, len(flat), size):
        rows = slice(start, min(start + size, len(flat)))
        part = memory[: rows.stop - start]
        with torch.autocast(flat.device.type, enabled=False):
            torch.mm(flat[rows].detach(), weight.detach().T, out=part)
        if bias is not None:
            part += bias.detach()
        logits = part.float()
        if scale != 1:
            logits *= scale
        if cap is not None:
            logits.div_(cap).tanh_().mul_(cap)
        yield rows, logits, logits.gather(1, targets[rows, None]).squeeze(1)


def find_head(checkpoint: Checkpoint, batch: Batch) -> Head | None:
    """The output embedding, if there is one module whose raw logits are hidden W^T + b and whose image the logits are."""
    logits = checkpoint.logits(batch)
    for module, hidden, raw in _candidates(checkpoint, batch, logits.shape):
        form = _linear_form(module, hidden, raw)
        if form is None:
            continue
        scale_and_cap = _scale_and_cap(checkpoint, module, batch, raw)
        if scale_and_cap is not None:
            return Head(module, *form, *scale_and_cap)
    return None


def _candidates(checkpoint: Checkpoint, batch: Batch, shape: torch.Size) -> list[tuple[nn.Module, Tensor, Tensor]]:
    """Modules called once, that own a parameter and return one tensor of the logits' shape, with what they took; last first."""
    calls: dict[nn.Module, list[tuple[Any, Any]]] = {}

    def noting(module: nn.Module) -> Any:
        original = module.forward

        def forward(*arguments: Any, **named: Any) -> Any:
            output = original(*arguments, **named)
            calls.setdefault(module, []).append((arguments[0] if arguments else None, output))
            return output

        return forward

    owners = [m for m in checkpoint.model.modules() if any(True for _ in m.parameters(recurse=False))]
    with stand_ins({module: noting(module) for module in owners}):
        checkpoint.logits(batch)
    return [
        (module, noted[0][0], noted[0][1])
        for module, noted in reversed(calls.items())
        if len(noted) == 1 and all(isinstance(t, Tensor) for t in noted[0]) and noted[0][1].shape == shape
        and noted[0][0].shape[:2] == shape[:2]
    ]  # fmt: skip


def _linear_form(module: nn.Module, hidden: Tensor, raw: Tensor) -> tuple[str, str | None, bool] | None:
    """Names of W and b, and whether W is transposed, where raw = hidden W^T + b."""
    own = dict(module.named_parameters(recurse=False))
    shape = raw.shape[-1], hidden.shape[-1]
    for name, weight in own.items():
        biases = [other for other, b in own.items() if b.shape == shape[:1]]
        for transposed in (False, True):
            if tuple(weight.shape) != (shape[::-1] if transposed else shape):
                continue
            for bias in (*biases, None):
                made = hidden @ (weight if transposed else weight.T)
                made = made if bias is None else made + own[bias]
                if made.dtype == raw.dtype and close(made, raw):
                    return name, bias, transposed
    return None


def _scale_and_cap(checkpoint: Checkpoint, module: nn.Module, batch: Batch, raw: Tensor) -> tuple[float, float | None] | None:
    """What the model makes of raw logits, told from made-up ones: a scale, a soft cap, or neither; None = something else."""

    def logits_of(made_up: Tensor) -> Tensor:
        with stand_ins({module: lambda *_, **__: made_up.clone()}):
            return checkpoint.logits(batch).double()

    limit = logits_of(torch.full_like(raw, SATURATION)).flatten()[0].item()
    scale = logits_of(torch.full_like(raw, 2.0**-10)).flatten()[0].item() * 2.0**10
    cap = None if limit > 0.5 * scale * SATURATION else limit
    if not (math.isfinite(limit) and math.isfinite(scale) and scale > 0 and (cap is None or cap > 0)):
        return None
    grid = torch.linspace(-300, 300, raw.numel(), device=raw.device, dtype=torch.float64)
    grid = grid[torch.randperm(raw.numel(), generator=torch.Generator().manual_seed(0)).to(raw.device)].view(raw.shape)
    grid = grid.to(raw.dtype)
    expected = scale * grid.double()
    if cap is not None:
        expected = cap * torch.tanh(expected / cap)
    if abs(scale - round(scale)) < 1e-6:
        scale = float(round(scale))
    return (scale, cap) if close(logits_of(grid).to(raw.dtype), expected.to(raw.dtype)) else None


def close(a: Tensor, b: Tensor) -> bool:
    """Equal to rounding, of a size with the largest element."""
    tolerance = 2e-5 if torch.finfo(a.dtype).bits > 16 else 2e-2
    scale = max(1.0, b.abs().max().item())
    return bool(torch.isfinite(a).all()) and (a.double() - b.double()).abs().max().item() <= tolerance * scale
