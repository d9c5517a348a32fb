"""The local learning coefficient: how many effective parameters a model uses around a checkpoint."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr
from torch import nn

from devinterp.analysis.uncertainty import Trace, ess_bulk, rhat, standard_error
from devinterp.engine.settings import choice
from devinterp.errors import ChainsUnusable
from devinterp.slt.sampling import sample
from devinterp.store.reader import metadata_of, n_beta_of, observable_names
from devinterp.store.samples import Samples, mean_per_draw, of_chains, root_of, usable_chains


def llc(
    model: nn.Module,
    dataset: Any,
    observables: Mapping[str, Any] | None = None,
    *,
    on_diverged: str = "raise",
    **settings: Any,
) -> xr.Dataset:
    """Sample around a checkpoint and compute the LLC in one call: `compute_llc(sample(...))`.

    Args:
        model, dataset, **settings: as in `sample`.
        observables: as in `sample`; None = the sampling data alone.
        on_diverged: as in `compute_llc`.

    Returns:
        As `compute_llc`.
    """
    choice("raise", "drop")("on_diverged", on_diverged)
    return compute_llc(sample(model, dataset, observables or {}, **settings), on_diverged=on_diverged)


def compute_llc(samples: Samples, *, on_diverged: str = "raise") -> xr.Dataset:
    """LLC with its standard error, from what `sample()` returned or stored (stores of devinterp 2.0 included).

        llc = n_beta (E[L(w)] - L(w0))          (Lau et al. 2023, arXiv 2308.12108, eq. 14)

    The mean is over draws, never over burn-in. Each draw's loss is paired with `baseline_loss`, the loss of the checkpoint
    on the very same batch, which removes the noise of the batches. Stores of devinterp 2.0 have no such baseline; theirs is
    `init_loss`, per chain and token position.

    `llc_sem`, the standard error of `llc_mean`, is n_beta times the larger of two Monte Carlo standard errors of the paired
    trace: of the chains as independent ones (autocorrelation within chains, spread between them), and of their mean as one
    series (batches shared by the chains: pairing leaves their excess losses correlated by 0.2 to 0.5 on a small language
    model). The effective sample size is used since in simulations its 95 % intervals hold the
    truth in 93-96 % of runs, where ten batch means per chain do in 73-95 %, and the spread of a few chain means gives
    intervals several times wider. For an interval take Student's t with `ess_bulk` - 1 degrees of freedom.

    A value depends on `localization` more than on anything else: compare LLCs at one setting only.

    Args:
        samples: a DataTree (or its root dataset, or the path of a store).
        on_diverged: "raise", or "drop" to leave out chains that diverged or failed, listed in the attributes.

    Returns:
        Dataset with `llc_mean`, `llc_std` (over chains, ddof 0), `llc_sem`, `llc_scalar` (= llc_mean),
        `llc_per_chain` (chain), `loss_trace` (chain, draw; mean sampling loss), `excess_trace` (chain, draw; the same minus
        the baseline), `init_loss` (mean), `rhat` and `ess_bulk` of the excess trace, and for every observable
        `llc_observable`, `llc_observable_sem` (observable). Losses in nats.

    Raises:
        ChainsUnusable: chains that diverged or failed (unless dropped) or are not finished.
        StoreError: the samples lack what is needed.
    """
    choice("raise", "drop")("on_diverged", on_diverged)
    ds = root_of(samples)
    n_beta = n_beta_of(ds)
    kept, dropped = usable_chains(ds, on_diverged)
    ds = of_chains(ds, kept)
    loss_trace = mean_per_draw(ds["sampling_loss"])
    excess = loss_trace - (
        mean_per_draw(ds["baseline_loss"]) if "baseline_loss" in ds else ds["init_loss"].mean("token_pos", dtype=np.float64)
    )
    excess = excess.transpose("chain", "draw")
    if not np.isfinite(excess).all():
        raise ChainsUnusable("the samples hold losses that are not finite. Look at sampling_loss; drop those chains.")
    values = excess.values.astype(np.float64)
    per_chain = n_beta * excess.mean("draw")
    mean = per_chain.mean("chain")
    result = xr.Dataset(
        {
            "llc_mean": mean,
            "llc_std": per_chain.std("chain", ddof=0),
            "llc_sem": n_beta * standard_error(values),
            "llc_scalar": mean,
            "llc_per_chain": per_chain,
            "loss_trace": loss_trace.transpose("chain", "draw"),
            "excess_trace": excess,
            "init_loss": ds["init_loss"].mean(["chain", "token_pos"], dtype=np.float64),
            "rhat": rhat(values),
            "ess_bulk": ess_bulk(values),
            **_per_observable(ds, n_beta),
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
    }
    return result


def _per_observable(ds: xr.Dataset, n_beta: float) -> dict[str, tuple[str, list[float]] | xr.DataArray]:
    """The LLC of each observable: n_beta (E[l] - l(w0)) on its own tokens."""
    names = [name for name in observable_names(ds) if f"init_loss_{name}" in ds]
    if not names:
        return {}
    means, errors = [], []
    for name in names:
        excess = mean_per_draw(ds[f"loss_{name}"]) - ds[f"init_loss_{name}"].mean(dtype=np.float64)
        trace: Trace = excess.transpose("chain", "draw").values
        means.append(n_beta * float(trace.mean()))
        errors.append(n_beta * standard_error(trace))
    return {
        "llc_observable": xr.DataArray(means, dims="observable", coords={"observable": names}),
        "llc_observable_sem": ("observable", errors),
    }
