"""Stochastic-gradient Nosé-Hoover thermostat (Ding et al. 2014, NeurIPS), one thermostat for each coordinate (Gan et al. 2015).

    dw = p dt,    dp = -F(w) dt - zeta p dt + sqrt(2 friction) dW,    dzeta = coupling (p^2 - 1) dt

Noise of minibatches heats the momenta p; the thermostats zeta answer with more friction, so its size need not be known. In
units of the step sqrt(lr), split in the symmetric order BADODAB (Leimkuhler & Shang 2016, SIAM J. Sci. Comput. 38, A712),
with one gradient a step:

    k    <- p - sqrt(lr) F(w)
    zeta <- zeta + (coupling/2) (k^2 - 1)
    p    <- ((1 - zeta/2) k + sqrt(2 friction) xi) / (1 + zeta/2)
    zeta <- zeta + (coupling/2) (p^2 - 1)
    w    <- w + (sqrt(lr)/2) (k + p)

Stable for lr A < 4, as SGLD, which is one such step with fresh momenta. Without gradient noise and with coupling=0 (constant
friction) the stationary variance on a quadratic is exactly 1/A; friction=2 is then the Leimkuhler-Matthews step. Thermostats
fluctuate by sqrt(coupling) and settle in some zeta/coupling steps: that much burn-in comes before the law holds. With
noise_level != 1 the temperature, and so the stationary variance, scales with noise_level^2.
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
    friction: float = field(default=0.5, metadata={"above": 0.0, "high": 2.0})
    coupling: float = field(default=0.01, metadata={"low": 0.0, "high": 1.0})
    traits: ClassVar = Traits(vectors=2, auto=1.0)

    def init(self, weights: Tensor, xi: Tensor) -> SGNHTState:
        return SGNHTState(self.noise_level * xi, weights.new_full(weights.shape, self.friction))

    def step(self, force: Force, state: SGNHTState, xi: Tensor) -> tuple[Move, SGNHTState]:
        time = self.lr**0.5
        pull = force.total()
        kicked = state.momentum - time * pull
        thermostat = state.thermostat + self._heat(kicked)
        damping = 1 / (1 + thermostat / 2)
        fresh = self.noise_level * (2 * self.friction) ** 0.5 * xi
        momentum = ((1 - thermostat / 2) * kicked + fresh) * damping
        gain = self.lr * damping
        noise = time * damping * (state.momentum + fresh / 2)
        return Move(-gain * pull, noise, gain), SGNHTState(momentum, thermostat + self._heat(momentum))

    def _heat(self, momentum: Tensor) -> Tensor:
        return self.coupling / 2 * (momentum * momentum - self.noise_level**2)
