"""The workloads of the speed benchmark, and one measurement: a process, in either library's interpreter, whose calls are timed.

python benchmarks/workloads.py NAME SIDE [--device cuda] [--quick] [--calls 1] [--store FOLDER]     (prints a JSON line a call)

SIDE is `ours` or `peer`, which differ in the interpreter alone, `naive` (naive.py), or `store`, which makes the store of a bif workload.
"""

import argparse
import gc
import json
import math
import os
import resource
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

BATCH = 8
SETTINGS = {"lr": 1e-4, "n_beta": 30.0, "localization": 100.0, "num_init_loss_batches": 4, "batch_size": BATCH}
ROWS = 64 * BATCH
SIDES = ("ours", "peer", "naive")
QUICK = 5
"""--quick divides the draws by this"""


@dataclass(frozen=True)
class Workload:
    kind: str
    """sample, suite, bif"""
    vocabulary: int
    tokens: int
    chains: int
    draws: int
    observables: dict[str, int]
    """number of batches of each"""
    layers: int = 3
    """of a GPT-NeoX; 0 = the MLP"""
    hidden: int = 64
    heads: int = 4
    restrictions: tuple[str, ...] = ()

    @property
    def sides(self) -> tuple[str, ...]:
        return SIDES[:2] if self.kind == "bif" else SIDES


def _heads(layer: int) -> Workload:
    return Workload("sample", 2048, 129, 4, 25, {"held": 2}, layers=6, hidden=128, restrictions=(f"l{layer}h1",))


