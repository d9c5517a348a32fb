"""The largest Hessian eigenvalue over the moving weights: what decides which step sizes are stable.

`lr="auto"` takes lr A = 1 along the stiffest direction, A = n_beta h_max + localization + weight_decay. There the
Leimkuhler-Matthews step has no bias on a quadratic, and consecutive draws are least correlated for their cost. h_max is
measured at the checkpoint and where a short pilot ends, since curvature can grow several-fold along flat directions.
"""

import logging
import math
import warnings
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.linalg import eigvalsh_tridiagonal
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from devinterp.engine.chain import Plan, Walker, is_finite
from devinterp.engine.posterior import Posterior
from devinterp.engine.seeds import noise_generator
from devinterp.engine.selection import Selection
from devinterp.engine.settings import Settings
from devinterp.engine.tokens import Ids
from devinterp.errors import DevinterpError, InputValueError

logger = logging.getLogger(__name__)

ITERATIONS = 10
CONVERGED = 0.03
"""Relative change of the eigenvalue at which the iteration stops"""
TOKENS = 2048
"""of the sampling stream, on which the curvature is measured; at least 8 sequences, at most 128"""
PILOT_CHAINS = 4
PILOT_ATTEMPTS = 12
SHARE_OF_STABLE = {"leimkuhler_matthews": 1.0, "sgmcmc_sgld": 0.25}
"""lr A chosen by `lr="auto"`; SGLD takes a quarter, which leaves a bias of 1/16 along the stiffest direction"""


@dataclass(frozen=True)
class StepSize:
    """The step size of a run and, for `lr="auto"`, the curvatures that it was chosen from."""

    lr: float
    h_max_checkpoint: float | None = None
    h_max_pilot: float | None = None
    pilot_steps: int | None = None


def choose_step_size(plan: Plan) -> StepSize:
    """lr = share / (n_beta h_max + localization + weight_decay), h_max the largest at the checkpoint and after a pilot.

    The pilot runs chains of its own at half the rate that the checkpoint suggests, or slower where that turns out unstable.
    Nothing of it depends on `num_chains` or `num_draws`, so a run can be extended.
    """
    settings, posterior = plan.settings, Posterior.of(plan.settings)
    batches = curvature_batches(plan)
    at_checkpoint = largest_eigenvalue(plan, plan.selection.initial(), batches)
    precision = posterior.n_beta * at_checkpoint + posterior.prior_precision
    if not precision > 0:
        raise InputValueError(
            f"lr='auto': the loss has no positive curvature at the checkpoint (h_max={at_checkpoint:.3g}) and there is no "
            "prior, so every step is stable and none is right. Give lr, or a localization > 0."
        )
    lr, after_pilot, steps = 0.5 / precision, 0.0, 0
    for chain in range(PILOT_CHAINS):
        h, lr, steps = pilot(plan, chain, lr, batches)
        after_pilot = max(after_pilot, h)
    precision = posterior.n_beta * max(at_checkpoint, after_pilot) + posterior.prior_precision
    chosen = SHARE_OF_STABLE[settings.sampling_method] / precision
    logger.info(
        "lr='auto': %.3g, from h_max %.3g at the checkpoint and %.3g after a pilot of %d steps",
        chosen, at_checkpoint, after_pilot, steps,
    )  # fmt: skip
    return StepSize(chosen, at_checkpoint, after_pilot, steps)


def pilot(plan: Plan, chain: int, lr: float, batches: list[Ids]) -> tuple[float, float, int]:
    """Largest curvature where a chain of its own ends, the lr that got it there, and its number of steps.

    From a flat checkpoint the first lr throws the chain out of the region in which it is stable: then again from the
    checkpoint, four times slower.
    """
    posterior = Posterior.of(plan.settings)
    for _ in range(PILOT_ATTEMPTS):
        steps = pilot_steps(plan.settings, lr)
        walker = Walker(replace(plan, sampler=plan.settings.sampler(lr), purpose="pilot"), chain)
        if all(_steps(walker, t) for t in range(steps)):
            h = largest_eigenvalue(plan, walker.weights, batches)
            if lr * (posterior.n_beta * h + posterior.prior_precision) < 4:
                return h, lr, steps
        lr /= 4
    raise DevinterpError(
        f"lr='auto': the pilot was unstable even with lr={lr * 4:.3g}. The loss grows too fast around this checkpoint: try a "
        "larger localization, or a bounding_box_size."
    )


def pilot_steps(settings: Settings, lr: float) -> int:
    """Until the flattest direction has relaxed (two relaxation times of 2 / (lr prior)), as far as the burn-in would go."""
    prior, burn_in = Posterior.of(settings).prior_precision, max(100, settings.num_burnin_steps)
    return max(20, min(burn_in, math.ceil(4 / (2 * lr * prior)))) if prior > 0 else burn_in


