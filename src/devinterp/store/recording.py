"""The tasks of a run: its baseline, and its chains. Each writes its own regions of the store, here or in a worker process."""

import traceback
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from devinterp.engine.baseline import baseline_losses, init_loss, init_loss_of
from devinterp.engine.chain import Snapshot, Walk, run_chains
from devinterp.engine.dispatch import Step
from devinterp.engine.prefix import Recorder
from devinterp.engine.walker import Plan
from devinterp.errors import ChainDiverged
from devinterp.store.commits import BaselineCommits, ChainCommits
from devinterp.store.durable import DISK_ERRORS
from devinterp.store.schema import COMPLETE, DIVERGED, FAILED, RUNNING
from devinterp.store.writer import Rows, StoreWriter, background


@dataclass(frozen=True)
class Failure:
    """What ended some chains of a run, in a form that travels between processes."""

    message: str
    traceback: str

    @classmethod
    def of(cls, error: Exception) -> "Failure":
        return cls(f"{type(error).__name__}: {error}", "".join(traceback.format_exception(error)))


Failures = dict[int, Failure]
"""By the number of the run in its task"""


@dataclass(frozen=True)
class Baseline:
    """The losses of a run at the checkpoint itself."""

    plan: Plan
    store: StoreWriter
    checkpoint_every: float
    source: Path | str | None = None
    """the store of a run that differs in its masks alone: its baseline is this one's too"""


@dataclass(frozen=True)
class Chains:
    """Chains of one run or of several that differ in their masks alone: they step together, so that batches and the
    passes through modules that are frozen in all of them are shared."""

    plans: tuple[Plan, ...]
    stores: tuple[StoreWriter, ...]
    walkers: tuple[tuple[tuple[int, ...], ...], ...]
    """for each run, the chains of each walker"""
    stop_at_divergence: bool
    checkpoint_every: float

    @property
    def count(self) -> int:
        return sum(len(chains) for walkers in self.walkers for chains in walkers)


def record(task: Baseline | Chains) -> Generator[Step, None, Failures]:
    """Do one task, or what is left of it; yields once for every row of a baseline, and for every step of chains.

    Closed between two of them, it commits what there is.

    Raises:
        OSError: the disk as a whole does not take what is to be written.
    """
    checkpoint = (task.plan if isinstance(task, Baseline) else task.plans[0]).checkpoint
    with checkpoint.ready(), background() as thread:
        if isinstance(task, Chains):
            return (yield from _record_chains(task, thread))
        try:
            yield from _record_baseline(task, thread)
        except Exception as error:  # the baseline of one run; the other runs go on
            _raise_if_of_the_disk(error)
            return {0: Failure.of(error)}
        return {}


def _raise_if_of_the_disk(error: Exception) -> None:
    """What every other chain would meet too."""
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        raise error


def _record_baseline(task: Baseline, thread: Executor) -> Generator[Step, None, None]:
    plan, store, settings = task.plan, task.store, task.plan.settings
    names = [f"init_loss_{observable.name}" for observable in plan.observables]
    of_sampling = [name for name in ("init_loss", "init_loss_count") if name in store.variables]
    with BaselineCommits(store, [*of_sampling, *names], task.checkpoint_every) as commits:
        if task.source is not None:
            store.copy([*of_sampling, "baseline_loss", *names], task.source)
            commits.finish(store.files(["baseline_loss"]))
            return
        for name, observable in zip(names, plan.observables, strict=True):
            store.write(name, init_loss_of(plan, observable).cpu())
        shared = settings.match_sampling_input_ids_across_chains
        for stream in [0] if shared else range(settings.num_chains):
            told = zip(of_sampling, init_loss(plan, stream), strict=False)
            for name, values in [(name, values.cpu()) for name, values in told]:
                for chain in range(settings.num_chains) if shared else [stream]:
                    store.write(name, values, chain)
            rows = commits.begin(Rows(store, None if shared else stream, thread), stream)
            for losses in baseline_losses(plan, stream, start=commits.draws(stream)):
                rows.append("baseline_loss", losses)
                commits.commit_if_due()
                yield Step()
            rows.flush()
        commits.finish()