def _bif(sequences: int) -> Workload:
    return Workload("bif", 97, 65, 4, 100, {"held": sequences // BATCH}, layers=1, hidden=16)


WORKLOADS = {
    "tiny": Workload("sample", 97, 65, 4, 200, {"held": 4}),
    "pythia14m": Workload("sample", 50304, 129, 2, 16, {"held": 2}, layers=6, hidden=128),
    **{f"heads l{layer}h1": _heads(layer) for layer in (0, 3, 5)},
    "suite": Workload(
        "suite", 2048, 64, 2, 25, {"task": 2, "held": 2}, layers=4,
        restrictions=("full", *(f"l{layer}h{head}" for layer in range(4) for head in range(4))),
    ),
    "bif64": _bif(64),
    "bif256": _bif(256),
    "mlp32": Workload("sample", 32, 33, 32, 200, {"held": 1}, layers=0),
}  # fmt: skip


class PerToken(nn.Module):
    """Logits of the next token from this one alone."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 16)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 32))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.mlp(self.embed(ids))


def quicker(workload: Workload) -> Workload:
    """Of a suite with fewer heads too."""
    fewer = workload.restrictions[:4] if workload.kind == "suite" else workload.restrictions
    return replace(workload, draws=math.ceil(workload.draws / QUICK), restrictions=fewer)


def build_model(workload: Workload) -> nn.Module:
    torch.manual_seed(0)
    if not workload.layers:
        return PerToken().eval()
    config = GPTNeoXConfig(
        vocab_size=workload.vocabulary, hidden_size=workload.hidden, num_hidden_layers=workload.layers,
        num_attention_heads=workload.heads, intermediate_size=4 * workload.hidden, max_position_embeddings=workload.tokens,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPTNeoXForCausalLM(config).eval()


def build_tokens(workload: Workload) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Of the sampling data, and of the observables: just as many sequences as they use."""
    rng = np.random.default_rng(0)

    def draw(rows: int) -> np.ndarray:
        return rng.integers(0, workload.vocabulary, (rows, workload.tokens))

    return draw(ROWS), {name: draw(batches * BATCH) for name, batches in workload.observables.items()}


def dataset_of(tokens: np.ndarray) -> Dataset:
    return Dataset.from_dict({"input_ids": tokens.tolist()}).with_format("torch")


# -- the calls that are timed: call(seed, path of a new store) --

Call = Callable[[int, str], None]


def of_library(workload: Workload, side: str, device: str) -> Call:
    """Ours and the peer's; the masks of one restriction are made before, as they are the same for every checkpoint."""
    from devinterp.slt.sampling import sample
    from devinterp.slt.susceptibilities import susceptibilities
    from devinterp.slt.weight_restrictions import create_param_masks

    model, (tokens, others) = build_model(workload).to(device), build_tokens(workload)
    data = dataset_of(tokens)
    observables = {name: (dataset_of(rows), workload.observables[name]) for name, rows in others.items()}
    settings = SETTINGS | {"num_chains": workload.chains, "num_draws": workload.draws, "device": device}
    settings |= {"progress": False} if side != "peer" else {}
    masks = None if not workload.restrictions else create_param_masks(model, workload.restrictions[0])

    def one(seed: int, path: str) -> None:
        samples = sample(model, data, observables, param_masks=masks, init_seed=seed, output_path=path, **settings)
        check(samples.dataset)

    def suite(seed: int, path: str) -> None:
        wanted = {name: name if side != "peer" else create_param_masks(model, name) for name in workload.restrictions}
        result = susceptibilities(
            model, data, observables, wanted, sampling_task="task", init_seed=seed, output_path=path, **settings
        )
        assert np.isfinite(result["susceptibilities"].sus.values).all()

    return suite if workload.kind == "suite" else one


def check(dataset) -> None:
    """Every chain has arrived, with finite losses; small beside the sampling."""
    losses = dataset["loss_held"].values
    assert np.isfinite(losses).all(), "a chain has diverged"
    assert losses.min() > 0, "a chain is missing"


def of_naive(workload: Workload, side: str, device: str) -> Call:
    import naive

    model, (tokens, others) = build_model(workload).to(device), build_tokens(workload)
    data = torch.as_tensor(tokens)
    observables = {name: torch.as_tensor(rows) for name, rows in others.items()}
    settings = SETTINGS | {"num_chains": workload.chains, "num_draws": workload.draws}

    def call(seed: int, path: str) -> None:
        for name in workload.restrictions or ("full",):
            masks = None if name == "full" else naive.head_masks(model, name, workload.heads)
            naive.sample(model, data, observables, f"{path}_{name}.npz", masks=masks, seed=seed, **settings)

    return call


def of_bif(store: str, device: str) -> Call:
    import xarray as xr

    from devinterp.slt.bif import compute_bif

    def call(seed: int, path: str) -> None:
        samples = xr.open_datatree(store, engine="zarr", consolidated=False)
        compute_bif(samples, device=device).influences.values  # noqa: B018  (it may be lazy)

    return call


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("name", choices=WORKLOADS)
    arguments.add_argument("side", choices=(*SIDES, "store"))
    arguments.add_argument("--device", default="cpu")
    arguments.add_argument("--quick", action="store_true")
    arguments.add_argument("--calls", type=int, default=2)
    arguments.add_argument("--store", default="")
    chosen = arguments.parse_args()
    warnings.simplefilter("ignore")
    workload = WORKLOADS[chosen.name]
    workload = quicker(workload) if chosen.quick else workload
    if chosen.side == "store":
        of_library(workload, "ours", "cpu")(0, chosen.store)
        return
    if workload.kind == "bif":
        stop_at_all_memory()
        call = of_bif(chosen.store, chosen.device)
    else:
        call = (of_naive if chosen.side == "naive" else of_library)(workload, chosen.side, chosen.device)
    gc.collect()
    before = megabytes()
    with tempfile.TemporaryDirectory() as folder:
        for number in range(chosen.calls):
            started = time.perf_counter()
            call(number + 1, f"{folder}/{number}")
            print(json.dumps({"seconds": time.perf_counter() - started, "before": before}), flush=True)
            gc.collect()


def stop_at_all_memory() -> None:
    """A MemoryError in this process instead of the end of another one."""
    if "SC_PHYS_PAGES" in os.sysconf_names:
        limit = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def megabytes() -> float:
    """Of this process, shared pages divided among those that share them; 0 where that is not known."""
    path = Path("/proc/self/smaps_rollup")
    lines = path.read_text().splitlines() if path.exists() else []
    return sum(int(line.split()[1]) / 1024 for line in lines if line.startswith("Pss:"))


if __name__ == "__main__":
    main()
