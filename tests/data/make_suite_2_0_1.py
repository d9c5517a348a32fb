"""How `suite_2_0_1` was made: two small runs by devinterp 2.0.1, and what it computes from them.

python3 -m venv peer && peer/bin/pip install torch==2.13.0 devinterp==2.0.1
peer/bin/python tests/data/make_suite_2_0_1.py tests/data/suite_2_0_1
"""

import sys
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset

from devinterp.slt.bif import compute_bif
from devinterp.slt.sampling import sample
from devinterp.slt.susceptibilities import compute_susceptibilities

SETTINGS = {"lr": 1e-3, "n_beta": 20.0, "localization": 5.0, "batch_size": 3, "num_draws": 12, "num_chains": 2,
            "num_init_loss_batches": 2, "device": "cpu"}  # fmt: skip


class TinyLM(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.mix, self.out = torch.nn.Embedding(11, 8), torch.nn.Linear(8, 8), torch.nn.Linear(8, 11)

    def forward(self, ids):
        return self.out(torch.tanh(self.mix(self.embed(ids))))


def tokens(count: int, seed: int) -> Dataset:
    ids = np.random.default_rng(seed).integers(0, 11, (count, 6))
    return Dataset.from_dict({"input_ids": ids.tolist()}).with_format("torch")


def main(folder: Path) -> None:
    observables = {"pile": (tokens(64, 0), 2), "b": (tokens(40, 9), 1), "a-b": (tokens(40, 9), 1)}
    runs = {
        name: sample(TinyLM(), tokens(64, 0), observables, param_masks=masks, output_path=str(folder / name), **SETTINGS)
        for name, masks in (("full", None), ("mix", {"mix.weight": None}))
    }
    computed = {}
    for method in ("token", "sequence"):
        for reduce in ("stack", "mean"):
            for covariance in (False, True):
                options = {
                    "correlation_method": method,
                    "reduce_chain_dimension_method": reduce,
                    "compute_covariance": covariance,
                }
                computed[f"{method} {reduce} {covariance}"] = compute_bif(runs["full"], device="cpu", **options).influences
    computed["average"] = compute_bif(runs["full"], average_tokenwise_bif=True, device="cpu").influences
    part = {"loss_keys": ["pile", "b"], "batch_index_range_1": [4, 0], "batch_index_range_2": [8, 1, 2]}
    computed["ranges"] = compute_bif(runs["full"], device="cpu", **part).influences
    computed["bif input_ids"] = compute_bif(runs["full"], device="cpu").input_ids
    tree = compute_susceptibilities(runs, "pile", include_sampling_task=True)
    for name in ("sus", "dataset_id", "batch", "target_position"):
        computed[name] = tree["susceptibilities"][name]
    for name in ("input_ids", "position"):
        computed[name] = tree["context"][name]
    np.savez_compressed(folder / "computed.npz", **{name: array.values for name, array in computed.items()})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
