"""Time, memory and bytes of runs that are too large for this machine, by formulas that are checked on it.

python benchmarks/scaling.py                  the tables of docs/scaling.md
python benchmarks/scaling.py --measure        the formulas against measurements on one core, about five minutes
python benchmarks/scaling.py --plot FILE      the picture
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from failures import Failing, best_commit_every, expected_worker_seconds, first_order_overhead, simulate


@dataclass(frozen=True)
class Model:
    """A GPT-NeoX; biases and norms are counted in `parameters` only."""

    name: str
    layers: int
    hidden: int
    vocabulary: int = 50304

    @property
    def parameters(self) -> int:
        d = self.hidden
        return 2 * self.vocabulary * d + self.layers * (12 * d**2 + 13 * d) + 2 * d

    def forward(self, tokens: int) -> float:
        """Operations per token: 2 per weight of a matrix product, 4 d T per layer for attention (all pairs)."""
        products = self.vocabulary * self.hidden + 12 * self.layers * self.hidden**2
        return 2.0 * products + 4.0 * self.layers * self.hidden * tokens


PYTHIA = (
    Model("14M", 6, 128), Model("70M", 6, 512), Model("160M", 12, 768), Model("410M", 24, 1024), Model("1B", 16, 2048, 50304),
    Model("1.4B", 24, 2048), Model("2.8B", 32, 2560, 50304), Model("6.9B", 32, 4096, 50432),
)  # fmt: skip
VECTORS = 3
"""of a chain, in float32 and of the moving weights: the weights, their gradient, the last noise of Leimkuhler-Matthews"""


@dataclass(frozen=True)
class Machine:
    name: str
    peak: float
    """operations per second, dense bfloat16"""
    memory: float
    bandwidth: float
    fraction: float = 0.35
    """of the peak that large matrix products of a whole pass reach"""
    launch: float = 5e-6
    """seconds per operator that are the least, however small it is"""
    state_bandwidth: float = 1e9
    """bytes per second of the disk or network that states are committed to"""


A100 = Machine("A100", 312e12, 80e9, 2.0e12)
H100 = Machine("H100", 989e12, 80e9, 3.35e12)
LAUNCHES = 40
"""operators per layer in a forward pass; a gradient has three times as many"""
UPDATE_BYTES = 40
"""moved per weight by a step of the sampler: ten passes over vectors"""
ACTIVATIONS = 24
"""numbers per token, layer and hidden unit that a gradient keeps"""
LOGIT_PASSES = 3
"""times that float32 logits go through memory in a forward pass"""
CHUNK_OF_LOGITS = 2 * 4 * 2**27
"""bytes of the logits that exist at once"""


@dataclass(frozen=True)
class Run:
    chains: int = 4
    draws: int = 200
    steps_per_draw: int = 5
    burn_in: int = 200
    batch: int = 32
    tokens: int = 1024
    observed: int = 3 * 32
    """sequences of all observables, at every draw"""

    @property
    def steps(self) -> int:
        return self.burn_in + self.draws * self.steps_per_draw


def seconds(model: Model, run: Run, machine: Machine, moving: float = 1.0) -> dict[str, float]:
    """Of one step, one draw and one chain, and of the baseline that the chains of a run share."""
    sequences = run.observed
    step = _gradient(model, run.batch, run.tokens, machine)
    step += UPDATE_BYTES * moving * model.parameters / machine.bandwidth
    draw = _losses(model, run.batch, run.tokens, machine) * sequences / run.batch
    baseline = run.draws * _losses(model, run.batch, run.tokens, machine)
    return {"step": step, "draw": draw, "chain": run.steps * step + run.draws * draw, "baseline": baseline}


def _losses(model: Model, sequences: int, tokens: int, machine: Machine) -> float:
    """Seconds of a forward pass: products, then what goes through memory; or the operators' launches, if they are longer."""
    products = model.forward(tokens) / (machine.fraction * machine.peak)
    through = LOGIT_PASSES * 4 * model.vocabulary + 2 * 2 * ACTIVATIONS * model.layers * model.hidden
    return max(sequences * tokens * (products + through / machine.bandwidth), LAUNCHES * model.layers * machine.launch)


