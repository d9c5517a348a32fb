"""Cost of a right answer: gradients and seconds until the LLC is within 3 % of its small-step limit, with a standard error of 3 %.

python3 -m venv peer && peer/bin/pip install torch==2.13.0 devinterp==2.0.1 transformers
python benchmarks/right_answer.py peer/bin/python [--quick]        (after `make demo`; on two idle cores; --quick only prints)

Three models; us as recommended (Leimkuhler-Matthews, lr="auto"), and `devinterp` 2.0.1 at the largest step size whose bias is 3 %.
1. Long runs of ours: the limit, and the bias of SGLD, whose 1/LLC is linear in lr (exactly so on a quadratic of one curvature).
2. Long runs of the peer at that lr: s, where the standard error of N gradients is s / sqrt(N); its bias; its baseline's noise.
3. One after the other, timed: a run of each at the cost that follows.
"""

import datetime
import json
import math
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch
import transformers
from datasets import Dataset
from demo_checkpoint import CHECKPOINT, load, machine, record
from transformers import AutoConfig, AutoModelForCausalLM

import devinterp
from devinterp.analysis.uncertainty import standard_error
from devinterp.engine.progress import logger

GOAL, TRANSIENT = 0.03, 0.01
N_BETA, BATCH, CHAINS, REPEATS, BASELINE = 30.0, 16, 1, 3, 32
RUNS = {("lm", 1): 2.0, ("lm", 4): 1.5, ("sgld", 2): 1.0, ("sgld", 4): 1.0}
"""(sampler, k): sampling time of the long run at lr = auto / k, in units of the model's."""
Long = namedtuple("Long", "llc sem s")
METHODS = {"lm": "leimkuhler_matthews", "sgld": "sgmcmc_sgld"}

PEER = """
import json, sys, time, warnings
import numpy as np, torch
from datasets import Dataset
from transformers import AutoModelForCausalLM
from devinterp.slt.llc import compute_llc
from devinterp.slt.lm_loss import compute_per_token_loss
from devinterp.slt.sampling import sample
warnings.simplefilter("ignore")
folder, jobs, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder).eval()
data = Dataset.from_dict({"input_ids": np.load(folder + "/tokens.npy").tolist()}).with_format("torch")
masks, jobs = torch.load(folder + "/masks.pt"), json.loads(jobs)
sample(model, data, {}, param_masks=masks, device="cpu", **jobs[0] | {"num_draws": 2, "num_chains": 1})  # imports, first touch
found = []
for number, job in enumerate(jobs):
    started = time.time()
    samples = sample(model, data, {}, param_masks=masks, device="cpu", output_path=f"{out}/{number}", **job)
    own = float(compute_llc(samples).llc_mean)
    seconds = time.time() - started
    ds = samples.dataset.transpose("chain", "step", ...)
    losses = ds.sampling_loss_micro.mean(["batch_sampling", "token_pos"], dtype=float).values
    ids = torch.as_tensor(ds.sampling_input_ids_micro[:, : len(data) // job["batch_size"]].values)  # it repeats its first epoch
    with torch.no_grad():
        at = [[compute_per_token_loss(model, batch).double().mean().item() for batch in chain] for chain in ids]
    paired = losses - np.array(at)[:, np.arange(losses.shape[1]) % ids.shape[1]]
    found.append({"own": own, "seconds": seconds, "paired": paired.tolist(), "baseline": at})
print(json.dumps(found))
"""


@dataclass
class Case:
    """A model on disk, and how it is sampled."""

    name: str
    folder: Path
    settings: dict
    time: int
    """sampling time of the long runs, in steps of lr="auto" """
    auto: float = math.nan

    def transient(self, lr: float) -> tuple[int, float]:
        """Steps until TRANSIENT of it is left, and how many steps' worth an average from the first step on lacks.

        What is missing of the squared distance shrinks by `decay` a step, in the flattest direction.
        """
        decay = (1 - lr * self.settings["localization"] / 2) ** 2
        return math.ceil(math.log(TRANSIENT) / math.log(decay)), 1 / (1 - decay)


