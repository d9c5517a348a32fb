"""Runs made good and bad on purpose, and what `diagnose` says of each: a confusion table.

python benchmarks/verdicts.py [LABEL ...]       (after `make demo`; about 5 minutes; writes to benchmarks/RESULTS.md)

With labels only those runs are made, and nothing is written.
"""

import datetime
import os
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch
from datasets import Dataset
from demo_checkpoint import load, machine, record

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from cases import TinyLM, Weights, quadratic, rows

import devinterp

LM, SGLD = "leimkuhler_matthews", "sgmcmc_sgld"
BASE = {"n_beta": 10.0, "localization": 5.0, "num_chains": 4, "num_draws": 200, "num_burnin_steps": 100, "batch_size": 4,
        "num_init_loss_batches": 1, "sampling_method": LM, "progress": False}  # fmt: skip
OF_DEMO = BASE | {"n_beta": 30.0, "localization": 1000.0, "batch_size": 16, "num_draws": 60, "num_burnin_steps": 20}
Made = tuple[Any, Any, dict[str, Any]]
"""model, dataset, settings"""


def on_quadratic(dimension: int, h: float = 2.0, **settings: Any) -> Made:
    return Weights(torch.zeros(dimension)), rows(40), BASE | {"loss_fn": quadratic(h)} | settings


def on_loss(start: torch.Tensor, loss: Any, **settings: Any) -> Made:
    return Weights(start), rows(40), BASE | {"loss_fn": lambda model, ids: loss(model.w).expand(len(ids), 1)} | settings


def noisy(scale: float, **settings: Any) -> Made:
    """Batches whose loss tilts by another slope each."""
    slopes = scale * torch.randn(400, 30, generator=torch.Generator().manual_seed(0))
    slopes -= slopes.mean(0)
    loss_fn = lambda model, ids: (model.w.square().sum() + slopes[ids[:, 0]] @ model.w)[:, None]  # noqa: E731
    return Weights(torch.zeros(30)), rows(400), BASE | {"loss_fn": loss_fn} | settings


def double_well(w: torch.Tensor) -> torch.Tensor:
    return ((w[:1].square() - 1).square() + 0.25 * w[:1]).sum() + w[1:].square().sum()


