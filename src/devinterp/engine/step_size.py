"""`lr="auto"`, and what is known of a step size that was given.

Automatic is lr A = 1 along the stiffest direction, A = n_beta h_max + localization + weight_decay. There the
Leimkuhler-Matthews step has no bias on a quadratic, and consecutive draws are least correlated for their cost. h_max is
measured at the checkpoint and where a short pilot ends, since curvature can grow several-fold along flat directions; with
few moving weights, or from a flat checkpoint, also on the pilot's way, since there it varies many-fold. For a sampler with
a metric M the same is said of the eigenvalues of M A (those of the symmetric M^(1/2) A M^(1/2)).
"""

import logging
import math
import statistics
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from devinterp.engine.batch import Batch
from devinterp.engine.curvature import Spectrum, check_curved, curvature_batches, spectrum
from devinterp.engine.posterior import Posterior
from devinterp.engine.settings import Settings
from devinterp.engine.walker import Plan, Walker
from devinterp.errors import DevinterpError

logger = logging.getLogger(__name__)

PILOT_CHAINS, PILOT_DIRECTIONS = 2, 32
"""Chains of a pilot, and directions that they have together at least (with at most 16 chains): the largest curvature over few
directions differs much from one point to another"""
PILOT_LOOKS = 8
"""Points of a pilot's chain, at most, at which the curvature is measured: enough for `PILOT_DIRECTIONS`, or from flat places"""
PILOT_ATTEMPTS = 12
SHORT_PILOT = 100
"""Steps that a pilot may take whatever the burn-in"""


@dataclass(frozen=True)
class StepSize:
    """The step size of a run, and the curvatures that it was chosen from or, when given, compared with."""

    lr: float
    h_max_checkpoint: float | None = None
    """of a given lr a lower bound"""
    h_max_pilot: float | None = None
    trace_checkpoint: float | None = None
    """of the Hessian, from one random direction"""
    trace_pilot: float | None = None
    """mean over the pilot's chains"""
    pilot_steps: int | None = None
    stiffest: float | None = None
    """with a metric M, in place of all curvatures: the largest eigenvalue of M (n_beta H + prior) that was seen"""


def choose_step_size(plan: Plan) -> StepSize:
    """lr = share / (n_beta h_max + localization + weight_decay), the largest at the checkpoint and of a pilot.

    The pilot runs chains of its own at half the rate that the checkpoint suggests, or slower where that turns out unstable.
    Nothing of it depends on `num_chains` or `num_draws`, so a run can be extended.
    """
    batches = curvature_batches(plan)
    at_checkpoint = spectrum(plan, None, batches)
    check_curved("lr='auto'", at_checkpoint.precision, "Give lr, or a localization > 0.")
    lr, in_pilot, steps, looks = 0.5 / at_checkpoint.precision, [], 0, min(PILOT_LOOKS, PILOT_DIRECTIONS // plan.selection.size)
    for chain in range(max(PILOT_CHAINS, min(16, math.ceil(PILOT_DIRECTIONS / plan.selection.size)))):
        found, lr, steps = pilot(plan, chain, lr, max(1, looks), batches)
        in_pilot.append(found)
        if _left_the_flat(plan, at_checkpoint, found):
            looks = PILOT_LOOKS
    largest = max(found.precision for found in in_pilot)
    precision = max(at_checkpoint.precision, largest)
    chosen = plan.sampler.traits.auto / precision
    logger.info(
        "lr='auto': %.3g, from a precision of %.3g along the stiffest direction at the checkpoint and %.3g in a pilot of "
        "%d steps", chosen, at_checkpoint.precision, largest, steps,
    )  # fmt: skip
    if plan.metric is not None:
        return StepSize(chosen, pilot_steps=steps, stiffest=precision)
    h_max = max(found.h_max for found in in_pilot)
    trace = statistics.fmean(found.trace for found in in_pilot)
    return StepSize(chosen, at_checkpoint.h_max, h_max, at_checkpoint.trace, trace, steps)


def _left_the_flat(plan: Plan, at_checkpoint: Spectrum, found: Spectrum) -> bool:
    """The prior holds the weights at the checkpoint, the loss does where chains go: curvature changes all along the way."""
    posterior = Posterior.of(plan.settings)
    return posterior.n_beta * at_checkpoint.h_max < posterior.prior_precision < posterior.n_beta * found.h_max


def pilot(plan: Plan, chain: int, lr: float, looks: int, batches: list[Batch]) -> tuple[Spectrum, float, int]:
    """The largest curvature that a chain of its own meets, the lr that got it there, and its number of steps.

    From a flat checkpoint the first lr throws the chain out of the region in which it is stable: then again from the
    checkpoint, four times slower.
    """
    for _ in range(PILOT_ATTEMPTS):
        steps = pilot_steps(plan.settings, lr, looks)
        seen = list(_looks(replace(plan, sampler=plan.settings.sampler(lr), purpose="pilot"), chain, lr, steps, looks, batches))
        if lr * seen[-1].precision < 4:
            return replace(max(seen, key=lambda found: found.precision), trace=seen[-1].trace), lr, steps
        lr /= 4
    raise DevinterpError(
        f"lr='auto': the pilot was unstable even with lr={lr * 4:.3g}. The loss grows too fast around this checkpoint: try a "
        "larger localization, or a bounding_box_size."
    )


def pilot_steps(settings: Settings, lr: float, looks: int = 1) -> int:
    """Until the flattest direction has relaxed at each look anew (2 / (lr prior) steps), as far as the burn-in would go."""
    prior, burn_in = Posterior.of(settings).prior_precision, max(SHORT_PILOT, settings.num_burnin_steps)
    return max(20, min(burn_in, math.ceil(2 * looks / (lr * prior)))) if prior > 0 else burn_in


def _looks(plan: Plan, chain: int, lr: float, steps: int, looks: int, batches: list[Batch]) -> Iterator[Spectrum]:
    """Along a chain of so many steps; the last is where it ends, or where it is no longer stable."""
    walker = Walker(plan, chain)
    for part in torch.arange(steps).tensor_split(looks):
        finite = all(_steps(walker, t) for t in part.tolist())
        yield (found := spectrum(plan, walker.weights[0], batches) if finite else Spectrum(math.inf))
        if not lr * found.precision < 4:
            return


def _steps(walker: Walker, t: int) -> bool:
    """One step; False where the loss is no longer finite."""
    total = walker.differentiate(t).sum(dtype=torch.float64).item()
    walker.step()
    return math.isfinite(total)


def given_step_size(plan: Plan) -> StepSize:
    """A given lr, and a lower bound of the curvature on the first batch of the chains."""
    lr = float(plan.settings.lr)
    if not plan.sampler.traits.auto or not plan.settings.n_beta:
        return StepSize(lr)
    if plan.metric is not None:
        return StepSize(lr, stiffest=1.0)  # as the metric is scaled
    found = spectrum(plan, None, [plan.batches.micro(0, 0)], iterations=4)
    reach = lr * found.precision
    if reach >= 4:
        warnings.warn(
            f"lr={lr:g}: lr (n_beta h_max + localization + weight_decay) is {reach:.3g} at the checkpoint "
            f"(h_max={found.h_max:.3g}), and no chain is stable from 4 on. Try lr={1 / reach * lr:.2g}, or lr='auto'.",
            UserWarning,
            stacklevel=2,
        )
    if not math.isfinite(found.h_max):
        return StepSize(lr)
    return StepSize(lr, h_max_checkpoint=found.h_max, trace_checkpoint=found.trace)
