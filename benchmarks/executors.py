"""Chains on the workers of an executor: throughput of two workers against one, and what handing a chain over costs.

python benchmarks/executors.py        (about 5 minutes on two idle cores; writes to benchmarks/RESULTS.md)
"""

import datetime
import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import dask
import numpy as np
import torch
from datasets import Dataset
from demo_checkpoint import machine, record
from distributed import Client, LocalCluster
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

import devinterp

STEPS = 20
KEEP_MEMORY = {"MALLOC_TRIM_THRESHOLD_": str(2**30), "MALLOC_MMAP_THRESHOLD_": str(2**25)}
"""as docs/clusters.md has it: otherwise Dask's workers give memory back at once, and get it anew at every operator"""
SETTINGS = {"lr": 1e-5, "n_beta": 30.0, "localization": 100.0, "batch_size": 8, "num_draws": STEPS, "num_init_loss_batches": 1,
            "progress": False, "sampling_method": "leimkuhler_matthews"}  # fmt: skip


def made() -> tuple[torch.nn.Module, Dataset]:
    config = GPTNeoXConfig(
        vocab_size=2048,
        hidden_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=768,
        max_position_embeddings=128,
    )
    tokens = np.random.default_rng(0).integers(0, 2048, (64, 128))
    return GPTNeoXForCausalLM(config), Dataset.from_dict({"input_ids": tokens.tolist()})


def seconds(**arguments: Any) -> float:
    model, data = arguments.pop("made")
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        devinterp.sample(model, data, {}, output_path=Path(folder) / "run", **SETTINGS | arguments)
        return time.perf_counter() - began


def marginal(counts: tuple[int, int], **arguments: Any) -> float:
    """Seconds that one more chain takes."""
    few, many = (seconds(num_chains=count, **arguments) for count in counts)
    return (many - few) / (counts[1] - counts[0])


def main() -> None:
    torch.set_num_threads(1)
    what = made()
    seconds(made=what, num_chains=1, chains_together="sequential")
    rounds = []
    for _ in range(3):
        found = {"here": marginal((2, 6), made=what, chains_together="sequential")}
        found["here, one step"] = marginal((4, 24), made=what, chains_together="sequential", num_draws=1)
        for workers in (1, 2):
            environment = dask.config.get("distributed.nanny.pre-spawn-environ") | KEEP_MEMORY
            with (
                dask.config.set({"distributed.nanny.pre-spawn-environ": environment}),
                LocalCluster(n_workers=workers, threads_per_worker=1, dashboard_address=None) as cluster,
                Client(cluster) as client,
            ):
                seconds(made=what, num_chains=workers, executor=client.get_executor())  # imports
                found[f"{workers} workers"] = marginal((2, 6), made=what, executor=client.get_executor())
                if workers == 1:
                    found["away, one step"] = marginal((4, 24), made=what, executor=client.get_executor(), num_draws=1)
        rounds.append(found)
        print(found, flush=True)
    middle = {name: sorted(found[name] for found in rounds)[1] for name in rounds[0]}
    here, one, two = middle["here"], middle["1 workers"], middle["2 workers"]
    ratios = [format(found["1 workers"] / found["2 workers"], ".2f") for found in rounds]
    handed = middle["away, one step"] - middle["here, one step"]
    text = (
        f"`python benchmarks/executors.py`, {datetime.date.today()}, {machine()}. GPT-NeoX of {sum(p.numel() for p in what[0].parameters()):,} "
        f"parameters, {STEPS} steps of 8 sequences of 128 tokens per chain, one thread each, Dask LocalCluster; medians of three rounds, "
        "seconds that one more chain takes (four more chains, in turn). What handing a chain over and storing it takes is that of chains of one "
        "step (twenty more), in a worker and here.\n\n"
        "| | seconds a chain | |\n|---|---|---|\n"
        f"| one after another, in this process | {here:.2f} | |\n"
        f"| one worker | {one:.2f} | handing over: {handed:.3f} s, {handed / here:.1%} of a chain |\n"
        f"| two workers | {two:.2f} | {one / two:.2f} times the throughput of one (rounds: {', '.join(ratios)}) |\n"
    )
    record("Executors", text)
    print(text)


if __name__ == "__main__":
    main()
