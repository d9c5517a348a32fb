"""One run: check, plan, run the chains, open the store. Shared by `sample()` and by suites of restrictions."""

import logging
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from devinterp.engine.baseline import baseline_losses, init_loss, init_loss_of
from devinterp.engine.batches import Batches
from devinterp.engine.chain import Plan
from devinterp.engine.checkpoint import Checkpoint, check_device, check_loss, check_model
from devinterp.engine.curvature import StepSize, choose_step_size, warn_if_unstable
from devinterp.engine.placement import record_chain
from devinterp.engine.progress import Progress
from devinterp.engine.selection import Selection, check_masks
from devinterp.engine.settings import Settings, choice, settings_of
from devinterp.engine.tokens import Observable, Tokens, check_observables, check_tokens, warn_about_padding
from devinterp.errors import ChainDiverged, InputTypeError, got
from devinterp.store.identity import identity
from devinterp.store.reader import metadata_of, open_store
from devinterp.store.runs import layout, metadata_for, open_writer, plain, stored_run
from devinterp.store.schema import COMPLETE, DIVERGED, FAILED, RUNNING
from devinterp.store.writer import StoreWriter, check_output_path, check_space

logger = logging.getLogger("devinterp")

LONG_RUN = 600.0
"""Seconds beyond which a run without output_path is warned about"""


@dataclass(frozen=True)
class Inputs:
    """Everything of a run except its restriction and its path, checked."""

    model: nn.Module
    checkpoint: Checkpoint
    settings: Settings
    batches: Batches
    observables: tuple[Observable, ...]
    on_diverged: str

    @classmethod
    def of(
        cls,
        model: nn.Module,
        dataset: Any,
        observables: Mapping[str, Any],
        settings: Settings,
        *,
        device: str | torch.device | None = None,
        loss_fn: Callable[[nn.Module, Tensor], Tensor] | None = None,
        on_diverged: str = "record",
    ) -> "Inputs":
        choice("record", "raise")("on_diverged", on_diverged)
        check_model(model)
        checked_device = check_device(model, device)
        if loss_fn is not None and not callable(loss_fn):
            fix = "None takes the next-token cross-entropy."
            raise InputTypeError(got("loss_fn", loss_fn, "a function (model, input_ids) -> per-token loss", fix))
        tokens = check_tokens("dataset", dataset, at_least=settings.batch_size)
        seen = check_observables(observables, tokens.length, settings.batch_size, settings.batches_per_draw, settings.obs_seed)
        _warn_about_inputs(model, settings, tokens)
        checkpoint = Checkpoint(model, loss_fn, checked_device, settings.train_mode)
        return cls(model, checkpoint, settings, Batches.of(tokens, settings), seen, on_diverged)

    @property
    def largest_id(self) -> int:
        return max([self.batches.tokens.largest, *(int(observable.ids.max()) for observable in self.observables)])


@dataclass(frozen=True)
class Request:
    """One run asked for: the moving weights, and where its store is or will be."""

    inputs: Inputs
    masks: dict[str, Tensor | None]
    path: Path | None

    @classmethod
    def of(cls, inputs: Inputs, param_masks: Any, output_path: Any) -> "Request":
        path = check_output_path(output_path)
        masks = check_masks(inputs.model, param_masks)
        check_space(path, *layout(inputs.settings, inputs.batches.tokens.length, inputs.observables))
        return cls(inputs, masks, path)

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        inputs = self.inputs
        return plain(
            identity(
                inputs.settings,
                inputs.checkpoint,
                inputs.checkpoint.digest_as_found,
                self.masks,
                inputs.batches,
                inputs.observables,
            )
        )

    def stored(self) -> xr.DataTree | None:
        """The run at the path if it is this one; refuses any other thing that is there."""
        return stored_run(self.path, self.fingerprint)


def request_of(
    model: nn.Module,
    dataset: Any,
    observables: Mapping[str, Any],
    *,
    param_masks: Any = None,
    output_path: Any = None,
    device: str | torch.device | None = None,
    loss_fn: Any = None,
    on_diverged: str = "record",
    **settings: Any,
) -> Request:
    """The arguments of `sample`, checked."""
    checked = settings_of(**settings)
    inputs = Inputs.of(model, dataset, observables, checked, device=device, loss_fn=loss_fn, on_diverged=on_diverged)
    return Request.of(inputs, param_masks, output_path)


