"""Patterning: which data to weight up or down so that components change as wanted."""

from collections.abc import Mapping
from numbers import Real
from typing import Any

import numpy as np
import xarray as xr

from devinterp.analysis.patterning import expected_noise, solve, summing_to_zero
from devinterp.analysis.susceptibility import Doubles
from devinterp.engine.settings import choice, number, switch
from devinterp.errors import InputTypeError, InputValueError, got
from devinterp.slt.suites import averaged


def compute_patterning(
    susceptibilities: xr.DataTree | xr.Dataset,
    target: Mapping[str, float],
    *,
    alpha: float | None = None,
    largest_change: float | None = None,
    n_beta: float | None = None,
    per: str | None = None,
    rcond: float = 1e-3,
    ridge: float = 0.0,
    renormalize: bool = True,
    negative: str = "clip",
    largest_cosine: float = 0.99,
) -> xr.Dataset:
    """Data weights that change the observables of components as wanted, to first order in the change.

        rho_j = 1 + alpha (pinv(chi) d_mu)_j           (Wang & Murfet 2026, Patterning: The Dual of Interpretability)
        d mu_C = (n_beta / n) sum_j chi_Cj (rho_j - 1)

    with chi the susceptibilities of components C to data j = 1 .. n, and mu_C = E_C[L - L(w0)] the mean excess loss of the
    sampling task in the chains of C: n_beta mu_C is its LLC. The second line is the first-order response of the posterior to
    training on the mean of rho_j l_j in place of the mean of l_j. Its neglected part grows with the square of the change.

    The rows of `susceptibilities` stand for the training data and should be drawn from it. Take one-chain values: those of two
    chains carry a factor of each component, so that `predicted_change` and `target` are in units of that factor.

    Args:
        susceptibilities: what `susceptibilities()` or `compute_susceptibilities()` returned, or its `/susceptibilities`; not
            standardised.
        target: wanted change d_mu of components, in nats. Components that it does not name are held: their target is 0.
            To leave some free, take the others only: `sus.sel(wr=[...])`.
        alpha: step along the solution; None = n / n_beta, which asks for the target itself.
        largest_change: choose alpha such that no weight changes by more than this before negative ones are dealt with.
        n_beta: of the samples; None = as the susceptibilities tell.
        per: "sequence" gives the tokens of a sequence one weight, by their mean; None keeps the rows as they are.
        rcond: singular values below this share of the largest are cut.
        ridge: added to squared singular values, as a share of the largest one's square: shrinks the change where chi is noise.
        renormalize: shift each component's susceptibilities to sum to zero over the data, as they do in theory (losses of
            minibatches break it), and scale the weights to mean 1.
        negative: what to do with negative weights: "clip" them to 0, "raise" or "keep".
        largest_cosine: a component whose profile over the data points like an earlier one's, or against it, beyond this
            cosine, is left out of the solution: the two cannot be moved apart. Components with a target come first.

    Returns:
        Dataset with `weights` (sus_flat) and the coordinates of the data; for every component (wr) `target_change`,
        `predicted_change` of the weights as returned, and `used`, False for those left out. The weights follow the noise of
        the susceptibilities too, which then looks like response; `expected_change` is without what that adds in the mean, by
        `sus_sem` (NaN where it is not known). Attributes: the settings, `alpha`, `rank` of the solution, `num_clipped`, and
        `mean_weight` before clipping and scaling.

    Raises:
        DevinterpInputError: an argument cannot be used, or a weight is negative with negative="raise".
    """
    ds, n_beta = _table(susceptibilities, n_beta)
    _check(alpha, largest_change, per, rcond, ridge, renormalize, negative, largest_cosine)
    wanted = _wanted(target, [str(name) for name in ds.wr.values])
    ds = _per_sequence(ds) if per == "sequence" else ds
    chi: Doubles = ds.sus.transpose("wr", "sus_flat").values.astype(np.float64)
    if not np.isfinite(chi).all():
        raise InputValueError("susceptibilities: some are not finite. Compute them again from chains that did not diverge.")
    if renormalize:
        chi = summing_to_zero(chi)
    found, per_weight = solve(chi, wanted, rcond, ridge, largest_cosine), n_beta / chi.shape[1]
    if not found.direction.any():
        fix = "Their components do not respond to these data. Take other data or components."
        raise InputValueError(got("target", dict(target), "a change that the data can make", fix))
    if largest_change is not None:
        alpha = largest_change / float(np.abs(found.direction).max())
    alpha = 1 / per_weight if alpha is None else alpha
    raw = 1 + alpha * found.direction
    weights = _without_negative(raw, negative, alpha)
    if renormalize:
        weights = weights / weights.mean()
    predicted = per_weight * chi @ (weights - 1)
    noise = np.full(len(chi), np.nan)
    if "sus_sem" in ds:
        noise = alpha * per_weight * expected_noise(found.shares, ds.sus_sem.transpose("wr", "sus_flat").values)
    result = xr.Dataset(
        {
            "weights": ("sus_flat", weights),
            "target_change": ("wr", wanted),
            "predicted_change": ("wr", predicted),
            "expected_change": ("wr", predicted - noise),
            "used": ("wr", found.used),
        },
        coords=ds.coords,
    )
    return result.assign_attrs(
        alpha=alpha, n_beta=n_beta, rcond=rcond, ridge=ridge, rank=found.rank, renormalize=renormalize, negative=negative,
        num_clipped=int((raw < 0).sum()) if negative == "clip" else 0, mean_weight=float(raw.mean()),
        largest_cosine=largest_cosine, dataset_id_to_name=ds.attrs.get("dataset_id_to_name", []),
    )  # fmt: skip