def _steps(walker: Walker, t: int) -> bool:
    """One step; False where the loss is no longer finite."""
    finite = is_finite(walker.differentiate(t))
    walker.step()
    return finite


def warn_if_unstable(plan: Plan) -> None:
    """A given lr is compared with the curvature on a few sequences; the figure is a lower bound, so a warning is certain."""
    if plan.settings.sampling_method == "rmsprop_sgld" or not plan.settings.n_beta:
        return
    posterior = Posterior.of(plan.settings)
    ids = plan.batches.micro(0, 0)[:8]
    try:
        h = largest_eigenvalue(plan, plan.selection.initial(), [ids], iterations=4)
    except (RuntimeError, NotImplementedError) as error:  # an operator without a second derivative
        logger.info("the stability of lr was not checked: %s", error)
        return
    reach = plan.sampler.lr * (posterior.n_beta * h + posterior.prior_precision)
    if reach >= 4:
        warnings.warn(
            f"lr={plan.sampler.lr:g}: lr (n_beta h_max + localization + weight_decay) is {reach:.3g} at the checkpoint "
            f"(h_max={h:.3g}), and no chain is stable from 4 on. Try lr={1 / reach * plan.sampler.lr:.2g}, or lr='auto'.",
            UserWarning,
            stacklevel=2,
        )


def curvature_batches(plan: Plan) -> list[Ids]:
    """The first sequences of the sampling stream, at most one epoch, at most `TOKENS` tokens at once where that is possible."""
    size, tokens = plan.settings.batch_size, plan.batches.tokens
    wanted = max(8, min(128, TOKENS // tokens.length))
    count = min(math.ceil(wanted / size), tokens.num_rows // size)
    ids = np.concatenate([plan.batches.micro(0, number) for number in range(count)])[:wanted]
    at_once = max(1, TOKENS // tokens.length)
    return [ids[start : start + at_once] for start in range(0, len(ids), at_once)]


def largest_eigenvalue(plan: Plan, weights: Tensor, batches: list[Ids], iterations: int = ITERATIONS) -> float:
    """Largest (not largest absolute) Hessian eigenvalue of the mean loss; 0 where nothing curves upwards.

    Lanczos iteration from a random direction, the three-term recurrence alone: one Hessian-vector product a step and three
    vectors in memory, like power iteration, but the largest eigenvalue of the tridiagonal matrix is a better lower bound
    after every step, and a dominant negative eigenvalue does not get in the way.
    """
    rng = noise_generator(weights.device, plan.settings.init_seed, "curvature")
    before = torch.zeros_like(weights)
    vector = torch.randn(weights.shape, generator=rng, dtype=weights.dtype, device=weights.device)
    vector /= vector.norm()
    diagonal: list[float] = []
    beside: list[float] = []
    found = 0.0
    for _ in range(min(iterations, len(weights))):
        image = hessian_vector_product(plan, weights, vector, batches)
        if beside:
            image -= beside[-1] * before
        diagonal.append(torch.dot(vector, image).item())
        image -= diagonal[-1] * vector
        if not math.isfinite(diagonal[-1]):
            return math.inf
        last, found = found, float(eigvalsh_tridiagonal(diagonal, beside)[-1])
        length = image.norm().item()
        scale = max(map(abs, (*diagonal, *beside)))
        if length <= 1e-5 * scale or (len(diagonal) > 2 and abs(found - last) < CONVERGED * abs(found)):
            break
        beside.append(length)
        before, vector = vector, image / length
    return max(0.0, found)


def hessian_vector_product(plan: Plan, weights: Tensor, vector: Tensor, batches: list[Ids]) -> Tensor:
    """H v of the mean loss over the batches, by differentiating g . v."""
    selection, checkpoint = plan.selection, plan.checkpoint
    leaves = selection.leaves(weights)
    directions = _pieces(selection, vector)
    product = torch.zeros_like(vector)
    # the fused attention kernels have no second derivative
    with sdpa_kernel(SDPBackend.MATH):
        for ids in batches:
            losses = checkpoint.losses(selection.place(leaves), checkpoint.ids(ids), checkpoint.buffers())
            gradients = torch.autograd.grad(losses.mean() * len(ids), leaves, create_graph=True, materialize_grads=True)
            slope = torch.stack([(g * v).sum() for g, v in zip(gradients, directions, strict=True)]).sum()
            if not slope.requires_grad:
                continue  # a loss linear in the weights
            images = torch.autograd.grad(slope, leaves, materialize_grads=True)
            for part, image in zip(_pieces(selection, product), images, strict=True):
                part += image.detach()
    return product / sum(map(len, batches))


def _pieces(selection: Selection, flat: Tensor) -> list[Tensor]:
    return [flat[piece.start : piece.stop] for piece in selection.pieces]
