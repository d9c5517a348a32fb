"""What every sampler shares: the force that acts on the weights, and the move that a step proposes.

A sampler is a frozen dataclass of its settings with two pure functions,

    init(weights, xi)        -> state
    step(force, state, xi)   -> (move, state)

where `xi` is standard normal noise of the weights' shape. It never draws noise, never writes to its arguments, and works on
any slice of the weights, since all operations are elementwise. Its `traits` tell what the engine has to know of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

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
    metric: Tensor | float = 1.0
    """the diagonal M of a run whose sampler takes one"""

    def total(self) -> Tensor:
        pull = self.n_beta * self.gradient
        return pull if self.prior is None else pull.add_(self.prior)


@dataclass(frozen=True)
class Move:
    """The proposed change of the weights: w <- w + drift + noise."""

    drift: Tensor
    """of this step's force alone"""
    noise: Tensor
    """all else: fresh noise, and of samplers with a memory what earlier steps have left in it"""
    gain: Tensor | float
    """drift = -gain * force; lets diagnostics split the drift into the parts of the force"""


@dataclass(frozen=True)
class Traits:
    """What the engine has to know of an algorithm besides its step."""

    vectors: int
    """of the state and the metric, each as long as the weights"""
    auto: float
    """lr A along the stiffest direction that lr="auto" takes; 0 where that is not what decides about stability"""


class Sampler(Protocol):
    """The shape of every algorithm in this folder."""

    traits: ClassVar[Traits]

    @property
    def lr(self) -> float: ...

    def init(self, weights: Tensor, xi: Tensor) -> Any: ...

    def step(self, force: Force, state: Any, xi: Tensor) -> tuple[Move, Any]: ...


@runtime_checkable
class TakesMetric(Protocol):
    """A sampler that moves in a diagonal metric, made once at the checkpoint; its `lr A` counts in that."""

    def metric(self, precision: Tensor) -> Tensor:
        """M up to its scale, from the n_beta |H_i| + localization + weight_decay of every weight."""
