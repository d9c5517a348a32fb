"""`sample()`: check, plan, run the chains, open the store."""

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from typing import Any

import torch
import xarray as xr
from torch import Tensor, nn

from devinterp.engine.progress import Progress
from devinterp.slt.requests import request_of
from devinterp.slt.running import run


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
    loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
    loss_fn_id: str | None = None,
    train_mode: bool = False,
    on_diverged: str = "record",
    chains_together: str = "auto",
    reuse_prefix: bool = True,
    compile: bool = False,
    precision: str | None = None,
    executor: Executor | None = None,
    devices: Sequence[str] | None = None,
    resume: bool = True,
    checkpoint_every: float = 300.0,
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
        dataset: a Hugging Face Dataset with an `input_ids` column of equal-length sequences; also `attention_mask` and `labels`
            (-100 = no loss), which leave padding out of every mean. With `loss_fn`, any columns of numbers: a Dataset, a torch
            Dataset, a dict or tuple of tensors such as (x, y) (docs/other_models.md).
        observables: name -> data, or (data, number of batches), of the same columns; may be empty.
        lr: step size, or "auto": 1 / (n_beta h_max + localization + llc_weight_decay), h_max the largest Hessian
            eigenvalue at the checkpoint and after a short pilot (a quarter of that for SGLD, in the metric where there is
            one, not offered for RMSprop and Adam).
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
        sampling_method: "sgmcmc_sgld", "leimkuhler_matthews" (recommended: no step-size bias on quadratics),
            "preconditioned_leimkuhler_matthews", "sgnht", "rmsprop_sgld" or "adam_sgld" (docs/guide.md: which is right when).
        sampling_method_kwargs: settings of the method: `damping` of preconditioned_leimkuhler_matthews; `friction`, `coupling`
            of sgnht; `alpha`, `eps`, `bias_correction` of rmsprop_sgld; `beta1`, `beta2`, `eps` of adam_sgld.
        rmsprop_eps: alias of sampling_method_kwargs["eps"].
        rmsprop_alpha: alias of sampling_method_kwargs["alpha"].
        shuffle: visit the dataset in a new random order every epoch; otherwise always in its own order.
        match_sampling_input_ids_across_chains: all chains see the same batches; only their noise differs.
        init_noise: standard deviation of noise added once to the moving weights before sampling.
        device: where to compute; None = the model's own, or a GPU where there is one.
        save_metrics: store norms and dot products of the parts of every update.
        output_path: directory of the Zarr store; None = temporary, deleted when Python exits. The same call again goes on
            where an interrupted one has stopped, and returns a finished run at once; with more chains or draws it adds them.
            What going on needs is kept beside it, in `<output_path>.run`. Or the URL of an object store, as "s3://bucket/run"
            (docs/store.md): worked on in a folder of this machine and copied at every commit.
        loss_fn: (model, input_ids) -> per-token loss (batch, token - 1); default next-token cross-entropy. Of data with other
            columns (model, batch) -> loss per row (batch,) or per position (batch, position), in nats; the batch is a dict of
            tensors, or a tuple where the data was one.
        loss_fn_id: stands for loss_fn where a stored run is recognised: change it whenever the function changes. None = a
            fingerprint of its code and of everything that it captures and uses.
        train_mode: sample with dropout and batch-norm updates on, from a hashed seed.
        on_diverged: "record" keeps the other chains and marks the diverged one; "raise" stops.
        chains_together: "processes" (side by side), "vmap" (one pass for all), "sequential", or "auto", which chooses by
            sizes (docs/speed.md). Results agree to the last digits; the first and last are equal at equal thread count.
        reuse_prefix: compute what lies before the moving weights once, where that is proven to change nothing.
        compile: losses through `torch.compile`, which takes about a minute first.
        precision: "bf16" runs the observables' forward passes in bfloat16; what that does to their losses at the checkpoint
            is stored in the metadata as `precision_error`.
        executor: hands the run to the workers of any `concurrent.futures.Executor`, for example `client.get_executor()` of a
            Dask cluster (docs/clusters.md). They load the model themselves and write their own parts of the store, so they
            need the file system of `output_path`.
        devices: a worker process on each of these devices of this machine, e.g. ["cuda:0", "cuda:1"]; chains go to whichever
            is free.
        resume: go on from the last commit; False starts chains that are not finished again.
        checkpoint_every: seconds between commits, the most that is lost to a crash; 0 commits every chunk that is whole.
        progress: show bars, or log lines without a terminal.

    Returns:
        A lazily read DataTree with `sampling_loss` and `baseline_loss` (nats), `loss_{obs}`, `init_loss`, `step_loss`,
        `chain_status` and more; all variables are listed in docs/store.md. Losses that do not count are NaN.

    Raises:
        DevinterpInputError: an argument cannot be used; before any chain starts and before any file is made.
        RunMismatchError: output_path holds a run with other inputs.
        RunLocked: another process writes the run at output_path.
        StorageError: the disk is full or fails, or an object store cannot be reached; what was committed is kept.
        ChainDiverged: with on_diverged="raise", a loss is not finite.
        ChainFailed: a chain ended in an error of the model, the machine or the disk; the others are stored.
    """
    request = request_of(
        model, dataset, observables, param_masks=param_masks, output_path=output_path, device=device, loss_fn=loss_fn,
        loss_fn_id=loss_fn_id, on_diverged=on_diverged, executor=executor, devices=devices,
        lr=lr, n_beta=n_beta, num_chains=num_chains, num_draws=num_draws, batch_size=batch_size,
        num_burnin_steps=num_burnin_steps, num_steps_bw_draws=num_steps_bw_draws,
        num_init_loss_batches=num_init_loss_batches, init_seed=init_seed, batches_per_draw=batches_per_draw,
        obs_seed=obs_seed, gradient_accumulation_steps=gradient_accumulation_steps, localization=localization,
        noise_level=noise_level, llc_weight_decay=llc_weight_decay, bounding_box_size=bounding_box_size,
        sampling_method=sampling_method, sampling_method_kwargs=sampling_method_kwargs, rmsprop_eps=rmsprop_eps,
        rmsprop_alpha=rmsprop_alpha, shuffle=shuffle,
        match_sampling_input_ids_across_chains=match_sampling_input_ids_across_chains, init_noise=init_noise,
        save_metrics=save_metrics, train_mode=train_mode, chains_together=chains_together, reuse_prefix=reuse_prefix,
        compile=compile, precision=precision, resume=resume, checkpoint_every=checkpoint_every,
    )  # fmt: skip
    with Progress(request.inputs.num_rows, "sampling", progress) as bar:
        return run(request, bar)
