"""What durable runs cost: a commit, and the fingerprint of a model.

python benchmarks/durability.py
"""

import datetime
import os
import tempfile
import time
from pathlib import Path
from statistics import median

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from demo_checkpoint import machine, record
from workloads import SETTINGS, WORKLOADS, build_model, build_tokens, dataset_of

import devinterp
from devinterp.engine.checkpoint import Checkpoint
from devinterp.store.commits import Commits

EVERY = 300.0
"""seconds, the default of checkpoint_every"""


def commits(name: str, method: str, seconds: float, draws: int) -> str:
    """Commits of a run that makes one every few seconds, and what they would take at the default."""
    workload = WORKLOADS[name]
    tokens, others = build_tokens(workload)
    observables = {key: (dataset_of(rows), workload.observables[key]) for key, rows in others.items()}
    took: list[float] = []
    original = Commits.commit

    def timed(self: Commits) -> None:
        began = time.perf_counter()
        original(self)
        took.append(time.perf_counter() - began)

    Commits.commit = timed  # type: ignore[method-assign]
    model = build_model(workload)
    with tempfile.TemporaryDirectory() as folder:
        devinterp.sample(
            model, dataset_of(tokens), observables, num_chains=1, num_draws=draws, output_path=Path(folder) / "run",
            chains_together="sequential", checkpoint_every=seconds, sampling_method=method, progress=False, **SETTINGS,
        )  # fmt: skip
    Commits.commit = original  # type: ignore[method-assign]
    size = sum(p.numel() for p in model.parameters())
    return (
        f"| {name}, {method} | {size / 1e6:.2f} M | {len(took)} | {1e3 * median(took):.0f} | {1e3 * max(took):.0f} | "
        f"{100 * median(took) / EVERY:.3f} % |"
    )


def fingerprint(megabytes: int) -> str:
    model = torch.nn.Linear(1024, megabytes * 256, bias=False)
    checkpoint = Checkpoint(model, None, torch.device("cpu"))
    rates = []
    for _ in range(3):
        began = time.perf_counter()
        checkpoint.digest()
        rates.append(megabytes / 1024 / (time.perf_counter() - began))
    return f"Fingerprint of {megabytes} MB of weights on one core: {median(rates):.1f} GB/s."


def main() -> None:
    lines = [
        f"`python benchmarks/durability.py`, {datetime.date.today()}, {machine()}. Commits of one chain: chunks, state and record, "
        f"each synced; their share of the time at the default of one every {EVERY:.0f} s.",
        "",
        "| run | parameters | commits | median (ms) | longest (ms) | share |",
        "|---|---|---|---|---|---|",
        commits("tiny", "leimkuhler_matthews", 1.0, 400),
        commits("pythia14m", "sgmcmc_sgld", 4.0, 16),
        commits("pythia14m", "leimkuhler_matthews", 4.0, 16),
        "",
        fingerprint(1024),
    ]
    record("Durability", "\n".join(lines))


if __name__ == "__main__":
    main()
