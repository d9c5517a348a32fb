"""Slow, obvious versions, one number at a time."""

import numpy as np
import xarray as xr
from arviz_stats.base import array_stats


def covariance(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(((a - a.mean()) * (b - b.mean())).sum() / (len(a) - 1))


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    return covariance(a, b) / (covariance(a, a) * covariance(b, b)) ** 0.5


def loss_traces(ds: xr.Dataset, names: list[str], reduce: str = "stack") -> np.ndarray:
    """Losses of all sequences of the observables, shape (batch, token_pos, observation)."""
    found = []
    for name in names:
        losses = ds[f"loss_{name}"].values.astype(np.float64)  # chain, draw, batch, token_pos
        losses = losses.mean(0, keepdims=True) if reduce == "mean" else losses
        for b in range(losses.shape[2]):
            found.append([[losses[c, d, b, t] for c in range(len(losses)) for d in range(losses.shape[1])]
                          for t in range(losses.shape[3])])  # fmt: skip
    return np.asarray(found)


def token_influences(traces: np.ndarray, rows: list[int], columns: list[int], measure=correlation) -> np.ndarray:
    length = traces.shape[1]
    return np.array([
        [[[measure(traces[i, t], traces[j, s]) for s in range(length)] for t in range(length)] for j in columns] for i in rows
    ])  # fmt: skip


def sequence_influences(traces: np.ndarray, rows: list[int], columns: list[int], measure=correlation) -> np.ndarray:
    return np.array([[measure(traces[i].mean(0), traces[j].mean(0)) for j in columns] for i in rows])


def susceptibility(restricted: xr.Dataset, full: xr.Dataset, task: str, observable: str, estimator: str) -> np.ndarray:
    """Draw by draw, token by token: shape (batch, token_pos)."""
    baseline = float(restricted[f"init_loss_{task}"].astype(float).mean())
    tokens = restricted[f"loss_{observable}"].shape[2:]
    result = np.zeros(tokens)
    for b in range(tokens[0]):
        for t in range(tokens[1]):
            gL, gl, g, L, token_loss = [], [], [], [], []
            for c in range(restricted.sizes["chain"]):
                for d in range(restricted.sizes["draw"]):
                    mean_loss = float(restricted[f"loss_{task}"][c, d].astype(float).mean())
                    loss = float(restricted[f"loss_{observable}"][c, d, b, t])
                    gL.append((mean_loss - baseline) * mean_loss)
                    gl.append((mean_loss - baseline) * loss)
                    g.append(mean_loss - baseline)
                    L.append(mean_loss)
                    token_loss.append(loss)
            if estimator == "two_chain":
                full_L = float(full[f"loss_{task}"].astype(float).mean())
                full_l = float(full[f"loss_{observable}"][:, :, b, t].astype(float).mean())
                result[b, t] = np.mean(gL) - np.mean(gl) - np.mean(g) * (full_L - full_l)
            else:
                result[b, t] = -covariance(np.array(g), np.array(token_loss) - np.array(L))
    return result


def standard_error(trace: np.ndarray) -> float:
    """ArviZ's Monte Carlo standard error of a trace (chain, draw), or of its mean over chains, if that is larger."""
    return max(float(array_stats.mcse(x, chain_axis=0, draw_axis=1, method="mean")) for x in (trace, trace.mean(0)[None]))


def susceptibility_error(restricted: xr.Dataset, full: xr.Dataset, task: str, loss: xr.DataArray, full_loss, estimator: str):
    """Of one token, or of a mean over some, given by its losses (chain, draw) in both runs."""
    L, full_L = (ds[f"loss_{task}"].astype(float).mean([f"batch_{task}", "token_pos"]).values for ds in (restricted, full))
    g = L - float(restricted[f"init_loss_{task}"].astype(float).mean())
    d, full_d = L - loss.astype(float).values, full_L - full_loss.astype(float).values
    if estimator == "one_chain":
        return standard_error((g - g.mean()) * (d - d.mean()))
    return (standard_error(g * (d - full_d.mean())) ** 2 + (g.mean() * standard_error(full_d)) ** 2) ** 0.5


def autocorrelations(x: np.ndarray) -> tuple[list[float], list[float]]:
    """Of a centred trace (chain, draw): within chains, and between different chains, by lag; (1 - k/draws) of the true ones."""
    chains, draws = x.shape
    within, between = [], []
    for k in range(draws):
        products = np.array(
            [[sum(x[a, t] * x[b, t + k] for t in range(draws - k)) / draws for a in range(chains)] for b in range(chains)]
        )
        within.append(np.diag(products).mean())
        between.append((products.sum() - np.trace(products)) / max(1, chains * (chains - 1)))
    return [value / within[0] for value in within], [value / within[0] for value in between]


def initial_positive(rho: list[float]) -> list[float]:
    end = next((k for k in range(0, len(rho) - 1, 2) if rho[k] + rho[k + 1] <= 0), len(rho) // 2 * 2)
    return [value if k < end else 0.0 for k, value in enumerate(rho)]


def influence_error(a: np.ndarray, b: np.ndarray, correlated: bool, by_chain: bool = False) -> float:
    """Of the correlation (or covariance) of two traces (chain, draw), with the sum over all pairs of lags written out."""
    a, b = (x.astype(np.float64) - x.mean(axis=1 if by_chain else None, keepdims=True, dtype=np.float64) for x in (a, b))
    chains, draws = a.shape
    parts = zip(autocorrelations(a), autocorrelations(b), strict=True)
    total = 0.0
    for times, pair in zip((1, chains - 1), parts, strict=True):
        one, other = map(initial_positive, pair)
        total += times * sum((1 if k == 0 else 2) * one[k] * other[k] / (1 - k / draws) for k in range(draws))
    groups = chains if by_chain else 1
    if correlated:
        a, b = a / np.square(a).mean() ** 0.5, b / np.square(b).mean() ** 0.5
        y = a * b - (a * b).mean() * (a**2 + b**2) / 2
        return float((np.square(y).mean() * max(1, total) / a.size) ** 0.5)
    scale = a.size / (a.size - groups)
    return float(scale * ((a * b).var() * max(1, total) / a.size) ** 0.5)
