"""What the moves of a chain are made of: norms and products of their parts (`save_metrics`)."""

from typing import Any

from torch import Tensor

from devinterp.engine.posterior import Posterior
from devinterp.samplers import Move

METRICS = (
    "scaled_grad",
    "unscaled_grad",
    "localization",
    "weight_decay",
    "noise",
    "distance",
    "dot_grad_prior",
    "dot_grad_noise",
    "dot_prior_noise",
)


class Sums:
    """Squares and products of the parts of a move, summed over blocks in float64, shape (chain,)."""

    def __init__(self) -> None:
        self.totals: dict[str, Any] = dict.fromkeys(METRICS, 0.0)

    def add(self, posterior: Posterior, w: Tensor, anchor: Tensor, gradient: Tensor, move: Move) -> None:
        displacement = w - anchor
        grad = -move.gain * posterior.n_beta * gradient
        localization = -move.gain * posterior.localization * displacement
        weight_decay = -move.gain * posterior.weight_decay * w
        prior = localization + weight_decay
        products = {
            "scaled_grad": (grad, grad),
            "unscaled_grad": (gradient, gradient),
            "localization": (localization, localization),
            "weight_decay": (weight_decay, weight_decay),
            "noise": (move.noise, move.noise),
            "distance": (displacement, displacement),
            "dot_grad_prior": (grad, prior),
            "dot_grad_noise": (grad, move.noise),
            "dot_prior_noise": (prior, move.noise),
        }
        for name, (a, b) in products.items():
            self.totals[name] = self.totals[name] + (a.double() * b.double()).sum(1)

    def metrics(self) -> dict[str, Tensor]:
        return {name: value if name.startswith("dot_") else value.sqrt() for name, value in self.totals.items()}
