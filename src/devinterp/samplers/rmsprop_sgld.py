"""SGLD preconditioned by a running mean of squared gradients (Li et al. 2016, arXiv 1512.07666, Algorithm 1).

    v <- alpha v + (1 - alpha) g^2,     G = 1 / (sqrt(v) + eps)
    w <- w - (lr/2) G F(w) + noise_level sqrt(lr G) xi

g is the raw gradient of the loss and v starts at 0. With `bias_correction=True` v starts at 1 and G uses
v / (1 - alpha^(t+1)) at the t-th step, counted from 1 (Hitchcock & Hoogland 2025, arXiv 2507.21449, Algorithm 3).

The drift term of the changing preconditioner (Gamma in Li et al.) is left out, as in every implementation in use: the
stationary law is not exactly the posterior.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from devinterp.samplers.base import Force, Move, Traits

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class RMSpropState:
    square_avg: Tensor
    t: int
    """steps taken"""


@dataclass(frozen=True)
class RMSpropSGLD:
    lr: float
    noise_level: float = 1.0
    alpha: float = field(default=0.99, metadata={"low": 0.0, "high": 1.0})
    eps: float = field(default=0.1, metadata={"above": 0.0})
    bias_correction: bool = False
    traits: ClassVar = Traits(vectors=1, auto=0.0)

    def init(self, weights: Tensor, xi: Tensor) -> RMSpropState:
        return RMSpropState(weights.new_full(weights.shape, float(self.bias_correction)), 0)

    def step(self, force: Force, state: RMSpropState, xi: Tensor) -> tuple[Move, RMSpropState]:
        g, t = force.gradient, state.t + 1
        square_avg = self.alpha * state.square_avg + (1 - self.alpha) * g * g
        correction = 1 - self.alpha ** (t + 1) if self.bias_correction else 1.0
        preconditioner = 1 / ((square_avg / correction).sqrt() + self.eps)
        gain = 0.5 * self.lr * preconditioner
        noise = self.noise_level * (self.lr * preconditioner).sqrt() * xi
        return Move(-gain * force.total(), noise, gain), RMSpropState(square_avg, t)
