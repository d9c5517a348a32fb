"""The same estimate for every run of a sweep, as one table over checkpoints and restrictions."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import xarray as xr

from devinterp.errors import ChainsUnusable, DevinterpError
from devinterp.store.sweeps import label, listed, runs_of, tree_of

SHARED = ("input_ids",)


def of_each_run(samples: Any, compute: Callable[[xr.Dataset], xr.Dataset]) -> xr.Dataset:
    """Compute for every run; the results along `checkpoint`, and `restriction` where there are some.

    NaN where a run failed or a chain was left out. Attributes that are not equal in all are dicts by run. Token ids, which
    all runs share, are there once.
    """
    tree = tree_of(samples)
    found: dict[str, dict[str | None, xr.Dataset]] = {}
    for checkpoint, runs in runs_of(tree).items():
        found[checkpoint] = {}
        for restriction, run in runs.items():
            with _said_of(label(checkpoint, restriction)):
                found[checkpoint][restriction] = compute(run)
    attrs: dict[str, Mapping[Any, Any]] = {label(name, r): part.attrs for name, one in found.items() for r, part in one.items()}
    there = [name for name in tree.attrs["restrictions"] if any(name in one for one in found.values())]
    rows = {
        name: _along("restriction", {str(r): part for r, part in one.items()}, there) if there else one[None]
        for name, one in found.items()
    }
    first = next(part for one in found.values() for part in one.values())
    shared = {name: first[name].variable for name in SHARED if name in first}
    return _of_sweep(tree, _along("checkpoint", rows), attrs).assign(shared)


def of_each_checkpoint(samples: Any, compute: Callable[[Mapping[str, xr.Dataset]], xr.DataTree]) -> xr.DataTree:
    """Compute susceptibilities from the runs of every checkpoint; the table along `checkpoint`, the contexts once.

    Checkpoints of which only the whole model is left are left out: their restrictions are among what failed.
    """
    tree = tree_of(samples)
    found: dict[str, xr.DataTree] = {}
    for checkpoint, runs in runs_of(tree).items():
        if len(runs) > 1:
            with _said_of(checkpoint):
                found[checkpoint] = compute({str(name): run for name, run in runs.items()})
    if not found:
        raise ChainsUnusable(f"no checkpoint has a restriction that can be used. {listed(tree.attrs['failed'])}")
    tables = {name: one["susceptibilities"].to_dataset() for name, one in found.items()}
    there = [name for name in tree.attrs["restrictions"] if any(name in table.wr.values for table in tables.values())]
    joined = _along("checkpoint", {name: table.reindex(wr=there) for name, table in tables.items()})
    result = _of_sweep(tree, joined, {name: one.attrs for name, one in found.items()})
    first = next(iter(found.values()))
    told = first["susceptibilities"].attrs
    return xr.DataTree.from_dict(
        {
            "/": xr.Dataset(attrs=result.attrs),
            "/susceptibilities": result.assign_attrs(told),
            "/context": first["context"].to_dataset(),
        }
    )


def _along(dim: str, parts: Mapping[str, xr.Dataset], order: list[str] | None = None) -> xr.Dataset:
    """Tables side by side along a new dim; of the order given, with NaN for those that are missing."""
    bare = [part.drop_attrs().drop_vars(SHARED, errors="ignore") for part in parts.values()]
    joined = xr.concat(bare, dim, data_vars="all", coords="minimal", compat="override", join="outer")
    joined = joined.assign_coords({dim: np.asarray(list(parts), dtype=object)})
    joined = joined if order is None else joined.reindex({dim: order})
    texts = {name: array.where(array.notnull(), "") for name, array in joined.data_vars.items() if array.dtype.kind == "O"}
    return joined.assign(texts)


def _of_sweep(tree: xr.DataTree, result: xr.Dataset, attrs: Mapping[str, Mapping[Any, Any]]) -> xr.Dataset:
    """With the coordinates of the sweep's checkpoints, and the attributes of all runs."""
    sweep = tree.to_dataset(inherit=False).sel(checkpoint=result["checkpoint"].values)
    names = dict.fromkeys(name for each in attrs.values() for name in each)
    merged = {}
    for name in names:
        values = {run: each[name] for run, each in attrs.items() if name in each}
        first = next(iter(values.values()))
        equal = len(values) == len(attrs) and all(value == first for value in values.values())
        merged[name] = first if equal else values
    failed = {"failed": tree.attrs["failed"]}
    return result.assign_coords({name: sweep[name] for name in ("step", "lr") if name in sweep}).assign_attrs(merged | failed)


@contextmanager
def _said_of(run: str) -> Iterator[None]:
    """Errors of an estimate with the run that they are of."""
    try:
        yield
    except DevinterpError as error:
        raise type(error)(f"{run}: {error}") from error
