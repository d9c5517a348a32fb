"""How often `diagnose` gives chains at rest a verdict that they do not deserve.

python benchmarks/false_alarms.py       (about 3 minutes; writes to benchmarks/RESULTS.md)

Runs of four chains, exact draws around the minimum of a quadratic in 100 directions; of every second run all chains share the noise
of batches, half as large as the spread of the loss itself.
"""

import datetime
import sys
from pathlib import Path

import numpy as np
from demo_checkpoint import machine, record

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from targets import energies

from devinterp.analysis.verdicts import Run

RUNS, DIRECTIONS, SHARED = 1000, 100, 5.0
DRAWS = (50, 100, 200, 400)
RHOS = (0.0, 0.5, 0.8, 0.9)
"""Autocorrelation of the weights; that of the loss is its square"""


def sick(draws: int, rho: float) -> int:
    rng, found = np.random.default_rng(0), 0
    for run in range(RUNS):
        trace = energies(rng, draws=draws, directions=DIRECTIONS, rho=rho, shared=SHARED * (run % 2))
        found += any(judgement.verdict != "healthy" for judgement in Run(trace, 1e-9, "").judge())
    return found


def main() -> None:
    lines = [
        f"`python benchmarks/false_alarms.py`, {datetime.date.today()}, {machine()}. Share of {RUNS} runs of 4 chains at rest in which a "
        "chain is not called healthy (length of the chains in autocorrelation times).", "",
        "| autocorrelation of the loss | " + " | ".join(f"{draws} draws" for draws in DRAWS) + " |",
        "|---|" + "---|" * len(DRAWS),
    ]  # fmt: skip
    for rho in RHOS:
        time = (1 + rho**2) / (1 - rho**2)
        cells = [f"{sick(draws, rho) / RUNS:.1%} ({draws / time:.0f})" for draws in DRAWS]
        lines.append(f"| {rho**2:.2f} | " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    record("Verdicts of chains at rest", "\n".join(lines))


if __name__ == "__main__":
    main()
