"""A run, or a suite of runs that differ in their masks: plan, place the chains, open the stores."""

import logging
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import BrokenExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import xarray as xr

from devinterp.engine.chain import Plan
from devinterp.engine.curvature import StepSize, choose_step_size, warn_if_unstable
from devinterp.engine.forward import Forward
from devinterp.engine.placement import Placement, decide, do, num_cores
from devinterp.engine.progress import Progress
from devinterp.engine.proof import find_forward, precision_error, steps_together
from devinterp.engine.selection import Selection
from devinterp.errors import ChainDiverged, ChainFailed
from devinterp.slt.requests import Request
from devinterp.store.reader import metadata_of, open_store
from devinterp.store.recording import Baseline, Chains, Failure, record
from devinterp.store.runs import metadata_for, open_writer
from devinterp.store.schema import COMPLETE, DIVERGED, FAILED, RUNNING
from devinterp.store.writer import StoreWriter

logger = logging.getLogger("devinterp")

RUNS_TOGETHER = 8
"""Restrictions that step together at most: they share passes through frozen layers, and are lost together when interrupted"""

Forwards = dict[frozenset[str], Forward]
"""Fast paths by the parameters that move, so that restrictions of the same parameters are proven once"""


@dataclass(frozen=True)
class Run:
    """A run that is planned and has a store, with chains still to be done."""

    request: Request
    plan: Plan
    store: StoreWriter
    placement: Placement

    @property
    def due(self) -> list[int]:
        """What failed once, for lack of memory or disk, is run again."""
        return [chain for chain, status in enumerate(self.store.status()) if status in (RUNNING, FAILED)]


def run(request: Request, bar: Progress) -> xr.DataTree:
    """The run asked for: as stored, or finished, or made."""
    return open_store(run_to_store(request, bar), ours=True)


def run_to_store(request: Request, bar: Progress) -> Path:
    """Where the run asked for is stored, after what is missing of it was computed.

    Raises:
        ChainFailed: a chain ended in an error; the others are stored.
        ChainDiverged: with on_diverged="raise".
    """
    known = _stored(request, bar)
    if known is not None and known.attrs.get("completed") and request.path is not None:
        return request.path
    made = prepare(request, known, {}, first=True)
    if failures := _carry_out([made], None, bar):
        raise _failed(failures[0])
    return made.store.path


def run_suite(requests: Mapping[str, Request], source: Path, bar: Progress) -> tuple[dict[str, xr.DataTree], dict[str, str]]:
    """Runs with the model, data and step size of a run that has just been made, at `source`; what failed, and why."""
    runs: dict[str, xr.DataTree] = {}
    failed: dict[str, str] = {}
    prepared: dict[str, Run] = {}
    forwards: Forwards = {}
    for name, request in requests.items():
        try:
            known = _stored(request, bar)
            if known is not None and known.attrs.get("completed"):
                runs[name] = known
            else:
                prepared[name] = prepare(request, known, forwards, first=False, num_runs=len(requests))
        except Exception as error:  # whatever it is, the other restrictions are not lost
            failed[name] = f"{type(error).__name__}: {error}"
    failures = _carry_out(list(prepared.values()), source, bar)
    for number, (name, made) in enumerate(prepared.items()):
        if number in failures:
            failed[name] = failures[number].message
        else:
            runs[name] = open_store(made.store.path, ours=True)
    for name, reason in failed.items():
        logger.warning("restriction %r failed: %s", name, reason)
    return {name: runs[name] for name in requests if name in runs}, failed


def prepare(request: Request, known: xr.DataTree | None, forwards: Forwards, *, first: bool, num_runs: int = 1) -> Run:
    """Plan a run and make its store, or open it. `first=False` where the same model and data have just been seen."""
    inputs, settings, checkpoint = request.inputs, request.inputs.settings, request.inputs.checkpoint
    told: Mapping[str, Any] = {} if known is None else metadata_of(known)
    with checkpoint.ready():
        if first:
            inputs.probe(request.path)
        selection = Selection.of(checkpoint.parameters, request.masks)
        moving = frozenset(piece.name for piece in selection.pieces)
        if moving not in forwards:
            forwards[moving] = find_forward(
                checkpoint, selection, inputs.batches.micro(0, 0), reuse_prefix=inputs.paths.reuse_prefix,
                compiled=inputs.paths.compile, precision=settings.precision,
            )  # fmt: skip
        plan = Plan(settings, settings.sampler(1.0), forwards[moving], selection, inputs.batches, inputs.observables)
        step_size = StepSize(**told["step_size"]) if told else _step_size(plan)
        plan = replace(plan, sampler=settings.sampler(step_size.lr))
        plan, placement = _placed(plan, inputs.paths.chains_together, told.get("computed"), num_runs)
        if first and settings.lr != "auto" and not told:
            warn_if_unstable(plan)
        metadata = metadata_for(settings, inputs.model, inputs.observables, request.fingerprint, checkpoint.device)
        metadata |= {"step_size": asdict(step_size), "computed": asdict(placement) | plan.forward.described()}
        if settings.precision is not None:
            metadata["precision_error"] = precision_error(plan.forward, plan.observables, settings.batch_size)
        return Run(request, plan, open_writer(request.path, plan, metadata, known), placement)


