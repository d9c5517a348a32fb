"""The physics: one file per algorithm, one shape. A new one is a file here and a line below.

Nothing here imports torch when it runs: the settings, and so `devinterp --help`, stay quick.
"""

from typing import Any

from devinterp.samplers.adam_sgld import AdamSGLD
from devinterp.samplers.base import Force, Move, Sampler, TakesMetric
from devinterp.samplers.leimkuhler_matthews import LeimkuhlerMatthews
from devinterp.samplers.preconditioned_leimkuhler_matthews import PreconditionedLeimkuhlerMatthews
from devinterp.samplers.rmsprop_sgld import RMSpropSGLD
from devinterp.samplers.sgld import SGLD
from devinterp.samplers.sgnht import SGNHT

SAMPLERS: dict[str, Any] = {
    "sgmcmc_sgld": SGLD,
    "rmsprop_sgld": RMSpropSGLD,
    "leimkuhler_matthews": LeimkuhlerMatthews,
    "preconditioned_leimkuhler_matthews": PreconditionedLeimkuhlerMatthews,
    "sgnht": SGNHT,
    "adam_sgld": AdamSGLD,
}

__all__ = [
    "SAMPLERS", "SGLD", "SGNHT", "AdamSGLD", "Force", "LeimkuhlerMatthews", "Move", "PreconditionedLeimkuhlerMatthews",
    "RMSpropSGLD", "Sampler", "TakesMetric",
]  # fmt: skip
