"""From the gradient of the loss to the force of the local posterior.

p(w) ∝ exp(-n_beta L(w) - localization/2 |w - w0|^2 - weight_decay/2 |w|^2)      (Lau et al. 2023, eq. 12)
"""

from dataclasses import dataclass

from torch import Tensor

from devinterp.engine.settings import Settings
from devinterp.samplers import Force


@dataclass(frozen=True)
class Posterior:
    n_beta: float
    localization: float
    weight_decay: float

    @classmethod
    def of(cls, settings: Settings) -> "Posterior":
        return cls(settings.n_beta, settings.localization, settings.llc_weight_decay)

    @property
    def prior_precision(self) -> float:
        return self.localization + self.weight_decay

    def force(self, weights: Tensor, anchor: Tensor, gradient: Tensor) -> Force:
        prior = None
        if self.localization:
            prior = (weights - anchor).mul_(self.localization)
        if self.weight_decay:
            decay = self.weight_decay * weights
            prior = decay if prior is None else prior.add_(decay)
        return Force(gradient, self.n_beta, prior)
