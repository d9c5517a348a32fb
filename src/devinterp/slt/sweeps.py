"""`sweep()`: the same run at every checkpoint of a training, or the same suite of restrictions."""

import logging
import os
import signal
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from contextvars import copy_context
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import xarray as xr

from devinterp.engine.origin import quiet
from devinterp.engine.placement import threads
from devinterp.engine.progress import Part, Progress
from devinterp.engine.stopping import Stop, heard_by_threads, stop_signals
from devinterp.errors import ChainsUnusable, RunLocked, RunMismatchError, StorageError
from devinterp.slt.running import run_to_store
from devinterp.slt.susceptibilities import run_all
from devinterp.slt.sweep_study import Requests, Study
from devinterp.store.sweeps import label, listed, opened

logger = logging.getLogger("devinterp")

UNDER_WAY = 4
"""Checkpoints at once with an executor, at most: each holds one model in memory here, besides those of the workers"""
SECONDS_BETWEEN_LOOKS = 0.2


def sweep(
    checkpoints: Any,
    dataset: Any,
    observables: Mapping[str, Any],
    *,
    output_path: str | os.PathLike[str],
    weight_restrictions: Mapping[str, Any] | None = None,
    sampling_task: str | None = None,
    executor: Executor | None = None,
    devices: Sequence[str] | None = None,
    on_diverged: str = "record",
    progress: bool = True,
    **sampling: Any,
) -> xr.DataTree:
    """Sample at every checkpoint of a training, with one set of settings, and open all runs as one.

    What `compute_llc`, `diagnose`, `compute_bif` and `compute_susceptibilities` make of the result has the dim `checkpoint`.
    Asked for again, what is stored is not sampled again: an interrupted sweep goes on where it stopped, and checkpoints that
    are new are added. A checkpoint that fails is warned about and listed in `attrs["failed"]`; the others go on.

    The law that is sampled is the same at every checkpoint. With `lr="auto"` its step size is chosen for each checkpoint by
    itself (on the whole model, where there are restrictions) and listed as `lr`: a step that is stable where curvature is
    largest would leave chains elsewhere unmoved, and a checkpoint that is added later would change all others. Estimates by
    "leimkuhler_matthews" do not depend on it beyond its stability; for SGLD "auto" keeps lr times the largest precision equal,
    and with it the relative bias along the stiffest direction. Pass a number for the same step everywhere.

    Args:
        checkpoints: name -> where the model is: a directory written by `save_pretrained`, "hub id" or "hub id@revision", or a
            function that returns a module (with an executor, one that can be pickled); `devinterp.revisions` makes such a
            dict; or a folder of checkpoints such as `checkpoint-500`, the output_dir of a Trainer, sorted by their steps. Each
            model is loaded when its turn comes. Code that comes with a checkpoint is never run.
        dataset, observables: as in `sample`, the same for all.
        output_path: folder of the runs, ordinary stores: `<checkpoint>.zarr`, or `<checkpoint>_<restriction>.zarr`. Letters,
            digits and ".-+= " of a checkpoint's name are kept, all else becomes "_".
        weight_restrictions: as in `susceptibilities`: one run for each at every checkpoint; with "full", the whole model.
        sampling_task: with weight_restrictions, what `compute_susceptibilities` takes for this sweep; None = it is to be said
            there, if at all.
        executor, devices: as in `sample`. With an executor up to 4 checkpoints are under way at once, and its workers load
            directories and hub ids themselves.
        on_diverged: "record" keeps a run of which a chain diverged, unless all did; "raise" counts it as failed.
        progress: one bar over all runs, or log lines without a terminal.
        **sampling: settings of `sample`, among them lr and n_beta.

    Returns:
        DataTree, read lazily: a node for each checkpoint, named after it, which is what `sample` would have returned; with
        restrictions one below it for each. Coordinates `checkpoint`, `lr`, and `step` where all names tell one. Attributes
        `failed` (checkpoint, or checkpoint/restriction -> reason), `restrictions`, `sampling_task`. `open_sweep(output_path)`
        gives it again.

    Raises:
        DevinterpInputError: an argument cannot be used; before any chain starts and before any file is made.
        RunMismatchError: output_path holds a sweep with other settings or data.
        StorageError: the disk is full or fails; what was committed is kept.
        ChainsUnusable: every checkpoint failed.
    """
    study = Study.of(
        checkpoints, dataset, observables, output_path=output_path, weight_restrictions=weight_restrictions,
        sampling_task=sampling_task, executor=executor, devices=devices, on_diverged=on_diverged, **sampling,
    )  # fmt: skip
    made = carry_out(study, UNDER_WAY if executor is not None else 1, progress)
    tree = opened(study.folder, replace(study.record, failed=made.failed), ours=True)
    if failed := tree.attrs["failed"]:
        warnings.warn(f"{len(failed)} of the sweep's checkpoints or runs failed. {listed(failed)}", stacklevel=2)
    return tree


@dataclass
class Made:
    """What became of the checkpoints of a sweep."""

    done: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    """checkpoint, or checkpoint/restriction -> reason"""
    elsewhere: set[str] = field(default_factory=set)
    """of those that failed, what another process is making"""

    def fail(self, name: str, error: Exception) -> None:
        self.failed[name] = f"{type(error).__name__}: {error}"
        if isinstance(error, RunLocked):
            self.elsewhere.add(name)
        logger.warning("%s is left out: %s", name, self.failed[name])


