"""Stochastic-gradient Nosé-Hoover thermostat (Ding et al. 2014, NeurIPS), one thermostat for each coordinate (Gan et al. 2015).

    dw = p dt,    dp = -F(w) dt - zeta p dt + sqrt(2 friction) dW,    dzeta = coupling (p^2 - 1) dt

Noise of minibatches heats the momenta p; the thermostats zeta answer with more friction, so its size need not be known. In
units of the step sqrt(lr), in the order BADODAB (Leimkuhler & Shang 2016, SIAM J. Sci. Comput. 38, A712), with one gradient
a step and friction that has N(0, friction/zeta) as its exact law:

    k    <- p - sqrt(lr) F(w)
    s    <- (4 + zeta) / (8 + 4 zeta)
    zeta <- zeta + coupling s (k^2 - 1)
    p    <- (k + sqrt(friction (2 + zeta)) xi) / (1 + zeta)
    zeta <- zeta + coupling (1 - s) (p^2 - 1)
    w    <- w + (sqrt(lr)/2) (k + p)

k carries the noise of one gradient more than p. Both have the mean square 1 without such noise; with noise of variance v a
step, independent from step to step, it is their average at the share s that is 1 where the stationary variance of w on a
quadratic is 1/A: exactly, for every lr A < 4 and lr n_beta^2 v < 4 - lr A, if thermostats are slow (coupling small). SGLD
is off by 1 + lr n_beta^2 v / 4. Noise that is correlated between weights is not taken up, or only in part. Thermostats
fluctuate by sqrt(coupling) and settle in some zeta/coupling steps: that much burn-in comes before the law holds. Constant
friction (coupling=0) is exact without gradient noise alone; where it is large too, this is the Leimkuhler-Matthews step.
With noise_level != 1 the stationary variance scales with noise_level^2.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from devinterp.samplers.base import Force, Move, Traits

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class SGNHTState:
    momentum: Tensor
    thermostat: Tensor
    """zeta, the friction a step"""


@dataclass(frozen=True)
class SGNHT:
    lr: float
    noise_level: float = 1.0
    friction: float = field(default=0.5, metadata={"above": 0.0})
    coupling: float = field(default=0.01, metadata={"low": 0.0, "high": 1.0})
    traits: ClassVar = Traits(vectors=2, auto=1.0)

    def init(self, weights: Tensor, xi: Tensor) -> SGNHTState:
        return SGNHTState(self.noise_level * xi, weights.new_full(weights.shape, self.friction))

    def step(self, force: Force, state: SGNHTState, xi: Tensor) -> tuple[Move, SGNHTState]:
        time, pull = self.lr**0.5, force.total()
        kicked = state.momentum - time * pull
        share = (4 + state.thermostat) / (8 + 4 * state.thermostat)
        thermostat = state.thermostat + share * self._heat(kicked)
        keep = 1 / (1 + thermostat)
        fresh = self.noise_level * keep * (self.friction * (2 + thermostat)) ** 0.5 * xi
        momentum = keep * kicked + fresh
        thermostat = thermostat + (1 - share) * self._heat(momentum)
        gain = 0.5 * self.lr * (1 + keep)
        noise = 0.5 * time * ((1 + keep) * state.momentum + fresh)
        return Move(-gain * pull, noise, gain), SGNHTState(momentum, thermostat)

    def _heat(self, momentum: Tensor) -> Tensor:
        return self.coupling * (momentum * momentum - self.noise_level**2)
