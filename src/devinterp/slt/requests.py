"""What is asked for, checked before any compute: shared by `sample()` and by suites of restrictions."""

import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from devinterp.engine.batch import IDS
from devinterp.engine.batches import Batches
from devinterp.engine.cargo import Origin
from devinterp.engine.checkpoint import Checkpoint, check_device, check_model, is_spread
from devinterp.engine.dispatch import Site, device_type
from devinterp.engine.observables import Observable, check_observables
from devinterp.engine.placement import num_cores
from devinterp.engine.rows import Rows, check_rows, warn_about_padding
from devinterp.engine.selection import check_masks
from devinterp.engine.settings import Paths, Settings, choice, settings_and_paths
from devinterp.engine.trials import check_loss, find_objective
from devinterp.engine.workers import Workers, check_workers
from devinterp.errors import InputTypeError, InputValueError, got
from devinterp.samplers import SAMPLERS
from devinterp.store.durable import told_of_the_disk
from devinterp.store.folder import FINAL_STATE_BYTES, RunFolder
from devinterp.store.identity import Source, identity
from devinterp.store.mirror import working_path
from devinterp.store.objects import Objects, is_url
from devinterp.store.remote import stored_there
from devinterp.store.runs import Stored, layout, plain, stored_run
from devinterp.store.schema import Variable
from devinterp.store.writer import check_output_path, check_space, stored_bytes

LONG_RUN = 600.0
"""Seconds beyond which a run without output_path is warned about"""


@dataclass(frozen=True)
class Inputs:
    """Everything of a run except its restriction and its path, checked."""

    model: nn.Module
    checkpoint: Checkpoint
    source: Source
    settings: Settings
    batches: Batches
    observables: tuple[Observable, ...]
    on_diverged: str
    paths: Paths
    workers: Workers
    device: str | None
    """as asked for, where workers of an executor are to find it"""
    device_type: str
    origin: Origin | None = None

    @classmethod
    def of(
        cls,
        model: nn.Module,
        dataset: Any,
        observables: Mapping[str, Any],
        settings: Settings,
        *,
        device: str | torch.device | None = None,
        loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
        loss_fn_id: str | None = None,
        on_diverged: str = "record",
        paths: Paths,
        executor: Executor | None = None,
        devices: Sequence[str] | None = None,
        origin: Origin | None = None,
    ) -> "Inputs":
        choice("record", "raise")("on_diverged", on_diverged)
        check_model(model)
        workers = check_workers(executor, devices, device, model)
        if paths.chains_together == "processes" and is_spread(model):
            fix = "Leave it out: its chains run one after another in this process."
            raise InputValueError(got("chains_together", "processes", "another for a model on several devices", fix))
        checked_device = _device(model, device, workers)
        if loss_fn is not None and not callable(loss_fn):
            fix = "None takes the next-token cross-entropy."
            raise InputTypeError(got("loss_fn", loss_fn, "a function (model, batch) -> loss per row or per position", fix))
        own = loss_fn is not None
        rows = check_rows("dataset", dataset, at_least=settings.batch_size, has_loss_fn=own)
        per_draw, seed = settings.batches_per_draw, settings.obs_seed
        seen = check_observables(observables, rows, settings.batch_size, per_draw, seed, has_loss_fn=own)
        _warn_about_inputs(model, settings, rows)
        source = Source.of(model, loss_fn, loss_fn_id)
        checkpoint = Checkpoint(model, loss_fn, checked_device, settings.train_mode)
        objective = find_objective(checkpoint, rows, settings.batch_size, seen)
        batches, seen = Batches.of(rows, objective, settings), tuple(map(objective.observed, seen))
        asked = None if device is None or workers.are_known else str(device)
        device_type_there = checked_device.type if workers.are_known else device_type(workers, asked)
        return cls(
            model, checkpoint, source, settings, batches, seen, on_diverged, paths, workers, asked, device_type_there, origin,
        )  # fmt: skip

    @property
    def largest_id(self) -> int:
        return max([self.batches.rows.largest_id, *(observable.largest_id for observable in self.observables)])

    @property
    def num_rows(self) -> int:
        """What a run counts up to: the batches of its baseline, and the steps of its chains and one look after the last."""
        settings = self.settings
        streams = 1 if settings.match_sampling_input_ids_across_chains else settings.num_chains
        return streams * settings.num_draws + settings.num_chains * (settings.num_steps + 1)

    def probe(self, path: Path | None) -> None:
        """One batch through the model, before anything is computed or made."""
        began = time.monotonic()
        first = self.checkpoint.placed(self.batches.micro(0, 0))
        check_loss(self.checkpoint, self.batches.objective, first, self.largest_id)
        if path is None:
            _warn_about_losing(self.settings, time.monotonic() - began)


