"""LLCs with known answers, by the settings that `calibrate` finds: nothing is tuned by hand.

python benchmarks/known_llc.py [--only KIND] [--most N] [--fresh] [--report]      (about 20 minutes on two idle cores; writes docs/accuracy.md)

Quadratics, regression, reduced rank regression and deep linear networks at their deepest point, normal crossings. All in full
batches, so that the sampler alone is on trial. Each row is kept in build/known_llc.jsonl, so a run that was cut off goes on.
"""

import argparse
import datetime
import itertools
import json
import math
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch
from demo_checkpoint import machine

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from cases import DeepLinear, Weights, by_row, curved, rows  # noqa: E402
from linear_networks import energies  # noqa: E402
from targets import crossing_llc, deep_linear_llc, quadratic_llc  # noqa: E402

import devinterp  # noqa: E402
from devinterp.analysis.uncertainty import standard_error  # noqa: E402

CACHE = ROOT / "build" / "known_llc.jsonl"
N_BETA, N_BETA_SINGULAR = 1000.0, 100.0
"""The smaller n_beta, the fewer steps settle a localization that is as weak beside it"""
Exact = Callable[[float], tuple[float, float]]
"""the LLC at this localization, and the error that it is known with"""


@dataclass(frozen=True)
class Case:
    kind: str
    name: str
    make: Callable[[], tuple[torch.nn.Module, Any, Any]]
    """model, dataset, loss function"""
    exact: Exact
    coefficient: float
    """lambda: without localization, at infinite n_beta"""
    multiplicity: int = 1
    n_beta: float = N_BETA


def quadratics() -> Iterator[Case]:
    for dimension, spread in itertools.product((3, 10, 100, 1000), (0, 2)):
        h = torch.logspace(-spread / 2, spread / 2, dimension)

        def make(h=h):
            return Weights(torch.zeros(len(h))), rows(8), curved(h)

        name = f"d = {dimension}, h within a factor of {10**spread}"
        yield Case("quadratic", name, make, lambda gamma, h=h: (quadratic_llc(h.tolist(), N_BETA, gamma), 0.0), dimension / 2)


def regressions() -> Iterator[Case]:
    """Linear regression on real data, each column scaled: curvatures are the eigenvalues of the correlations."""
    from sklearn.datasets import load_breast_cancer, load_diabetes, load_wine

    for load in (load_diabetes, load_wine, load_breast_cancer):
        x, y = load(return_X_y=True)
        x = (x - x.mean(0)) / x.std(0)
        x, y = torch.tensor(x, dtype=torch.float32), torch.tensor((y - y.mean()) / y.std(), dtype=torch.float32)
        solution = torch.linalg.lstsq(x.double(), y.double()).solution.float()
        h = torch.linalg.eigvalsh(x.T.double() @ x.double() / len(x)).tolist()

        def make(x=x, y=y, solution=solution):
            loss = lambda model, ids: 0.5 * (x[ids[:, 0]] @ model.w - y[ids[:, 0]]).square()[:, None]  # noqa: E731
            return Weights(solution), rows(len(x)), loss

        name = f"{load.__name__[5:]}, {x.shape[1]} weights"
        yield Case("regression", name, make, lambda gamma, h=h: (quadratic_llc(h, N_BETA, gamma), 0.0), x.shape[1] / 2)