def run(request: Request, bar: Progress, probe: bool = True) -> xr.DataTree:
    """Return the stored run, or finish it, or make it.

    `probe=False` where a run with the same model, data and a step size that is known to be stable has just been made.
    """
    inputs, settings, checkpoint = request.inputs, request.inputs.settings, request.inputs.checkpoint
    known = request.stored()
    if known is not None and inputs.on_diverged == "raise":
        _raise_for_diverged(known)
    if known is not None and known.attrs.get("completed"):
        logger.info("%s holds this very run, complete; nothing to compute", request.path)
        bar.skip(num_rows(inputs))
        return known
    metadata = metadata_for(settings, inputs.model, inputs.observables, request.fingerprint, checkpoint.device)
    with checkpoint.ready():
        if probe:
            _probe(inputs, request.path)
        selection = Selection.of(checkpoint.parameters, request.masks)
        plan = Plan(settings, settings.sampler(1.0), checkpoint, selection, inputs.batches, inputs.observables)
        step_size = _step_size(plan, known)
        plan = replace(plan, sampler=settings.sampler(step_size.lr))
        if probe and settings.lr != "auto" and known is None:
            warn_if_unstable(plan)
        store = open_writer(request.path, plan, metadata | {"step_size": asdict(step_size)}, known)
        _run(plan, store, inputs.on_diverged, bar)
    return open_store(store.path)


def num_rows(inputs: Inputs) -> int:
    """What a run counts up to: the batches of its baseline, and the forward passes on sampling batches of its chains."""
    settings = inputs.settings
    return _num_streams(settings) * settings.num_draws + settings.num_chains * (settings.num_steps + 1)


def _num_streams(settings: Settings) -> int:
    return 1 if settings.match_sampling_input_ids_across_chains else settings.num_chains


def _probe(inputs: Inputs, path: Path | None) -> None:
    began = time.monotonic()
    check_loss(inputs.checkpoint, inputs.checkpoint.ids(inputs.batches.micro(0, 0)), inputs.largest_id)
    if path is None:
        _warn_about_losing(inputs.settings, time.monotonic() - began)


def _warn_about_inputs(model: nn.Module, settings: Settings, tokens: Tokens) -> None:
    settings.warn_about()
    wanted = settings.num_init_loss_batches * settings.gradient_accumulation_steps * settings.batch_size
    if tokens.num_rows < wanted:
        _warn(f"dataset has {tokens.num_rows} sequences and init_loss wants {wanted}: some are counted more than once.")
    config = getattr(model, "config", None)
    pad, eos = getattr(config, "pad_token_id", None), getattr(config, "eos_token_id", None)
    if isinstance(pad, int) and pad != eos:
        warn_about_padding(tokens.rows(np.arange(min(tokens.num_rows, 1000))), pad)
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


def _step_size(plan: Plan, known: xr.DataTree | None) -> StepSize:
    if known is not None:
        return StepSize(**metadata_of(known)["step_size"])
    return choose_step_size(plan) if plan.settings.lr == "auto" else StepSize(float(plan.settings.lr))


def _run(plan: Plan, store: StoreWriter, on_diverged: str, bar: Progress) -> None:
    named = bar.description
    _record_baseline(plan, store, bar)
    status = store.status()
    for chain in range(plan.settings.num_chains):
        bar.describe(f"{named}, chain {chain + 1}/{plan.settings.num_chains}")
        due, rows = bar.done, plan.settings.num_steps + 1
        if status[chain] in (RUNNING, FAILED):  # what failed once, for lack of memory or disk, is run again
            store.write("chain_status", RUNNING, chain)
            _record_chain(plan, store, chain, on_diverged, bar)
        bar.skip(due + rows - bar.done)
    bar.describe(named)
    store.finish()


def _raise_for_diverged(known: xr.DataTree) -> None:
    """For chains that diverged in an earlier call."""
    for chain, at in enumerate(known.to_dataset()["diverged_at"].values):
        if at >= 0:
            raise ChainDiverged(chain, int(at), float(metadata_of(known)["step_size"]["lr"]))


def _record_baseline(plan: Plan, store: StoreWriter, bar: Progress) -> None:
    settings, shared = plan.settings, plan.settings.match_sampling_input_ids_across_chains
    for observable in plan.observables:
        store.write(f"init_loss_{observable.name}", init_loss_of(plan, observable).cpu())
    for stream in range(_num_streams(settings)):
        mean = init_loss(plan, stream).cpu()
        for chain in range(settings.num_chains) if shared else [stream]:
            store.write("init_loss", mean, chain)
        with store.rows(None if shared else stream) as rows:
            for losses in baseline_losses(plan, stream):
                rows.append("baseline_loss", losses)
                bar.update("baseline")


def _record_chain(plan: Plan, store: StoreWriter, chain: int, on_diverged: str, bar: Progress) -> None:
    with store.rows(chain) as rows:
        try:
            diverged_at = record_chain(plan, chain, rows, bar)
        except Exception:
            store.write("chain_status", FAILED, chain)
            raise
    if diverged_at is None:
        store.write("chain_status", COMPLETE, chain)
        return
    store.write("diverged_at", diverged_at, chain)
    store.write("chain_status", DIVERGED, chain)
    diverged = ChainDiverged(chain, diverged_at, plan.sampler.lr)
    if on_diverged == "raise":
        raise diverged
    logger.warning("%s The other chains go on.", diverged)
