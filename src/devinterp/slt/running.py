"""A run, or a suite of runs that differ in their masks: plan, place the chains, open the stores."""

import logging
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import xarray as xr

from devinterp.engine.dispatch import Death, Step, do
from devinterp.engine.progress import Progress
from devinterp.engine.stopping import Stop, stop_signals
from devinterp.errors import ChainDiverged, ChainFailed
from devinterp.slt.planning import Planned, Question, plan_all
from devinterp.slt.requests import Request
from devinterp.slt.tasks import Run, chain_tasks
from devinterp.store.folder import RunFolder
from devinterp.store.mirror import Mirror, discard, only_writer_at
from devinterp.store.reader import metadata_of, open_store
from devinterp.store.recording import Baseline, Chains, Failure, record
from devinterp.store.runs import Stored, metadata_for, open_writer
from devinterp.store.schema import COMPLETE, DIVERGED, FAILED

logger = logging.getLogger("devinterp")

Found = TypeVar("Found")


def run(request: Request, bar: Progress) -> xr.DataTree:
    """The run asked for: as stored, or finished, or made."""
    return open_store(run_to_store(request, bar), ours=True)


def run_to_store(request: Request, bar: Progress) -> Path | str:
    """Where the run asked for is stored, after what is missing of it was computed.

    Raises:
        ChainFailed: a chain ended in an error; the others are stored.
        ChainDiverged: with on_diverged="raise".
    """
    if _is_complete(request, bar) and request.place is not None:
        return request.place
    with ExitStack() as held, stop_signals() as stop, request.told_of_the_disk():
        (made,) = prepare([request], held, is_first=True)
        if isinstance(made, Exception):
            raise made
        if failures := _carry_out([made], None, bar, stop):
            raise _failed(failures[0])
        return request.place or made.store.path


def run_suite(
    requests: Mapping[str, Request], source: Path | str, bar: Progress
) -> tuple[dict[str, xr.DataTree], dict[str, str]]:
    """Runs with the model, data and step size of a run that has just been made, at `source`; what failed, and why."""
    paths: dict[str, Path | str] = {}
    failed: dict[str, str] = {}
    left: dict[str, Request] = {}
    with ExitStack() as held, stop_signals() as stop:
        for name, request in requests.items():
            try:
                if _is_complete(request, bar) and request.place is not None:
                    paths[name] = request.place
                else:
                    left[name] = request
            except Exception as error:  # whatever it is, the other restrictions are not lost
                failed[name] = _told(error)
        found = dict(zip(left, prepare(list(left.values()), held, is_first=False), strict=True))
        failed |= {name: _told(error) for name, error in found.items() if isinstance(error, Exception)}
        made = {name: one for name, one in found.items() if isinstance(one, Run)}
        failures: dict[int, Failure] = {}
        if made:
            with next(iter(made.values())).request.told_of_the_disk():
                failures = _carry_out(list(made.values()), source, bar, stop)
    for number, (name, one) in enumerate(made.items()):
        if number in failures:
            failed[name] = failures[number].message
        else:
            paths[name] = one.request.place or one.store.path
    for name, reason in failed.items():
        logger.warning("restriction %r failed: %s", name, reason)
    return {name: open_store(paths[name], ours=True) for name in requests if name in paths}, failed


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def prepare(requests: Sequence[Request], held: ExitStack, *, is_first: bool) -> list[Run | Exception]:
    """Plan runs, and make their stores or open them; of one that cannot be, why.

    `is_first=False` where the same model and data have just been seen. From here until `held` is closed no other process
    writes the runs.
    """
    begun = [_tried(_begin, request, held, is_first, len(requests)) for request in requests]
    questions = [each.question for each in begun if isinstance(each, _Begun)]
    answers = iter(plan_all(questions, requests[0].site) if questions else [])
    return [_tried(_opened, each, next(answers)) if isinstance(each, _Begun) else each for each in begun]


def _tried(function: Callable[..., Found], *arguments: Any) -> Found | Exception:
    try:
        return function(*arguments)
    except Exception as error:
        return error


@dataclass(frozen=True)
class _Begun:
    """A run of which this process is the only writer."""

    request: Request
    folder: RunFolder | None
    mirror: Mirror | None
    known: Stored | None
    question: Question


def _begin(request: Request, held: ExitStack, is_first: bool, num_runs: int) -> _Begun:
    inputs = request.inputs
    here = inputs.workers.are_known
    if is_first and here:
        with inputs.checkpoint.ready():
            inputs.probe(request.path)
    folder, mirror = held.enter_context(only_writer_at(request.path, request.objects))
    known = request.stored_here()  # again: another process may have ended in the meantime
    question = Question(
        inputs.checkpoint, inputs.settings, inputs.paths, inputs.batches, inputs.observables, request.masks,
        {} if known is None else known.metadata, is_first, num_runs, None if here else inputs.largest_id,
    )  # fmt: skip
    return _Begun(request, folder, mirror, known, question)