@dataclass(frozen=True)
class Request:
    """One run asked for: the moving weights, and where its store is or will be."""

    inputs: Inputs
    masks: dict[str, Tensor | None]
    path: Path | None
    """where it is worked on"""
    objects: Objects | None = None
    """where it is stored, if not there"""

    @classmethod
    def of(cls, inputs: Inputs, param_masks: Any, output_path: Any) -> "Request":
        objects = Objects.of(output_path) if is_url(output_path) else None
        if objects is not None and not inputs.workers.are_known:
            fix = "Its workers write the store themselves: give a file system that they share, or leave executor out."
            raise InputValueError(got("output_path", output_path, "a local path with an executor", fix))
        path = check_output_path(output_path if objects is None else working_path(objects))
        masks = check_masks(inputs.model, param_masks)
        _check_memory(inputs, masks)
        request = cls(inputs, masks, path, objects)
        check_space(path, *request.layout(), extra=state_bytes(inputs, masks) + sent_bytes(inputs))
        if path is not None:
            inputs.source.warn_if_never_reused()
        return request

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        inputs = self.inputs
        return plain(
            identity(
                inputs.settings,
                inputs.source,
                inputs.device_type,
                inputs.checkpoint.digest_as_found,
                self.masks,
                inputs.batches,
                inputs.observables,
            )
        )

    @property
    def site(self) -> Site:
        """Where the run is planned and its chains go."""
        inputs = self.inputs
        folder = None if inputs.workers.are_known or self.path is None else RunFolder(self.path.absolute()).away
        return Site(inputs.workers, inputs.checkpoint, inputs.origin, inputs.device, inputs.device_type, folder)

    def told_of_the_disk(self) -> AbstractContextManager[None]:
        """Errors of the disk, with what this run still needs."""
        if self.path is None:
            return nullcontext()
        return told_of_the_disk(self.path, stored_bytes(*self.layout()))

    def layout(self) -> tuple[dict[str, Variable], dict[str, int]]:
        return layout(self.inputs.settings, self.inputs.batches, self.inputs.observables)

    @property
    def place(self) -> Path | str | None:
        """Where its store is or will be, as it was asked for."""
        return self.path if self.objects is None else self.objects.url

    def stored(self) -> Stored | None:
        """The run at its place if it is this one; refuses any other thing that is there."""
        if self.objects is not None:
            return stored_there(self.objects, self.fingerprint, self.layout()[1])
        return self.stored_here()

    def stored_here(self) -> Stored | None:
        """The same of the path at which this process is the one writer."""
        return stored_run(self.path, self.fingerprint, self.layout()[1])


def state_bytes(inputs: Inputs, masks: Mapping[str, Tensor | None]) -> int:
    """Of what lies beside a store, at most: two states of each chain on its way, and the small ones of those that ended."""
    parameters = inputs.checkpoint.parameters
    moving = sum(parameters[name].numel() if mask is None else int(mask.sum()) for name, mask in masks.items())
    each, chains = 2 * 4 * moving, inputs.settings.num_chains
    return 2 * each * min(chains, num_cores()) + min(each, FINAL_STATE_BYTES) * chains


def sent_bytes(inputs: Inputs) -> int:
    """Of the model, as workers of an executor are to read it."""
    if inputs.workers.are_known or inputs.origin is not None:
        return 0
    return sum(p.numel() * p.element_size() for p in inputs.checkpoint.parameters.values())


def request_of(
    model: nn.Module,
    dataset: Any,
    observables: Mapping[str, Any],
    *,
    param_masks: Any = None,
    output_path: Any = None,
    device: str | torch.device | None = None,
    loss_fn: Any = None,
    loss_fn_id: Any = None,
    on_diverged: str = "record",
    executor: Any = None,
    devices: Any = None,
    origin: Origin | None = None,
    **settings: Any,
) -> Request:
    """The arguments of `sample`, checked; `origin`, where workers can load the model from."""
    checked, paths = settings_and_paths(**settings)
    inputs = Inputs.of(
        model, dataset, observables, checked, device=device, loss_fn=loss_fn, loss_fn_id=loss_fn_id,
        on_diverged=on_diverged, paths=paths, executor=executor, devices=devices, origin=origin,
    )  # fmt: skip
    return Request.of(inputs, param_masks, output_path)