def main() -> None:
    python, quick = sys.argv[1], "--quick" in sys.argv
    quiet()
    with tempfile.TemporaryDirectory() as folder:
        cases = prepare(Path(folder), 4 if quick else 1)
        tasks = sorted(((case, *run) for case in cases for run in RUNS), key=lambda task: -task[0].time * task[2])
        with multiprocessing.get_context("spawn").Pool(2) as pool:
            long = dict(zip([(case.name, *run) for case, *run in tasks], pool.starmap(long_run, tasks, 1), strict=True))
        lrs = [lr_of_bias(case, long) for case in cases]
        jobs = [[peer_job(case, lr)] for case, (lr, _) in zip(cases, lrs, strict=True)]
        with ThreadPoolExecutor(2) as threads:
            peers = list(threads.map(lambda case, job: peer_runs(python, case, job)[0], cases, jobs))
        rows, notes = [], []
        for case, (lr, by_sgld), peer in zip(cases, lrs, peers, strict=True):
            limit = long[case.name, "lm", 4]
            ours, seconds = our_row(case, long[case.name, "lm", 1], limit)
            rows += [ours, *peer_rows(python, case, lr, peer, limit, seconds)]
            notes.append(note(case, lr, peer, limit, by_sgld))
            print("\n".join([*rows[-4:], notes[-1]]), flush=True)
    head = f"`python benchmarks/right_answer.py PEER_PYTHON`, {datetime.date.today()}, {machine()}. {WHAT}"
    text = "\n".join([head, "", TITLES, "|---|" + "---|" * 7, *rows, "", *notes, "", WHY])
    print(text) if quick else record("Cost of a right answer", text)


def quiet() -> None:
    torch.set_num_threads(1)
    logger.setLevel("WARNING")
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore")