def _record_chains(task: Chains, thread: Executor) -> Generator[Step, None, Failures]:
    recorder, failures = recorder_for(task.plans, task.count), Failures()
    walks = {
        (i, chains): _Recording(task, plan, store, chains, recorder, thread)
        for i, (plan, store, walkers) in enumerate(zip(task.plans, task.stores, task.walkers, strict=True))
        for chains in walkers
    }
    going = {key: walk.steps() for key, walk in walks.items()}
    try:
        while going:  # those that are behind first, so that passes are shared; then in turn, a step each
            behind = min(walks[key].steps_taken for key in going)
            for key in [key for key in going if walks[key].steps_taken == behind]:
                try:
                    yield next(going[key])
                except StopIteration:
                    del going[key]
                except ChainDiverged:
                    raise
                except Exception as error:
                    del going[key]
                    _raise_if_of_the_disk(error)
                    failures[key[0]] = Failure.of(error)
    finally:
        for steps in going.values():
            steps.close()
    return failures


def recorder_for(plans: Sequence[Plan], count: int) -> Recorder | None:
    """Shared by all that step together: holds the last batch of every stream in use."""
    prefixes = [plan.forward.prefix for plan in plans if plan.forward.prefix is not None]
    if not prefixes or len(prefixes) < len(plans):
        return None
    streams = 1 if plans[0].batches.shared else count
    return Recorder(plans[0].checkpoint, prefixes, streams * plans[0].settings.gradient_accumulation_steps)


@dataclass
class _Recording:
    """A walk, its rows, and what became of each of its chains."""

    task: Chains
    plan: Plan
    store: StoreWriter
    chains: tuple[int, ...]
    recorder: Recorder | None
    thread: Executor
    steps_taken: int = 0

    def steps(self) -> Generator[Step, None, None]:
        alive = self.chains
        try:
            walk = Walk(self.plan, self.chains, self.recorder)
            with ChainCommits(self.store, walk, self.task.checkpoint_every) as commits:
                rows = commits.begin({chain: Rows(self.store, chain, self.thread) for chain in self.chains})
                self._say(RUNNING, walk.watch.alive)
                self._bury(walk.watch.diverged)
                for all_seen in run_chains(walk):
                    alive, self.steps_taken = walk.watch.alive, walk.steps_taken
                    notes = []
                    for seen in all_seen:
                        if isinstance(seen, Snapshot):
                            notes.append(_append(rows[seen.chain], seen, self.plan.settings.num_steps))
                        else:
                            self._bury({seen.chain: seen.steps_taken})
                            if self.task.stop_at_divergence:
                                raise ChainDiverged(seen.chain, seen.steps_taken, self.plan.sampler.lr)
                    commits.commit_if_due()
                    yield Step(len(notes), notes[-1] if notes else "")
                for gathered in rows.values():
                    gathered.flush()
                commits.settle()
                self._say(COMPLETE, walk.watch.alive)
                commits.finish()
        except ChainDiverged:
            raise
        except Exception:
            with suppress(OSError):  # the first error is the one to be told of
                self._say(FAILED, alive)
            raise

    def _bury(self, diverged: Mapping[int, int]) -> None:
        for chain, at in diverged.items():
            self.store.write("diverged_at", at, chain)
            self._say(DIVERGED, [chain])

    def _say(self, status: int, chains: Sequence[int]) -> None:
        for chain in chains:
            if self.store.status(chain) != status:
                self.store.write("chain_status", status, chain)


def _append(rows: Rows, seen: Snapshot, num_steps: int) -> str:
    if seen.steps_taken < num_steps:
        rows.append("step_loss", seen.mean_loss)
        for name, value in (seen.metrics or {}).items():
            rows.append(f"metrics_{name}", value)
    if seen.draw is None:
        return ""
    rows.append("sampling_loss", seen.losses)
    for name, losses in seen.observables.items():
        rows.append(f"loss_{name}", losses)
    return f"loss {seen.mean_loss.item():.3f}"
