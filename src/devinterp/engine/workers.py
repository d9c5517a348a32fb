"""Whose worker processes a run uses: its own, one per device, or those of an executor that the caller has made."""

import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from devinterp.engine.checkpoint import check_device, is_spread
from devinterp.errors import InputTypeError, InputValueError, got

WORKER_IDLE_SECONDS = 300
CREDENTIALS = ("AWS_", "GOOGLE_", "AZURE_")
"""Beginnings of the environment variables by which object stores are reached"""


@dataclass(frozen=True)
class Workers:
    """Where tasks are handed to."""

    executor: Executor | None = None
    """the caller's; None = processes of this machine"""
    devices: tuple[str, ...] = ()
    """of processes of this machine: one for each"""

    @property
    def are_known(self) -> bool:
        """Processes of this machine, of a number that we choose."""
        return self.executor is None

    @property
    def parent(self) -> int | None:
        """The process without which ours are to end; those of an executor end with whatever has started them."""
        return os.getpid() if self.are_known else None

    def make(self, count: int) -> Executor:
        """Ready to take tasks; called again after a death, which an executor of processes does not survive."""
        from loky import get_reusable_executor

        if self.executor is not None:
            return self.executor
        if self.devices:
            return OnePerDevice(self.devices)
        # those that stayed from an earlier run know the credentials of that time
        credentials = {name: value for name, value in os.environ.items() if name.startswith(CREDENTIALS)}
        executor: Executor = get_reusable_executor(max_workers=count, timeout=WORKER_IDLE_SECONDS, env=credentials)
        return executor

    def end(self, executor: Executor, *, now: bool) -> None:
        """Own processes that stay for the next run are only ended when they are to stop `now`."""
        if isinstance(executor, OnePerDevice):
            executor.shutdown(wait=not now)
        elif self.executor is None and now:
            executor.shutdown(wait=True, kill_workers=True)  # type: ignore[call-arg]


def check_workers(executor: Any, devices: Any, device: Any, model: nn.Module) -> Workers:
    """`executor` and `devices` of `sample`, checked."""
    if is_spread(model) and (executor is not None or devices is not None):
        name, given = ("executor", type(executor)) if executor is not None else ("devices", devices)
        fix = "Its chains run one after another in this process; workers would need all of its devices each."
        raise InputValueError(got(name, given, "None for a model on several devices", fix))
    if executor is not None:
        if not isinstance(executor, Executor):
            fix = "Of a Dask client take client.get_executor()."
            raise InputTypeError(got("executor", type(executor), "a concurrent.futures.Executor or None", fix))
        if devices is not None:
            raise InputValueError(got("devices", devices, "None with an executor", "Its workers choose their own devices."))
        return Workers(executor)
    if devices is None:
        return Workers()
    if isinstance(devices, str) or not isinstance(devices, Sequence) or not devices:
        raise InputTypeError(got("devices", devices, "a list of devices, or None", "Try ['cuda:0', 'cuda:1']."))
    if device is not None:
        raise InputValueError(got("device", str(device), "None with devices", "Give one of the two."))
    if multiprocessing.current_process().daemon:
        fix = "A daemonic process may start no workers."
        raise InputValueError(got("devices", devices, "None in a worker of multiprocessing.Pool", fix))
    checked = [_one(model, each) for each in devices]
    if len({each.type for each in checked}) > 1:
        fix = "Noise of a CPU is not that of a GPU: chains would depend on where they run."
        raise InputValueError(got("devices", devices, "devices of one kind", fix))
    return Workers(devices=tuple(map(str, checked)))


def _one(model: nn.Module, device: Any) -> torch.device:
    try:
        return check_device(model, device)
    except InputValueError as error:
        raise InputValueError(str(error).replace("device=", "devices: ", 1)) from error


class OnePerDevice(Executor):
    """A worker process for each device. A task goes to the first that is free; a process that died is replaced."""

    def __init__(self, devices: Sequence[str]):
        self._free = list(range(len(devices)))
        self._devices = tuple(devices)
        self._guard = threading.Lock()
        self._processes: dict[int, Any] = {}
        self._threads = ThreadPoolExecutor(len(devices), thread_name_prefix="devinterp-device")

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Call `fn` there, with the worker's `device` as one more argument."""
        return self._threads.submit(self._on_next, fn, args, kwargs)

    def _on_next(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        from loky import ProcessPoolExecutor

        with self._guard:
            number = self._free.pop(0)
            process = self._processes.get(number) or ProcessPoolExecutor(max_workers=1)
            self._processes[number] = process
        try:
            return process.submit(fn, *args, **kwargs, device=self._devices[number]).result()
        except BrokenExecutor:
            with self._guard:
                del self._processes[number]
            raise
        finally:
            with self._guard:
                self._free.append(number)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """`wait=False` ends what is under way."""
        if wait:
            self._threads.shutdown(cancel_futures=cancel_futures)
        for process in list(self._processes.values()):
            process.shutdown(wait=True, kill_workers=True)
        self._threads.shutdown(cancel_futures=True)
