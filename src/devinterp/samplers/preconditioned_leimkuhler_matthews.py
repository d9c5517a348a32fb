"""The Leimkuhler-Matthews step in a fixed diagonal metric M (leimkuhler_matthews.py in the coordinates M^(-1/2) w).

    w_{n+1} <- w_n - (lr/2) M F(w_n) + noise_level sqrt(lr M) (xi_n + xi_{n+1}) / 2

Unlike a metric that follows the chain (RMSprop, Adam), a constant one calls for no further drift: on a quadratic with
posterior precision A the stationary covariance is exactly A^-1 whatever M is, for every stable step. M decides how fast the
directions mix: with M = 1/A all of them mix alike, where the plain step takes 4/(lr A) steps in the flat ones.

    M = 1 / (n_beta |H_i| + localization + weight_decay + damping mean),    |H_i| the norm of row i of the Hessian

measured at the checkpoint by random probes, and scaled so that the largest eigenvalue of M (n_beta H + prior) is 1 there: lr
has no unit and is stable below 4. The norm of a row is at least its diagonal entry, positive at a saddle too, and zero only
for weights that the loss does not see. `damping`, in units of the mean over the weights, bounds the spread of M.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from devinterp.samplers.base import Force, Move, Traits
from devinterp.samplers.leimkuhler_matthews import LeimkuhlerMatthewsState

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class PreconditionedLeimkuhlerMatthews:
    lr: float
    noise_level: float = 1.0
    damping: float = field(default=0.01, metadata={"above": 0.0})
    traits: ClassVar = Traits(vectors=2, auto=1.0)

    def metric(self, precision: Tensor) -> Tensor:
        return 1 / (precision + self.damping * precision.mean())

    def init(self, weights: Tensor, xi: Tensor) -> LeimkuhlerMatthewsState:
        return LeimkuhlerMatthewsState(xi)

    def step(self, force: Force, state: LeimkuhlerMatthewsState, xi: Tensor) -> tuple[Move, LeimkuhlerMatthewsState]:
        rate = self.lr * force.metric
        gain = 0.5 * rate
        noise = 0.5 * self.noise_level * rate**0.5 * (state.xi + xi)
        return Move(-gain * force.total(), noise, gain), LeimkuhlerMatthewsState(xi)
