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


def ess_bulk(trace: Trace) -> float:
    """Bulk effective sample size of a trace (chain, draw); NaN where it is undefined."""
    if not _varies(trace):
        return float("nan")
    from arviz_stats.base import array_stats

    return float(array_stats.ess(trace, chain_axis=0, draw_axis=1, method="bulk"))


def standard_error(trace: Trace) -> float:
    """Standard error of the mean over chains and draws of a trace (chain, draw).

    The larger of two Monte Carlo standard errors, each sd / sqrt(ESS) with the ESS of the mean:

    - of all chains as independent ones. Its ESS (Vehtari et al. 2021, eq. 10) counts autocorrelation within chains and
      shrinks when chains level off at different values, so an unmixed run gets a wide error;
    - of the mean over chains, as one series. Chains that see the same batches rise and fall together; taken as independent
      they would promise an error that is too small by up to sqrt(number of chains).

    NaN with fewer than four draws or a constant trace.
    """
    if not _varies(trace):
        return float("nan")
    from arviz_stats.base import array_stats

    together = trace.mean(axis=0, keepdims=True)
    errors = [float(array_stats.mcse(trace, chain_axis=0, draw_axis=1, method="mean"))]
    if _varies(together):
        errors.append(float(array_stats.mcse(together, chain_axis=0, draw_axis=1, method="mean")))
    return max(errors)


def _varies(trace: Trace) -> bool:
    return trace.shape[1] >= FEWEST_DRAWS and bool(np.ptp(trace) > 0)