def _gradient(model: Model, sequences: int, tokens: int, machine: Machine) -> float:
    """Twice as much again for the backward pass."""
    return 3 * _losses(model, sequences, tokens, machine)


def bytes_needed(model: Model, run: Run, moving: float = 1.0, weight: int = 2, activation: int = 2) -> dict[str, float]:
    """On a GPU for one chain; of the state of one chain; of the store."""
    from devinterp.store.schema import variables
    from devinterp.store.writer import stored_bytes

    vectors = 4 * VECTORS * moving * model.parameters
    kept = activation * ACTIVATIONS * run.batch * run.tokens * model.layers * model.hidden
    sizes = {"chain": run.chains, "draw": run.draws, "step": run.steps, "batch": run.batch, "token": run.tokens,
             "token_pos": run.tokens - 1, "batch_observed": run.observed}  # fmt: skip
    store = stored_bytes(variables(["observed"], (), True), sizes)
    return {
        "chain": weight * model.parameters + vectors + kept + CHUNK_OF_LOGITS,
        "state": 8 * moving * model.parameters,
        "store": float(store),
    }


def hours(model: Model, run: Run, machine: Machine, gpus: int) -> float:
    """Of a run whose chains are dealt out over GPUs."""
    taken = seconds(model, run, machine)
    rounds = math.ceil(run.chains / gpus)
    return (taken["baseline"] + rounds * taken["chain"]) / 3600


