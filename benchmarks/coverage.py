"""How often nominal 95 % intervals of the LLC hold its exact value, over 400 independent runs of each target.

python benchmarks/coverage.py        (about 5 minutes)

Targets are quadratics, whose LLC is known at the very step size. Chains share no batches there, so 1600 chains of one call are
400 runs of 4. Beside ours (Student's t on the effective sample size) stand what `devinterp` 2.0.1 offers, the standard deviation
over chains, and that divided by the square root of their number.
"""

import os
import sys
import warnings
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import datetime

import torch
from demo_checkpoint import machine, record
from scipy.stats import t as student

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from cases import Weights, rows
from targets import quadratic_llc

import devinterp

RUNS, CHAINS = 400, 4
TARGETS = {
    "20 equal directions, lr A = 1": ([2.0] * 20, "leimkuhler_matthews", 0.04, 200, 1),
    "the same, 50 draws": ([2.0] * 20, "leimkuhler_matthews", 0.04, 50, 1),
    "the same, lr A = 0.1: slow": ([2.0] * 20, "leimkuhler_matthews", 0.004, 200, 1),
    "one direction": ([2.0], "leimkuhler_matthews", 0.04, 200, 1),
    "40 directions over a factor of 100, 5 steps a draw": (
        torch.logspace(-1, 1, 40).tolist(),
        "leimkuhler_matthews",
        0.008,
        200,
        5,
    ),
    "20 equal directions by SGLD, at its own biased value": ([2.0] * 20, "sgmcmc_sgld", 0.02, 200, 1),
}
N_BETA, GAMMA = 10.0, 5.0


def main() -> None:
    warnings.simplefilter("ignore")
    lines = []
    for name, (h, method, lr, draws, every) in TARGETS.items():
        curvature = torch.tensor(h)
        loss_fn = lambda model, ids, h=curvature: (0.5 * h * model.w.square()).sum().expand(len(ids), 1)  # noqa: E731
        samples = devinterp.sample(
            Weights(torch.zeros(len(h))), rows(4), {}, loss_fn=loss_fn, lr=lr, n_beta=N_BETA, localization=GAMMA, batch_size=1,
            sampling_method=method, num_chains=RUNS * CHAINS, num_draws=draws, num_steps_bw_draws=every, num_burnin_steps=400,
            num_init_loss_batches=1, chains_together="vmap", progress=False,
        ).to_dataset().load()  # fmt: skip
        truth = quadratic_llc(h, N_BETA, GAMMA, lr if method == "sgmcmc_sgld" else 0.0)
        hits, wide = {"ours": 0, "spread of chains": 0, "the same / sqrt(chains)": 0}, []
        for number in range(RUNS):
            result = devinterp.compute_llc(samples.isel(chain=slice(number * CHAINS, (number + 1) * CHAINS)))
            off, spread = abs(float(result.llc_mean) - truth), float(result.llc_std)
            reach = student.ppf(0.975, max(float(result.ess_bulk) - 1, 2)) * float(result.llc_sem)
            hits["ours"] += off < reach
            hits["spread of chains"] += off < 1.96 * spread
            hits["the same / sqrt(chains)"] += off < 1.96 * spread / CHAINS**0.5
            wide.append(reach / truth)
        shares = " | ".join(f"{count / RUNS:.1%}" for count in hits.values())
        lines.append(f"| {name} | {draws} | {truth:.4g} | {shares} | ± {sum(wide) / RUNS:.1%} |")
        print(lines[-1], flush=True)
    head = (
        f"`python benchmarks/coverage.py`, {datetime.date.today()}, {machine()}. How often a nominal 95 % interval holds the exact value: "
        f"{RUNS} runs of {CHAINS} chains (a share of 95 % is known to ± 2 %)."
    )
    titles = (
        "| target | draws | LLC | ours | spread of chains (2.0.1) | the same / sqrt(chains) | mean width of ours |\n"
        + "|---|"
        + "---|" * 6
    )
    record("Coverage of error bars", "\n".join([head, "", titles, *lines]))


if __name__ == "__main__":
    main()
