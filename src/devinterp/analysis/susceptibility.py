"""The two susceptibility estimators, from running sums over draws. Bare arrays only."""

import numpy as np
import numpy.typing as npt

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


def standardised(values: Doubles) -> tuple[Doubles, Doubles, Doubles]:
    """z-scores of each column of (token, component), with their means and standard deviations (ddof 0); NaN if constant."""
    mean, deviation = values.mean(0), values.std(0)
    scale = np.where(values.max(0) > values.min(0), deviation, np.nan)
    return (values - mean) / scale, mean, deviation
