"""How the cost of our runs grows with chains, draws, observable batches and restrictions; peak memory with draws and restrictions.

python benchmarks/growth.py [--quick]        (part of `make bench`; 3 to 5 minutes on two idle cores; --quick only prints)

The tiny transformer of the speed benchmark. Seconds are those of a further call in a process that has made this call before.
"""

import argparse
import datetime
import json
import os
import sys
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path

from processes import run
from workloads import WORKLOADS, Workload, megabytes, of_library

HEADS = tuple(f"l{layer}h{head}" for layer in range(3) for head in range(4))
PANELS = {
    "chains": (1, 2, 4, 8, 16, 32, 64),
    "draws": (25, 50, 100, 200, 400),
    "observable batches": (1, 2, 4, 8, 16),
    "restrictions": (1, 2, 4, 8),
}
MEMORY = {"draws": (50, 200, 800, 1600), "restrictions": (1, 2, 4, 8)}
Rows = list[tuple[int, float, float]]
"""(how many, seconds of the call, seconds per draw)"""


def case(panel: str, value: int) -> Workload:
    """Two chains of 20 draws and one observable of 2 batches, where nothing else is said; a suite holds the whole model too."""
    base = replace(WORKLOADS["tiny"], chains=2, draws=20, observables={"held": 2})
    match panel:
        case "chains":
            return replace(base, chains=value)
        case "draws":
            return replace(base, draws=value)
        case "observable batches":
            return replace(base, observables={"held": value})
    spread = HEADS[:: len(HEADS) // value][:value]  # over all layers
    return replace(base, kind="suite", observables={"task": 2, "held": 2}, restrictions=("full", *spread))


def draws_of(workload: Workload) -> int:
    runs = len(workload.restrictions) if workload.kind == "suite" else 1
    return runs * workload.chains * workload.draws


def worker(panel: str, values: list[int], calls: int) -> None:
    """In a process of its own: a line for every value, of the last of some calls."""
    warnings.simplefilter("ignore")
    for value in values:
        call = of_library(case(panel, value), "ours", "cpu")
        before = megabytes()
        with tempfile.TemporaryDirectory() as folder:
            for number in range(calls):
                started = time.perf_counter()
                call(number + 1, f"{folder}/{number}")
                seconds = time.perf_counter() - started
        print(json.dumps({"value": value, "seconds": seconds, "before": before}), flush=True)


def seconds_of(panel: str, values: tuple[int, ...]) -> Rows:
    lines, _, words = run([sys.executable, __file__, "--worker", panel, "--values", *map(str, values)])
    assert not words, words
    rows = [(line["value"], line["seconds"], line["seconds"] / draws_of(case(panel, line["value"]))) for line in lines]
    print(panel, [(value, round(seconds, 3), f"{1000 * each:.2f} ms") for value, seconds, each in rows], flush=True)
    return rows


def memory_of(panel: str, values: tuple[int, ...]) -> list[tuple[int, float]]:
    """Peak of the process and its workers above that before the call, in MB; a process for every value."""
    found = []
    for value in values:
        command = [sys.executable, __file__, "--worker", panel, "--calls", "1", "--values", str(value)]
        lines, peak, words = run(command, memory=True)
        assert not words, words
        found.append((value, peak - lines[0]["before"]))
    print(f"memory, {panel}", [(value, f"{size:.0f} MB") for value, size in found], flush=True)
    return found


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--quick", action="store_true")
    arguments.add_argument("--worker", default="", help=argparse.SUPPRESS)
    arguments.add_argument("--values", type=int, nargs="*", help=argparse.SUPPRESS)
    arguments.add_argument("--calls", type=int, default=2, help=argparse.SUPPRESS)
    chosen = arguments.parse_args()
    if chosen.worker:
        worker(chosen.worker, chosen.values, chosen.calls)
        return
    kept = 3 if chosen.quick else None
    times = {panel: seconds_of(panel, values[:kept]) for panel, values in PANELS.items()}
    sizes = {panel: memory_of(panel, values[: kept and 2]) for panel, values in MEMORY.items()}
    if chosen.quick:
        with tempfile.TemporaryDirectory() as folder:
            plot(times, sizes, Path(folder) / "growth.png")
        print(table(times, sizes))
        return
    from demo_checkpoint import machine, record

    plot(times, sizes, Path(__file__).parent / "growth.png")
    heading = (
        f"`python benchmarks/growth.py`, {datetime.date.today()}, {machine()}. Load before: {os.getloadavg()[0]:.1f}. The tiny transformer of "
        "the speed benchmark; 2 chains of 20 draws, one step a draw, one observable of 2 batches, unless that is what is counted. "
        "Restrictions are heads, each a run beside that of the whole model, with two observables. Memory is the peak of the process "
        "and its workers above that before the call; it jumps where a run is long enough for worker processes. Picture: `growth.png`."
    )
    record("How cost grows", f"{heading}\n\n{table(times, sizes)}")


def table(times: dict[str, Rows], sizes: dict[str, list[tuple[int, float]]]) -> str:
    lines = ["| what | how many | seconds | ms a draw | what doubling costs | peak memory (MB) |", "|---|---|---|---|---|---|"]
    for panel, rows in times.items():
        memory = dict(sizes.get(panel, []))
        known = {value: (seconds, each) for value, seconds, each in rows}
        for value in sorted(known | memory):
            seconds, each = known.get(value, (None, None))
            half = known.get(value // 2, (None, None))[0]
            cells = [
                "" if seconds is None else f"{seconds:.3g}",
                "" if each is None else f"{1000 * each:.2f}",
                "" if half is None or seconds is None else f"x {seconds / half:.2f}",
                f"{memory[value]:.0f}" if value in memory else "",
            ]
            lines.append(f"| {panel} | {value} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(times: dict[str, Rows], sizes: dict[str, list[tuple[int, float]]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6), layout="constrained")
    axes = figure.subplots(2, 3).flat
    for axis, (panel, rows) in zip(axes, times.items(), strict=False):
        axis.plot([value for value, *_ in rows], [1000 * each for *_, each in rows], "o-")
        axis.set_ylabel("ms a draw")
        axis.set_xlabel(panel)
    for axis, (panel, points) in zip(list(figure.axes)[len(times) :], sizes.items(), strict=True):
        axis.plot(*zip(*points, strict=True), "s-", color="C1")
        axis.set_ylabel("peak memory (MB)")
        axis.set_xlabel(panel)
    for axis in figure.axes:
        axis.set_xscale("log", base=2)
        ticks = axis.lines[0].get_xdata()
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
        axis.set_ylim(0, 1.1 * max(axis.lines[0].get_ydata()))
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    print(f"picture: {path}")


if __name__ == "__main__":
    main()
