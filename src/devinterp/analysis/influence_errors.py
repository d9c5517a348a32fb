"""Standard errors of the covariances and correlations of many traces, as blocked matrix products. Bare arrays only.

With y_t the trace of which an influence is the mean to first order (delta method), of N observations in all,

    covariance c:   y_t = x_i x_j - c                              (x centred)
    correlation r:  y_t = x_i x_j - r (x_i^2 + x_j^2) / 2          (x centred, of variance 1)

    error^2 = Var[y] (1 + 2 sum_k rho_i(k) rho_j(k)) / N           (Bartlett 1935, 1946)

Var[y] is measured. For Gaussian traces it is (1 - r^2)^2, or v_i v_j (1 + r^2) with variances v; losses are not Gaussian,
and those formulas made intervals that held the truth in 60 % of runs for quadratic losses. The autocorrelations stand in for
those of y: exact for Gaussian traces of one and the same autocorrelation. Between chains that share batches, correlations at
equal and later draws count in the same way.
"""

import torch
from torch import Tensor


def lagged(z: Tensor, chains: int) -> Tensor:
    """Autocorrelations of traces, scaled such that a_i . a_j = 1 + 2 sum_k (1 - k/n) rho_i(k) rho_j(k), n draws a chain.

    They are means over chains, about the trace's own mean: levels at which chains differ never decay. Behind them stands, times
    sqrt(chains - 1), what different chains have in common, from the covariance of the mean over chains. The lags
    of each trace end with Geyer's initial positive sequence: before the first pair (2k, 2k + 1) whose sum is not positive.

    Args:
        z: centred traces, shape (series, observations), the chains one after another.

    Returns:
        Shape (series, n), or (series, 2 n) with several chains.
    """
    traces = z.view(len(z), chains, -1)
    draws = traces.shape[2]
    within = _autocovariance(traces[:, 0])
    for chain in range(1, chains):
        within += _autocovariance(traces[:, chain])
    within /= chains
    weights = 2.0 / (1 - torch.arange(draws, device=z.device, dtype=z.dtype) / draws)
    weights[0] = 1
    parts = [_initial_positive(within / within[:, :1]) * weights.sqrt()]
    if chains > 1:
        between = (chains * _autocovariance(traces.mean(1)) - within) / (chains - 1)
        parts.append(_initial_positive(between / within[:, :1]) * ((chains - 1) * weights).sqrt())
    return torch.cat(parts, dim=1)


def errors_of_products(
    rows: Tensor, columns: Tensor, row_lags: Tensor, column_lags: Tensor, influences: Tensor, correlation: bool
) -> Tensor:
    """Standard errors of `influences = rows @ columns.T`, of traces standardised by `moments.standardised`.

    Args:
        rows, columns: shape (series, observations).
        row_lags, column_lags: of the same traces, by `lagged`.
        influences: shape (rows, columns).
        correlation: whether the variances that the traces were divided by were estimated too.
    """
    variance = rows.square() @ columns.square().T
    if correlation:  # in place: a block is large
        cubes = torch.addmm(rows.pow(3) @ columns.T, rows, columns.pow(3).T)
        scale = (2 * variance).add_(rows.pow(4).sum(1)[:, None]).add_(columns.pow(4).sum(1))
        variance += scale.mul_(influences).div_(4).sub_(cubes).mul_(influences)
    else:
        variance.addcmul_(influences, influences, value=-1 / rows.shape[1])
    inefficiency = (row_lags @ column_lags.T).clamp_min_(1)  # never more than the number of draws
    return variance.clamp_min_(0).mul_(inefficiency).sqrt_()


def _autocovariance(x: Tensor) -> Tensor:
    """Of traces (series, draw) that are centred, at every lag, divided by the number of draws."""
    draws = x.shape[1]
    spectrum = torch.fft.rfft(x, n=2 * draws)
    covariance: Tensor = torch.fft.irfft(spectrum.abs().square(), n=2 * draws)[:, :draws] / draws
    return covariance


def _initial_positive(rho: Tensor) -> Tensor:
    pairs = rho[:, : rho.shape[1] // 2 * 2].view(len(rho), -1, 2)
    kept = (pairs.sum(2, keepdim=True) > 0).cumprod(dim=1)
    cut = torch.zeros_like(rho)
    cut[:, : rho.shape[1] // 2 * 2] = (pairs * kept).flatten(1)
    return cut