def _table(given: Any, n_beta: Any) -> tuple[xr.Dataset, float]:
    """The raw susceptibilities, and n_beta as given or as they tell."""
    told = given.attrs if isinstance(given, xr.DataTree | xr.Dataset) else {}
    ds = given["susceptibilities"].to_dataset() if isinstance(given, xr.DataTree) and "susceptibilities" in given else given
    ds = ds.to_dataset() if isinstance(ds, xr.DataTree) else ds
    if not isinstance(ds, xr.Dataset) or "sus" not in ds or set(ds["sus"].dims) != {"sus_flat", "wr"}:
        fix = "Pass what compute_susceptibilities() returned."
        raise InputTypeError(got("susceptibilities", type(given), "a DataTree or Dataset with sus (sus_flat, wr)", fix))
    if told.get("standardize") or "sus_std" in ds:
        fix = "z-scores have lost the size of each response. Compute them again with standardize=False."
        raise InputValueError(got("susceptibilities", "standardised", "raw", fix))
    known = told.get("n_beta") if n_beta is None else n_beta
    hint = "Give n_beta as it was sampled with: these susceptibilities do not tell." if n_beta is None else "Try 30."
    return ds, float(number(hint, above=0.0)("n_beta", known))


def _check(
    alpha: Any, largest_change: Any, per: Any, rcond: Any, ridge: Any, renormalize: Any, negative: Any, cosine: Any
) -> None:
    number("None asks for the target itself.", also=(None,))("alpha", alpha)
    number("Try 0.5.", above=0.0, also=(None,))("largest_change", largest_change)
    if alpha is not None and largest_change is not None:
        raise InputValueError(got("alpha", alpha, "None with largest_change", "Either sets the size of the change."))
    choice("sequence", also=(None,))("per", per)
    number("Try 1e-3.", high=1.0)("rcond", rcond)
    number("Try 0.01.")("ridge", ridge)
    switch("renormalize", renormalize)
    choice("clip", "raise", "keep")("negative", negative)
    number("Try 0.99; 1 leaves out none.", high=1.0)("largest_cosine", cosine)


def _wanted(target: Any, known: list[str]) -> Doubles:
    """The change of every component, 0 for those not named."""
    if not isinstance(target, Mapping):
        raise InputTypeError(
            got("target", target, "a dict: component -> wanted change in nats", f"Try {{{known[0]!r}: -0.01}}.")
        )
    if unknown := [name for name in target if name not in known]:
        raise InputValueError(got("target", unknown, f"made of {known}", "Name components of the susceptibilities."))
    for name, value in target.items():
        if isinstance(value, bool) or not isinstance(value, Real) or not np.isfinite(float(value)):
            raise InputTypeError(got(f"target[{name!r}]", value, "a finite number of nats", "Try -0.01."))
    wanted = np.array([float(target.get(name, 0.0)) for name in known])
    if not wanted.any():
        raise InputValueError(
            got("target", dict(target), "a change of at least one component", f"Try {{{known[0]!r}: -0.01}}.")
        )
    return wanted


def _per_sequence(ds: xr.Dataset) -> xr.Dataset:
    if "batch" not in ds.coords:
        fix = "Compute the susceptibilities with mean_over=None or 'sequence'."
        raise InputValueError(got("per", "sequence", "None where there is one row for each observable", fix))
    values = ds.sus.transpose("sus_flat", "wr").values
    means, grid = averaged(values, {name: ds[name].values for name in ("dataset_id", "batch")}, by_sequence=True)
    coords = {"wr": ds.wr, **{name: ("sus_flat", numbers) for name, numbers in grid.items()}}
    return xr.Dataset({"sus": (("sus_flat", "wr"), means)}, coords=coords, attrs=ds.attrs)


def _without_negative(weights: Doubles, negative: str, alpha: float) -> Doubles:
    lowest = float(weights.min())
    if lowest >= 0 or negative == "keep":
        return weights
    if negative == "raise":
        fix = f"Try alpha={alpha / (1 - lowest):.3g}, where the smallest is 0, or negative='clip'."
        raise InputValueError(f"{(weights < 0).sum()} of {len(weights)} weights are negative, the smallest {lowest:.3g}. {fix}")
    return weights.clip(min=0)