def _device(model: nn.Module, asked: Any, workers: Workers) -> torch.device:
    """Where the caller's own process has the model. Of an executor's workers: it is only looked at, where it is."""
    if not workers.are_known:
        return next((p.device for p in model.parameters()), torch.device("cpu"))
    return check_device(model, workers.devices[0] if workers.devices else asked)


def path_of_run(output_path: Any, name: str) -> Any:
    """`<stem>_<name><suffix>`; what is no path is left for the run's own check to refuse."""
    if not isinstance(output_path, str | os.PathLike):
        return output_path
    stem, suffix = os.path.splitext(output_path.rstrip("/") if is_url(output_path) else os.fspath(output_path))
    return f"{stem}_{name}{suffix}"


def at_step_size(request: Request, lr: float) -> Request:
    """The request with the step size that another run has chosen, where it does not give its own."""
    inputs = request.inputs
    if inputs.settings.lr != "auto":
        return request
    return replace(request, inputs=replace(inputs, settings=replace(inputs.settings, lr=lr)))


def check_stored(first: Request, others: Sequence[Request]) -> None:
    """Refuse other runs at the paths of runs that take the step size of the first, before any chain starts."""
    known = first.stored()
    lr = None if known is None else known.metadata["step_size"]["lr"]
    for request in others:
        if request.path is None or (request.objects is None and not request.path.exists()):
            continue
        if request.objects is not None and not request.objects.list(request.objects.name):
            continue
        if lr is None and request.inputs.settings.lr == "auto":
            fix = f"The run that chooses its step size is missing: {first.place}."
            raise InputValueError(got("output_path", str(request.place), "new, or stored with that run", fix))
        (request if lr is None else at_step_size(request, lr)).stored()


def _check_memory(inputs: Inputs, masks: Mapping[str, Tensor | None]) -> None:
    """The vectors of one chain: moving weights, their gradient, the sampler's state and metric."""
    elements = sum(
        inputs.checkpoint.parameters[name].numel() if mask is None else int(mask.sum()) for name, mask in masks.items()
    )
    needed = 4 * elements * (2 + SAMPLERS[inputs.settings.sampling_method].traits.vectors)
    device = inputs.checkpoint.device
    if device.type == "cuda":
        there = torch.cuda.mem_get_info(device)[1]
    elif device.type == "cpu" and "SC_PHYS_PAGES" in os.sysconf_names:
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        return
    if needed > there:
        raise MemoryError(
            f"one chain of {elements:,} moving weights needs {needed:,} bytes besides the model, {device} has {there:,}. "
            "Move fewer weights (param_masks), or take a larger machine."
        )


def _warn_about_inputs(model: nn.Module, settings: Settings, rows: Rows) -> None:
    settings.warn_about()
    wanted = settings.num_init_loss_batches * settings.gradient_accumulation_steps * settings.batch_size
    if rows.num_rows < wanted:
        _warn(f"dataset has {rows.num_rows} rows and init_loss wants {wanted}: some are counted more than once.")
    config = getattr(model, "config", None)
    pad, eos = getattr(config, "pad_token_id", None), getattr(config, "eos_token_id", None)
    if isinstance(pad, int) and pad != eos and rows.form == IDS:
        warn_about_padding(rows.batch(np.arange(min(rows.num_rows, 1000))).given, pad)
    if settings.train_mode and any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules()):
        _warn("train_mode=True: dropout adds noise to every gradient, beyond that of the sampler.")
    if settings.train_mode and any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
        _warn("train_mode=True: batch-norm statistics move with every step of a chain (and are put back afterwards).")


def _warn_about_losing(settings: Settings, probe_seconds: float) -> None:
    expected = probe_seconds * settings.num_steps * settings.num_chains * settings.gradient_accumulation_steps
    if expected > LONG_RUN:
        _warn(
            f"This run may take {expected / 3600:.1f} h, and without output_path its results are deleted when Python "
            "exits. Try output_path='runs/first'."
        )


def _warn(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=4)
