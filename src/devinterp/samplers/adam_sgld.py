"""SGLD preconditioned as in Adam (Hitchcock & Hoogland 2025, arXiv 2507.21449, Algorithm 2).

    m <- beta1 m + (1 - beta1) g,      v <- beta2 v + (1 - beta2) g^2,      G = 1 / (sqrt(v / (1 - beta2^(t+1))) + eps)
    w <- w - (lr/2) G (n_beta m / (1 - beta1^t) + prior) + noise_level sqrt(lr G) xi

at the t-th step, counted from 1; g is the raw gradient of the loss, the prior localization (w - w0) + weight_decay w. m
starts at 0 and v at 1, as in rmsprop_sgld with its bias correction.

Not a sampler of the posterior, for two reasons: G changes without the drift that this calls for, and the averaged gradient
is tau = beta1 / (1 - beta1) steps old. The second alone widens the variance on a quadratic by lr G n_beta h (1/4 + tau/2) to
first order, 19 times as much as SGLD at its default beta1: take small steps, or compare with another sampler.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from devinterp.samplers.base import Force, Move, Traits

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class AdamState:
    average: Tensor
    square_avg: Tensor
    t: int
    """steps taken"""


@dataclass(frozen=True)
class AdamSGLD:
    lr: float
    noise_level: float = 1.0
    beta1: float = field(default=0.9, metadata={"low": 0.0, "below": 1.0})
    beta2: float = field(default=0.99, metadata={"low": 0.0, "below": 1.0})
    eps: float = field(default=0.1, metadata={"above": 0.0})
    traits: ClassVar = Traits(vectors=2, auto=0.0)

    def init(self, weights: Tensor, xi: Tensor) -> AdamState:
        return AdamState(weights.new_zeros(weights.shape), weights.new_ones(weights.shape), 0)

    def step(self, force: Force, state: AdamState, xi: Tensor) -> tuple[Move, AdamState]:
        g, t = force.gradient, state.t + 1
        average = self.beta1 * state.average + (1 - self.beta1) * g
        square_avg = self.beta2 * state.square_avg + (1 - self.beta2) * g * g
        preconditioner = 1 / ((square_avg / (1 - self.beta2 ** (t + 1))).sqrt() + self.eps)
        gain = 0.5 * self.lr * preconditioner
        remembered = average / (1 - self.beta1**t) - g
        noise = self.noise_level * (self.lr * preconditioner).sqrt() * xi - gain * force.n_beta * remembered
        return Move(-gain * force.total(), noise, gain), AdamState(average, square_avg, t)
