"""Peak memory of a full-model run, for 50 and for 1000 draws, against what it must hold.

python benchmarks/memory.py
"""

import datetime
import resource
import subprocess
import sys

SETTINGS = {"n_beta": 30.0, "localization": 1000.0, "lr": 5e-4, "batch_size": 1, "num_chains": 1, "num_init_loss_batches": 1,
            "progress": False}  # fmt: skip


def peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def one(hidden: int, draws: int, method: str) -> None:
    """In a process of its own: a GPT-NeoX of this width on random tokens; prints parameters, peak before and after."""
    import numpy as np
    import torch
    from datasets import Dataset
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    import devinterp

    torch.set_num_threads(2)
    config = GPTNeoXConfig(vocab_size=64, hidden_size=hidden, num_hidden_layers=2, num_attention_heads=4,
                           intermediate_size=4 * hidden, max_position_embeddings=8)  # fmt: skip
    model = GPTNeoXForCausalLM(config)
    ids = np.random.default_rng(0).integers(0, 64, (64, 8))
    data = Dataset.from_dict({"input_ids": ids.tolist()})
    sample = devinterp.sample  # imports, which are not counted
    before = peak_megabytes()
    samples = sample(model, data, {}, num_draws=draws, sampling_method=method, **SETTINGS)
    assert samples.chain_status.values.tolist() == [1]
    print(sum(p.numel() for p in model.parameters()), before, peak_megabytes())


def main() -> None:
    from demo_checkpoint import machine, record

    lines = [
        f"`python benchmarks/memory.py`, {datetime.date.today()}, {machine()}. GPT-NeoX of 2 layers on sequences of 8 tokens; growth of the "
        "process's peak during `sample()` (about 130 MB of it libraries that are loaded when first used), in units of the weights (float32). The model itself (one unit, also the anchor) is there before. "
        "Beside it the run needs the moving weights, the gradient and the sampler's state: 2 units for SGLD, 3 for Leimkuhler-Matthews.",
        "",
        "| sampler | parameters | draws | peak before (MB) | peak after (MB) | growth (units of the weights) |",
        "|---|---|---|---|---|---|",
    ]
    for method, hidden, draws in (
        ("sgmcmc_sgld", 2048, 5), ("leimkuhler_matthews", 2048, 5), ("sgmcmc_sgld", 256, 50), ("sgmcmc_sgld", 256, 1000),
    ):  # fmt: skip
        done = subprocess.run(
            [sys.executable, __file__, str(hidden), str(draws), method], capture_output=True, text=True, check=True
        )
        size, before, after = map(float, done.stdout.split())
        growth = (after - before) * 2**20 / (4 * size)
        lines.append(f"| {method} | {size / 1e6:.1f} M | {draws} | {before:.0f} | {after:.0f} | {growth:.2f} |")
    record("Peak memory", "\n".join(lines))


if __name__ == "__main__":
    if len(sys.argv) == 4:
        one(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
    else:
        main()
