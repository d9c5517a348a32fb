"""Tasks done here, one after another, or handed to worker processes; the steps of all are counted in one place."""

import contextlib
import logging
import multiprocessing
import os
import tempfile
import traceback
import uuid
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from devinterp.engine.board import SECONDS_BETWEEN_LOOKS, Board, Place
from devinterp.engine.cargo import Message, Origin, Sender
from devinterp.engine.checkpoint import Checkpoint, check_device
from devinterp.engine.placement import Placement, num_cores, threads
from devinterp.engine.stopping import SECONDS_TO_STOP, no_signals
from devinterp.engine.workers import Workers
from devinterp.errors import DevinterpError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Step:
    """What a task yields between two of its steps."""

    count: int = 1
    """rows that the progress display is to count"""
    note: str = ""


@dataclass(frozen=True)
class Death:
    """The outcome of a task that took its worker with it, or never found one."""

    reason: str


@dataclass(frozen=True)
class Raised:
    """The outcome of a task that ended in an error of its own, as it travels."""

    error: Exception


Task = TypeVar("Task")
Work = Callable[[Task], Generator[Step, None, Any]]
"""Does a task, yields after every step, and returns an outcome. Closed between two steps, it keeps what was done."""


@dataclass(frozen=True)
class Site:
    """Where tasks are done, and what they need there."""

    workers: Workers
    checkpoint: Checkpoint
    origin: Origin | None = None
    device: str | None = None
    """that was asked for; of an executor's workers"""
    device_type: str | None = None
    folder: Path | None = None
    """that workers see too; None = temporary, on this machine"""

    @contextlib.contextmanager
    def meeting_place(self) -> Iterator[Path]:
        """An empty folder for what is exchanged, removed afterwards."""
        parent = self.folder
        if parent is not None:
            parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="devinterp-", dir=parent, ignore_cleanup_errors=True) as folder:
            yield Path(folder).absolute()
        if parent is not None:
            with contextlib.suppress(OSError):
                parent.rmdir()

    def sender(self, folder: Path) -> Sender:
        return Sender(folder, self.checkpoint, self.origin, self.device_type)


def do(work: Work[Task], tasks: Sequence[Task], placement: Placement, site: Site) -> Generator[Step, None, list[Any]]:
    """Do tasks where they are placed; yields the steps of all, and returns their outcomes in order.

    The outcome of a task whose worker died is a `Death`.
    """
    workers = site.workers
    if (
        workers.executor is not None
        or workers.devices
        or (placement.way == "processes" and len(tasks) > 1 and may_start_workers())
    ):
        return (yield from _handed_out(work, tasks, placement, site))
    with threads(placement.threads):
        outcomes: list[Any] = []
        for task in tasks:
            outcome = yield from work(task)
            outcomes.append(outcome)
    return outcomes


def may_start_workers() -> bool:
    """Not from within a worker of `multiprocessing.Pool`, for one: there chains run one after another, with equal numbers."""
    if multiprocessing.current_process().daemon:
        logger.info("a daemonic process may start no workers: chains run one after another")
        return False
    return True


