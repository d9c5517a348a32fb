"""Speed of equal work by us, by `devinterp` 2.0.1 and by a hand-written loop (naive.py), and how far we are from the floor.

python benchmarks/speed.py --peer PEER_PYTHON [--quick] [--only NAME] [--rounds 3] [--device cuda]     (`make bench`; on an idle machine)

Every process makes its call twice, with another `init_seed` the second time: the first call and a further call. --quick, with a fifth
of the draws, and --only print and record nothing.
"""

import argparse
import datetime
import importlib.metadata
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from floor import floor
from processes import environment, num_cores, run
from workloads import QUICK, SETTINGS, SIDES, WORKLOADS, quicker

IMPORT_ROUNDS = 7
LEAST_IMPORT = 0.02
"""Seconds below which a ratio of imports would be one of noise"""
FLOORS = ("pythia14m", "tiny", "heads l0h1", "heads l3h1", "heads l5h1")
MEAN = "heads, mean"
NONE = "-"
"""Not measured"""
PLAN = tuple[str, str]
"""(workload, side)"""


@dataclass
class Measured:
    """Of one workload on one side."""

    first: list[float] = field(default_factory=list)
    further: list[float] = field(default_factory=list)
    growth: float | None = None
    """peak memory of the process tree above that before the call, in MB"""
    words: str = ""
    """why there are no figures"""

    def shown(self, which: str) -> str:
        seconds = getattr(self, which)
        return f"{statistics.median(seconds):.3g}" if seconds else self.words or NONE


# -- sampling and influences --


def measure(names: list[str], chosen: argparse.Namespace) -> dict[PLAN, Measured]:
    """Round by round all sides in turn; then one process of each, whose memory is watched and whose time is not used."""
    found: dict[PLAN, Measured] = {}
    here = Path(__file__).parent
    options = ["--device", chosen.device] + ["--quick"] * chosen.quick
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            script = [str(here / "workloads.py"), name]
            sides, more = WORKLOADS[name].sides, [*options, "--store", f"{folder}/{name}"]
            if WORKLOADS[name].kind == "bif":
                _, _, words = run([sys.executable, *script, "store", *more])
                assert not words, "no store to compute influences from"
            for turn, side in itertools.product(range(chosen.rounds + 1), sides):
                measured = found.setdefault((name, side), Measured())
                if measured.words:
                    continue
                python = chosen.peer if side == "peer" else sys.executable
                for_memory = turn == chosen.rounds
                calls, peak, measured.words = run(
                    [python, *script, side, *more, "--calls", "1" if for_memory else "2"], memory=for_memory
                )
                seconds = [call["seconds"] for call in calls]
                told = f"{peak:.0f} MB" if for_memory else ", ".join(f"{s:.3f} s" for s in seconds)
                print(f"{name}, {side}: {told} {measured.words}".rstrip(), flush=True)
                if for_memory:
                    measured.growth = peak - calls[0]["before"] if peak and calls else None
                else:
                    measured.first += seconds[:1]
                    measured.further += seconds[1:]
    return found


def add_mean_of_heads(found: dict[PLAN, Measured]) -> None:
    """Of the heads of three layers, call by call."""
    for side in SIDES:
        heads = [measured for (name, of), measured in found.items() if name.startswith("heads ") and of == side]
        if len(heads) > 1 and all(measured.further for measured in heads):
            mean = [
                [statistics.mean(s) for s in zip(*calls, strict=False)]
                for calls in zip(*((m.first, m.further) for m in heads), strict=True)
            ]
            found[MEAN, side] = Measured(*mean)


def names_of(found: dict[PLAN, Measured]) -> list[str]:
    """In order, the mean of the heads after them."""
    names = list(dict.fromkeys(name for name, _ in found if name != MEAN))
    if any(name == MEAN for name, _ in found):
        names.insert(1 + max(i for i, name in enumerate(names) if name.startswith("heads ")), MEAN)
    return names


def ratio(found: dict[PLAN, Measured], name: str, side: str, which: str) -> str:
    ours, other = (getattr(found.get((name, of), Measured()), which) for of in ("ours", side))
    return f"{statistics.median(other) / statistics.median(ours):.2f}" if ours and other else NONE


def speed_table(found: dict[PLAN, Measured]) -> list[str]:
    lines = [
        "| workload | ours (s) | 2.0.1 (s) | naive (s) | 2.0.1 / ours | naive / ours | first call: 2.0.1 / ours | naive / ours |",
        "|---|" + "---|" * 7,
    ]
    for name in names_of(found):
        cells = [found.get((name, side), Measured()).shown("further") for side in SIDES]
        cells += [ratio(found, name, side, which) for which in ("further", "first") for side in SIDES[1:]]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def first_and_memory_table(found: dict[PLAN, Measured]) -> list[str]:
    lines = [
        "| workload | first call: ours (s) | 2.0.1 (s) | naive (s) | memory: ours (MB) | 2.0.1 (MB) | naive (MB) |",
        "|---|" + "---|" * 6,
    ]
    for name in names_of(found):
        sides = [found.get((name, side), Measured()) for side in SIDES]
        cells = [measured.shown("first") for measured in sides]
        cells += [NONE if measured.growth is None else f"{measured.growth:.0f}" for measured in sides]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def spread(found: dict[PLAN, Measured]) -> str:
    """The largest, over workloads and sides, and whose."""
    wide = {
        key: (max(measured.further) - min(measured.further)) / statistics.median(measured.further)
        for key, measured in found.items()
        if len(measured.further) > 1
    }
    if not wide:
        return "One round."
    (name, side), most = max(wide.items(), key=lambda item: item[1])
    return f"Rounds differ by at most {most:.0%} ({name}, {side}), in the median {statistics.median(wide.values()):.0%}."


