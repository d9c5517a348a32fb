"""The tasks of a run: its baseline, and its chains. Each writes its own regions of the store, here or in a worker process."""

import traceback
from collections.abc import Generator, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from devinterp.engine.baseline import baseline_losses, init_loss, init_loss_of
from devinterp.engine.chain import Plan, Snapshot, run_chains
from devinterp.engine.prefix import Recorder
from devinterp.errors import ChainDiverged
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
    source: Path | None = None
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

    @property
    def count(self) -> int:
        return sum(len(chains) for walkers in self.walkers for chains in walkers)


def record(task: Baseline | Chains) -> Generator[str, None, Failures]:
    """Do one task; yields a note for every row of a baseline and for every step of a chain."""
    checkpoint = (task.plan if isinstance(task, Baseline) else task.plans[0]).checkpoint
    with checkpoint.ready(), background() as thread:
        if isinstance(task, Chains):
            return (yield from _record_chains(task, thread))
        try:
            yield from _record_baseline(task, thread)
        except Exception as error:  # the baseline of one run; the other runs go on
            return {0: Failure.of(error)}
        return {}


def _record_baseline(task: Baseline, thread: Executor) -> Generator[str, None, None]:
    plan, store, settings = task.plan, task.store, task.plan.settings
    names = [f"init_loss_{observable.name}" for observable in plan.observables]
    if task.source is not None:
        store.copy(["init_loss", "baseline_loss", *names], task.source)
        return
    for name, observable in zip(names, plan.observables, strict=True):
        store.write(name, init_loss_of(plan, observable).cpu())
    shared = settings.match_sampling_input_ids_across_chains
    for stream in [0] if shared else range(settings.num_chains):
        mean = init_loss(plan, stream).cpu()
        for chain in range(settings.num_chains) if shared else [stream]:
            store.write("init_loss", mean, chain)
        with store.rows(None if shared else stream, thread) as rows:
            for losses in baseline_losses(plan, stream):
                rows.append("baseline_loss", losses)
                yield ""


def _record_chains(task: Chains, thread: Executor) -> Generator[str, None, Failures]:
    recorder, failures = recorder_for(task.plans, task.count), Failures()
    walks = {
        (i, chains): _record_walker(plan, store, chains, recorder, thread, task.stop_at_divergence)
        for i, (plan, store, walkers) in enumerate(zip(task.plans, task.stores, task.walkers, strict=True))
        for chains in walkers
    }
    try:
        while walks:  # in turn, a step each
            for (i, chains), walk in list(walks.items()):
                try:
                    yield next(walk)
                except StopIteration:
                    del walks[i, chains]
                except Exception as error:
                    if isinstance(error, ChainDiverged):
                        raise
                    failures[i] = Failure.of(error)
                    del walks[i, chains]
    finally:
        for walk in walks.values():
            walk.close()
    return failures


def recorder_for(plans: Sequence[Plan], count: int) -> Recorder | None:
    """Shared by all that step together: holds the last batch of every stream in use."""
    prefixes = [plan.forward.prefix for plan in plans if plan.forward.prefix is not None]
    if not prefixes or len(prefixes) < len(plans):
        return None
    streams = 1 if plans[0].batches.shared else count
    return Recorder(plans[0].checkpoint, prefixes, streams * plans[0].settings.gradient_accumulation_steps)


def _record_walker(
    plan: Plan,
    store: StoreWriter,
    chains: tuple[int, ...],
    recorder: Recorder | None,
    thread: Executor,
    stop_at_divergence: bool,
) -> Generator[str, None, None]:
    """The rows of some chains, and what became of each of them."""
    alive = set(chains)
    for chain in chains:
        store.write("chain_status", RUNNING, chain)
    try:
        with ExitStack() as stack:
            rows = {chain: stack.enter_context(store.rows(chain, thread)) for chain in chains}
            for seen in run_chains(plan, chains, recorder):
                if isinstance(seen, Snapshot):
                    yield _append(rows[seen.chain], seen, plan.settings.num_steps)
                else:
                    alive.discard(seen.chain)
                    store.write("diverged_at", seen.steps_taken, seen.chain)
                    store.write("chain_status", DIVERGED, seen.chain)
                    if stop_at_divergence:
                        raise ChainDiverged(seen.chain, seen.steps_taken, plan.sampler.lr)
    except ChainDiverged:
        raise
    except Exception:
        for chain in alive:
            store.write("chain_status", FAILED, chain)
        raise
    for chain in alive:
        store.write("chain_status", COMPLETE, chain)


def _append(rows: Rows, seen: Snapshot, num_steps: int) -> str:
    if seen.steps_taken < num_steps:
        rows.append("step_loss", seen.losses.mean())
        for name, value in (seen.metrics or {}).items():
            rows.append(f"metrics_{name}", value)
    if seen.draw is None:
        return ""
    rows.append("sampling_loss", seen.losses)
    for name, losses in seen.observables.items():
        rows.append(f"loss_{name}", losses)
    return f"loss {seen.losses.mean().item():.3f}"
