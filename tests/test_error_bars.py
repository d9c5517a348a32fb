"""Error bars: how often nominal 95 % intervals hold the exact value, over many independent runs."""

import numpy as np
import pytest
from cases import autoregressive
from targets import quadratic_covariance

from devinterp.analysis.susceptibility import one_chain_errors, two_chain_errors
from devinterp.analysis.uncertainty import standard_error, standard_errors

RUNS, CHAINS, DRAWS = 600, 4, 200
QUANTILE = 1.96


def covers(values: np.ndarray, truth: float, errors: np.ndarray) -> float:
    """Share of the runs whose interval holds the truth."""
    return float((np.abs(values - truth) < QUANTILE * errors).mean())


@pytest.mark.parametrize("chains", [1, 2, 4, 8])
@pytest.mark.parametrize("draws", [4, 5, 7, 10, 25, 100])
def test_errors_of_many_traces_are_those_of_each(chains, draws):
    rng = np.random.default_rng(draws)
    traces = np.concatenate(
        [autoregressive(rng, rho, chains, draws, 15) + spread * rng.standard_normal((chains, 1, 15))
         for rho in (-0.8, 0.0, 0.6, 0.97) for spread in (0, 2)], axis=2,
    )  # fmt: skip
    each = [standard_error(traces[..., i]) for i in range(traces.shape[2])]
    np.testing.assert_allclose(standard_errors(traces), each, rtol=1e-12)
    traces[..., 0] = 1.5
    assert np.isnan(standard_errors(traces)[0])
    assert np.isnan(standard_errors(traces[:, :3])).all()


@pytest.mark.parametrize("rho", [0.3, 0.8])
@pytest.mark.parametrize("estimator", ["one_chain", "two_chain"])
def test_susceptibility_intervals_hold_the_exact_value(estimator, rho):
    """L = w'Hw/2 and l = w'Aw/2 + b'w under a Gaussian of variance 1: -Cov(L, l - L) = tr(H H)/2 - tr(H A)/2."""
    rng, d = np.random.default_rng(1), 8
    H, A, b = np.diag(np.linspace(0.5, 1.5, d)), np.diag(rng.uniform(0, 2, d)), rng.standard_normal(d)
    truth = quadratic_covariance(H, 0 * b, H - A, -b, np.eye(d))

    def losses() -> tuple[np.ndarray, np.ndarray]:
        w = autoregressive(rng, rho, CHAINS, DRAWS, RUNS, d)
        L = 0.5 * np.square(w) @ np.diag(H)
        return L, L - 0.5 * np.square(w) @ np.diag(A) - w @ b

    g, D = losses()
    if estimator == "one_chain":
        values = (g * D).mean((0, 1)) - g.mean((0, 1)) * D.mean((0, 1))
        errors = one_chain_errors(g, D)
    else:
        _, full = losses()
        values = (g * D).mean((0, 1)) - g.mean((0, 1)) * full.mean((0, 1))
        errors = two_chain_errors(g, D, full.mean((0, 1)), standard_errors(full))
    covered = covers(values, truth, errors)
    independent = ((g - g.mean((0, 1))) * (D - D.mean((0, 1)))).std((0, 1)) / (CHAINS * DRAWS) ** 0.5
    blind = covers(values, truth, independent)
    print(f"{estimator}, rho {rho}: covered {covered:.1%}; with every draw independent {blind:.1%}")
    assert 0.92 <= covered <= 0.98
    assert blind < min(covered - 0.02, 0.94)
