"""How often nominal 95 % intervals hold the exact value, of the LLC and of a susceptibility, over 400 independent runs.

python benchmarks/coverage.py        (about 8 minutes on one idle core)

Targets are quadratics, whose values are known at the very step size. Chains share no batches there, so 1600 chains of one call
are 400 runs of 4. Beside ours (Student's t on the effective sample size for the LLC, 1.96 `sus_sem` for susceptibilities) stand
what devinterp 2.0.1 offers, the standard deviation over chains, and that divided by the square root of their number.
"""

import datetime
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch
import xarray as xr
from demo_checkpoint import machine, record
from scipy.stats import t as student

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from cases import Weights, curved, rows
from targets import quadratic_covariance, quadratic_llc

import devinterp

RUNS, CHAINS, QUANTILE = 400, 4, 1.96
N_BETA, GAMMA = 10.0, 5.0
LM, SGLD = "leimkuhler_matthews", "sgmcmc_sgld"
SETTINGS = {"n_beta": N_BETA, "localization": GAMMA, "num_chains": RUNS * CHAINS, "num_init_loss_batches": 1,
            "chains_together": "vmap", "progress": False}  # fmt: skip
EQUAL, SPREAD = [2.0] * 20, torch.logspace(-1, 1, 40).tolist()
LLCS = {  # curvatures, settings; burn-in leaves 1e-4 of the transient
    "LLC, 20 equal directions, lr A = 1": (EQUAL, {"lr": 0.04, "num_draws": 200, "num_burnin_steps": 20}),
    "the same, 50 draws": (EQUAL, {"lr": 0.04, "num_draws": 50, "num_burnin_steps": 20}),
    "the same, lr A = 0.1: slow": (EQUAL, {"lr": 0.004, "num_draws": 200, "num_burnin_steps": 100}),
    "one direction": ([2.0], {"lr": 0.04, "num_draws": 200, "num_burnin_steps": 20}),
    "40 directions over a factor of 100, 3 steps a draw": (
        SPREAD,
        {"lr": 0.009, "num_draws": 200, "num_steps_bw_draws": 3, "num_burnin_steps": 180},
    ),
    "20 equal directions by SGLD, at its own biased value": (
        EQUAL,
        {"lr": 0.02, "num_draws": 200, "num_burnin_steps": 40, "sampling_method": SGLD},
    ),
}
TOKENS, SIZE = 4, 12
"""of the model whose susceptibilities are asked for; half of its weights are the component"""
Row = tuple[str, int, float, list[float], float]
"""target, draws, exact value, shares of the runs whose intervals hold it, mean half-width of ours"""


def of_llcs() -> Iterator[Row]:
    for name, (h, own) in LLCS.items():
        settings = {"sampling_method": LM} | SETTINGS | own
        loss_fn = curved(torch.tensor(h))
        samples = devinterp.sample(Weights(torch.zeros(len(h))), rows(4), {}, loss_fn=loss_fn, batch_size=1, **settings)
        lr = settings["lr"] if settings["sampling_method"] == SGLD else 0.0
        truth = quadratic_llc(h, N_BETA, GAMMA, lr)
        results = [devinterp.compute_llc(run) for run in runs_of(samples.to_dataset().load())]
        values, spreads, reaches = (
            np.array(each)
            for each in zip(
                *((float(r.llc_mean), float(r.llc_std), student.ppf(0.975, float(r.ess_bulk) - 1) * float(r.llc_sem))
                  for r in results), strict=True,
            )
        )  # fmt: skip
        yield name, settings["num_draws"], truth, shares(values - truth, reaches, spreads), float(reaches.mean() / truth)