def prepare(folder: Path, divisor: int) -> list[Case]:
    """The head gets a localization at which it may go about as far, sqrt(d / localization), as the whole model."""
    model, data = load()
    tokens = np.asarray(data.with_format("numpy")[:]["input_ids"])
    head, (small, short) = devinterp.create_param_masks(model, "l1h3"), train_small(tokens)
    cases = []
    for name, made, ids, masks, localization, length in (
        ("demo checkpoint 1200, 231k weights", model, tokens, None, 1000.0, 700),
        ("its head l1h3, 4k weights", model, tokens, head, 30.0, 3000),
        ("one layer of width 32, 78k weights", small, short, None, 300.0, 1200),
    ):
        settings = {"n_beta": N_BETA, "localization": localization, "batch_size": BATCH, "num_init_loss_batches": 1}
        case = Case(name, folder / str(len(cases)), settings, length // divisor)
        made.save_pretrained(case.folder)
        np.save(case.folder / "tokens.npy", ids)
        torch.save(masks or {name: None for name, _ in made.named_parameters()}, case.folder / "masks.pt")
        case.auto = ours(case, lr="auto", num_draws=4)[1]
        cases.append(case)
    return cases


def train_small(tokens: np.ndarray) -> tuple[torch.nn.Module, np.ndarray]:
    """A second model, trained on the demo's text in sequences of 32 for about 15 seconds."""
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(CHECKPOINT)
    config.update({"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 128})
    model, ids, steps = AutoModelForCausalLM.from_config(config), tokens.reshape(-1, 32), 2000
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        batch = torch.as_tensor(ids)[torch.randint(len(ids), (32,))]
        optimizer.zero_grad()
        model(batch, labels=batch).loss.backward()
        optimizer.step()
    return model, ids


def ours(case: Case, method: str = "lm", **settings):
    """The LLC's dataset, the step size, and the seconds of both calls."""
    model = AutoModelForCausalLM.from_pretrained(case.folder)
    data = Dataset.from_dict({"input_ids": np.load(case.folder / "tokens.npy")})
    settings = {"num_chains": CHAINS, "progress": False, "sampling_method": METHODS[method]} | case.settings | settings
    settings["param_masks"] = torch.load(case.folder / "masks.pt")
    started = time.time()
    samples = devinterp.sample(model, data, {}, **settings)
    result = devinterp.compute_llc(samples)
    return result, samples.attrs["metadata"]["step_size"]["lr"], time.time() - started


def long_run(case: Case, method: str, k: int) -> Long:
    quiet()
    lr, draws = case.auto / k, math.ceil(case.time * RUNS[method, k] / 2)
    result, _, _ = ours(case, method, lr=lr, num_chains=2, num_draws=draws, num_steps_bw_draws=k,
                        num_burnin_steps=2 * case.transient(lr)[0], match_sampling_input_ids_across_chains=False)  # fmt: skip
    value = float(result.llc_mean)
    found = Long(value, float(result.llc_sem), s_of(N_BETA * result.excess_trace.values / value))
    print(f"{case.name}, {method}, auto / {k}: {found}", flush=True)
    return found


def s_of(trace: np.ndarray) -> float:
    """The standard error of one chain's mean, times the square root of its length."""
    return float(np.mean([standard_error(chain[None]) ** 2 for chain in trace]) ** 0.5 * trace.shape[1] ** 0.5)


def lr_of_bias(case: Case, long: dict) -> tuple[float, str]:
    """The lr at which SGLD is 3 % too high, LLC(lr) = limit / (1 - c lr); and the limit according to SGLD alone."""
    limit, runs = long[case.name, "lm", 4].llc, [long[case.name, "sgld", k] for k in (2, 4)]
    x, y = case.auto / np.array([2, 4]), np.array([1 / run.llc for run in runs])
    error = np.array([run.sem / run.llc**2 for run in runs])
    c = (x * (1 - limit * y) / error**2).sum() / (x**2 / error**2).sum()
    to_zero = np.array([-x[1], x[0]]) / (x[0] - x[1])  # the line through both points, at lr = 0
    by_sgld = 1 / (to_zero @ y)
    return GOAL / (1 + GOAL) / c, f"{by_sgld:.3f} ± {np.linalg.norm(to_zero * error) * by_sgld**2:.3f}"


def peer_job(case: Case, lr: float) -> dict:
    """Four chains that share nothing, batches included, are four runs with an init_seed each."""
    steps = math.ceil(max(case.time / 2, 1.2 * case.transient(lr)[1] / TRANSIENT))
    return case.settings | {"lr": lr, "num_draws": steps, "num_chains": 4, "match_sampling_input_ids_across_chains": False}


def peer_runs(python: str, case: Case, jobs: list[dict]) -> list[dict]:
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # where it would find us
    with tempfile.TemporaryDirectory() as out:
        command = [python, "-c", PEER, str(case.folder), json.dumps(jobs), out]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True, env=alone)
    runs = json.loads(done.stdout.strip().split("\n")[-1])
    return [run | {name: N_BETA * np.array(run[name]) for name in ("paired", "baseline")} for run in runs]


def our_row(case: Case, run: Long, limit: Long) -> tuple[str, float]:
    """The run is made REPEATS times with lr="auto", and as often with its value given, which tells what "auto" costs."""
    burn_in, draws, bias = (
        case.transient(case.auto)[0],
        max(4, math.ceil((run.s / GOAL) ** 2 / CHAINS)),
        run.llc / limit.llc - 1,
    )
    length = {"num_burnin_steps": burn_in, "num_draws": draws}
    chosen, given = ([ours(case, lr=lr, init_seed=seed, **length) for seed in range(REPEATS)] for lr in ("auto", case.auto))
    seconds, alone = (float(np.median([seconds for _, _, seconds in runs])) for runs in (chosen, given))
    off = np.mean([(float(result.llc_mean) / limit.llc - 1) ** 2 for result, _, _ in chosen + given]) ** 0.5
    result = chosen[0][0]
    cost = f'{seconds:.1f} ({seconds - alone:.1f} of it lr="auto")' if abs(bias) <= GOAL else "infinite"
    return (
        f"| {case.name} | ours | {case.auto:.2g} (auto) | {bias:+.1%} ± {math.hypot(run.sem, limit.sem) / limit.llc:.1%} | "
        f'{CHAINS * (burn_in + draws)} + those of lr="auto" | {cost} | 1 | {float(result.llc_mean):.3g} ± '
        f"{float(result.llc_sem):.2g}; {2 * REPEATS} runs off by {off:.1%} (r.m.s.) |"
    ), seconds


def peer_rows(python: str, case: Case, lr: float, peer: dict, limit: Long, our_seconds: float) -> list[str]:
    """By hand: paired and without burn-in. Its compute_llc: over all steps; paired if there is a baseline batch for each."""
    burn_in, lacking = case.transient(lr)
    after = peer["paired"][:, burn_in:] / limit.llc
    s, every, bias = s_of(after), math.ceil(lacking / TRANSIENT), after.mean() - 1
    by_hand, whole = burn_in + math.ceil((s / GOAL) ** 2), max(every, math.ceil((s / GOAL) ** 2))
    once = case.settings | {"lr": lr, "num_chains": 1}
    own = once | {"num_draws": whole, "num_init_loss_batches": whole}
    cut, own = peer_runs(python, case, [once | {"num_draws": by_hand}, own])
    kept, sem = cut["paired"][:, burn_in:], math.hypot(standard_error(after), limit.sem / limit.llc)
    runs = max(1.0, (own_error(peer, s, every, limit) / GOAL) ** 2)
    extrapolated = runs * every * cut["seconds"] / by_hand

    def row(who: str, lacks: float, gradients: str, seconds: float, told: str, check: str) -> str:
        cells = [f"{bias - lacks:+.1%} ± {sem:.1%}", gradients, f"{seconds:.1f}{told}", f"{seconds / our_seconds:.1f}", check]
        return f"| | 2.0.1, {who} | {lr:.2g} | {' | '.join(cells)} |"

    return [
        row("paired and cut by hand", 0, f"{by_hand}", cut["seconds"], "", f"{kept.mean():.3g} ± {standard_error(kept):.2g}"),
        row("its compute_llc, a baseline batch a step", lacking / whole, f"{whole}", own["seconds"], "", f"{own['own']:.3g}"),
        row(f"its compute_llc, {BASELINE} baseline batches (default)", lacking / every,
            f"{runs * every:.0f} ({runs:.1f} runs)", extrapolated, " (extrapolated)", ""),
    ]  # fmt: skip


def own_error(peer: dict, s: float, steps: int, limit: Long) -> float:
    """Relative, of its own estimate: s / sqrt(N), and that of a baseline from the first batches of those that the run sees."""
    apart = max(0.0, 1 / BASELINE - 1 / min(steps, peer["baseline"].shape[1]))
    return math.hypot(s / steps**0.5, peer["baseline"].std() / limit.llc * apart**0.5)


def note(case: Case, lr: float, peer: dict, limit: Long, by_sgld: str) -> str:
    (burn_in, lacking), paired, baseline = case.transient(lr), peer["paired"], peer["baseline"]
    after, length, s = paired[:, burn_in:], paired.shape[1], s_of(paired[:, burn_in:] / limit.llc)
    own = (paired + baseline[:, np.arange(length) % baseline.shape[1]]).mean(axis=1) - baseline[:, :BASELINE].mean(axis=1)
    lacked = (1 - paired[:, : 2 * burn_in] / after.mean()).sum(axis=1).mean()
    return (
        f"- {case.name}: localization {case.settings['localization']:g}; limit {limit.llc:.3f} ± {limit.sem:.3f}, by SGLD extrapolated "
        f"{by_sgld}. 2.0.1 at {lr:.2g}, four runs of {length}: s {s:.2f}; the average from the first step on lacks {lacked:.1f} steps' "
        f"worth (taken: {lacking:.1f}); with {BASELINE} baseline batches its values are {', '.join(f'{v:.3g}' for v in own)} "
        f"(standard error taken: {own_error(peer, s, length, limit) * limit.llc:.2g})."
    )


WHAT = (
    f"Until the LLC is within {GOAL:.0%} of its small-step limit with a standard error of {GOAL:.0%}, with {TRANSIENT:.0%} of the transient "
    f"left. n_beta {N_BETA:g}, batches of {BATCH}, one chain, one thread. Seconds: of a run of that many gradients (its LLC in the last "
    "column) to the LLC, without imports, unless extrapolated; no baseline batches that the estimate does not use."
)
TITLES = "| model | who | lr | bias | gradients | seconds | ratio | LLC of such a run |"
WHY = (
    "2.0.1 takes the largest lr whose bias is 3 % according to our SGLD (in the table: its own bias, in four longer runs); neither that "
    "search nor the pairing by hand is timed. Its compute_llc averages from the first step on, so a run must be 100 times as long as what "
    "that lacks (this error and the step size's have opposite signs and could cancel, unknown to the user). Its baseline is the mean of "
    "the first batches of the stream. As many as there are steps are those of the steps, and pair it exactly; 32 leave their noise in, "
    "and other values of init_seed must average it out."
)


if __name__ == "__main__":
    main()
