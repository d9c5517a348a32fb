"""The simulation of failing workers against the closed form, and the sizes of models against theirs."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

from failures import Failing, best_commit_every, expected_worker_seconds, first_order_overhead, simulate
from scaling import PYTHIA


@pytest.mark.parametrize("hours", [0.5, 4.0, 24.0])
@pytest.mark.parametrize("commit", [0.0, 5.0, 60.0])
def test_simulated_worker_time_is_that_of_the_closed_form(hours, commit):
    failing = Failing(hours * 3600, commit=commit)
    work, count = 2.2 * 3600, 4000
    found = [
        simulate(np.full(count, work), 16, failing, np.random.default_rng(seed)).worker_seconds / count for seed in range(5)
    ]
    exact = expected_worker_seconds(work, failing)
    error = np.std(found, ddof=1) / np.sqrt(5)
    assert abs(np.mean(found) - exact) < 5 * error + 1e-4 * exact
    assert error < 0.01 * exact


def test_rare_failures_cost_what_the_first_order_says():
    failing = Failing(1000 * 3600, commit=2.0, restart=60.0)
    work = 100 * failing.commit_every
    exact = (expected_worker_seconds(work, failing) - failing.start) / work - 1
    assert exact == pytest.approx(first_order_overhead(failing), rel=0.01)
    best = best_commit_every(failing)
    overheads = [
        first_order_overhead(Failing(failing.between_failures, every, 2.0)) for every in (0.8 * best, best, 1.25 * best)
    ]
    assert overheads[1] == min(overheads)


def test_without_failures_the_makespan_is_that_of_a_list():
    work = np.array([5.0, 3.0, 3.0, 2.0, 2.0])
    found = simulate(work, 2, Failing(1e15, commit=0.0, restart=0.0, start=0.0), np.random.default_rng(0))
    assert (found.makespan, found.worker_seconds, found.failures) == (8.0, 15.0, 0)


def test_sizes_of_models():
    """Of Biderman et al. 2023, table 1 (total parameters)."""
    published = {
        "70M": 70_426_624,
        "160M": 162_322_944,
        "410M": 405_334_016,
        "1B": 1_011_781_632,
        "1.4B": 1_414_647_808,
        "2.8B": 2_775_208_960,
        "6.9B": 6_857_302_016,
    }
    assert {model.name: model.parameters for model in PYTHIA if model.name in published} == published
