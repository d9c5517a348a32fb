"""What a sweep will take, before it is begun: tasks, bytes, and time from a short real trial on its first checkpoint."""

import logging
import math
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from devinterp.engine.forward import Forward
from devinterp.engine.origin import quiet
from devinterp.engine.placement import decide, num_cores
from devinterp.engine.progress import Progress
from devinterp.engine.selection import Selection
from devinterp.engine.walker import Plan
from devinterp.errors import ChainsUnusable
from devinterp.slt.requests import Request, at_step_size
from devinterp.slt.running import run_suite, run_to_store
from devinterp.slt.sweep_study import Study
from devinterp.slt.sweeps import Made, checked
from devinterp.store.durable import free_bytes
from devinterp.store.reader import metadata_of, open_store
from devinterp.store.sweeps import FULL, listed
from devinterp.store.writer import stored_bytes

ENOUGH_SECONDS = 1.0
"""that what is measured has to take, so that a step is known to a few percent"""
FIRST_DRAWS, MOST_TIMES_MORE = 4, 16
RESTRICTIONS_TRIED = 8
SMALL_MODEL = 200_000_000
"""Parameters up to which imports are a part of the time to load that counts"""

ASSUMPTION = (
    "as long at every checkpoint as at the first, on this machine, one checkpoint after another, without an executor; hub "
    "downloads are not counted, nor is what an interrupted run has already done"
)


@dataclass(frozen=True)
class Seconds:
    """Of the runs of one checkpoint."""

    load: float
    start: float
    """of a run, with its step size and its first draw"""
    step: float
    """of all chains"""
    draw: float
    """what a draw takes besides its steps"""
    again: float
    """to find that a run is stored"""

    def run(self, steps: int, draws: int) -> float:
        """Without loading."""
        return self.start + self.step * steps + self.draw * draws


@dataclass(frozen=True)
class Forecast:
    """What a sweep will do and take."""

    checkpoints: dict[str, str]
    """name -> where it is loaded from"""
    failed: dict[str, str]
    """those that are not there, with the reason"""
    restrictions: list[str]
    num_chains: int
    num_runs: int
    num_stored: int
    """of them finished already"""
    num_bytes: int
    """of all stores, at most"""
    num_bytes_free: int
    seconds: float
    of_model: Seconds
    """of the run of the whole model"""
    of_restriction: Seconds | None
    """of one restriction's"""
    trial: str
    """the checkpoint that was tried"""

    @property
    def num_tasks(self) -> int:
        """Chains that are left to be run."""
        return (self.num_runs - self.num_stored) * self.num_chains


def forecast(study: Study) -> Forecast:
    """Check every input of a sweep, try a few steps of it, and say what the whole will take. Makes nothing that stays.

    Raises:
        DevinterpInputError: an argument cannot be used, or does not fit the first checkpoint.
        ChainsUnusable: no checkpoint can be loaded.
    """
    made, study = Made(), study.here()
    with quiet():
        left = checked(study, made)
        while left:
            try:
                model, load = _timed_load(study, left[0])
                break
            except Exception as error:
                made.fail(left.pop(0), error)
        else:
            raise ChainsUnusable(f"every checkpoint failed. {listed(made.failed)}")
        request = study.requests(left[0], model)[study.of_each[0]]
        of_model, of_restriction = _tried(study, left[0], model, load)
    stored = {(name, each): _is_finished(study.path(name, each)) for name in left for each in study.of_each}
    settings = study.settings
    seconds = 0.0
    for (_, each), finished in stored.items():
        of_run = of_model if each == study.of_each[0] else of_restriction or of_model
        seconds += of_run.load + (of_run.again if finished else of_run.run(settings.num_steps, settings.num_draws))
    return Forecast(
        checkpoints={name: str(origin) for name, origin in study.origins.items()},
        failed=made.failed,
        restrictions=list(study.restrictions),
        num_chains=settings.num_chains,
        num_runs=len(stored),
        num_stored=sum(stored.values()),
        num_bytes=len(stored) * stored_bytes(*request.layout()),
        num_bytes_free=free_bytes(study.folder),
        seconds=seconds,
        of_model=of_model,
        of_restriction=of_restriction,
        trial=left[0],
    )


def _timed_load(study: Study, name: str) -> tuple[nn.Module, float]:
    """The model, and how long it takes to load the next: the first time imports come first."""
    began = time.monotonic()
    model = study.origins[name].load()
    if sum(p.numel() for p in model.parameters()) < SMALL_MODEL:
        began = time.monotonic()
        model = study.origins[name].load()
    return model, time.monotonic() - began


def _is_finished(path: Path) -> bool:
    return path.exists() and open_store(path, ours=True).attrs.get("completed") == 1


