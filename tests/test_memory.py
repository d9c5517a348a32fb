"""Peak memory, each case in a process of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parent.parent / "benchmarks" / "memory.py"


def growth(hidden: int, draws: int, method: str) -> tuple[float, float]:
    """Megabytes by which the peak grew during sample(), and the weights' own."""
    command = [sys.executable, str(BENCHMARK), str(hidden), str(draws), method]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    size, before, after = map(float, done.stdout.split())
    return after - before, 4 * size / 2**20


@pytest.mark.slow
@pytest.mark.parametrize(("method", "vectors"), [("sgmcmc_sgld", 2), ("leimkuhler_matthews", 3)])
def test_a_full_model_run_holds_weights_gradient_and_state(method, vectors):
    """Beside the model itself, which is the anchor. 101M parameters, 385 MB: libraries and activations are a third of that."""
    grown, unit = growth(2048, 3, method)
    assert unit > 380
    assert vectors - 0.2 < grown / unit < vectors + 0.5


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_draws():
    few, _ = growth(128, 50, "sgmcmc_sgld")
    many, _ = growth(128, 1000, "sgmcmc_sgld")
    # 950 more draws of 8 kB each would be visible ten times over if they were kept in Python
    assert many < few + 15
