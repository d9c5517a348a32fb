"""Known learning coefficients, end to end through the public calls, with lr="auto" and nothing tuned."""

import itertools
import math

import numpy as np
import pytest
import torch
from cases import DeepLinear, Weights, by_row, rows
from checks import check_estimate
from linear_networks import energies
from scipy.integrate import quad
from targets import crossing_llc, deep_linear_llc, quadratic_llc
from torch import nn

import devinterp
from devinterp.analysis.uncertainty import standard_error

AUTO = {"lr": "auto", "sampling_method": "leimkuhler_matthews", "num_init_loss_batches": 1, "progress": False}

DEEP_LINEAR = [
    ((6, 4, 7), 2), ((9, 9, 9), 3), ((5, 3, 5), 0), ((5, 6, 5, 4), 2), ((7, 3, 3, 8), 3), ((8, 6, 6, 8), 3),
    ((10, 10, 10, 10), 4),
]  # fmt: skip


def test_values_of_the_formula():
    """Values computed by hand or published, so that the formula itself is not on trial."""
    known = {((2, 2, 2), 0): (1.5, 1), ((2, 2, 2), 1): (2, 2), ((3, 3, 3), 1): (4, 1), ((5, 3, 5), 0): (6.5, 2),
             ((5, 4, 5), 0): (8, 1), ((10, 10, 10), 4): (45.5, None), ((10, 10, 10, 10), 4): (44, None),
             ((8, 6, 6, 8), 3): (24, 3), ((100, 100, 100, 100, 50), 50): None}  # fmt: skip
    for (widths, rank), expected in known.items():
        if expected is not None:
            value, multiplicity = deep_linear_llc(widths, rank)
            assert value == pytest.approx(expected[0])
            assert expected[1] in (None, multiplicity)


def test_anisotropic_quadratic_is_half_its_dimension():
    h = torch.logspace(-1, 1, 40)
    loss = lambda model, ids: (0.5 * h * model.w.square()).sum().expand(len(ids), 1)  # noqa: E731
    n_beta, gamma = 1000.0, 1.0
    result = devinterp.llc(Weights(torch.zeros(40)), rows(8), loss_fn=loss, n_beta=n_beta, localization=gamma, num_chains=4,
                           num_draws=500, num_burnin_steps=300, batch_size=8, **AUTO)  # fmt: skip
    truth = quadratic_llc(h.tolist(), n_beta, gamma)
    assert truth == pytest.approx(20, rel=0.01)
    check_estimate(float(result.llc_mean), truth, float(result.llc_sem), largest=0.03)


class Regression(nn.Module):
    def __init__(self, x: np.ndarray, y: np.ndarray, solution: np.ndarray):
        super().__init__()
        self.w = nn.Parameter(torch.as_tensor(solution, dtype=torch.float32))
        self.register_buffer("x", torch.as_tensor(x, dtype=torch.float32))
        self.register_buffer("y", torch.as_tensor(y, dtype=torch.float32))

    def forward(self, numbers):
        return 0.5 * (self.x[numbers] @ self.w - self.y[numbers]).square()[:, None]


def test_linear_regression_is_half_its_number_of_weights():
    """Real data in full batches, at the least-squares solution: d/2 = 15 up to localization."""
    from sklearn.datasets import load_breast_cancer

    x, y = load_breast_cancer(return_X_y=True)
    x = np.linalg.qr(x - x.mean(0))[0] * len(x) ** 0.5  # whitened: 30 directions of curvature 1
    solution = np.linalg.lstsq(x, y, rcond=None)[0]
    n_beta, gamma = 100.0, 1.0
    result = devinterp.llc(Regression(x, y, solution), rows(len(x)), loss_fn=by_row, n_beta=n_beta, localization=gamma,
                           num_chains=4, num_draws=400, num_burnin_steps=50, batch_size=len(x), **AUTO)  # fmt: skip
    truth = quadratic_llc([1.0] * 30, n_beta, gamma)
    assert truth == pytest.approx(15, rel=0.02)
    check_estimate(float(result.llc_mean), truth, float(result.llc_sem), largest=0.02)