def linear_network(kind: str, widths: tuple[int, ...], rank: int) -> Case:
    coefficient, multiplicity = deep_linear_llc(widths, rank)
    weights = sum(a * b for a, b in itertools.pairwise(widths))

    def make():
        return DeepLinear(widths, rank), rows(widths[0]), by_row

    def exact(gamma: float) -> tuple[float, float]:
        sweeps = max(80, min(4000, 4_000_000 // (weights * max(widths))))
        found = energies(widths, rank, N_BETA_SINGULAR, gamma, sweeps=sweeps, burn_in=sweeps // 4)
        return float(found.mean()), standard_error(found)

    name = f"{'-'.join(map(str, widths))}, rank {rank}"
    if kind.startswith("deep"):
        name += f", {weights} weights"
    return Case(kind, name, make, exact, coefficient, multiplicity, N_BETA_SINGULAR)


def reduced_rank() -> Iterator[Case]:
    """From both sides of each case of Aoyagi & Watanabe (2005)."""
    for widths, rank in (
        ((6, 4, 7), 2), ((6, 4, 7), 3), ((9, 9, 9), 3), ((8, 6, 8), 2), ((5, 3, 5), 1), ((4, 3, 4), 1),
        ((3, 2, 9), 1), ((3, 2, 9), 2), ((9, 2, 3), 1), ((9, 2, 3), 2), ((3, 9, 3), 1), ((4, 12, 3), 2), ((10, 10, 10), 4),
    ):  # fmt: skip
        yield linear_network("reduced rank regression", widths, rank)


def deep_linear() -> Iterator[Case]:
    """20 random ones, of 2 to 6 layers and up to 1e5 weights, and those of multiplicity above 1 that tests have."""
    rng = np.random.default_rng(0)
    for number in range(20):
        layers, largest = 2 + number % 5, (8, 16, 32, 160)[min(3, number // 6)]
        widths = tuple(int(width) for width in rng.integers(max(3, largest // 2), largest + 1, layers + 1))
        yield linear_network("deep linear network", widths, int(rng.integers(1, min(widths))))
    for widths, rank in (((8, 6, 6, 8), 3), ((5, 4, 4, 5), 1), ((6, 5, 5, 5, 6), 2)):
        yield linear_network("deep linear network", widths, rank)


def crossings() -> Iterator[Case]:
    """Products of even powers, integrated numerically with the localization that was taken."""
    for powers in ((2,), (3,), (1, 1), (1, 2), (2, 2), (1, 1, 1)):

        def make(powers=powers):
            def loss(model, ids):
                return math.prod(model.w[i] ** (2 * k) for i, k in enumerate(powers)).expand(len(ids), 1)

            return Weights(torch.zeros(len(powers))), rows(8), loss

        name = " ".join(f"w{i + 1}^{2 * k}" for i, k in enumerate(powers))
        exact = lambda gamma, powers=powers: (crossing_llc(powers, N_BETA_SINGULAR, gamma), 0.0)  # noqa: E731
        yield Case("normal crossing", name, make, exact, 1 / (2 * max(powers)), powers.count(max(powers)), N_BETA_SINGULAR)


KINDS = {
    "quadratic": quadratics,
    "regression": regressions,
    "crossing": crossings,
    "reduced": reduced_rank,
    "deep": deep_linear,
}


def measure(kind: str, number: int) -> dict[str, Any]:
    """In a process of its own: calibrate, then sample."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    case, started = list(KINDS[kind]())[number], time.time()
    model, data, loss_fn = case.make()
    fixed = {"loss_fn": loss_fn, "num_init_loss_batches": 1, "chains_together": "vmap"}
    fixed["largest_excess"] = math.inf  # a rise of any size is local: these losses have no other minimum
    row = {"case": f"{case.kind}: {case.name}", "n_beta": case.n_beta}
    try:
        found = devinterp.calibrate(model, data, n_beta=case.n_beta, batch_size=len(data), progress=False, **fixed)
        calibrated = time.time()
        samples = devinterp.sample(model, data, {}, progress=False, **found.settings)
        result, diagnosis = devinterp.compute_llc(samples), devinterp.diagnose(samples)
    except devinterp.errors.DevinterpError as error:
        return row | {"error": str(error)}
    sampled, gamma = time.time(), found.settings["localization"]
    truth, truth_error = case.exact(gamma)
    steps = found.settings["num_burnin_steps"] + found.settings["num_draws"] * found.settings["num_steps_bw_draws"]
    return row | {
        "truth": truth, "truth_error": truth_error, "llc": float(result.llc_mean), "sem": float(result.llc_sem), "gamma": gamma,
        "lr": found.settings["lr"], "steps": steps, "seconds": [calibrated - started, sampled - calibrated],
        "left": [f"{one:g}: {fault}" for one, fault in zip(found.table.localization.values, found.table.fault.values, strict=True)],
        "verdict": ", ".join(sorted(set(diagnosis.verdict.values.tolist()))),
    }  # fmt: skip


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--fresh", action="store_true", help="measure again what is kept")
    arguments.add_argument("--only", choices=KINDS, help="one kind; writes no report")
    arguments.add_argument("--most", type=int, metavar="N", help="measure this many cases; writes no report")
    arguments.add_argument("--report", action="store_true", help="measure nothing; report what is kept")
    arguments.add_argument("--processes", type=int, default=2)
    chosen = arguments.parse_args()
    if chosen.fresh:
        CACHE.unlink(missing_ok=True)
    CACHE.parent.mkdir(exist_ok=True)
    CACHE.touch()
    kinds = [chosen.only] if chosen.only else list(KINDS)
    cases = [(kind, number, case) for kind in kinds for number, case in enumerate(KINDS[kind]())]
    wanted = {f"{case.kind}: {case.name}": case.n_beta for _, _, case in cases}
    kept = {row["case"]: row for row in map(json.loads, CACHE.read_text().splitlines())}
    kept = {name: row for name, row in kept.items() if wanted.get(name) == row["n_beta"]}
    left = [] if chosen.report else [each for each in cases if f"{each[2].kind}: {each[2].name}" not in kept][: chosen.most]
    with ProcessPoolExecutor(chosen.processes, mp_context=get_context("spawn")) as pool:
        for row in pool.map(measure, [kind for kind, _, _ in left], [number for _, number, _ in left]):
            with CACHE.open("a") as file:
                file.write(json.dumps(row) + "\n")
            kept[row["case"]] = row
            print(row, flush=True)
    if not chosen.only and chosen.most is None:
        text = report([case for _, _, case in cases], kept)
        print(text)
        (ROOT / "docs" / "accuracy.md").write_text(text)


HEAD = f"""# Accuracy

How far measured LLCs are from known ones. `python benchmarks/known_llc.py`, {{date}}, {{machine}}. The settings are those that
`calibrate` finds by default with `n_beta={N_BETA:g}` for quadratics and regression and `n_beta={N_BETA_SINGULAR:g}` for the others;
nothing is tuned by hand. `accuracy` is at its default too, a standard error of 3 %, which is most of the errors below: {{within}} of the
measured values are within two standard errors of the exact ones. Verdicts of `diagnose` on the runs: {{verdicts}}.

Two comparisons, since a measured LLC differs from the learning coefficient λ of theory for two reasons:

- **the sampler**: against the LLC at this very n_beta and localization. Quadratics and regressions have a formula, normal crossings are
  integrated numerically. Linear networks are sampled exactly by another way that has no step size and shares no code: given the other layers, a
  layer's posterior is Gaussian, so one layer after another is drawn (`tests/linear_networks.py`); the error of that is in the table.
- **the question**: against λ, which has no localization and infinite n_beta. Localization takes nearly flat directions away, more of them the
  stronger it is, and a multiplicity m > 1 takes (m - 1) / ln n_beta. No sampler can do better than this difference at these settings.

`calibrate` takes the weakest localization that settles within `max_steps`, 1000 by default, which for deep linear networks is far from
none. Exact values for 10-10-10-10, rank 4 (λ = 44): at n_beta 100 and localization 0.3, 1, 3, 10, 30 they are 5, 6, 10, 20, 37 % below λ,
at n_beta 1000 they are 2, 3, 5, 10, 20 %. Whoever wants λ itself raises `max_steps`: burn-in takes about 4.6 n_beta h_max / localization
steps. Of the network of 6 layers and 103 874 weights curvature grows a hundredfold along flat directions: only localization 340 settles in
1000 steps, and that measures 4 % of λ. Where curvature grows without bound along a flat direction, as in w1^2 w2^4, step sizes go by the steepest place that pilots come to,
and the run is tried at its full length (docs/diagnosis.md). What is left is small: 1500 chains of a plain loop on w1^2 w2^4
(localization 1.5, lr 0.0035) are 3.0 ± 0.4 % too high and 2 of them diverge in 8000 steps; on w1^2 w2^2 (2.4, 0.0026), 0.0 ± 0.2 % and
none. Whether pilots meet a steep place is chance, so other seeds can find other settings for such losses, and a run can still be spiky and told so.
`make test-slow` raises the steps (n_beta 5000, localization 1, 4000 steps of burn-in) and is 0 to 6 % from λ (benchmarks/RESULTS.md).
"""

PUBLISHED = """
Published for SGLD on deep linear networks, against λ (Lau et al. 2023, up to 1e8 weights): a median of about 17 % too low, read off the plot,
and 40 of 593 runs without a number; the tests of devinterp 1.x accept 40 %.
"""


def report(cases: list[Case], kept: dict[str, dict[str, Any]]) -> str:
    pairs = [(case, kept[name]) for case in cases if (name := f"{case.kind}: {case.name}") in kept]
    right = [(case, row) for case, row in pairs if "llc" in row]
    counts: dict[str, int] = {}
    for _, row in right:
        counts[row["verdict"]] = counts.get(row["verdict"], 0) + 1
    verdicts = ", ".join(f"{verdict} {count}" for verdict, count in sorted(counts.items(), key=lambda pair: -pair[1]))
    off = [(row["llc"] - row["truth"]) / math.hypot(row["sem"], row["truth_error"]) for _, row in right]
    within = f"{sum(abs(each) < 2 for each in off)} of {len(off)}"
    lines = [
        HEAD.format(date=datetime.date.today(), machine=machine(), verdicts=verdicts, within=within), PUBLISHED,
        "| | cases | sampler: median error | 95th percentile | largest | against λ: median | 95th percentile | largest |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    kinds = dict.fromkeys(case.kind for case in cases)
    lines += [summary(kind, [pair for pair in right if pair[0].kind == kind]) for kind in kinds]
    lines.append(summary("m > 1", [pair for pair in right if pair[0].multiplicity > 1]))
    lines.append(summary("**all**", right))
    lines += [
        "", "| case | exact here | measured | error | λ (m) | exact against λ | localization | lr | steps a chain | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for case, row in pairs:
        coefficient = f"{case.coefficient:.4g}" + (f" ({case.multiplicity})" if case.multiplicity > 1 else "")
        if "error" in row:
            lines.append(f"| {row['case']} | | {row['error'].splitlines()[0]} | | {coefficient} | | | | | |")
            continue
        known = f"{row['truth']:.4g}" + (f" ± {row['truth_error']:.1g}" if row["truth_error"] else "")
        lines.append(
            f"| {row['case']} | {known} | {row['llc']:.4g} ± {row['sem']:.2g} | {row['llc'] / row['truth'] - 1:+.1%} | {coefficient} | "
            f"{row['truth'] / case.coefficient - 1:+.1%} | {row['gamma']:g} | {row['lr']:.2g} | {row['steps']} | "
            f"{row['seconds'][0]:.0f} + {row['seconds'][1]:.0f} |"
        )
    if missing := [f"{case.kind}: {case.name}" for case in cases if f"{case.kind}: {case.name}" not in kept]:
        lines += ["", f"Not measured yet: {'; '.join(missing)}."]
    lines += ["", "Seconds are those of `calibrate` and of the run, one thread each, on a machine that others used too."]
    return "\n".join(lines) + "\n"


def summary(name: str, pairs: list[tuple[Case, dict[str, Any]]]) -> str:
    sampler = [abs(row["llc"] / row["truth"] - 1) for _, row in pairs]
    theory = [abs(row["llc"] / case.coefficient - 1) for case, row in pairs]
    return f"| {name} | {len(pairs)} | {' | '.join(spread(sampler))} | {' | '.join(spread(theory))} |"


def spread(errors: list[float]) -> list[str]:
    if not errors:
        return [""] * 3
    return [f"{each:.1%}" for each in (statistics.median(errors), float(np.quantile(errors, 0.95)), max(errors))]


if __name__ == "__main__":
    main()
