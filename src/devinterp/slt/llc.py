"""The local learning coefficient: how many effective parameters a model uses around a checkpoint."""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import xarray as xr
from torch import nn

from devinterp.analysis.llc import running_mean, variance_form
from devinterp.analysis.uncertainty import ess, rhat, standard_error
from devinterp.engine.settings import choice, switch
from devinterp.errors import ChainsUnusable, StoreError
from devinterp.slt.llc_parts import PARTS, of_observables, of_parts
from devinterp.slt.sampling import sample
from devinterp.slt.step_size import step_size_of
from devinterp.slt.sweep_results import of_each_run
from devinterp.store.reader import metadata_of, n_beta_of
from devinterp.store.samples import Samples, draw_spans, of_chains, root_of, usable_chains
from devinterp.store.sweeps import is_sweep

ERROR_OF_CORRECTION = 0.5
"""of the correction for the step size: its trace is that of one random direction, and its formula the first order"""


def llc(
    model: nn.Module,
    dataset: Any,
    observables: Mapping[str, Any] | None = None,
    *,
    on_diverged: str = "raise",
    per: str | None = None,
    correct_step_size: bool = False,
    **settings: Any,
) -> xr.Dataset:
    """Sample around a checkpoint and compute the LLC in one call: `compute_llc(sample(...))`.

    Args:
        model, dataset, **settings: as in `sample`.
        observables: as in `sample`; None = the sampling data alone.
        on_diverged, per, correct_step_size: as in `compute_llc`.

    Returns:
        As `compute_llc`.
    """
    _check_options(on_diverged, per, correct_step_size)
    samples = sample(model, dataset, observables or {}, **settings)
    return compute_llc(samples, on_diverged=on_diverged, per=per, correct_step_size=correct_step_size)


def compute_llc(
    samples: Samples, *, on_diverged: str = "raise", per: str | None = None, correct_step_size: bool = False
) -> xr.Dataset:
    """LLC with its standard error, from what `sample()` returned or stored (stores of devinterp 2.0 included).

        llc          = n_beta (E[L(w)] - L(w0))          (Lau et al. 2023, arXiv 2308.12108, eq. 14)
        llc_variance = n_beta^2 Var[L(w)]                (equal to the above for regular models without localization)

    The mean is over draws, never over burn-in. Each draw's loss is paired with `baseline_loss`, the loss of the checkpoint
    on the very same batch, which removes the noise of the batches. Stores of devinterp 2.0 have no such baseline; theirs is
    `init_loss`, per chain and token position.

    `llc_sem`, the standard error of `llc_mean`, is n_beta times the larger of two Monte Carlo standard errors of the paired
    trace: of the chains as independent ones (autocorrelation within chains, spread between them), and of their mean as one
    series (batches shared by the chains: pairing leaves their excess losses correlated by 0.2 to 0.5 on a small language
    model). The effective sample size is used since in simulations its 95 % intervals hold the
    truth in 93-96 % of runs, where ten batch means per chain do in 73-95 %, and the spread of a few chain means gives
    intervals several times wider. For an interval take Student's t with `ess_bulk` - 1 degrees of freedom.

    `llc_variance` needs no baseline. Where it differs from `llc_mean` by more than localization explains, one of the two is
    wrong: with r = n_beta h / (n_beta h + localization) the mean form gives the sum of r/2 over directions, the variance form
    that of r^2/2. The variance that batches add is taken off.

    A value depends on `localization` more than on anything else: compare LLCs at one setting only.

    Args:
        samples: a DataTree (or its root dataset, or the path of a store); or a sweep (or its path), which gives everything
            along `checkpoint`, and `restriction` where it has some.
        on_diverged: "raise", or "drop" to leave out chains that diverged or failed, listed in the attributes.
        per: also the LLC of each "sequence" or "token" of the observables; their mean is the observable's.
        correct_step_size: take `step_size_bias` off `llc_mean`, `llc_scalar` and `llc_per_chain`, and add half of it, as an
            error of its own, to `llc_sem`. Needs an SGLD or Leimkuhler-Matthews run with a known curvature.

    Returns:
        Dataset with `llc_mean`, `llc_std` (over chains, ddof 0), `llc_sem`, `llc_scalar` (= llc_mean),
        `llc_per_chain` (chain), `llc_running` (chain, draw; over the draws up to each), `llc_variance` and
        `llc_variance_sem`, `step_size_bias` (what the step size adds to the LLC, lr n_beta tr(H) / 8 for SGLD to first order,
        0 for Leimkuhler-Matthews; NaN where the trace was not measured), `loss_trace` (chain, draw; mean sampling loss),
        `excess_trace` (chain, draw; the same minus the baseline), `init_loss` (mean), `rhat` and `ess_bulk` of the excess
        trace, and for every observable `llc_observable`, `llc_observable_sem` and its loss at the checkpoint,
        `init_loss_observable` (observable). With `per`, for observable OBS `llc_sequence_OBS` (batch_OBS) or `llc_token_OBS`
        (batch_OBS, token_pos), each with `..._sem`, and `input_ids_OBS`. Losses in nats.

    Raises:
        ChainsUnusable: chains that diverged or failed (unless dropped) or are not finished.
        StoreError: the samples lack what is needed.
    """
    _check_options(on_diverged, per, correct_step_size)
    if is_sweep(samples):
        options: dict[str, Any] = {"on_diverged": on_diverged, "per": per, "correct_step_size": correct_step_size}
        return of_each_run(samples, partial(compute_llc, **options))
    ds = root_of(samples)
    n_beta = n_beta_of(ds)
    kept, dropped = usable_chains(ds, on_diverged)
    ds = of_chains(ds, kept)
    traces = excess_losses(ds)
    values = traces["excess"].values
    bias = step_size_of(ds).llc_bias
    taken_off = _correction(bias) if correct_step_size else 0.0
    per_chain = n_beta * traces["excess"].mean("draw") - taken_off
    variance, variance_sem = variance_form(n_beta * values, n_beta**2 * traces["batch_variance"].values)
    result = xr.Dataset(
        {
            "llc_mean": per_chain.mean("chain"),
            "llc_std": per_chain.std("chain", ddof=0),
            "llc_sem": math.hypot(n_beta * standard_error(values), ERROR_OF_CORRECTION * taken_off),
            "llc_scalar": per_chain.mean("chain"),
            "llc_per_chain": per_chain,
            "llc_running": (("chain", "draw"), running_mean(n_beta * values) - taken_off),
            "llc_variance": variance,
            "llc_variance_sem": variance_sem,
            "step_size_bias": bias,
            "loss_trace": traces["loss"],
            "excess_trace": traces["excess"],
            "init_loss": ds["init_loss"].mean(["chain", "token_pos"], dtype=np.float64),
            "rhat": rhat(values),
            "ess_bulk": ess(values, "bulk"),
            **of_observables(ds, n_beta),
            **({} if per is None else of_parts(ds, n_beta, per)),
        }
    )
    stored = metadata_of(ds)["config"]["sampler"] if "metadata" in ds.attrs else {}
    told = ("sampling_method", "localization", "num_burnin_steps", "num_steps_bw_draws", "llc_weight_decay")
    result.attrs = {
        "n_beta": n_beta,
        **{name: stored[name] for name in told if name in stored},
        "num_chains_used": len(kept),
        "dropped_chains": dropped,
        "baseline": "baseline_loss, paired with each draw" if "baseline_loss" in ds else "init_loss",
        "step_size_corrected": correct_step_size,
    }
    return result


