"""What every sampler shares: the force that acts on the weights, and the move that a step proposes.

A sampler is a frozen dataclass of its settings with two pure functions,

    init(weights, xi)        -> state
    step(force, state, xi)   -> (move, state)

where `xi` is standard normal noise of the weights' shape. It never draws noise, never writes to its arguments, and works on
any slice of the weights, since all operations are elementwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Force:
    """n_beta g + localization (w - w0) + weight_decay w: minus the gradient of the log posterior, in its parts."""

    gradient: Tensor
    """g, the gradient of the mean loss of the step's batch"""
    n_beta: float
    prior: Tensor | None = None
    """localization (w - w0) + weight_decay w; None when both vanish"""

    def total(self) -> Tensor:
        pull = self.n_beta * self.gradient
        return pull if self.prior is None else pull.add_(self.prior)


@dataclass(frozen=True)
class Move:
    """The proposed change of the weights: w <- w + drift + noise."""

    drift: Tensor
    noise: Tensor
    gain: Tensor | float
    """drift = -gain * force; lets diagnostics split the drift into the parts of the force"""


class Sampler(Protocol):
    """The shape of every algorithm in this folder."""

    @property
    def lr(self) -> float: ...

    def init(self, weights: Tensor, xi: Tensor) -> Any: ...

    def step(self, force: Force, state: Any, xi: Tensor) -> tuple[Move, Any]: ...
