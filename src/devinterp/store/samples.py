"""Samples as an analysis takes them: the root dataset, the chains that can be used, means that read a few draws at a time."""

import os
from collections.abc import Iterator

import numpy as np
import xarray as xr

from devinterp.errors import ChainsUnusable, InputTypeError, StoreError, got
from devinterp.store.reader import open_store
from devinterp.store.schema import COMPLETE, STATUS_MEANINGS

Samples = xr.DataTree | xr.Dataset | str | os.PathLike[str]
"""What sample() returned, its root dataset, or the path of its store"""

DRAWS_READ_AT_ONCE = 50


def draws_in_parts(losses: xr.DataArray) -> Iterator[xr.DataArray]:
    """The same array, a bounded number of draws at a time."""
    for start in range(0, losses.sizes["draw"], DRAWS_READ_AT_ONCE):
        yield losses.isel(draw=slice(start, start + DRAWS_READ_AT_ONCE)).load()


def mean_per_draw(losses: xr.DataArray) -> xr.DataArray:
    """Mean over everything but chain and draw, in float64, reading a bounded number of draws at a time."""
    over = [dim for dim in losses.dims if dim not in ("chain", "draw")]
    parts = [part.mean(over, dtype=np.float64) for part in draws_in_parts(losses)]
    return xr.concat(parts, "draw", coords="minimal", compat="override", join="override")


def root_of(samples: Samples) -> xr.Dataset:
    if isinstance(samples, str | os.PathLike):
        samples = open_store(samples)
    if isinstance(samples, xr.DataTree):
        samples = samples.to_dataset()
    if not isinstance(samples, xr.Dataset):
        fix = "Pass what sample() returned, or the path of its store."
        raise InputTypeError(got("samples", type(samples), "a DataTree, a Dataset or a path", fix))
    if missing := [name for name in ("sampling_loss", "init_loss") if name not in samples]:
        raise StoreError(f"the samples lack {missing}: they were not made by sample().")
    return samples


def of_chains(ds: xr.Dataset, kept: list[int]) -> xr.Dataset:
    """These chains only. All of them are not indexed at all, which reads several times faster than by a list."""
    return ds if kept == list(range(ds.sizes["chain"])) else ds.isel(chain=kept)


def usable_chains(ds: xr.Dataset, on_diverged: str) -> tuple[list[int], list[int]]:
    """Positions of the chains to use, and of those left out."""
    count = ds.sizes["chain"]
    if "chain_status" in ds:
        status = [int(value) for value in ds["chain_status"].values]
    else:  # devinterp 2.0 keeps no status
        if not ds.attrs.get("completed", 1):
            raise ChainsUnusable("the store is not complete: its run was interrupted. Run it again.")
        finite = np.isfinite(mean_per_draw(ds["sampling_loss"]).transpose("chain", "draw").values).all(axis=1)
        status = [COMPLETE if ok else STATUS_MEANINGS.index("diverged") for ok in finite]
    running = [chain for chain in range(count) if status[chain] == STATUS_MEANINGS.index("running")]
    if running:
        raise ChainsUnusable(f"chains {running} are not finished. Wait for the run, or ask for it again to finish it.")
    bad = [chain for chain in range(count) if status[chain] != COMPLETE]
    listed = ", ".join(f"{chain} ({STATUS_MEANINGS[status[chain]]})" for chain in bad)
    if bad and on_diverged == "raise":
        raise ChainsUnusable(
            f"chains {listed} of {count} did not complete. Run again with a smaller lr (or lr='auto') or a larger "
            "localization, or pass on_diverged='drop' to go without them."
        )
    if len(bad) == count:
        raise ChainsUnusable(f"no chain is left: {listed}. Run again with a smaller lr (or lr='auto').")
    return [chain for chain in range(count) if chain not in bad], bad
