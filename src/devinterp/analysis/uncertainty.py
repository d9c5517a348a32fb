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
    if not _varies(trace):
        return float("nan")
    from arviz_stats.base import array_stats

    together = trace.mean(axis=0, keepdims=True)
    each, of_mean = (array_stats.mcse(chains, chain_axis=0, draw_axis=1, method="mean") for chains in (trace, together))
    return float(np.fmax(each, of_mean))


def standard_errors(traces: Trace) -> npt.NDArray[np.float64]:
    """`standard_error` of every trace in an array (chain, draw, ...), of the shape that follows; all of them at once."""
    if traces.shape[1] < FEWEST_DRAWS:
        return np.full(traces.shape[2:], np.nan)
    flat = np.ascontiguousarray(np.moveaxis(traces.reshape(*traces.shape[:2], -1), -1, 0))
    errors = np.fmax(_errors_of_means(flat), _errors_of_means(flat.mean(axis=1, keepdims=True)))
    constant = np.ptp(flat, axis=(1, 2)) == 0
    return np.where(constant, np.nan, errors).reshape(traces.shape[2:])


def _errors_of_means(traces: Trace) -> npt.NDArray[np.float64]:
    """sd / sqrt(ESS) of traces (series, chain, draw), as ArviZ has it for one: chains split in halves, Geyer's initial
    monotone sequence (Vehtari et al. 2021, eq. 10-13)."""
    half = traces.shape[2] // 2
    halves = np.concatenate([traces[..., :half], traces[..., -half:]], axis=1)
    covariance = _mean_autocovariance(halves)
    within = covariance[:, :1] * half / (half - 1)
    total = covariance[:, :1] + halves.mean(axis=2).var(axis=1, ddof=1)[:, None]
    with np.errstate(invalid="ignore", divide="ignore"):  # constant ones
        rho = 1 - (within - covariance) / total
    rho[:, 0] = 1
    last = max(0, -(-(half - 4) // 2))
    even, odd = rho[:, 0 : 2 * last + 1 : 2], rho[:, 1 : 2 * last + 2 : 2]
    positive = np.logical_and.accumulate(even + odd > 0, axis=1)
    end = np.minimum(positive.sum(axis=1), last)[:, None]  # the first pair that is not counted whole
    counted = np.where(np.arange(last + 1) < end, np.minimum.accumulate(even + odd, axis=1), 0).sum(axis=1)
    rest = np.take_along_axis(np.where(positive, even, np.maximum(even, 0)), end, axis=1)[:, 0]
    draws = halves.shape[1] * half
    time = np.maximum(-1 + 2 * counted + rest, 1 / np.log10(draws))
    error: npt.NDArray[np.float64] = traces.std(axis=(1, 2), ddof=1) * np.sqrt(time / draws)
    return error


def _mean_autocovariance(traces: Trace) -> Trace:
    """Of traces (series, chain, draw), the mean over chains at every lag, with 1/draws."""
    from scipy.fft import irfft, next_fast_len, rfft

    draws = traces.shape[2]
    padded = next_fast_len(2 * draws, real=True)
    spectrum = rfft(traces - traces.mean(axis=2, keepdims=True), n=padded)
    power = (np.square(spectrum.real) + np.square(spectrum.imag)).mean(axis=1)
    covariance: Trace = irfft(power, n=padded)[:, :draws] / draws
    return covariance


def _varies(trace: Trace) -> bool:
    return trace.shape[1] >= FEWEST_DRAWS and bool(np.ptp(trace) > 0)