def excess_losses(ds: xr.Dataset) -> xr.Dataset:
    """Of the sampling batch at each draw, (chain, draw) in float64.

    `loss`, its mean; `excess`, the same minus that of the checkpoint on the same batch; and `batch_variance`, the part of the
    variance of `excess` that is the batch's, by the spread of its sequences (NaN for batches of one).
    """
    parts = []
    for span in draw_spans(ds):
        losses = ds["sampling_loss"].isel(draw=span).load()
        baseline = ds["baseline_loss"].isel(draw=span).load() if "baseline_loss" in ds else ds["init_loss"]
        loss = losses.mean("token_pos", dtype=np.float64)
        excess = loss - baseline.mean("token_pos", dtype=np.float64)
        means = {"loss": loss.mean("batch"), "excess": excess.mean("batch")}
        parts.append(xr.Dataset(means | {"batch_variance": _variance_of_mean(excess)}))
    found = xr.concat(parts, "draw", coords="minimal", compat="override", join="override").transpose("chain", "draw")
    if not np.isfinite(found["excess"]).all():
        raise ChainsUnusable("the samples hold losses that are not finite. Look at sampling_loss; drop those chains.")
    return found


def _variance_of_mean(excess: xr.DataArray) -> xr.DataArray:
    count = excess.sizes["batch"]
    return excess.var("batch", ddof=1) / count if count > 1 else xr.full_like(excess.isel(batch=0, drop=True), np.nan)


def _check_options(on_diverged: str, per: str | None, correct_step_size: bool) -> None:
    choice("raise", "drop")("on_diverged", on_diverged)
    if per is not None:
        choice(*PARTS)("per", per)
    switch("correct_step_size", correct_step_size)


def _correction(bias: float) -> float:
    if math.isnan(bias):
        raise StoreError(
            "the step size cannot be corrected for: these samples do not tell the curvature of the loss. Run again with "
            "sampling_method='sgmcmc_sgld' and lr='auto', or better 'leimkuhler_matthews', which needs no correction."
        )
    return bias
