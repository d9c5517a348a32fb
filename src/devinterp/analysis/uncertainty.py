"""How far a mean over chains and draws can be trusted. Bare arrays in, numbers out; R-hat and ESS are ArviZ's."""

import numpy as np
import numpy.typing as npt

Trace = npt.NDArray[np.float64]

FEWEST_DRAWS = 4
"""ArviZ's estimators split each chain in two halves of at least two draws"""


def rhat(trace: Trace) -> float:
    """Rank-normalised split R-hat (Vehtari et al. 2021) of a trace (chain, draw); NaN for one chain or too few draws."""
    if trace.shape[0] < 2 or not _varies(trace):
        return float("nan")
    from arviz_stats.base import array_stats

    return float(array_stats.rhat(trace, chain_axis=0, draw_axis=1, method="rank"))


def ess(trace: Trace, method: str) -> float:
    """Effective sample size of a trace (chain, draw): "bulk", "tail" (5 and 95 % quantiles) or "mean"; NaN if undefined."""
    if not _varies(trace):
        return float("nan")
    from arviz_stats.base import array_stats

    prob = (0.05, 0.95) if method == "tail" else None
    return float(array_stats.ess(trace, chain_axis=0, draw_axis=1, method=method, prob=prob))


def standard_error(trace: Trace) -> float:
    """Standard error of the mean over chains and draws of a trace (chain, draw).

    The larger of two Monte Carlo standard errors, each sd / sqrt(ESS) with the ESS of the mean:

    - of all chains as independent ones. Its ESS (Vehtari et al. 2021, eq. 10) counts autocorrelation within chains and
      shrinks when chains level off at different values, so an unmixed run gets a wide error;
    - of the mean over chains, as one series. Chains that see the same batches rise and fall together; taken as independent
      they would promise an error that is too small by up to sqrt(number of chains).

    NaN with fewer than four draws or a constant trace.
    """
    return float(standard_errors(trace))


def standard_errors(traces: Trace) -> npt.NDArray[np.float64]:
    """`standard_error` of every trace in an array (chain, draw, ...), of the shape that follows."""
    if traces.shape[1] < FEWEST_DRAWS:
        return np.full(traces.shape[2:], np.nan)
    from arviz_stats.base import array_stats

    together = traces.mean(axis=0, keepdims=True)
    each = array_stats.mcse(traces, chain_axis=0, draw_axis=1, method="mean")
    of_mean = array_stats.mcse(together, chain_axis=0, draw_axis=1, method="mean")
    constant = np.ptp(traces, axis=(0, 1)) == 0
    return np.where(constant, np.nan, np.fmax(each, of_mean))


def _varies(trace: Trace) -> bool:
    return trace.shape[1] >= FEWEST_DRAWS and bool(np.ptp(trace) > 0)