def _opened(begun: _Begun, found: Planned | Exception) -> Run:
    if isinstance(found, Exception):
        raise found
    request, inputs = begun.request, begun.request.inputs
    plan = begun.question.plan(found)
    metadata = metadata_for(
        inputs.settings, inputs.model, inputs.batches, inputs.observables, request.fingerprint, inputs.device_type
    )
    metadata |= found.described | {"step_size": asdict(found.step_size)}
    store = open_writer(begun.folder, plan, metadata, begun.known, resume=inputs.paths.resume)
    if begun.mirror is not None:
        begun.mirror.begin()
    return Run(request, plan, store, found.placement, begun.mirror)


def _is_complete(request: Request, bar: Progress) -> bool:
    """Whether the very run asked for is stored, with nothing missing or damaged."""
    known = request.stored()
    if known is None or not known.completed or request.place is None:
        return False
    if request.inputs.on_diverged == "raise":
        _raise_for_diverged(open_store(request.place, ours=True))
    logger.info("%r holds this very run, complete; nothing to compute", str(request.place))
    if request.objects is not None and request.path is not None:
        discard(request.path)
    bar.skip(request.inputs.num_rows)
    return True


def _carry_out(runs: Sequence[Run], source: Path | str | None, bar: Progress, stop: Stop) -> dict[int, Failure]:
    """Do what is left of each run; by number, those with a chain that failed."""
    failures: dict[int, Failure] = {}
    walkers = [made.walkers for made in runs]
    _refuse_diverged(runs, walkers)
    end = bar.done + bar.skipped + sum(made.request.inputs.num_rows for made in runs)
    for placement in {made.placement: None for made in runs}:
        numbers = [i for i, made in enumerate(runs) if made.placement == placement]
        tasks: list[tuple[list[int], Baseline | Chains]] = [
            ([i], Baseline(runs[i].plan, runs[i].store, runs[i].request.inputs.paths.checkpoint_every, source))
            for i in numbers
            if runs[i].needs_baseline
        ]
        tasks += chain_tasks(runs, numbers, walkers, placement)
        steps = do(record, [task for _, task in tasks], placement, runs[numbers[0]].request.site)
        outcomes = _followed(steps, runs, bar, stop)
        for (members, task), outcome in zip(tasks, outcomes, strict=True):
            failures |= _failures_of(runs, members, task, outcome)
    bar.skip(end - bar.done - bar.skipped)
    for i, made in enumerate(runs):
        _tell_of_diverged(made, [chain for walker in walkers[i] for chain in walker])
        if i not in failures:
            made.store.finish()
    return failures


def _followed(steps: Generator[Step, None, list[Any]], runs: Sequence[Run], bar: Progress, stop: Stop) -> list[Any]:
    """What the tasks return, after all of their steps were counted; closed at once when interrupted, so that they commit."""
    with closing(steps):
        while True:
            try:
                step = next(steps)
            except StopIteration as ended:
                outcomes: list[Any] = ended.value
                return outcomes
            bar.update(step.count, step.note)
            for made in runs:
                if made.mirror is not None:
                    made.mirror.raise_if_lost()
            if stop.signal is not None:
                steps.close()
                kept = all(made.store.folder is not None for made in runs)
                stop.raise_if_asked(
                    f"What was done is kept in {runs[0].store.path}; the same call goes on from there."
                    if kept
                    else "Nothing is kept: the run had no output_path."
                )


def _failures_of(runs: Sequence[Run], members: Sequence[int], task: Baseline | Chains, outcome: Any) -> dict[int, Failure]:
    if not isinstance(outcome, Death):
        return {members[i]: failure for i, failure in (outcome or {}).items()}
    reason = Failure(f"its worker process died, perhaps for lack of memory ({outcome.reason})", "")
    if isinstance(task, Chains):
        for store, walkers in zip(task.stores, task.walkers, strict=True):
            for chain in (chain for chains in walkers for chain in chains):
                if store.status(chain) not in (COMPLETE, DIVERGED):
                    store.write("chain_status", FAILED, chain)
    return dict.fromkeys(members, reason)


def _failed(failure: Failure) -> ChainFailed:
    error = ChainFailed(f"{failure.message}. Chains that ended well are stored; the same call again runs the others.")
    if failure.traceback:
        error.add_note(failure.traceback)
    return error


def _tell_of_diverged(made: Run, chains: Sequence[int]) -> None:
    for chain in chains:
        if made.store.status(chain) == DIVERGED:
            at = made.store.diverged_at(chain)
            logger.warning("%s The other chains went on.", ChainDiverged(chain, at, made.plan.sampler.lr))


def _refuse_diverged(runs: Sequence[Run], walkers: Sequence[list[tuple[int, ...]]]) -> None:
    """With on_diverged="raise", of an unfinished run of which a chain has diverged in an earlier call."""
    for made, left in zip(runs, walkers, strict=True):
        for chain in made.finished.difference(*left):
            if made.request.inputs.on_diverged == "raise" and made.store.status(chain) == DIVERGED:
                raise ChainDiverged(chain, made.store.diverged_at(chain), made.plan.sampler.lr)


def _raise_for_diverged(known: xr.DataTree) -> None:
    """For chains that diverged in an earlier call."""
    for chain, at in enumerate(known.to_dataset()["diverged_at"].values):
        if at >= 0:
            raise ChainDiverged(chain, int(at), float(metadata_of(known)["step_size"]["lr"]))