# -- the floor --


def floor_table(floors: dict[str, float], found: dict[PLAN, Measured], quick: bool) -> list[str]:
    lines = [
        "| workload | floor (ms a draw) | ours (ms a draw) | ours / floor | 2.0.1 / floor | naive / floor |",
        "|---|" + "---|" * 5,
    ]
    for name, least in floors.items():
        workload = quicker(WORKLOADS[name]) if quick else WORKLOADS[name]
        each = [found.get((name, side), Measured()).further for side in SIDES]
        draws = [statistics.median(s) / (workload.chains * workload.draws) if s else None for s in each]
        cells = [NONE if s is None else f"{s / least:.2f}" for s in draws]
        own = NONE if draws[0] is None else f"{1000 * draws[0]:.2f}"
        lines.append(f"| {name} | {1000 * least:.2f} | {own} | {' | '.join(cells)} |")
    return lines


# -- imports --


def import_table(peer: str, rounds: int) -> list[str]:
    """Seconds above an interpreter that does nothing."""
    statements = ("import devinterp", "from devinterp.slt.sampling import sample")
    commands: dict[PLAN, list[str]] = {}
    for side, python in (("ours", sys.executable), ("peer", peer)):
        commands["pass", side] = [python, "-c", "pass"]
        commands |= {(words, side): [python, "-c", words] for words in statements}
        if (script := Path(python).parent / "devinterp").exists():
            commands["devinterp --help", side] = [str(script), "--help"]
    times: dict[PLAN, list[float]] = {key: [] for key in commands}
    for turn, (key, command) in itertools.product(range(rounds + 1), commands.items()):
        started = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True, env=environment(ours=key[1] == "ours"))
        if turn:  # the first fills the caches
            times[key].append(time.perf_counter() - started)
    lines = ["| | ours (s) | 2.0.1 (s) | 2.0.1 / ours |", "|---|---|---|---|"]
    for words in (statements[0], "devinterp --help", statements[1]):
        above = [
            statistics.median(times[words, side]) - statistics.median(times["pass", side]) if (words, side) in times else None
            for side in ("ours", "peer")
        ]
        cells = [NONE if s is None else f"{s:.3f}" for s in above]
        known = all(s is not None and s > LEAST_IMPORT for s in above)
        lines.append(f"| `{words}` | {' | '.join(cells)} | {f'{above[1] / above[0]:.1f}' if known else NONE} |")
    return lines


# -- the report --


def heading(chosen: argparse.Namespace, load: float) -> str:
    from demo_checkpoint import machine

    asked = "import importlib.metadata as m; print(*(m.version(n) for n in ('torch', 'transformers')))"
    peer = subprocess.run([chosen.peer, "-c", asked], capture_output=True, text=True, check=True).stdout.split()
    where = torch.cuda.get_device_name() if chosen.device == "cuda" else f"{num_cores()} cores"
    return (
        f"`python benchmarks/speed.py --peer PEER_PYTHON{' --device cuda' * (chosen.device == 'cuda')}`, {datetime.date.today()}, {machine()}, "
        f"{where}, transformers {importlib.metadata.version('transformers')}; the peer's torch {peer[0]}, transformers {peer[1]}. "
        f"Load before: {load:.1f}. Medians of {chosen.rounds} rounds, all sides in turn, every measurement in a fresh process. Sampling "
        f"with our defaults, {SETTINGS}; sizes are in `workloads.py`, *naive* is `naive.py`. Seconds are those of a further call in a "
        "process that has made one before; first calls are in the second table, with the peak memory of the process and its workers above "
        "that before the first call. Masks are made before the call, except in *suite*; *bif* is `compute_bif` alone, on one store."
    )


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--peer", required=True)
    arguments.add_argument("--rounds", type=int, default=0, help="3, with --quick 1")
    arguments.add_argument("--only", default="", help="workloads whose names begin so, or import")
    arguments.add_argument("--quick", action="store_true")
    arguments.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    chosen = arguments.parse_args()
    chosen.rounds = chosen.rounds or (1 if chosen.quick else 3)
    if chosen.device == "cuda" and not torch.cuda.is_available():
        sys.exit("there is no CUDA device here: nothing measured")
    load = os.getloadavg()[0]
    if load > 0.5:
        print(f"the machine is not idle (load {load:.1f}): these figures are not to be relied on")
    names = [name for name in WORKLOADS if name.startswith(chosen.only)]
    floors = {
        name: floor(WORKLOADS[name], num_cores() if chosen.device == "cpu" else 1, chosen.device)
        for name in FLOORS
        if name in names
    }
    found = measure(names, chosen)
    add_mean_of_heads(found)
    parts = [heading(chosen, load)]
    if found:
        parts += ["\n".join(speed_table(found)), spread(found), "\n".join(first_and_memory_table(found))]
    if floors:
        where = "on one thread, divided by the cores" if chosen.device == "cpu" else "on the GPU"
        parts += [
            f"The floor: the matrix products that a draw cannot avoid (`floor.py`), each timed alone {where}.",
            "\n".join(floor_table(floors, found, chosen.quick)),
        ]
    if "import".startswith(chosen.only) and chosen.device == "cpu":
        rounds = 2 if chosen.quick else IMPORT_ROUNDS
        parts += [f"Above an interpreter that does nothing, medians of {rounds}:", "\n".join(import_table(chosen.peer, rounds))]
    text = "\n\n".join(parts)
    if chosen.quick or chosen.only:
        print(f"{text}\n\n(not recorded{f'; 1/{QUICK} of the draws' * chosen.quick})")
        return
    from demo_checkpoint import record

    record("Speed" if chosen.device == "cpu" else "Speed on a GPU", text)


if __name__ == "__main__":
    main()
