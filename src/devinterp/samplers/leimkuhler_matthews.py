"""The Leimkuhler-Matthews step (AMRX 2013; Leimkuhler, Matthews & Tretyakov, Proc. R. Soc. A 470, 2014).

    w_{n+1} <- w_n - (lr/2) F(w_n) + noise_level sqrt(lr) (xi_n + xi_{n+1}) / 2

The noise of a step is the mean of two consecutive draws, so each draw is used twice. One gradient a step, as in SGLD, but on
a quadratic with posterior precision A the stationary variance is exactly 1/A for every stable step (lr A < 4), where SGLD has
1 / (A (1 - lr A/4)). With noise_level != 1 the stationary variance scales with noise_level^2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from devinterp.samplers.base import Force, Move, Traits

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class LeimkuhlerMatthewsState:
    xi: Tensor
    """xi_n, the half of the noise that the next step shares with this one"""


@dataclass(frozen=True)
class LeimkuhlerMatthews:
    lr: float
    noise_level: float = 1.0
    traits: ClassVar = Traits(vectors=1, auto=1.0)

    def init(self, weights: Tensor, xi: Tensor) -> LeimkuhlerMatthewsState:
        return LeimkuhlerMatthewsState(xi)

    def step(self, force: Force, state: LeimkuhlerMatthewsState, xi: Tensor) -> tuple[Move, LeimkuhlerMatthewsState]:
        gain = 0.5 * self.lr
        noise = 0.5 * self.noise_level * self.lr**0.5 * (state.xi + xi)
        return Move(-gain * force.total(), noise, gain), LeimkuhlerMatthewsState(xi)
