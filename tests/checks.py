"""One rule for every stochastic test: two-sided alpha = 1e-6, so |z| < 4.89. Seeds are fixed, so CI never flakes."""

import math

import numpy as np

LIMIT = 4.89


def check_gaussian(values: np.ndarray, mean: float, variance: float) -> None:
    """Independent coordinates with this exact law: one test of the mean, one of the variance.

    With D values the smallest variance error found with power 1 - 1e-6 is 9.64 sqrt(2/D): 1.4 % for D = 1e6.
    """
    values = np.asarray(values, dtype=np.float64)
    assert len(values) >= 10_000, "too few coordinates for a test that can fail"
    z_mean = (values.mean() - mean) / math.sqrt(variance / len(values))
    z_variance = (((values - mean) ** 2).mean() / variance - 1) / math.sqrt(2 / len(values))
    assert abs(z_mean) < LIMIT, f"mean {values.mean():.6g}, should be {mean:.6g} (z = {z_mean:.1f})"
    assert abs(z_variance) < LIMIT, f"variance {values.var():.6g}, should be {variance:.6g} (z = {z_variance:.1f})"


def check_estimate(value: float, truth: float, standard_error: float, largest: float) -> None:
    """An estimate agrees with the truth; `largest` (relative) keeps a large error bar from hiding a wrong value."""
    assert standard_error < largest * abs(truth), f"standard error {standard_error:.3g} says nothing about {truth:.3g}"
    assert abs(value - truth) < LIMIT * standard_error, f"{value:.4g} ± {standard_error:.2g}, should be {truth:.4g}"