def runs() -> Iterator[tuple[str, Made]]:
    """(label, run)"""
    model, data = load()
    # lr A = 1 along the stiffest direction where nothing else is said
    for dimension, localization in ((5, 5.0), (20, 1.0), (20, 20.0), (200, 5.0), (1000, 5.0)):
        yield "good", on_quadratic(dimension, lr="auto", localization=localization, num_draws=400)
        yield "good", on_quadratic(dimension, lr=0.01, localization=localization, num_draws=1000)
        yield "good", on_quadratic(dimension, lr=0.008, sampling_method=SGLD, localization=localization, num_draws=1000)
    yield "good", noisy(0.5, lr=0.01, num_draws=1000)
    yield "good", noisy(2.0, lr=0.005, num_draws=1000, num_steps_bw_draws=4, batch_size=32)
    yield (
        "good",
        on_loss(torch.zeros(20), lambda w: w.pow(4).sum(), lr="auto", n_beta=100.0, num_draws=400, num_burnin_steps=400),
    )
    for seed in range(4):
        yield "good", (model, data, OF_DEMO | {"lr": "auto", "init_seed": seed, "localization": (1000.0, 2000.0)[seed % 2]})
    for lr in (0.06, 0.08, 0.1, 0.12, 0.14):  # A = 25: lr A from 1.5 to 3.5
        yield "lr too large", on_quadratic(40, lr=lr, sampling_method=SGLD)
    for lr in (0.1, 0.12, 0.14):
        yield "lr too large", on_quadratic(40, lr=lr)
    for lr, localization in ((0.3, 5.0), (0.5, 5.0), (1.0, 1.0), (3.0, 0.1)):
        yield "diverged", on_loss(torch.ones(5), lambda w: w.pow(4).sum(), lr=lr, localization=localization)
    for lr, draws in ((0.01, 200), (0.003, 400), (0.05, 200), (0.01, 1000)):
        flat = lambda w: (w[0] * w[1]).square() + 0.01 * w[2:].square().sum()  # noqa: E731
        yield (
            "no localization",
            on_loss(torch.full((40,), 0.0), flat, lr=lr, localization=0.0, num_draws=draws, num_burnin_steps=0),
        )
    for seed in range(4):
        yield (
            "no localization",
            (model, data, OF_DEMO | {"lr": 5e-4, "localization": 0.0, "num_burnin_steps": 0, "init_seed": seed}),
        )
    for draws in (5, 10, 15, 30):
        yield "too short", on_quadratic(20, lr=0.01, num_draws=draws, num_burnin_steps=0)
        yield "too short", on_quadratic(3, lr=0.002, num_draws=2 * draws, num_burnin_steps=0)
    for lr in (1e-12, 1e-9, 1e-7, 1e-6):
        yield "does not move", on_quadratic(20, lr=lr, num_burnin_steps=0)
        yield "does not move", (model, data, OF_DEMO | {"lr": lr / 1000, "num_draws": 30})
    for power, lr in ((4, 0.01), (4, 0.02), (6, 0.02), (6, 0.05)):  # a box keeps chains that jump from diverging
        settings = {"lr": lr, "n_beta": 1000.0, "localization": 0.5, "num_draws": 1000, "bounding_box_size": 0.6}
        yield "spikes", on_loss(torch.zeros(3), lambda w, p=power: w.pow(p).sum(), **settings)
    counting = Dataset.from_dict({"input_ids": ((np.arange(64)[:, None] + np.arange(6)) % 11).tolist()})
    for seed in range(3):
        steep = lambda w: 0.5 * w.square().sum() + 3.0 * w.sum()  # noqa: E731
        yield "not at a minimum", on_loss(torch.full((20,), float(seed)), steep, lr=0.01)
        # an untrained model on sequences that it can learn
        settings = {"lr": 0.002, "n_beta": 200.0, "localization": 1.0}
        yield "not at a minimum", (TinyLM(seed=seed), counting, BASE | settings)
    lower = torch.tensor([-1.03] + [0.0] * 11)  # of two wells
    for seed in (1, 2, 4, 5, 6, 8):  # at least one of the eight chains begins in the other
        settings = {"lr": 0.001, "n_beta": 60.0, "localization": 0.1, "init_noise": 1.0, "init_seed": seed, "num_draws": 300,
                    "num_chains": 8, "num_burnin_steps": 300}  # fmt: skip
        yield "other basins", on_loss(lower, double_well, **settings)


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    seen: list[tuple[str, str]] = []
    for number, (label, (model, data, settings)) in enumerate(runs()):
        if sys.argv[1:] and label not in sys.argv[1:]:
            continue
        found = devinterp.diagnose(devinterp.sample(model, data, {}, **settings))
        verdicts = Counter(found.verdict.values.tolist())
        sick = [verdict for verdict in verdicts if verdict != "healthy"]
        said = max(sick, key=verdicts.__getitem__) if sick else "healthy"
        seen.append((label, said))
        print(number, label, dict(verdicts), f"{float(found.llc_mean):.4g} ± {float(found.mcse):.2g}", flush=True)
    if sys.argv[1:]:
        return
    counts, labels = Counter(seen), [label for label, _ in seen]
    missed = [f"run {i} ({label}): {said}" for i, (label, said) in enumerate(seen) if (said == "healthy") != (label == "good")]
    said = sorted({verdict for _, verdict in seen})
    lines = ["| made | runs | " + " | ".join(said) + " |", "|---|" + "---|" * (len(said) + 1)]
    lines += [
        f"| {label} | {labels.count(label)} | " + " | ".join(str(counts[label, verdict] or "") for verdict in said) + " |"
        for label in dict.fromkeys(labels)
    ]
    head = (
        f"`python benchmarks/verdicts.py`, {datetime.date.today()}, {machine()}. {len(labels)} runs of 4 or 8 chains, made good or bad on purpose; "
        "of each run the commonest verdict that is not healthy."
    )
    tail = "Wrong: " + ("; ".join(missed) if missed else "none") + "."
    record("Verdicts of diagnose", "\n".join([head, "", *lines, "", tail]))


if __name__ == "__main__":
    main()
