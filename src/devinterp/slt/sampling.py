"""`sample()`: check, plan, run the chains, open the store."""

import logging
import os
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
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
from devinterp.engine.settings import Settings, choice, gather_sampler_kwargs
from devinterp.engine.tokens import Tokens, check_observables, check_tokens, warn_about_padding
from devinterp.errors import ChainDiverged, InputTypeError, got
from devinterp.store.identity import identity
from devinterp.store.reader import metadata_of, open_store
from devinterp.store.runs import layout, metadata_for, open_writer, plain, stored_run
from devinterp.store.schema import COMPLETE, DIVERGED, FAILED, RUNNING
from devinterp.store.writer import StoreWriter, check_output_path, check_space

logger = logging.getLogger("devinterp")

LONG_RUN = 600.0
"""Seconds beyond which a run without output_path is warned about"""


def sample(
    model: nn.Module,
    dataset: Any,
    observables: Mapping[str, Any],
    *,
    lr: float | str,
    n_beta: float,
    param_masks: Mapping[str, Tensor | None] | None = None,
    num_chains: int = 4,
    num_draws: int = 200,
    batch_size: int = 32,
    num_burnin_steps: int = 0,
    num_steps_bw_draws: int = 1,
    num_init_loss_batches: int = 32,
    init_seed: int = 100,
    batches_per_draw: int = 3,
    obs_seed: int = 1337,
    gradient_accumulation_steps: int = 1,
    localization: float = 0.0,
    noise_level: float = 1.0,
    llc_weight_decay: float = 0.0,
    bounding_box_size: float | None = None,
    sampling_method: str = "sgmcmc_sgld",
    sampling_method_kwargs: dict[str, Any] | None = None,
    rmsprop_eps: float | None = None,
    rmsprop_alpha: float | None = None,
    shuffle: bool = True,
    match_sampling_input_ids_across_chains: bool = True,
    init_noise: float | None = None,
    device: str | torch.device | None = None,
    save_metrics: bool = False,
    output_path: str | os.PathLike[str] | None = None,
    loss_fn: Callable[[nn.Module, Tensor], Tensor] | None = None,
    train_mode: bool = False,
    on_diverged: str = "record",
    progress: bool = True,
) -> xr.DataTree:
    """Sample weights around a checkpoint and record per-token losses at every draw.

    The target is the local posterior (Lau et al. 2023, arXiv 2308.12108)

        p(w) ∝ exp(-n_beta L(w) - localization/2 |w - w0|^2 - llc_weight_decay/2 |w|^2),

    w0 the checkpoint. One step of `sgmcmc_sgld`, g the gradient of the mean loss over the step's batch:

        w <- w - (lr/2) (n_beta g + localization (w - w0) + llc_weight_decay w) + sqrt(lr) noise_level xi

    Draw d (from 0) is taken after step num_burnin_steps + (d + 1) num_steps_bw_draws. The model is sampled in eval mode and
    handed back as it came; no global random state is read or changed; a half-precision model moves in float32.

    Args:
        model: any module mapping `input_ids` (batch, token) to logits or to an object with `.logits`; with `loss_fn`, anything.
        dataset: a Hugging Face Dataset with an `input_ids` column of equal-length sequences.
        observables: name -> Dataset or (Dataset, number of batches); may be empty.
        lr: step size, or "auto": 1 / (n_beta h_max + localization + llc_weight_decay), h_max the largest Hessian
            eigenvalue at the checkpoint and after a short pilot (a quarter of that for SGLD, not offered for RMSprop).
        n_beta: inverse temperature times n, in 1/nats.
        param_masks: parameter name -> bool mask (None = whole parameter). Only these move; None = every parameter that
            requires a gradient.
        num_chains: independent chains, each started at the checkpoint.
        num_draws: draws per chain.
        batch_size: sequences per gradient micro-batch, and per observable batch.
        num_burnin_steps: steps before draws begin to count.
        num_steps_bw_draws: steps per draw.
        num_init_loss_batches: batches (times gradient_accumulation_steps) for `init_loss`.
        init_seed: the streams of chain c are hashed from (init_seed, c).
        batches_per_draw: default number of batches of an observable.
        obs_seed: fixes which sequences an observable uses.
        gradient_accumulation_steps: micro-batches averaged per step.
        localization: pull towards the checkpoint, per squared weight. It defines what is measured: state it with every LLC.
        noise_level: standard deviation of the noise; only 1 samples the posterior.
        llc_weight_decay: precision of a Gaussian prior centred at zero.
        bounding_box_size: weights are clamped to the checkpoint +- this.
        sampling_method: "sgmcmc_sgld", "rmsprop_sgld" or "leimkuhler_matthews" (recommended: no step-size bias on quadratics).
        sampling_method_kwargs: settings of the method: `alpha`, `eps`, `bias_correction` of rmsprop_sgld.
        rmsprop_eps: alias of sampling_method_kwargs["eps"].
        rmsprop_alpha: alias of sampling_method_kwargs["alpha"].
        shuffle: visit the dataset in a new random order every epoch; otherwise always in its own order.
        match_sampling_input_ids_across_chains: all chains see the same batches; only their noise differs.
        init_noise: standard deviation of noise added once to the moving weights before sampling.
        device: where to compute; None = the model's own, or a GPU where there is one.
        save_metrics: store norms and dot products of the parts of every update.
        output_path: directory of the Zarr store; None = temporary, deleted when Python exits. The same call again returns
            what is stored; chains of an unfinished run that are not complete are run from their start.
        loss_fn: (model, input_ids) -> per-token loss (batch, token - 1); default next-token cross-entropy.
        train_mode: sample with dropout and batch-norm updates on, from a hashed seed.
        on_diverged: "record" keeps the other chains and marks the diverged one; "raise" stops.
        progress: show bars, or log lines without a terminal.

    Returns:
        A lazily read DataTree with `sampling_loss` and `baseline_loss` (nats), `loss_{obs}`, `init_loss`, `step_loss`,
        `chain_status` and more; all variables are listed in docs/store.md.

    Raises:
        DevinterpInputError: an argument cannot be used; before any chain starts and before any file is made.
        RunMismatchError: output_path holds a run with other inputs.
        ChainDiverged: with on_diverged="raise", a loss is not finite.
    """
    settings = Settings(
        lr=lr, n_beta=n_beta, num_chains=num_chains, num_draws=num_draws, batch_size=batch_size,
        num_burnin_steps=num_burnin_steps, num_steps_bw_draws=num_steps_bw_draws,
        num_init_loss_batches=num_init_loss_batches, init_seed=init_seed, batches_per_draw=batches_per_draw,
        obs_seed=obs_seed, gradient_accumulation_steps=gradient_accumulation_steps, localization=localization,
        noise_level=noise_level, llc_weight_decay=llc_weight_decay, bounding_box_size=bounding_box_size,
        sampling_method=sampling_method,
        sampling_method_kwargs=gather_sampler_kwargs(
            sampling_method, sampling_method_kwargs, rmsprop_eps=rmsprop_eps, rmsprop_alpha=rmsprop_alpha
        ),
        shuffle=shuffle, match_sampling_input_ids_across_chains=match_sampling_input_ids_across_chains,
        init_noise=init_noise, save_metrics=save_metrics, train_mode=train_mode,
    )  # fmt: skip
    choice("record", "raise")("on_diverged", on_diverged)
    path = check_output_path(output_path)
    check_model(model)
    masks = check_masks(model, param_masks)
    checked_device = check_device(model, device)
    if loss_fn is not None and not callable(loss_fn):
        fix = "None takes the next-token cross-entropy."
        raise InputTypeError(got("loss_fn", loss_fn, "a function (model, input_ids) -> per-token loss", fix))
    tokens = check_tokens("dataset", dataset, at_least=settings.batch_size)
    checked = check_observables(observables, tokens.length, settings.batch_size, settings.batches_per_draw, settings.obs_seed)
    check_space(path, *layout(settings, tokens.length, checked))
    _warn_about_inputs(model, settings, tokens)

    checkpoint = Checkpoint(model, loss_fn, checked_device, settings.train_mode)
    batches = Batches.of(tokens, settings)
    fingerprint = plain(identity(settings, checkpoint, masks, batches, checked))
    metadata = metadata_for(settings, model, checked, fingerprint, checked_device)
    known = stored_run(path, fingerprint)
    if known is not None and known.attrs.get("completed"):
        logger.info("%s holds this very run, complete; nothing to compute", path)
        return known
    with checkpoint.ready():
        largest = max([tokens.largest, *(int(observable.ids.max()) for observable in checked)])
        began = time.monotonic()
        check_loss(checkpoint, checkpoint.ids(batches.micro(0, 0)), largest)
        if path is None:
            _warn_about_losing(settings, time.monotonic() - began)
        selection = Selection.of(checkpoint.parameters, masks)
        plan = Plan(settings, settings.sampler(1.0), checkpoint, selection, batches, checked)
        step_size = _step_size(plan, known)
        plan = replace(plan, sampler=settings.sampler(step_size.lr))
        if lr != "auto" and known is None:
            warn_if_unstable(plan)
        store = open_writer(path, plan, metadata | {"step_size": asdict(step_size)}, known)
        _run(plan, store, on_diverged, progress)
    return open_store(store.path)


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


