"""What the traces of chains say about how far they can be believed. Bare arrays only.

A trace is x = n_beta (L(w) - L(w0)), paired, of shape (chain, draw): its mean is the LLC.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from devinterp.analysis.uncertainty import FEWEST_DRAWS, Trace, ess, standard_error

FALSE_ALARM = 1e-4
"""How often a healthy trace may be taken for a spiky one, or healthy chains for ones that disagree"""
RARE = 2e-3
"""How often chains at rest may be taken for ones that drift, however many looks are taken at them"""


@dataclass(frozen=True)
class Change:
    """Mean over the second half of the draws minus that over the first, with its standard error; NaN for a few draws.

    The error is that of each half about a line through it: of a trace that climbs all the way nothing would be significant
    otherwise, since a climb is autocorrelation too.
    """

    size: float
    error: float
    degrees: float
    """of freedom that the error has: those of the half that has fewer, at least one"""

    @classmethod
    def of(cls, trace: Trace) -> "Change":
        half = trace.shape[1] // 2
        early, late = trace[:, :half], trace[:, -half:]
        errors, degrees = zip(*map(_error_about_line, (early, late)), strict=True)
        return cls(float(late.mean() - early.mean()), math.hypot(*errors), max(1.0, min(degrees)))

    def smallest_sure(self, looks: int = 1) -> float:
        """The size up to which Student's t takes stationary traces: past it in any of so many looks, two of a thousand go."""
        from scipy.special import stdtrit

        return float(stdtrit(self.degrees, 1 - RARE / 2 / looks)) * self.error

    def is_sure(self, looks: int = 1) -> bool:
        return abs(self.size) > self.smallest_sure(looks)


def _error_about_line(trace: Trace) -> tuple[float, float]:
    """Standard error of the mean and its degrees of freedom: effective draws less mean and slope.

    The larger error of two, as in `uncertainty.standard_error`: of all chains as independent ones, or of their mean as one
    series, which has a quarter of the draws where chains are four. Unlike there, no series has more effective draws than draws:
    the loss along a chain on a quadratic is not antithetic, and where few draws look so it is chance.
    """
    if trace.shape[1] < FEWEST_DRAWS:
        return math.nan, math.nan
    about, found = _about_line(trace), []
    for series in (about, about.mean(axis=0, keepdims=True)):
        degrees = min(ess(series, "mean"), series.size) - 2
        found.append((float(series.std(ddof=1) / np.sqrt(np.maximum(1.0, degrees))), degrees))  # NaN stays NaN
    return max(found)


def _about_line(trace: Trace) -> Trace:
    """Each chain less its own regression on the number of the draw."""
    time = np.arange(trace.shape[1]) - (trace.shape[1] - 1) / 2
    slopes = trace @ time / np.square(time).sum()
    about: Trace = trace - slopes[:, None] * time
    return about


def without_common(trace: Trace) -> Trace:
    """The traces less what all chains have in common at each draw, at the level of each.

    Chains that see the same batches rise and fall together. That is variance within every chain and none between them, so
    R-hat of the traces themselves comes out too small; of what is left, within and between shrink alike, by 1 - 1/chains.
    """
    own: Trace = trace - trace.mean(axis=0, keepdims=True) + trace.mean()
    return own


def disagreement(trace: Trace) -> tuple[float, npt.NDArray[np.float64]]:
    """Probability of levels as far apart as these when all chains have one level, and each one's distance from the middle one.

        Q = (1 - 1/C) sum over chains of (level / standard error)^2  ~  chi^2 with C - 1 degrees of freedom

    of the traces without what they have in common; the distances are from the median level, in standard errors. One chain
    agrees with itself.
    """
    from scipy.special import chdtrc

    count = trace.shape[0]
    if count < 2:
        return 1.0, np.zeros(count)
    own = without_common(trace)
    errors = np.array([standard_error(chain[None]) for chain in own])
    levels = own.mean(axis=1)
    q = (1 - 1 / count) * np.square((levels - levels.mean()) / errors).sum()
    return float(chdtrc(count - 1, q)), (levels - np.median(levels)) / errors


def spikes(trace: Trace) -> npt.NDArray[np.int64]:
    """Number of draws in each chain that are further up than the posterior puts any.

    Where the loss is quadratic, x is at most as wide-tailed as a Gamma variable with the same mean and scale 1 (equal to it
    without localization; of w^(2k), too). To its quantile of `FALSE_ALARM` for the whole trace comes the noise of batches,
    five times the spread that is left when the Gamma's variance is taken off the observed one (by the median absolute
    deviation, which spikes do not move).
    """
    from scipy.special import gammainccinv

    found = []
    for chain in trace:
        level = max(float(chain.mean()), 0.05)
        middle = np.median(chain)
        spread = 1.4826 * float(np.median(np.abs(chain - middle)))
        noise = math.sqrt(max(0.0, spread**2 - level))
        limit = float(gammainccinv(level, FALSE_ALARM / len(chain))) + 5 * noise
        found.append(int((chain > limit).sum()))
    return np.array(found)
