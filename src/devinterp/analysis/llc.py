"""Estimates of the LLC from traces of x = n_beta (L(w) - L(w0)), of shape (chain, draw). Bare arrays only."""

import numpy as np
import numpy.typing as npt

from devinterp.analysis.uncertainty import Trace, standard_error


def running_mean(trace: Trace) -> Trace:
    """Of each chain over its draws up to each."""
    return np.cumsum(trace, axis=1) / np.arange(1, trace.shape[1] + 1)


def variance_form(trace: Trace, batch_variance: npt.NDArray[np.float64]) -> tuple[float, float]:
    """n_beta^2 Var[L] over the draws of all chains, with its standard error.

        Var[L] = E[(x - mean x)^2] + (error of mean x)^2 - E[batch variance]

    The second term is what the mean of N correlated draws takes off the first; the third what batches add to it.

    Args:
        trace: x, shape (chain, draw).
        batch_variance: of x at each draw by its batch alone, the same shape. NaN (batches of one) gives NaN.
    """
    deviation = np.square(trace - trace.mean()) - batch_variance
    return float(deviation.mean() + standard_error(trace) ** 2), standard_error(deviation)