def _run(plan: Plan, store: StoreWriter, on_diverged: str, progress: bool) -> None:
    _record_baseline(plan, store, progress)
    status = store.status()
    for chain in range(plan.settings.num_chains):
        if status[chain] == RUNNING:
            _record_chain(plan, store, chain, on_diverged, progress)
    store.finish()


def _record_baseline(plan: Plan, store: StoreWriter, progress: bool) -> None:
    settings, shared = plan.settings, plan.settings.match_sampling_input_ids_across_chains
    for observable in plan.observables:
        store.write(f"init_loss_{observable.name}", init_loss_of(plan, observable).cpu())
    streams = [0] if shared else list(range(settings.num_chains))
    with Progress(len(streams) * settings.num_draws, "baseline", progress) as bar:
        for stream in streams:
            mean = init_loss(plan, stream).cpu()
            for chain in range(settings.num_chains) if shared else [stream]:
                store.write("init_loss", mean, chain)
            with store.rows(None if shared else stream) as rows:
                for losses in baseline_losses(plan, stream):
                    rows.append("baseline_loss", losses)
                    bar.update()


def _record_chain(plan: Plan, store: StoreWriter, chain: int, on_diverged: str, progress: bool) -> None:
    description = f"chain {chain + 1}/{plan.settings.num_chains}"
    with Progress(plan.settings.num_steps + 1, description, progress) as bar, store.rows(chain) as rows:
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