def _tried(study: Study, name: str, model: nn.Module, load: float) -> tuple[Seconds, Seconds | None]:
    """Short runs of several lengths, in the way in which the long ones will be computed; their differences are the steps."""
    trial = Trial.of(study, name, model)
    every, burnin = study.settings.num_steps_bw_draws, study.settings.num_burnin_steps
    _, _, lr = trial.run(1, 0)  # what is slow the first time: imports, worker processes
    whole, again, _ = trial.run(1, 0)
    # the others without the choice of a step size, which takes as long for a run of any length
    short, _, _ = trial.run(1, 0, lr)
    draws = FIRST_DRAWS
    while True:
        long, _, _ = trial.run(1 + draws, 0, lr)
        least = min(b - a for a, b in zip(short, long, strict=True))
        if least > ENOUGH_SECONDS or draws >= study.settings.num_draws:
            break
        draws *= math.ceil(min(MOST_TIMES_MORE, max(2.0, 1.2 * ENOUGH_SECONDS / max(least, 1e-9))))
    burnt = trial.run(1, every * draws, lr)[0] if burnin else None
    found = []
    for which in range(len(short)):
        both = max(0.0, long[which] - short[which]) / draws  # a draw and the steps before it
        step = both / every if burnt is None else max(0.0, burnt[which] - short[which]) / (every * draws)
        draw, start = max(0.0, both - every * step), max(0.0, whole[which] - both)
        scale = 1 / len(trial.restricted) if which else 1.0
        found.append(Seconds(0.0 if which else load, *(scale * x for x in (start, step, draw, again[which]))))
    return found[0], found[1] if len(found) > 1 else None


@dataclass(frozen=True)
class Trial:
    """Short runs on one checkpoint: of the whole model, and of a few restrictions together."""

    study: Study
    name: str
    model: nn.Module
    restricted: list[str]
    ways: tuple[str, ...]
    """`chains_together` of the one and of the others, as the full lengths will have it"""

    @classmethod
    def of(cls, study: Study, name: str, model: nn.Module) -> "Trial":
        requests = study.requests(name, model)
        first, *others = requests
        few = max(RESTRICTIONS_TRIED, num_cores())
        spread = [others[i * len(others) // min(few, len(others))] for i in range(min(few, len(others)))]
        ways = [_way(requests[first], 1)] + [_way(requests[spread[0]], len(others)) for _ in spread[:1]]
        return cls(study, name, model, [str(name) for name in spread], tuple(ways))

    def run(self, draws: int, burnin: int, lr: float | str | None = None) -> tuple[list[float], list[float], float]:
        """Seconds of the run of the whole model and of those of the restrictions; to find them stored; the step size taken."""
        with tempfile.TemporaryDirectory(prefix="devinterp-trial-") as folder, _silent():
            given = self.study.settings
            settings = replace(given, num_draws=draws, num_burnin_steps=burnin, lr=given.lr if lr is None else lr)
            kept = {each: masks for each, masks in self.study.restrictions.items() if each in (FULL, *self.restricted)}
            short = replace(self.study, settings=settings, folder=Path(folder), restrictions=kept)
            seconds, taken = self._timed(short)
            return seconds, self._timed(short)[0], taken

    def _timed(self, short: Study) -> tuple[list[float], float]:
        began = time.monotonic()
        with Progress(0, "trial", enabled=False) as bar:
            source = run_to_store(self._requests(short, self.ways[0])[short.of_each[0]], bar)
            seconds = [time.monotonic() - began]
            lr = float(metadata_of(open_store(source, ours=True))["step_size"]["lr"])
            if self.restricted:
                others = self._requests(short, self.ways[1])
                began = time.monotonic()
                _, failed = run_suite({name: at_step_size(others[name], lr) for name in self.restricted}, source, bar)
                seconds.append(time.monotonic() - began)
                if failed:
                    raise ChainsUnusable(f"the trial failed. {listed(failed)}")
        return seconds, lr

    def _requests(self, short: Study, way: str) -> Mapping[str | None, Request]:
        return replace(short, paths=replace(short.paths, chains_together=way)).requests(self.name, self.model)


def _way(request: Request, num_runs: int) -> str:
    """Where the chains of the run in its full length will be computed."""
    inputs = request.inputs
    selection = Selection.of(inputs.checkpoint.parameters, request.masks)
    plan = Plan(
        inputs.settings, inputs.settings.sampler(1.0), Forward(inputs.checkpoint), selection, inputs.batches, inputs.observables
    )
    return decide(inputs.paths.chains_together, plan, num_runs).way


@contextmanager
def _silent() -> Iterator[None]:
    """What the trial's runs say of themselves would be taken for the sweep's."""
    logger, level = logging.getLogger("devinterp"), logging.getLogger("devinterp").level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
