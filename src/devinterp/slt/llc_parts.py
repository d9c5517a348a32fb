"""The LLC of each observable, and of each of its sequences and tokens: n_beta (E[l(w)] - l(w0)) on its own tokens."""

from typing import Any

import numpy as np
import xarray as xr

from devinterp.analysis.uncertainty import standard_error, standard_errors
from devinterp.errors import StoreError
from devinterp.store.reader import observable_names
from devinterp.store.samples import mean_per_draw

PARTS = ("sequence", "token")


def of_observables(ds: xr.Dataset, n_beta: float) -> dict[str, Any]:
    names = _names(ds)
    if not names:
        return {}
    means, errors, starts = [], [], []
    for name in names:
        starts.append(float(ds[f"init_loss_{name}"].mean(dtype=np.float64)))
        excess = mean_per_draw(ds[f"loss_{name}"]) - starts[-1]
        trace = excess.transpose("chain", "draw").values
        means.append(n_beta * float(trace.mean()))
        errors.append(n_beta * standard_error(trace))
    return {
        "llc_observable": xr.DataArray(means, dims="observable", coords={"observable": names}),
        "llc_observable_sem": ("observable", errors),
        "init_loss_observable": ("observable", starts),
    }


def of_parts(ds: xr.Dataset, n_beta: float, per: str) -> dict[str, xr.DataArray]:
    """Of every sequence or token, read a sequence at a time."""
    if not (names := _names(ds)):
        raise StoreError(f"per={per!r}: the samples have no observables. Run again with observables={{'code': tokens}}.")
    found: dict[str, xr.DataArray] = {}
    for name in names:
        batch, pairs = f"batch_{name}", []
        for number in range(ds.sizes[batch]):
            losses, start = (
                ds[f"loss_{name}"].isel({batch: number}).load(),
                ds[f"init_loss_{name}"].isel({batch: number}).load(),
            )
            if per == "sequence":
                losses, start = (array.mean("token_pos", dtype=np.float64) for array in (losses, start))
            traces = n_beta * (losses.astype(np.float64) - start).transpose("chain", "draw", ...)
            error = xr.zeros_like(traces.isel(chain=0, draw=0, drop=True)) + standard_errors(traces.values)
            pairs.append((traces.mean(["chain", "draw"]), error))
        means, errors = (xr.concat(each, batch, coords="minimal", compat="override") for each in zip(*pairs, strict=True))
        found |= {f"llc_{per}_{name}": means, f"llc_{per}_{name}_sem": errors}
        if f"input_ids_{name}" in ds:
            found[f"input_ids_{name}"] = ds[f"input_ids_{name}"].load()
    return found


def _names(ds: xr.Dataset) -> list[str]:
    return [name for name in observable_names(ds) if f"init_loss_{name}" in ds]
