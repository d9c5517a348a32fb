"""Stochastic-gradient Langevin dynamics (Welling & Teh 2011, eq. 4), as in Lau et al. 2023 (arXiv 2308.12108).

    w <- w - (lr/2) F(w) + noise_level sqrt(lr) xi,        F = n_beta g + localization (w - w0) + weight_decay w

On a quadratic with posterior precision A the stationary variance is noise_level^2 / (A (1 - lr A/4)): biased upwards by the
step size, and stable for 0 < lr A < 4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from devinterp.samplers.base import Force, Move, Traits

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class SGLD:
    lr: float
    noise_level: float = 1.0
    traits: ClassVar = Traits(vectors=0, auto=0.25)  # which leaves a bias of 1/16 along the stiffest direction

    def init(self, weights: Tensor, xi: Tensor) -> None:
        return None

    def step(self, force: Force, state: None, xi: Tensor) -> tuple[Move, None]:
        gain = 0.5 * self.lr
        return Move(-gain * force.total(), self.noise_level * self.lr**0.5 * xi, gain), None
