"""Samples as an analysis takes them: the root dataset, the chains that can be used, means that read a few draws at a time."""

import os
from collections.abc import Iterator

import numpy as np
import xarray as xr

from devinterp.errors import ChainsUnusable, InputTypeError, StoreError, got, shown
from devinterp.store.reader import observable_names, open_store
from devinterp.store.schema import COMPLETE, DIVERGED, RUNNING, STATUS_MEANINGS, variables

Samples = xr.DataTree | xr.Dataset | str | os.PathLike[str]
"""What sample() returned, its root dataset, or the path of its store"""

DRAWS_READ_AT_ONCE = 50


def draw_spans(samples: xr.Dataset | xr.DataArray) -> Iterator[slice]:
    """All draws, a bounded number at a time."""
    for start in range(0, samples.sizes["draw"], DRAWS_READ_AT_ONCE):
        yield slice(start, start + DRAWS_READ_AT_ONCE)


def draws_in_parts(losses: xr.DataArray) -> Iterator[xr.DataArray]:
    """The same array, a bounded number of draws at a time."""
    for span in draw_spans(losses):
        yield losses.isel(draw=span).load()


def mean_per_draw(losses: xr.DataArray) -> xr.DataArray:
    """Mean over everything but chain and draw, in float64, reading a bounded number of draws at a time."""
    over = [dim for dim in losses.dims if dim not in ("chain", "draw")]
    parts = [part.mean(over, dtype=np.float64) for part in draws_in_parts(losses)]
    return xr.concat(parts, "draw", coords="minimal", compat="override", join="override")


def root_of(samples: Samples) -> xr.Dataset:
    if isinstance(samples, str | os.PathLike):
        samples = open_store(samples)
    if isinstance(samples, xr.DataTree):
        if "sweep" in samples.attrs:
            fix = "Take one of its runs, for example samples['step512']."
            raise InputTypeError(got("samples", "a sweep", "the samples of one run", fix))
        samples = samples.to_dataset(inherit=False)
    if not isinstance(samples, xr.Dataset):
        fix = "Pass what sample() returned, or the path of its store."
        raise InputTypeError(got("samples", type(samples), "a DataTree, a Dataset or a path", fix))
    if missing := [name for name in ("sampling_loss", "init_loss") if name not in samples]:
        raise StoreError(f"the samples lack {missing}: they were not made by sample().")
    _check_layout(samples)
    return samples


def _check_layout(ds: xr.Dataset) -> None:
    """Dims, sizes and kinds of what analyses read: a stranger's store has any."""
    expected = variables(observable_names(ds), (), "chain" not in ds.get("baseline_loss", ds["sampling_loss"]).dims)
    for name, variable in expected.items():
        if name not in ds or name == "n_beta":
            continue
        found, dims = ds[name], variable.dims
        if name.startswith("input_ids_"):  # devinterp 2.0 repeats them for every chain and draw
            found = found[(0,) * (found.ndim - 2)] if found.size else found
        kinds = "f" if variable.dtype.startswith("float") else "iu"
        if set(found.dims) != set(dims) or found.dtype.kind not in kinds or not found.size:
            got_ = f"{found.dtype} with sizes {shown(dict(found.sizes))}"
            raise StoreError(f"the samples' {name} is {got_}: must be {variable.dtype} over {dims}. Ask for another copy.")
    tokens, losses = ds.sizes.get("token"), ds.sizes.get("token_pos")
    if tokens is not None and tokens != (losses or 0) + 1:
        raise StoreError(f"the samples have {tokens} tokens and {losses} losses per sequence: must be one loss fewer.")


def of_chains(ds: xr.Dataset, kept: list[int]) -> xr.Dataset:
    """These chains only. All of them are not indexed at all, which reads several times faster than by a list."""
    return ds if kept == list(range(ds.sizes["chain"])) else ds.isel(chain=kept)


def status_of_chains(ds: xr.Dataset) -> list[int]:
    """What became of each chain, by the codes of the schema."""
    if "chain_status" in ds:
        status = [int(value) for value in ds["chain_status"].values]
        if unknown := sorted(set(status) - set(range(len(STATUS_MEANINGS)))):
            raise StoreError(f"the samples hold the chain_status {unknown}, which has no meaning. Ask for another copy.")
    else:  # devinterp 2.0 keeps no status
        if not ds.attrs.get("completed", 1):
            raise ChainsUnusable("the store is not complete: its run was interrupted. Run it again.")
        finite = np.isfinite(mean_per_draw(ds["sampling_loss"]).transpose("chain", "draw").values).all(axis=1)
        status = [COMPLETE if ok else DIVERGED for ok in finite]
    if running := [chain for chain, code in enumerate(status) if code == RUNNING]:
        raise ChainsUnusable(f"chains {running} are not finished. Wait for the run, or ask for it again to finish it.")
    return status


def usable_chains(ds: xr.Dataset, on_diverged: str) -> tuple[list[int], list[int]]:
    """Positions of the chains to use, and of those left out."""
    status = status_of_chains(ds)
    count = len(status)
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
