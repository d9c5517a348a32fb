"""`calibrate` on language models: healthy on the first try, how long it takes, and whether smaller steps give the same LLC.

python benchmarks/calibrating.py [--report] [--most N]       (after `make demo`; about 30 minutes on two idle cores)

The demo's checkpoints, and small models of other architectures trained for a moment on the demo's text. Each is calibrated with
nothing given but n_beta and batch size, sampled with what was found, then by other chains (other seeds), and with a quarter of
the step size and eight times the steps. Each row is kept in build/calibrating.jsonl, so a run that was cut off goes on. With
--most, N models are measured and nothing is written to RESULTS.md; with --report what is kept is.
"""

import argparse
import datetime
import json
import math
import time
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from demo_checkpoint import DEMO, ROOT, load, machine, record
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config

import devinterp

CACHE = ROOT / "build" / "calibrating.jsonl"
GIVEN = {"n_beta": 30.0, "batch_size": 16, "chains_together": "sequential"}
OTHER_SEEDS = (1, 2, 3, 4)
FINER_SEED = 5
TRAINING_STEPS = 400
SMALL = {"vocab_size": 1024, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 192,
         "max_position_embeddings": 64}  # fmt: skip
OTHERS: dict[str, Callable[[], Any]] = {
    "GPT-2": lambda: GPT2Config(vocab_size=1024, n_embd=64, n_layer=2, n_head=4, n_positions=64),
    "Llama": lambda: LlamaConfig(**SMALL, num_key_value_heads=2),
    "Qwen2": lambda: Qwen2Config(**SMALL, num_key_value_heads=2),
}


def trained(config: Any, data: Any) -> nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    ids = torch.as_tensor(data[:]["input_ids"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(TRAINING_STEPS):
        batch = ids[torch.randint(len(ids), (16,))]
        loss = model(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 99:
            print(f"  step {step + 1}: loss {loss.item():.2f}", flush=True)
    return model


def seen(model: nn.Module, data: Any, settings: dict[str, Any]) -> dict[str, Any]:
    started = time.time()
    diagnosis = devinterp.diagnose(devinterp.sample(model, data, {}, progress=False, **settings))
    return {
        "llc": float(diagnosis.llc_mean), "sem": float(diagnosis.mcse), "seconds": time.time() - started,
        "verdict": ", ".join(sorted(set(diagnosis.verdict.values.tolist()))),
    }  # fmt: skip


def measure(name: str, model: nn.Module, data: Any) -> dict[str, Any]:
    started = time.time()
    try:
        found = devinterp.calibrate(model, data, progress=False, **GIVEN)
    except devinterp.errors.DevinterpError as error:
        return {"model": name, "error": str(error), "calibrate": time.time() - started}
    calibrated = time.time() - started
    settings, taken = found.settings, found.table.sel(localization=found.settings["localization"])
    row: dict[str, Any] = {"model": name, "loss": float(taken.loss[0]), "calibrate": calibrated}
    row |= {key: settings[key] for key in ("localization", "lr", "num_burnin_steps", "num_draws", "num_steps_bw_draws")}
    row["as found"] = seen(model, data, settings)
    row["others"] = [seen(model, data, settings | {"init_seed": seed}) for seed in OTHER_SEEDS]
    row["finer"] = seen(model, data, settings | {
        "lr": settings["lr"] / 4,
        "num_burnin_steps": 8 * settings["num_burnin_steps"],
        "num_steps_bw_draws": 8 * settings["num_steps_bw_draws"],
        "init_seed": FINER_SEED,
    })  # fmt: skip
    return row


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--report", action="store_true", help="measure nothing; report what is kept")
    arguments.add_argument("--most", type=int, metavar="N", help="measure this many models; write no report")
    chosen = arguments.parse_args()
    warnings.simplefilter("ignore")
    CACHE.parent.mkdir(exist_ok=True)
    CACHE.touch()
    kept = map(json.loads, CACHE.read_text().splitlines())
    rows = {row["model"]: row for row in kept if "error" in row or "others" in row}
    models: dict[str, Callable[[], nn.Module]] = {
        f"demo, {path.name}": lambda path=path: AutoModelForCausalLM.from_pretrained(path)
        for path in sorted((DEMO / "checkpoints").iterdir())
    }
    models |= {f"{name}, {TRAINING_STEPS} steps": lambda make=make: trained(make(), data) for name, make in OTHERS.items()}
    left = [] if chosen.report else [name for name in reversed(models) if name not in rows]
    data = load()[1] if left else None
    for name in left[: chosen.most]:
        rows[name] = measure(name, models[name](), data)
        print(rows[name], flush=True)
        with CACHE.open("a") as file:
            file.write(json.dumps(rows[name]) + "\n")
    if chosen.most is not None:
        return
    lines = [
        f"`python benchmarks/calibrating.py`, {datetime.date.today()}, {machine()}. n_beta {GIVEN['n_beta']:g}, batches of "
        f"{GIVEN['batch_size']}; nothing else given. The first run is what a user gets who takes the settings as they are; the others are of "
        "other chains. Finer steps are a quarter of the step size and eight times the steps; the difference is in standard errors of "
        "both. Seconds on a machine that others used too.", "",
        "| model | loss | localization | lr | burn-in + draws x steps | LLC | verdict | of the others | finer steps | difference | seconds of calibrate, of the run |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name in (name for name in models if name in rows):
        row = rows[name]
        if "error" in row:
            what = row["error"].replace("\n", " ")
            lines.append(f"| {name} | | | | | refused: {what} | | | | | {row['calibrate']:.0f} |")
            continue
        found, finer = row["as found"], row["finer"]
        counts = Counter(run["verdict"] for run in row["others"])
        others = ", ".join(f"{verdict} {count} of {len(OTHER_SEEDS)}" for verdict, count in counts.items())
        off = (found["llc"] - finer["llc"]) / math.hypot(found["sem"], finer["sem"])
        lines.append(
            f"| {name} | {row['loss']:.2f} | {row['localization']:g} | {row['lr']:.2g} | "
            f"{row['num_burnin_steps']} + {row['num_draws']} x {row['num_steps_bw_draws']} | {found['llc']:.3g} ± {found['sem']:.2g} | "
            f"{found['verdict']} | {others} | {finer['llc']:.3g} ± {finer['sem']:.2g} | {off:+.1f} ({found['llc'] / finer['llc'] - 1:+.1%}) | "
            f"{row['calibrate']:.0f}, {found['seconds']:.0f} |"
        )
    record("Calibrated settings", "\n".join(lines))


if __name__ == "__main__":
    main()