def fits(model: Model, run: Run, machine: Machine, moving: float = 1.0) -> int:
    """Sequences of a micro-batch that fit beside the vectors; 0 where not one does."""
    fixed = bytes_needed(model, replace(run, batch=0, observed=0), moving)["chain"]
    each = bytes_needed(model, replace(run, batch=1, observed=0), moving)["chain"] - fixed
    return max(0, int((0.9 * machine.memory - fixed) // each))


# -- tables --


def print_tables() -> None:
    run = Run()
    print(f"\n{run}\n")
    print(
        "| model | GPU | memory beside the activations | sequences at once | step | draw | chain | run on 1, 4 GPUs | store | state |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for model in PYTHIA:
        for machine in (A100, H100):
            taken, needed, room = seconds(model, run, machine), bytes_needed(model, run), fits(model, run, machine)
            alone = bytes_needed(model, replace(run, batch=0), 1.0)["chain"]
            most = (
                f"{min(room, run.batch)}"
                if room
                else f"none; {min(fits(model, run, machine, 1 / model.layers), run.batch)} if a layer moves"
            )
            times = [f"{hours(model, run, machine, gpus):.2g}" for gpus in (1, 4)]
            print(
                f"| {model.name} | {machine.name} | {alone / 1e9:.1f} GB | {most} | {taken['step'] * 1e3:.0f} ms | "
                f"{taken['draw'] * 1e3:.0f} ms | {taken['chain'] / 3600:.2g} h | {', '.join(times)} h | "
                f"{needed['store'] / 1e9:.2f} GB | {needed['state'] / 1e9:.2g} GB |"
            )
    print("\nA suite: 20 checkpoints x 65 components (and the whole model) x 4 chains, hours on H100 (no passes shared)\n")
    print("| model | chains | 1 | 4 | 16 | 64 GPUs | all stores |")
    print("|---|---|---|---|---|---|---|")
    for model in PYTHIA:
        taken, count = seconds(model, run, H100), 20 * 66 * run.chains
        spans = [math.ceil(count / gpus) * taken["chain"] / 3600 for gpus in (1, 4, 16, 64)]
        cells = [f"{span:,.0f}" if span >= 100 else f"{span:.2g}" for span in spans]
        print(f"| {model.name} | {count} | {' | '.join(cells)} | {20 * 66 * bytes_needed(model, run)['store'] / 1e12:.1f} TB |")


def print_failures() -> None:
    rng = np.random.default_rng(0)
    print(
        "\n| model | MTBF of a worker | commit takes | overhead, simulated | exact | first order | best checkpoint_every | overhead there |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for model in (PYTHIA[0], PYTHIA[3], PYTHIA[6], PYTHIA[7]):
        chain, commit = seconds(model, Run(), H100)["chain"], bytes_needed(model, Run())["state"] / H100.state_bandwidth
        for mean in (4, 24):
            failing = Failing(mean * 3600.0, commit=commit)
            work = np.full(3000, chain)
            found = simulate(work, 64, failing, rng)
            at_best = replace(failing, commit_every=best_commit_every(failing))
            exact = [expected_worker_seconds(chain, one) / chain - 1 for one in (failing, at_best)]
            print(
                f"| {model.name} | {mean} h | {commit:.1f} s | {found.worker_seconds / work.sum() - 1:.1%} | {exact[0]:.1%} | "
                f"{first_order_overhead(failing):.1%} | {at_best.commit_every:.0f} s | {exact[1]:.1%} |"
            )
    chain = seconds(PYTHIA[3], Run(), H100)["chain"]
    count = 20 * 66 * 4
    print(f"\nThe suite of the 410M model, {count} chains of {chain / 3600:.2f} h: hours to its end, and above the ideal\n")
    print("| GPUs | ideal | no failures | MTBF 24 h | MTBF 4 h |")
    print("|---|---|---|---|---|")
    for gpus in (1, 4, 16, 64):
        cells = []
        for mean in (1e9, 24.0, 4.0):
            failing = Failing(mean * 3600, commit=bytes_needed(PYTHIA[3], Run())["state"] / H100.state_bandwidth)
            spans = [simulate(np.full(count, chain), gpus, failing, rng).makespan for _ in range(3)]
            cells.append(np.mean(spans) / 3600)
        ideal = count * chain / gpus / 3600
        print(f"| {gpus} | {ideal:.1f} | {' | '.join(f'{cell:.1f} (+{cell / ideal - 1:.1%})' for cell in cells)} |")


# -- measured here --

SMALL = (Model("A", 2, 64, 4096), Model("B", 4, 128, 4096), Model("C", 6, 192, 4096), Model("D", 6, 320, 4096))
BATCH, TOKENS, OBSERVED = 8, 128, 16
SETTINGS = {"lr": 1e-6, "n_beta": 30.0, "localization": 100.0, "batch_size": BATCH, "sampling_method": "leimkuhler_matthews"}
CHAINS, DRAWS = (1, 4), (4, 12)


def print_measured(names: str) -> None:
    """Each in a process of its own, one thread; processor time, since others use this machine."""
    print("\n| model | weights | matrix products alone | step's gradient | draw | update | kept for the gradient, per token, layer and unit "
          "| vectors / 3 | a draw more of 1, 4 chains / predicted | store | states |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for number, model in enumerate(SMALL):
        if model.name not in names:
            continue
        one = json.loads(_child(f"one {number}"))
        runs = {(c, d): json.loads(_child(f"run {number} {c} {d}")) for c in CHAINS for d in DRAWS}
        forward = model.forward(TOKENS) * BATCH * TOKENS / one["speed"]
        draw = forward * OBSERVED / BATCH
        ratios = []
        for chains in CHAINS:
            taken = (runs[chains, DRAWS[1]]["seconds"] - runs[chains, DRAWS[0]]["seconds"]) / (DRAWS[1] - DRAWS[0])
            predicted = chains * (one["step"] + one["update"] + one["draw"]) + one["draw"] * BATCH / OBSERVED
            ratios.append(f"{taken / predicted:.2f}")
        last = runs[CHAINS[-1], DRAWS[1]]
        print(
            f"| {model.name} | {model.parameters / 1e6:.2f}M | {one['speed'] / 1e9:.0f} GFLOP/s | "
            f"{one['step'] * 1e3:.0f} ms = {one['step'] / forward / 3:.2f} x | {one['draw'] * 1e3:.0f} ms = {one['draw'] / draw:.2f} x | "
            f"{one['update'] / model.parameters * 1e9:.1f} ns a weight | {one['kept']:.1f} | {one['vectors'] / (4 * VECTORS * model.parameters):.2f} | "
            f"{', '.join(ratios)} | {last['store']:.2f} x | {last['states']:.2f} x |",
            flush=True,
        )


def _child(what: str) -> str:
    done = subprocess.run([sys.executable, __file__, "--child", what], stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.strip().splitlines()[-1]


def _inputs(model: Model) -> tuple[Any, Any, Any]:
    import torch
    from datasets import Dataset
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = GPTNeoXConfig(
        vocab_size=model.vocabulary, hidden_size=model.hidden, num_hidden_layers=model.layers, num_attention_heads=4,
        intermediate_size=4 * model.hidden, max_position_embeddings=TOKENS, use_cache=False,
    )  # fmt: skip
    network = GPTNeoXForCausalLM(config).eval()
    assert sum(p.numel() for p in network.parameters()) == model.parameters
    data, observed = (
        Dataset.from_dict({"input_ids": np.random.default_rng(count).integers(0, model.vocabulary, (count, TOKENS)).tolist()})
        for count in (64, OBSERVED)
    )
    return network, data, {"observed": (observed, OBSERVED // BATCH)}


def measure_one(model: Model) -> dict[str, float]:
    """Of one chain: a step's gradient, a draw's observables, the sampler's update; what its vectors and a gradient take."""
    import torch

    from devinterp.engine.placement import operations
    from devinterp.engine.proof import find_forward
    from devinterp.engine.selection import Selection
    from devinterp.engine.walker import Plan, Walker
    from devinterp.slt.requests import request_of

    network, data, observables = _inputs(model)
    request = request_of(network, data, observables, num_draws=100, **SETTINGS)
    inputs, settings = request.inputs, request.inputs.settings
    with inputs.checkpoint.ready():
        selection = Selection.of(inputs.checkpoint.parameters, request.masks)
        forward = find_forward(
            inputs.checkpoint, selection, inputs.batches.micro(0, 0), reuse_prefix=True, compiled=False, precision=None
        )
        plan = Plan(settings, settings.sampler(1e-6), forward, selection, inputs.batches, inputs.observables)
        assert operations(plan)[0] == 6.0 * model.parameters * BATCH * TOKENS  # what the library itself counts with
        walker = Walker(plan, 0)
        saved: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        weights = {leaf.untyped_storage().data_ptr() for leaf in (walker.weights, *inputs.checkpoint.parameters.values())}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            walker._on_batch(0, 0)
        kept = sum(size for at, size in saved.items() if at not in weights)
        vectors = [walker.weights, walker.gradient, *walker.kept.values()]
        a = torch.randn(1024, 1024)
        times = {"step": [], "draw": [], "update": [], "product": []}
        for _ in range(5):
            for name, work in (("product", lambda: a @ a), ("step", lambda: walker.differentiate(0)),
                               ("draw", walker.observe), ("update", walker.step)):  # fmt: skip
                began = time.process_time()
                work()
                times[name].append(time.process_time() - began)
    least = {name: min(found) for name, found in times.items()}
    return least | {
        "speed": 2 * 1024**3 / least["product"], "vectors": float(sum(v.numel() * 4 for v in vectors)),
        "kept": kept / (4 * BATCH * TOKENS * model.layers * model.hidden),
    }  # fmt: skip


def measure_run(model: Model, chains: int, draws: int) -> dict[str, float]:
    """A whole run: processor time, and bytes on the disk over those predicted."""
    import devinterp
    from devinterp.slt.requests import request_of, stored_bytes

    network, data, observables = _inputs(model)
    with tempfile.TemporaryDirectory() as folder:
        began = time.process_time()
        how = {"num_chains": chains, "num_draws": draws, "num_init_loss_batches": 1, **SETTINGS}
        devinterp.sample(
            network, data, observables, output_path=f"{folder}/run", progress=False, chains_together="sequential", **how
        )
        taken = time.process_time() - began
        sizes = {
            name: sum(file.stat().st_size for file in Path(folder, name).rglob(f"*{end}") if file.is_file())
            for name, end in (("run", ""), ("run.run", ".safetensors"))
        }
        predicted = stored_bytes(*request_of(network, data, observables, **how).layout())
    return {"seconds": taken, "store": sizes["run"] / predicted, "states": sizes["run.run"] / (8 * chains * model.parameters)}


# -- the picture --


def plot(to: Path) -> None:
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    figure = Figure(figsize=(13, 4.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    gpus = np.array([1, 2, 4, 8, 16, 32, 64])
    for number, model in enumerate(PYTHIA):
        chain = seconds(model, Run(), H100)["chain"]
        left.loglog(gpus, np.ceil(5280 / gpus) * chain / 3600, "o-", ms=3, color=f"C{number}", label=model.name)
    left.set(
        title="5280 chains: 20 checkpoints x 66 x 4, no failures",
        xlabel="H100 GPUs",
        ylabel="hours",
        xticks=gpus,
        xticklabels=gpus,
    )
    left.legend(fontsize=8, ncols=2)
    rng, work = np.random.default_rng(1), 6 * 3600.0
    every = np.array([10, 30, 60, 120, 300, 600, 1200, 2400, 3600])
    for mean, color in ((4, "C3"), (24, "C0")):
        for commit, line, mark in ((3.0, "-", "o"), (30.0, "--", "s")):
            failing = [Failing(mean * 3600.0, commit_every=float(e), commit=commit) for e in every]
            exact = [expected_worker_seconds(work, one) / work - 1 for one in failing]
            found = [simulate(np.full(2000, work), 64, one, rng).worker_seconds / (2000 * work) - 1 for one in failing]
            middle.loglog(every, exact, line, color=color, label=f"MTBF {mean} h, commit {commit:.0f} s")
            middle.loglog(every, found, mark, color=color, ms=4)
    middle.axvline(300, color="0.8", zorder=0)
    middle.set(
        title="A chain of 6 h: time beyond it, exact (lines) and simulated",
        xlabel="checkpoint_every, seconds",
        ylabel="overhead",
    )
    middle.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    middle.legend(fontsize=8)
    chain = seconds(PYTHIA[3], Run(), H100)["chain"]
    commit = bytes_needed(PYTHIA[3], Run())["state"] / H100.state_bandwidth
    for mean, label in ((1e9, "no failures"), (24.0, "MTBF 24 h"), (4.0, "MTBF 4 h")):
        overheads = []
        for count in gpus:
            spans = [
                simulate(np.full(5280, chain), int(count), Failing(mean * 3600, commit=commit), rng).makespan for _ in range(3)
            ]
            overheads.append(np.mean(spans) / (5280 * chain / count) - 1)
        right.semilogx(gpus, overheads, "o-", ms=4, label=label)
    right.set(
        title=f"5280 chains of {chain / 60:.0f} min (410M): beyond the ideal",
        xlabel="H100 GPUs",
        xticks=gpus,
        xticklabels=gpus,
        ylim=0,
    )
    right.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    right.legend(fontsize=8)
    for axes in (left, middle, right):
        axes.title.set_fontsize(10)
    for axes in (left, right):
        axes.xaxis.set_minor_locator(NullLocator())
    figure.savefig(to, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", nargs="?", const="ABCD", metavar="MODELS")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        kind, number, *rest = given.child.split()
        model = SMALL[int(number)]
        print(json.dumps(measure_one(model) if kind == "one" else measure_run(model, *map(int, rest))))
    elif given.measure:
        print_measured(given.measure)
    elif given.plot:
        plot(given.plot)
    else:
        print_tables()
        print_failures()


if __name__ == "__main__":
    main()