def _handed_out(work: Work[Task], tasks: Sequence[Task], placement: Placement, site: Site) -> Generator[Step, None, list[Any]]:
    """Workers import nothing of the user's script."""
    outcomes: list[Any] = [None] * len(tasks)
    count = min(len(tasks), max(1, num_cores() // placement.threads))
    with site.meeting_place() as folder:
        board = Board(folder / "board", len(tasks))
        with site.sender(folder) as sender:
            messages = [sender.message(task) for task in tasks]

        def attempt(numbers: Sequence[int]) -> Generator[Step, None, list[int]]:
            """Do some of the tasks; returns those whose worker died."""
            futures: dict[int, Future[Any]] = {}
            executor = site.workers.make(count if len(numbers) > 1 else 1)
            with _stopped_if_left(site.workers, executor, futures, board):
                for i in numbers:
                    task = partial(_carried_out, work, messages[i], board.folder, i, placement.threads, site.workers.parent)
                    futures[i] = _submit(executor, task, site)
                yield from _watched(list(futures.values()), board)
            for i, future in futures.items():
                outcomes[i] = _outcome(future)
                if isinstance(outcomes[i], Raised):
                    raise outcomes[i].error
            return [i for i in numbers if isinstance(outcomes[i], Death)]

        # a death can take others with it that were under way: of our processes all, so each is tried once more, alone
        dead = yield from attempt(range(len(tasks)))
        for again in [[i] for i in dead] if site.workers.are_known else [dead]:
            yield from attempt(again)
    return outcomes


def elsewhere(function: Callable[[Any], Any], content: Any, site: Site) -> Any:
    """`function(content)`, done by a worker of the executor.

    Raises:
        DevinterpError: as raised by it, or no worker came back.
    """
    executor = site.workers.make(1)
    with site.meeting_place() as folder:
        with site.sender(folder) as sender:
            message = sender.message(content)
        future = _submit(executor, partial(_answered, function, message, folder / "answer", torch.get_num_threads()), site)
        outcome = _outcome(future)
        if isinstance(outcome, Raised):
            raise outcome.error
        if isinstance(outcome, Death):
            raise DevinterpError(f"no worker of the executor could plan the run: {outcome.reason}")
        return outcome.filled_around(site.checkpoint)


def _submit(executor: Executor, task: Callable[..., Any], site: Site) -> Future[Any]:
    """A future even where the executor takes nothing more."""
    from loky import wrap_non_picklable_objects

    device = {} if site.workers.devices or site.device is None else {"device": site.device}
    try:
        # by value, also where the executor itself knows only names: classes and functions of the caller's script
        # and each time as a new task, where equal ones (Dask) have one result
        return executor.submit(wrap_non_picklable_objects(partial(task, attempt=uuid.uuid4().hex)), **device)
    except Exception as error:
        refused: Future[Any] = Future()
        refused.set_exception(error)
        return refused


def _outcome(future: Future[Any]) -> Any:
    """What the task returned. Errors of a future are those of its worker: a task returns its own."""
    try:
        return future.result()
    except Exception as error:
        return Death(f"{type(error).__name__}: {error}".rstrip(": "))


@contextlib.contextmanager
def _stopped_if_left(workers: Workers, executor: Executor, futures: Mapping[int, Future[Any]], board: Board) -> Iterator[None]:
    """When the block is interrupted, workers end their step and keep what was done; then those that are ours are killed."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, GeneratorExit | OSError):
            board.stop()
            # of a task under way the caller's executor would lose sight when it is cancelled
            begun = [future for task, future in futures.items() if board.has_begun(task) or not future.cancel()]
            wait(begun, timeout=SECONDS_TO_STOP)
        workers.end(executor, now=True)
        raise
    workers.end(executor, now=False)


def _watched(futures: Sequence[Future[Any]], board: Board) -> Iterator[Step]:
    """The steps that were counted, now and then, until all is done; an error of the machine ends it at once."""
    seen, waiting = 0, set(futures)
    while waiting:
        done, waiting = wait(waiting, timeout=SECONDS_BETWEEN_LOOKS, return_when=FIRST_COMPLETED)
        total = board.total()
        yield Step(total - seen)
        seen = total
        for future in done:
            outcome = _outcome(future)
            if isinstance(outcome, Raised) and isinstance(outcome.error, OSError):
                raise outcome.error


def _carried_out(
    work: Work[Any],
    message: Message,
    board: Path,
    number: int,
    num_threads: int,
    parent: int | None,
    attempt: str = "",
    device: str | None = None,
) -> Any:
    """In a worker: do one task to its end, or until it is told to stop."""
    try:
        torch.set_num_threads(num_threads)
        place, parent = Place(board, number), os.getppid() if parent is None else parent
        task, _ = message.opened(device)
        steps = work(task)
        with no_signals(), contextlib.closing(steps):
            while True:
                try:
                    step = next(steps)
                except StopIteration as end:
                    place.look()
                    return end.value
                if not place.add(step.count):
                    return None
                if os.name == "posix" and os.getppid() != parent:
                    os._exit(1)  # nobody waits for it, and another run may have taken over
    except Exception as error:
        return Raised(_travelling(error))


def _answered(
    function: Callable[[Any], Any],
    message: Message,
    folder: Path,
    num_threads: int,
    attempt: str = "",
    device: str | None = None,
) -> Any:
    """In a worker: call a function, and send what it returns."""
    try:
        torch.set_num_threads(num_threads)
        content, checkpoint = message.opened(device)
        with Sender(folder, checkpoint) as sender:
            return sender.answer(function(content))
    except Exception as error:
        return Raised(_travelling(error))


def _travelling(error: Exception) -> Exception:
    """An error of a kind that the caller knows."""
    if isinstance(error, DevinterpError | OSError | MemoryError):
        return error
    return DevinterpError("".join(traceback.format_exception(error)))


def device_type(workers: Workers, asked: str | None) -> str:
    """Of the device on which the executor's workers would compute, as one of them says.

    Raises:
        DevinterpError: no worker came back.
    """
    if workers.executor is None:
        raise ValueError("only the workers of an executor have devices of their own")
    logger.info("asking the executor for a worker")
    outcome = _outcome(workers.executor.submit(_own_device_type, asked))
    if isinstance(outcome, Raised):
        raise outcome.error
    if isinstance(outcome, Death):
        raise DevinterpError(f"no worker of the executor answered: {outcome.reason}")
    return str(outcome)


def _own_device_type(asked: str | None) -> Any:
    try:
        return check_device(torch.nn.Module(), asked).type
    except Exception as error:
        return Raised(_travelling(error))
