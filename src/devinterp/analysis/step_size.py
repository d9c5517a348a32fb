"""What a step size does to the law that is sampled, from the settings and the curvature known. Bare numbers only.

On a quadratic of posterior precision A = n_beta h + localization + weight_decay, SGLD has the variance 1 / (A (1 - lr A/4)):
too large by lr A/4 to first order. Weighted with what each direction adds to the LLC, n_beta h / 2A, that is

    LLC(lr) - LLC(0) = sum over directions of (n_beta h / 2A) (lr A/4) = lr n_beta tr(H) / 8

whatever the localization. The Leimkuhler-Matthews step has no such bias for any stable step, lr A < 4.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

UNBIASED = ("leimkuhler_matthews", "preconditioned_leimkuhler_matthews", "sgnht")
"""On quadratics, at every stable step"""
OF_THEIR_OWN = ("rmsprop_sgld", "adam_sgld", "preconditioned_leimkuhler_matthews", "sgnht")
"""With them a direction does not relax by 1 - lr A/2 a step"""
STABLE = 4.0
"""lr A from which no chain is stable"""
LARGEST_REACH = 2.0
"""lr A up to which the Leimkuhler-Matthews step stays within a few percent on language models"""
LARGEST_BIAS = 0.1
"""of the variance along the stiffest direction"""


@dataclass(frozen=True)
class StepSize:
    """Of a run, with the largest eigenvalue and the trace of the Hessian of its loss; NaN where they are not known."""

    method: str
    lr: float
    n_beta: float
    prior: float
    """localization + weight_decay"""
    h_max: float = math.nan
    trace: float = math.nan
    stiffest: float = math.nan
    """of a sampler with a metric M, in place of both: the largest eigenvalue of M (n_beta H + prior)"""

    @property
    def reach(self) -> float:
        """lr A along the stiffest direction."""
        precision = self.n_beta * self.h_max + self.prior
        return self.lr * (precision if math.isnan(self.stiffest) else self.stiffest)

    @property
    def stiffest_bias(self) -> float:
        """Relative error of the variance along the stiffest direction; infinite where no chain is stable."""
        if self.reach >= STABLE:
            return math.inf
        if self.method == "sgmcmc_sgld":
            return 1 / (1 - self.reach / STABLE) - 1
        return 0.0 * self.reach if self.method in UNBIASED else math.nan

    @property
    def too_large(self) -> str:
        """Why, where the curvature known says so; otherwise empty."""
        if self.reach >= STABLE:
            return f"lr A is {self.reach:.2g} along the stiffest direction, and no chain is stable from {STABLE:g} on"
        if self.stiffest_bias > LARGEST_BIAS:
            return f"it widens the variance along the stiffest direction by {self.stiffest_bias:.0%}"
        if self.method in UNBIASED and self.reach > LARGEST_REACH:
            return (
                f"lr A is {self.reach:.2g} along the stiffest direction; above {LARGEST_REACH:g} only quadratics are unbiased"
            )
        return ""

    @property
    def llc_bias(self) -> float:
        """What the step size adds to the LLC, to first order in lr."""
        if self.method == "sgmcmc_sgld":
            return self.lr * self.n_beta * self.trace / 8
        return 0.0 if self.method in UNBIASED else math.nan

    def transient_left(self, steps: npt.NDArray[np.int64]) -> float:
        """Mean over draws after these many steps of what is missing of the squared distance, where no loss acts:

            (1 - lr prior / 2)^(2 steps)

        An upper bound for every other direction. 1 without a prior, where such directions never settle.
        """
        if self.method in OF_THEIR_OWN:
            return math.nan
        return float(np.mean((1 - self.lr * self.prior / 2) ** (2.0 * steps)))