def _placed(plan: Plan, asked: str, stored: Mapping[str, Any] | None, num_runs: int) -> tuple[Plan, Placement]:
    """Where the chains run; a store that is gone on with, as it began."""
    placement = Placement(stored["way"], stored["threads"]) if stored else decide(asked, plan, num_runs)
    if placement.way != "vmap":
        return plan, placement
    together = replace(plan, forward=replace(plan.forward, head=None))  # its gradients are made outside of autograd
    if stored or steps_together(together):
        return together, placement
    return plan, replace(placement, way="sequential")


def _stored(request: Request, bar: Progress) -> xr.DataTree | None:
    known = request.stored()
    if known is not None and request.inputs.on_diverged == "raise":
        _raise_for_diverged(known)
    if known is not None and known.attrs.get("completed"):
        logger.info("%r holds this very run, complete; nothing to compute", str(request.path))
        bar.skip(request.inputs.num_rows)
    return known


def _step_size(plan: Plan) -> StepSize:
    return choose_step_size(plan) if plan.settings.lr == "auto" else StepSize(float(plan.settings.lr))


def _carry_out(runs: Sequence[Run], source: Path | None, bar: Progress) -> dict[int, Failure]:
    """Do what is due of each run; by number, those with a chain that failed."""
    failures: dict[int, Failure] = {}
    due = [made.due for made in runs]
    end = bar.done + bar.skipped + sum(made.request.inputs.num_rows for made in runs)
    for placement in {made.placement: None for made in runs}:
        numbers = [i for i, made in enumerate(runs) if made.placement == placement]
        # the baseline also where all chains are done: it may be what was interrupted
        tasks: list[tuple[list[int], Baseline | Chains]] = [
            ([i], Baseline(runs[i].plan, runs[i].store, source)) for i in numbers
        ]
        tasks += _chain_tasks(runs, numbers, due, placement)
        outcomes = _followed(do(record, [task for _, task in tasks], placement), bar)
        for (members, task), outcome in zip(tasks, outcomes, strict=True):
            failures |= _failures_of(runs, members, task, outcome)
    bar.skip(end - bar.done - bar.skipped)
    for i, made in enumerate(runs):
        _tell_of_diverged(made, due[i])
        if i not in failures:
            made.store.finish()
    return failures


def _followed(steps: Generator[str, None, list[Any]], bar: Progress) -> list[Any]:
    """What the steps return, after all of them were counted; closed at once when interrupted, so that rows are written."""
    with closing(steps):
        while True:
            try:
                bar.update(next(steps))
            except StopIteration as ended:
                outcomes: list[Any] = ended.value
                return outcomes


def _chain_tasks(
    runs: Sequence[Run], numbers: Sequence[int], due: Sequence[list[int]], placement: Placement
) -> list[tuple[list[int], Chains]]:
    """Who steps together: where modules are frozen, as many as share them, spread evenly over the workers."""
    workers = max(1, num_cores() // placement.threads) if placement.way == "processes" else 1
    shared = [i for i in numbers if runs[i].plan.forward.prefix is not None]
    groups: list[tuple[list[int], list[list[tuple[int, ...]]]]] = []
    if len(shared) == 1:  # of one run, its chains
        (i,) = shared
        walkers = placement.chains_per_walker(due[i])
        groups += [([i], [walkers[worker::workers]]) for worker in range(min(workers, len(walkers)))]
    elif shared:  # each layer costs something else: dealt out in turn
        count = max(-(-len(shared) // RUNS_TOGETHER), min(workers, len(shared)))
        groups += [
            (shared[number::count], [placement.chains_per_walker(due[i]) for i in shared[number::count]])
            for number in range(count)
        ]
    groups += [([i], [[walker]]) for i in numbers if i not in shared for walker in placement.chains_per_walker(due[i])]
    return [
        (
            members,
            Chains(
                tuple(runs[i].plan for i in members),
                tuple(runs[i].store for i in members),
                tuple(map(tuple, walkers)),
                stop_at_divergence=runs[members[0]].request.inputs.on_diverged == "raise",
            ),
        )
        for members, walkers in groups
    ]  # fmt: skip


def _failures_of(runs: Sequence[Run], members: Sequence[int], task: Baseline | Chains, outcome: Any) -> dict[int, Failure]:
    if not isinstance(outcome, BrokenExecutor):
        return {members[i]: failure for i, failure in outcome.items()}
    reason = Failure(f"its worker process died, perhaps for lack of memory ({outcome})", "")
    if isinstance(task, Chains):
        for store, walkers in zip(task.stores, task.walkers, strict=True):
            for chain in (chain for chains in walkers for chain in chains):
                if store.status()[chain] not in (COMPLETE, DIVERGED):
                    store.write("chain_status", FAILED, chain)
    return dict.fromkeys(members, reason)


def _failed(failure: Failure) -> ChainFailed:
    error = ChainFailed(f"{failure.message}. Chains that ended well are stored; the same call again runs the others.")
    if failure.traceback:
        error.add_note(failure.traceback)
    return error


def _tell_of_diverged(made: Run, due: Sequence[int]) -> None:
    status = made.store.status()
    for chain in due:
        if status[chain] == DIVERGED:
            at = made.store.diverged_at(chain)
            logger.warning("%s The other chains went on.", ChainDiverged(chain, at, made.plan.sampler.lr))


def _raise_for_diverged(known: xr.DataTree) -> None:
    """For chains that diverged in an earlier call."""
    for chain, at in enumerate(known.to_dataset()["diverged_at"].values):
        if at >= 0:
            raise ChainDiverged(chain, int(at), float(metadata_of(known)["step_size"]["lr"]))