def of_susceptibilities() -> Iterator[Row]:
    """Losses l_j = w'A_j w/2 + b_j'w of four tokens, L their mean (without a slope), the component six of twelve weights."""
    rng = np.random.default_rng(0)
    half = rng.standard_normal((TOKENS, SIZE, SIZE))
    A, b = half @ half.swapaxes(1, 2) / SIZE, rng.standard_normal((TOKENS, SIZE)) / 8
    A[0] *= 3  # the token that the component serves most
    b -= b.mean(0)
    A_, b_ = torch.tensor(A, dtype=torch.float32), torch.tensor(b, dtype=torch.float32)

    def loss_fn(model: Any, ids: torch.Tensor) -> torch.Tensor:
        squares = torch.einsum("i,jik,k->j", model.w, A_[ids[:, 0]], model.w)
        return (0.5 * squares + b_[ids[:, 0]] @ model.w)[:, None]

    masks = {"full": None, "half": {"w": torch.arange(SIZE) < SIZE // 2}}
    draws, seen = 200, {"task": (rows(TOKENS), 1), "tokens": (rows(TOKENS), 1)}
    settings = (
        SETTINGS
        | {"lr": 0.03, "batch_size": TOKENS}
        | {"num_draws": draws, "num_steps_bw_draws": 2, "num_burnin_steps": 60, "sampling_method": LM}
    )
    samples = {
        name: devinterp.sample(Weights(torch.zeros(SIZE)), rows(TOKENS), seen, param_masks=mask, loss_fn=loss_fn, **settings)
        .to_dataset()
        .load()
        for name, mask in masks.items()
    }
    order = samples["half"].input_ids_tokens[:, 0].values
    exact = {name: exact_values(A, b, slice(0, SIZE // 2))[name][order] for name in ("one_chain", "two_chain")}
    for estimator, truth in exact.items():
        values, reaches, spreads = [], [], []
        for full, half_model in zip(*map(runs_of, samples.values()), strict=True):
            tree = devinterp.compute_susceptibilities({"full": full, "half": half_model}, "task", estimator=estimator)
            sus = tree["susceptibilities"].to_dataset().sel(wr="half")
            values.append(sus.sus.values)
            reaches.append(QUANTILE * sus.sus_sem.values)
            spreads.append(np.std([per_chain(full, half_model, chain, estimator) for chain in range(CHAINS)], axis=0))
        every = [np.array(each) for each in (values, reaches, spreads)]
        largest = int(np.abs(truth).argmax())
        off, reach, spread = every[0] - truth, every[1], every[2]
        yield (
            f"susceptibility, {estimator}, {TOKENS} tokens", draws, float(truth[largest]), shares(off, reach, spread),
            float(reach[:, largest].mean() / abs(truth[largest])),
        )  # fmt: skip


def exact_values(A: np.ndarray, b: np.ndarray, moved: slice) -> dict[str, np.ndarray]:
    """Of every token: Cov_C(L, L - l), and E_C[L (L - l)] - E_C[L] E_full[L - l]."""
    H, S_full = A.mean(0), np.linalg.inv(N_BETA * A.mean(0) + GAMMA * np.eye(SIZE))
    H_C = H[moved, moved]
    S = np.linalg.inv(N_BETA * H_C + GAMMA * np.eye(len(H_C)))
    mean = 0.5 * np.trace(H_C @ S)
    one, two = [], []
    for each, slope in zip(A, b, strict=True):
        difference = H_C - each[moved, moved]
        one.append(quadratic_covariance(H_C, np.zeros(len(H_C)), difference, -slope[moved], S))
        two.append(one[-1] + mean * 0.5 * (np.trace(difference @ S) - np.trace((H - each) @ S_full)))
    return {"one_chain": np.array(one), "two_chain": np.array(two)}


def per_chain(full: xr.Dataset, half: xr.Dataset, chain: int, estimator: str) -> np.ndarray:
    """The value of one chain alone, by hand."""

    def excess(ds: xr.Dataset) -> tuple[np.ndarray, np.ndarray]:
        one = ds.isel(chain=chain)
        L = one.loss_task.values[..., 0].mean(1, dtype=np.float64)
        return L, L[:, None] - one.loss_tokens.values[..., 0]

    g, d = excess(half)
    centre = d.mean(0) if estimator == "one_chain" else excess(full)[1].mean(0)
    return (g[:, None] * d).mean(0) - g.mean() * centre


def runs_of(samples: xr.Dataset) -> Iterator[xr.Dataset]:
    for number in range(RUNS):
        yield samples.isel(chain=slice(number * CHAINS, (number + 1) * CHAINS))


def shares(off: np.ndarray, reach: np.ndarray, spread: np.ndarray) -> list[float]:
    """Of the runs (and tokens): by our interval, by the spread of chains, and by that over the root of their number."""
    return [float((np.abs(off) < each).mean()) for each in (reach, QUANTILE * spread, QUANTILE * spread / CHAINS**0.5)]


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    lines = []
    for make in (of_llcs, of_susceptibilities):
        for name, draws, truth, found, width in make():
            lines.append(f"| {name} | {draws} | {truth:.4g} | {' | '.join(f'{s:.1%}' for s in found)} | ± {width:.1%} |")
            print(lines[-1], flush=True)
    head = (
        f"`python benchmarks/coverage.py`, {datetime.date.today()}, {machine()}. How often a nominal 95 % interval holds the exact "
        f"value: {RUNS} runs of {CHAINS} chains (a share of 95 % is known to ± 2 %). Of susceptibilities the share is over all "
        "tokens, the value that of the token with the largest."
    )
    titles = "| target | draws | value | ours | spread of chains (2.0.1) | the same / sqrt(chains) | half-width of ours |"
    record("Coverage of error bars", "\n".join([head, "", titles, "|---|" + "---|" * 6, *lines]))


if __name__ == "__main__":
    main()