def carry_out(study: Study, under_way: int, progress: bool) -> Made:
    """Every run of the study, so many checkpoints at once; what failed, and why."""
    made = Made()
    left = checked(study, made)
    first = _first(study, left, made)
    if first is None:
        raise ChainsUnusable(f"every checkpoint failed. {listed(made.failed)}")
    rows = len(study.of_each) * first[1][study.of_each[0]].inputs.num_rows
    study.known().write(study.folder)
    try:
        with Progress((1 + len(left)) * rows, "sweep", progress) as bar, quiet():
            work = [partial(_one, study, *first, Part(bar, rows, first[0]), made)]
            work += [partial(_loaded, study, name, Part(bar, rows, name), made) for name in left]
            del first  # its model is not needed longer than its runs
            if under_way == 1:
                while work:
                    work.pop(0)()
            else:
                _side_by_side(work, under_way, f"What was done is kept in {study.folder}; the same call goes on from there.")
    except BaseException:
        with suppress(OSError):  # of the same disk: the first error tells more
            _record(study, made)
        raise
    _record(study, made)
    if not made.done:
        raise ChainsUnusable(f"every checkpoint failed. {listed(made.failed)}")
    return made


def _record(study: Study, made: Made) -> None:
    """Keep what failed with the stores, so that they are not taken for what was asked for."""
    whole = study.known()
    others = {name: reason for name, reason in whole.failed.items() if not study.is_asked_for(name)}
    failed = {name: reason for name, reason in made.failed.items() if name not in made.elsewhere}
    replace(whole, failed=others | failed).write(study.folder)


def checked(study: Study, made: Made) -> list[str]:
    """The checkpoints that are there, as far as their small files tell; the others are told of at once."""
    left = []
    for name, origin in study.origins.items():
        try:
            origin.check()
            left.append(name)
        except Exception as error:  # whatever it is, the other checkpoints are not lost
            made.fail(name, error)
    return left


def _first(study: Study, left: list[str], made: Made) -> tuple[str, Requests] | None:
    """The first checkpoint that can be loaded, taken from those left, and its runs.

    Raises:
        DevinterpInputError: an argument does not fit its model; said before anything is made, since it will fit none.
    """
    while left:
        name = left.pop(0)
        try:
            model = study.origins[name].load()
        except Exception as error:
            made.fail(name, error)
            continue
        try:
            requests = study.requests(name, model)
            request = requests[study.of_each[0]]
            if request.inputs.workers.are_known:  # those of an executor try a batch themselves
                with request.inputs.checkpoint.ready():
                    request.inputs.probe(request.path)
            return name, requests
        except RunMismatchError as error:  # of this checkpoint alone: its weights are others than those stored
            made.fail(name, error)
    return None


def _loaded(study: Study, name: str, part: Part, made: Made) -> None:
    """Load a checkpoint and make its runs."""
    with part:
        try:
            requests = study.requests(name, study.origins[name].load())
        except Exception as error:
            made.fail(name, error)
        else:
            _one(study, name, requests, part, made)


def _one(study: Study, name: str, requests: Requests, part: Part, made: Made) -> None:
    """The runs of one checkpoint."""
    with part:
        part.describe(f"{list(study.origins).index(name) + 1} of {len(study.origins)}")
        try:
            if study.restrictions:
                on_diverged = "raise" if study.on_diverged == "raise" else "drop"
                named = {str(restriction): request for restriction, request in requests.items()}
                _, _, failed = run_all(named, {}, on_diverged, part)
                made.failed |= {label(name, restriction): reason for restriction, reason in failed.items()}
            else:
                run_to_store(requests[None], part)
        except StorageError:  # the next one would meet it too
            raise
        except Exception as error:
            made.fail(name, error)
        else:
            made.done.append(name)


def _side_by_side(work: list[partial[None]], under_way: int, kept: str) -> None:
    """Checkpoints in threads, each of which waits for its workers; a signal stops all of them between two steps."""
    with (
        threads(torch.get_num_threads()),
        stop_signals() as stop,
        heard_by_threads(stop),
        ThreadPoolExecutor(under_way, thread_name_prefix="devinterp-sweep") as pool,
    ):
        waiting: set[Future[None]] = set()
        while work:
            waiting.add(pool.submit(copy_context().run, _unless_stopped, stop, work.pop(0)))
        errors: list[BaseException] = []
        while waiting:
            done, waiting = wait(waiting, timeout=SECONDS_BETWEEN_LOOKS, return_when=FIRST_COMPLETED)
            errors += [error for future in done if (error := future.exception()) is not None]
            if errors and stop.signal is None:
                stop.signal = signal.SIGTERM  # those that are under way commit what they have
            if stop.signal is not None:
                waiting = {future for future in waiting if not future.cancel()}
        if errors:
            raise errors[0]
        stop.raise_if_asked(kept)


def _unless_stopped(stop: Stop, work: partial[None]) -> None:
    """A thread that is done takes what is next before it can be taken back."""
    if stop.signal is None:
        work()
