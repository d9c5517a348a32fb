"""The largest Hessian eigenvalue over the moving weights, which decides which step sizes are stable; its trace; noise."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from devinterp.engine.batch import Batch, mean_loss
from devinterp.engine.posterior import Posterior
from devinterp.engine.seeds import noise_generator
from devinterp.engine.selection import Block
from devinterp.engine.walker import Plan, Walker, update_blocks
from devinterp.errors import InputValueError

ITERATIONS = 10
CONVERGED = 0.1
"""Relative change of the eigenvalue at which the iteration stops: lr moves by less, and is stable to four times its value"""
REACH = 1e-2
"""Distance of the central differences: small against the width of the posterior, large against rounding"""
ROUNDING = 1e-5
"""A difference of gradients below this share of them is taken for rounding"""
TOKENS = 2048
"""of the sampling stream, on which the curvature is measured; at least 8 sequences, at most 128"""
NOISE_BATCHES = 8


@dataclass(frozen=True)
class Spectrum:
    """What is measured of a Hessian: its largest eigenvalue, and its trace from one random direction."""

    precision: float
    """the largest eigenvalue of n_beta H + prior, or with a metric M of M times that"""
    h_max: float = math.nan
    trace: float = math.nan


def check_curved(what: str, precision: float, fix: str) -> None:
    """Raises InputValueError where nothing holds the weights, neither the loss nor a prior."""
    if not precision > 0:
        raise InputValueError(
            f"{what}: the loss has no positive curvature at the checkpoint and there is no prior, so every step is stable and "
            f"none is right. {fix}"
        )


def gradient_noise(plan: Plan) -> float:
    """Variance of the gradient of a step's batch at the checkpoint, summed over the moving weights.

    sum over b of |g_b - mean g|^2 / (K - 1) = (sum of |g_b|^2 - |sum of g_b|^2 / K) / (K - 1)
    """
    walker, squares = Walker(plan, 0), 0.0
    total = torch.zeros_like(walker.gradient)
    for t in range(NOISE_BATCHES):
        walker.differentiate(t)
        squares += walker.gradient.square().sum(dtype=torch.float64).item()
        total += walker.gradient
    of_mean = total.square().sum(dtype=torch.float64).item() / NOISE_BATCHES
    return max(0.0, (squares - of_mean) / (NOISE_BATCHES - 1))


def curvature_batches(plan: Plan) -> list[Batch]:
    """Rows of the sampling stream's first epoch, at most `TOKENS` numbers at once where that is possible.

    Its first batches; without shuffling some from all over it, since what is sorted begins with one kind.
    """
    size, rows = plan.settings.batch_size, plan.batches.rows
    at_once = max(1, TOKENS // rows.elements)
    wanted = max(8, min(128, TOKENS // rows.elements))
    there = rows.num_rows // size
    count = min(math.ceil(wanted / size), there)
    numbers = range(count) if plan.settings.shuffle else [number * there // count for number in range(count)]
    whole = Batch.join([plan.batches.micro(0, number) for number in numbers], torch.cat)[:wanted]
    return [whole[start : start + at_once] for start in range(0, len(whole), at_once)]


def spectrum(plan: Plan, weights: Tensor | None, batches: list[Batch], iterations: int = ITERATIONS) -> Spectrum:
    """Largest (not largest absolute) Hessian eigenvalue of the mean loss, 0 where nothing curves upwards; and the trace.

    At the given weights, None = the checkpoint. Power iteration; when the dominant eigenvalue is negative, again with the
    Hessian shifted by it. The first direction is random, so its Rayleigh quotient has the mean trace / size. With a metric
    only the precision is measured.
    """
    curvature, posterior = Curvature(plan, weights, batches), Posterior.of(plan.settings)
    largest = curvature.dominant(iterations)
    trace = curvature.first_quotient * plan.selection.size
    if largest < 0:  # the eigenvalues shifted by it lie close together: no early stop
        largest = max(0.0, largest + curvature.dominant(2 * iterations, shift=largest, converged=0.0))
    if plan.metric is not None:
        return Spectrum(largest)
    return Spectrum(posterior.n_beta * largest + posterior.prior_precision, largest, trace)


class Curvature:
    """(H - shift) v of the mean loss, or in a metric (M (n_beta H + prior) - shift) v, by central differences of the gradient:

        H v = (g(w + r v) - g(w - r v)) / 2r + O(r^2)

    Two gradients a product, and two vectors of memory: the displaced weights, whose distance from the centre is the
    direction, and the gradient; a chain holds no less. Half-precision models are differentiated in float32, since r v would
    be lost in rounding.
    """

    def __init__(self, plan: Plan, centre: Tensor | None, batches: list[Batch]):
        self.plan, self.centre, self.batches = plan, centre, batches
        self.first_quotient = 0.0
        self.blocks = update_blocks(plan.selection)
        self.displaced = plan.selection.initial()
        self.reach = REACH * min(1.0, self.displaced.norm().item() or 1.0)
        self.gradient = torch.empty_like(self.displaced)
        self.leaves = plan.selection.leaves(self.displaced, self.gradient)
        parameters = plan.checkpoint.parameters
        self.in_float32 = {name: p.float() for name, p in parameters.items() if p.dtype in (torch.float16, torch.bfloat16)}

    def dominant(self, iterations: int, shift: float = 0.0, converged: float = CONVERGED) -> float:
        """The eigenvalue of H - shift, or of M (n_beta H + prior) - shift, of largest size; infinite where the gradient is."""
        rng = noise_generator(self.gradient.device, self.plan.settings.init_seed, "curvature")
        torch.randn(self.gradient.shape, generator=rng, out=self.gradient)
        found, metric = 0.0, self.plan.metric
        for iteration in range(iterations):
            last, found = found, self.apply(shift) if metric is None else self.apply_in_metric(metric, shift)
            if not iteration:
                self.first_quotient = found
            settled = iteration > 1 and abs(found - last) < converged * abs(found)
            if not math.isfinite(found) or not self.gradient.any() or settled:
                break
        return found if math.isfinite(found) else math.inf

    @torch.no_grad()
    def apply(self, shift: float = 0.0) -> float:
        """Replace the direction held in `gradient` by its image; returns the Rayleigh quotient of the direction."""
        step = self.reach / self.gradient.norm().item()
        for block, centre in self._centred():
            torch.add(centre, self.gradient[block.where], alpha=step, out=self.displaced[block.where])
        self.gradient.zero_()
        self._accumulate(1.0)
        size = self.gradient.norm().item()
        for block, centre in self._centred():
            self.displaced[block.where].neg_().add_(centre, alpha=2.0)
        self._accumulate(-1.0)
        if self.gradient.norm().item() < ROUNDING * size:
            self.gradient.zero_()  # a loss linear in the weights
        quotient = 0.0
        for block, centre in self._centred():
            direction = (centre - self.displaced[block.where]).div_(self.reach)
            image = self.gradient[block.where]
            image.div_(2 * self.reach).sub_(direction, alpha=shift)
            quotient += torch.dot(direction, image).item()
        return quotient

    @torch.no_grad()
    def apply_in_metric(self, metric: Tensor, shift: float) -> float:
        """The same for M (n_beta H + prior) - shift, which is symmetric in the scalar product of 1/M."""
        posterior, product, square = Posterior.of(self.plan.settings), 0.0, 0.0
        self.apply()
        for block, centre in self._centred():
            direction = (centre - self.displaced[block.where]).div_(self.reach)
            image = self.gradient[block.where].mul_(posterior.n_beta).add_(direction, alpha=posterior.prior_precision)
            product += torch.dot(direction, image).item()
            square += torch.dot(direction, direction / metric[block.where]).item()
            image.mul_(metric[block.where]).sub_(direction, alpha=shift)
        return product / square - shift

    def _centred(self) -> Iterator[tuple[Block, Tensor]]:
        for block in self.blocks:
            yield block, block.anchor if self.centre is None else self.centre[block.where]

    @torch.enable_grad()
    def _accumulate(self, sign: float) -> None:
        # not compiled: here the batches have other shapes
        forward, placed = replace(self.plan.forward, compiled=False), self.plan.checkpoint.placed
        shape = self.plan.batches.objective.positions
        counts = [len(batch) * shape if batch.counted is None else int(batch.counted.sum()) for batch in self.batches]
        for batch, count in zip(map(placed, self.batches), counts, strict=True):
            moved = self.in_float32 | self.plan.selection.place(self.leaves, cast=not self.in_float32)
            losses = forward.losses(moved, batch, forward.checkpoint.buffers())
            share = sign * count / sum(counts)
            torch.autograd.backward(mean_loss(losses, batch.counted) * share, inputs=self.leaves)
