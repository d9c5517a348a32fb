"""`devinterp sweep STUDY.toml`: a sweep as a file, its plan, and what came of it."""

import warnings
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from devinterp.cli.options import JsonOption
from devinterp.cli.printing import inert, print_json, print_table
from devinterp.cli.study_file import StudyFile

if TYPE_CHECKING:
    import xarray as xr

    from devinterp.slt.sweep_forecast import Forecast, Seconds


def sweep_command(
    study: Annotated[Path, typer.Argument(help="TOML file; its keys are the arguments of devinterp.sweep and of sample.")],
    *,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check every input, try a few steps, say what it will take; make nothing.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Sample at every checkpoint of a training and print the LLCs. The same command goes on where it stopped."""
    from devinterp.slt.sweep_forecast import forecast
    from devinterp.slt.sweep_study import Study
    from devinterp.slt.sweeps import sweep

    asked = StudyFile.read(study)
    arguments = asked.arguments()
    if dry_run:
        plan = forecast(Study.of(**arguments))
        if as_json:
            print_json(_plan_of(plan))
        else:
            typer.echo(inert("\n".join(_lines(plan, asked))))
        if plan.failed:
            raise typer.Exit(2)
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "[0-9]+ of the sweep's")  # it is printed below
        tree = sweep(**arguments)
    if as_json:
        print_json(result_of(tree, asked.output_path))
    else:
        print_sweep(tree)
        where = str(asked.output_path)
        typer.echo(f"\nruns in {where!r}; from Python: devinterp.compute_llc({where!r}), devinterp.open_sweep({where!r})")
    if tree.attrs["failed"]:
        raise typer.Exit(1)


def print_sweep(tree: "xr.DataTree") -> None:
    """One line for each run, and what failed."""
    rows = [("run", "LLC", "± error", "R-hat", "ESS", "lr", "chains")]
    for run in _runs(tree):
        values = (f"{run[name]:.3g}" for name in ("llc_mean", "llc_sem", "rhat", "ess_bulk", "lr"))
        rows.append((run["run"], *values, ", ".join(f"{count} {verdict}" for verdict, count in run["verdicts"].items())))
    print_table([tuple(map(inert, row)) for row in rows])
    for name, reason in tree.attrs["failed"].items():
        typer.echo(inert(f"failed: {name}: {reason}"), err=True)
    typer.echo("(compare LLCs at equal n_beta and localization only)")


def _runs(tree: "xr.DataTree") -> list[dict[str, Any]]:
    """LLC and verdicts of every run that can be used."""
    from devinterp.slt.diagnosis import diagnose
    from devinterp.slt.llc import compute_llc
    from devinterp.store.sweeps import label, runs_of

    steps = dict(zip(tree.checkpoint.values, tree.step.values, strict=True)) if "step" in tree.coords else {}
    found = []
    for checkpoint, runs in runs_of(tree).items():
        for restriction, samples in runs.items():
            llc, verdicts = compute_llc(samples, on_diverged="drop"), diagnose(samples).verdict.values.tolist()
            numbers = {name: float(llc[name]) for name in ("llc_mean", "llc_sem", "rhat", "ess_bulk")}
            names = {"run": label(checkpoint, restriction), "checkpoint": checkpoint, "restriction": restriction}
            step = {"step": int(steps[checkpoint])} if steps else {}
            lr = float(samples.attrs["metadata"]["step_size"]["lr"])
            counts = {verdict: verdicts.count(verdict) for verdict in dict.fromkeys(verdicts)}
            found.append({**names, **step, **numbers, "lr": lr, "verdicts": counts})
    return found


def result_of(tree: "xr.DataTree", path: Path | str) -> dict[str, Any]:
    return {"output_path": str(path), "runs": _runs(tree), "failed": tree.attrs["failed"]}


def _plan_of(plan: "Forecast") -> dict[str, Any]:
    from devinterp.slt.sweep_forecast import ASSUMPTION

    return {**asdict(plan), "num_tasks": plan.num_tasks, "assumption": ASSUMPTION}


def _lines(plan: "Forecast", asked: StudyFile) -> list[str]:
    from devinterp.slt.sweep_forecast import ASSUMPTION

    lines = [f"checkpoints   {len(plan.checkpoints)}"]
    lines += [f"  {name}: {plan.failed.get(name, origin)}" for name, origin in plan.checkpoints.items()]
    if plan.restrictions:
        lines.append(f"restrictions  {len(plan.restrictions)}: {', '.join(plan.restrictions)}")
    stored = f" ({plan.num_stored} runs are stored already)" if plan.num_stored else ""
    lines += [
        f"tasks         {plan.num_tasks}: {plan.num_chains} chains of {plan.num_runs - plan.num_stored} runs{stored}",
        f"disk          {_size(plan.num_bytes)} at most in {str(asked.output_path)!r}, {_size(plan.num_bytes_free)} are free",
        f"time          about {_duration(plan.seconds)}",
        f"              tried on {plan.trial}: {_rates(plan.of_model)}",
    ]
    if plan.of_restriction is not None:
        lines.append(f"              each restriction: {_rates(plan.of_restriction)}")
    lines.append(f"              assumed: {ASSUMPTION}")
    if plan.failed:
        lines.append(f"{len(plan.failed)} checkpoints cannot be used; the others can")
    return lines


def _rates(seconds: "Seconds") -> str:
    load = f"{seconds.load:.2g} s to load, " if seconds.load else ""
    return f"{load}{seconds.start:.2g} s to start, {seconds.step:.2g} s a step, {seconds.draw:.2g} s more a draw"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