def test_numerical_integration_of_normal_crossings():
    """Against the integral over one weight by hand: w1 is Gaussian given w2, of precision 2 n_beta w2^2 + gamma."""
    n_beta = 1000.0
    for gamma in (0.1, 1.0, 10.0):
        density = lambda w, g=gamma: (2 * n_beta * w * w + g) ** -0.5 * math.exp(-g * w * w / 2)  # noqa: E731
        energy = lambda w, g=gamma, d=density: d(w) * n_beta * w * w / (2 * n_beta * w * w + g)  # noqa: E731
        ends = [0.0, 1e-4, 1e-2, 0.1, 1.0, 30.0]
        top, bottom = (sum(quad(f, *pair)[0] for pair in itertools.pairwise(ends)) for f in (energy, density))
        assert crossing_llc((1, 1), n_beta, gamma) == pytest.approx(top / bottom, rel=1e-5)
    assert crossing_llc((3,), 1000.0, 1e-4) == pytest.approx(1 / 6, rel=1e-4)
    assert crossing_llc((1, 1, 1), 1000.0, 0.1) == pytest.approx(crossing_llc((1, 1, 1), 1000.0, 0.1, points=360), rel=1e-6)


@pytest.mark.parametrize(("gamma", "rank"), [(1.0, 0), (5.0, 1)])
def test_exact_sampling_of_linear_networks_against_an_integral(gamma, rank):
    """Two layers of one weight each, n_beta (w1 w2 - rank)^2 / 2, on a grid."""
    n_beta, w = 20.0, np.linspace(-8, 8, 2001)
    energy = 0.5 * n_beta * (w[:, None] * w - rank) ** 2
    density = np.exp(-energy - gamma / 2 * ((w[:, None] - rank) ** 2 + (w - rank) ** 2))
    truth = float((energy * density).sum() / density.sum())
    found = energies((1, 1, 1), rank, n_beta, gamma, sweeps=20_000, burn_in=100)
    check_estimate(float(found.mean()), truth, standard_error(found), largest=0.02)


def deep_linear(widths, rank, num_chains, num_burnin_steps, num_draws):
    model, count = DeepLinear(widths, rank), widths[0]
    return devinterp.llc(model, rows(count), loss_fn=by_row, n_beta=5000.0, localization=1.0, num_chains=num_chains,
                         num_draws=num_draws, num_steps_bw_draws=8, num_burnin_steps=num_burnin_steps, batch_size=count,
                         **AUTO)  # fmt: skip


def test_a_small_deep_linear_network():
    """Against exact sampling at the same n_beta and localization, which are far from the limit that theory has."""
    widths, rank, n_beta, gamma = (4, 3, 4), 1, 200.0, 2.0
    result = devinterp.llc(DeepLinear(widths, rank), rows(4), loss_fn=by_row, n_beta=n_beta, localization=gamma, num_chains=4,
                           num_draws=400, num_steps_bw_draws=5, num_burnin_steps=1000, batch_size=4, **AUTO)  # fmt: skip
    known = energies(widths, rank, n_beta, gamma, sweeps=4000, burn_in=400)
    error = math.hypot(float(result.llc_sem), standard_error(known))
    check_estimate(float(result.llc_mean), float(known.mean()), error, largest=0.03)
    apart = abs(float(known.mean()) - deep_linear_llc(widths, rank)[0])
    assert apart > 10 * standard_error(known), "the exact value is told apart from theory's limit"
    assert apart > 3 * error, "and so is the measured one"


@pytest.mark.slow
@pytest.mark.parametrize(("widths", "rank"), DEEP_LINEAR)
def test_deep_linear_networks(widths, rank, record_property):
    """At the deepest point; 8 chains, 4000 steps of burn-in, 500 draws 8 steps apart. About two minutes each."""
    result = deep_linear(widths, rank, num_chains=8, num_burnin_steps=4000, num_draws=500)
    truth, _ = deep_linear_llc(widths, rank)
    error = float(result.llc_mean) / truth - 1
    record_property("relative_error", error)
    print(
        f"\n{widths}; rank {rank}: {truth:g}, measured {float(result.llc_mean):.2f} ± {float(result.llc_sem):.2f} "
        f"({error:+.1%}), R-hat {float(result.rhat):.3f}"
    )
    assert abs(error) < 0.08
