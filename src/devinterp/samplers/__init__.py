"""The physics: one file per algorithm, one shape. A new one is a file here and a line below.

Nothing here imports torch when it runs: the settings, and so `devinterp --help`, stay quick.
"""

from devinterp.samplers.base import Force, Move, Sampler
from devinterp.samplers.leimkuhler_matthews import LeimkuhlerMatthews
from devinterp.samplers.rmsprop_sgld import RMSpropSGLD
from devinterp.samplers.sgld import SGLD

SAMPLERS = {
    "sgmcmc_sgld": SGLD,
    "rmsprop_sgld": RMSpropSGLD,
    "leimkuhler_matthews": LeimkuhlerMatthews,
}

__all__ = ["SAMPLERS", "SGLD", "Force", "LeimkuhlerMatthews", "Move", "RMSpropSGLD", "Sampler"]
