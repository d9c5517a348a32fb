"""The two susceptibility estimators, from running sums over draws, and the errors of both. Bare arrays only."""

import numpy as np
import numpy.typing as npt

from devinterp.analysis.uncertainty import standard_errors

Doubles = npt.NDArray[np.float64]


class Moments:
    """Running sums over draws from which both estimators are made, in float64.

    With L the mean loss on the sampling task, l the loss of one token, g = L - L(w0), d = (L - l) - (L - l)(w0):

        E[g],  E[d],  E[g d]            (d of shape (batch, token_pos))

    A constant in d, here its value at w0, cancels in both estimators; taken off, the sums lose no digits.
    """

    def __init__(self, tokens: tuple[int, ...]):
        self.count, self.g = 0, 0.0
        self.d, self.gd = np.zeros(tokens), np.zeros(tokens)

    def add(self, g: Doubles, d: Doubles) -> None:
        """g of shape (draws,), d of shape (draws, batch, token_pos)."""
        self.count += len(g)
        self.g += float(g.sum())
        self.d += d.sum(0)
        self.gd += np.einsum("n,n...->...", g, d)

    def two_chain(self, full: "Moments") -> Doubles:
        """E_C[g d] - E_C[g] E_full[d]      (Baker et al. 2025, arXiv 2504.18274, app. C.4)"""
        return np.asarray(self.gd / self.count - self.g / self.count * (full.d / full.count))

    def one_chain(self) -> Doubles:
        """Cov_C(g, d) = -Cov_C(g, l - L), with N - 1."""
        return np.asarray((self.gd - self.g * self.d / self.count) / (self.count - 1))


def one_chain_errors(g: Doubles, d: Doubles) -> Doubles:
    """Standard errors of Cov_C(g, d) by the delta method: those of the mean of

        (g_t - E_C[g]) (d_t - E_C[d])

    which is the estimate itself to first order in the errors of both means.

    Args:
        g: shape (chain, draw), or (chain, draw, 1 ...) to match d.
        d: shape (chain, draw, ...).
    """
    return standard_errors(_centred(_beside(g, d)) * _centred(d))


def two_chain_errors(g: Doubles, d: Doubles, full_mean: Doubles, full_error: Doubles) -> Doubles:
    """Standard errors of E_C[g d] - E_C[g] E_full[d], the runs taken as independent:

        e^2 = error of E_C[g (d - E_full[d])]^2 + (E_C[g] error of E_full[d])^2

    Args:
        g, d: of the restricted run, as in `one_chain_errors`.
        full_mean, full_error: E_full[d] and its own standard error, shape (...).
    """
    g = _beside(g, d)
    errors: Doubles = np.hypot(standard_errors(g * (d - full_mean)), g.mean(axis=(0, 1)) * full_error)
    return errors


def _beside(g: Doubles, d: Doubles) -> Doubles:
    return g.reshape(*g.shape, *[1] * (d.ndim - g.ndim))


def _centred(x: Doubles) -> Doubles:
    centred: Doubles = x - x.mean(axis=(0, 1))
    return centred


def standardised(values: Doubles) -> tuple[Doubles, Doubles, Doubles]:
    """z-scores of each column of (token, component), with their means and standard deviations (ddof 0); NaN if constant."""
    mean, deviation = values.mean(0), values.std(0)
    scale = np.where(values.max(0) > values.min(0), deviation, np.nan)
    return (values - mean) / scale, mean, deviation
