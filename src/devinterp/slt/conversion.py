"""A stored run in other forms: today's layout of a store of devinterp 2.0, one NetCDF file, one table."""

import importlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import xarray as xr

from devinterp.errors import InputValueError, PackageMissing, got
from devinterp.store.matrices import check_new_path
from devinterp.store.reader import metadata_of, n_beta_of, observable_names, open_store
from devinterp.store.samples import draw_spans, mean_per_draw, root_of, status_of_chains
from devinterp.store.schema import DIVERGED, Variable, variables
from devinterp.store.writer import StoreWriter, check_space, made_beside

STEPS_READ_AT_ONCE = 100
ALONG = {"chain": 0, "draw": 0, "step": 1, "token_pos": 0}
"""Coordinates of a store, and where they start"""


def convert(store: str | os.PathLike[str], output_path: str | os.PathLike[str]) -> Path:
    """Write a stored run in another form, by the ending of `output_path`; the store itself is left as it is.

    - `.nc`: NetCDF 4, every variable with its dims, unit and meaning; the settings as JSON in the attribute `metadata`.
    - `.parquet`: a table of one row for each chain and draw: `chain`, `draw`, `n_beta`, and means over batch and position of
      `sampling_loss`, `baseline_loss`, `init_loss` and, for every observable OBS, `loss_OBS` and `init_loss_OBS`, in nats:
      `llc = n_beta mean(sampling_loss - baseline_loss)`. The settings are in the file's own metadata.
    - `.zarr` or no ending: a store of devinterp 2.0 in today's layout, with `n_beta`, coordinates, `chain_status` and
      `step_loss`. What has no place there (the inputs and single losses of every step) is left out.

    Args:
        store: the path of a run's store, of this version or of 2.0, whose chains are finished.
        output_path: a new path.

    Returns:
        The path written.

    Raises:
        InputValueError: another ending, something at `output_path`, or a store that has today's layout already.
        PackageMissing: NetCDF without `pip install 'devinterp[netcdf]'`.
        StoreError: this is no store, or it lacks what is needed.
        ChainsUnusable: chains are not finished.
    """
    if isinstance(output_path, str | os.PathLike) and os.path.lexists(output_path):
        fix = "Something is there; nothing was changed. Choose another."
        raise InputValueError(got("output_path", os.fspath(output_path), "new", fix))
    path = check_new_path(output_path)
    if path.suffix not in FORMS:
        fix = "Try run.nc, run.parquet or run.zarr."
        raise InputValueError(
            got("output_path", str(path), f"a path that ends in one of {', '.join(filter(None, FORMS))}", fix)
        )
    form = FORMS[path.suffix]
    if form is _netcdf:
        _need_h5netcdf()
    ds = root_of(open_store(store))
    status_of_chains(ds)
    if form is _todays and "n_beta" in ds:
        fix = "It needs no conversion: copy the folder, with the one that ends in .run."
        raise InputValueError(got("store", os.fspath(store), "made by devinterp 2.0", fix))
    with made_beside(path) as made:
        form(ds, made / path.name)
        (made / path.name).rename(path)
    return path


def _need_h5netcdf() -> None:
    for package in ("h5netcdf", "h5py"):
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise PackageMissing(package, "a NetCDF file", "'devinterp[netcdf]'") from error


def _netcdf(ds: xr.Dataset, path: Path) -> None:
    plain = {name: value if isinstance(value, str | int | float) else json.dumps(value) for name, value in ds.attrs.items()}
    ds.assign_attrs(plain).to_netcdf(path, engine="h5netcdf")


def _parquet(ds: xr.Dataset, path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table(_columns(ds)).replace_schema_metadata({"devinterp": json.dumps(metadata_of(ds))})
    pq.write_table(table, path)


def _columns(ds: xr.Dataset) -> dict[str, np.ndarray[tuple[int, ...], np.dtype[np.generic]]]:
    """Each of length chains times draws, chain by chain."""
    grid = xr.DataArray(np.zeros((ds.sizes["chain"], ds.sizes["draw"])), dims=("chain", "draw"))
    numbers = {dim: xr.DataArray(np.arange(ds.sizes[dim]), dims=dim) for dim in ("chain", "draw")}
    found = {**numbers, "n_beta": xr.DataArray(n_beta_of(ds))}
    losses = ["sampling_loss", "baseline_loss", "init_loss"]
    losses += [f"{kind}_{name}" for name in observable_names(ds) for kind in ("loss", "init_loss")]
    for name in losses:
        if name in ds and "draw" in ds[name].dims:
            found[name] = mean_per_draw(ds[name]).drop_vars(("chain", "draw"), errors="ignore")
        elif name in ds:
            over = [dim for dim in ds[name].dims if dim != "chain"]
            found[name] = ds[name].mean(over, dtype=np.float64).drop_vars("chain", errors="ignore")
    return {name: column.broadcast_like(grid).transpose("chain", "draw").values.ravel() for name, column in found.items()}


def _todays(ds: xr.Dataset, path: Path) -> None:
    """Of a store of devinterp 2.0."""
    names = observable_names(ds)
    metrics = [str(name).removeprefix("metrics_") for name in ds.data_vars if str(name).startswith("metrics_")]
    steps = ds.sizes.get("step")
    made = {"chain", "draw", "token_pos", "n_beta", "chain_status", "diverged_at"} | ({"step"} if steps else set())
    made |= {"step_loss"} if "sampling_loss_micro" in ds else set()
    described: dict[str, Variable] = {
        name: variable for name, variable in variables(names, metrics, True).items() if name in made or name in ds
    }
    sizes = {str(dim): size for dim, size in ds.sizes.items()}
    check_space(path, described, sizes)
    writer = StoreWriter(path, described)
    writer.create(sizes, metadata_of(ds))
    for name, variable in described.items():
        if name in ALONG:
            writer.write(name, range(ALONG[name], ALONG[name] + sizes[name]))
        elif name not in made:
            _copy(writer, variable, ds[name])
    writer.write("n_beta", n_beta_of(ds))
    status = status_of_chains(ds)
    writer.write("chain_status", status)
    writer.write("diverged_at", [_first_bad_step(ds, chain) if code == DIVERGED else -1 for chain, code in enumerate(status)])
    if "step_loss" in described:
        for span, losses in _step_losses(ds):
            writer.write("step_loss", losses, slice(None), span)
    writer.finish()


def _copy(writer: StoreWriter, variable: Variable, values: xr.DataArray) -> None:
    values = values[(0,) * (values.ndim - len(variable.dims))]  # 2.0 repeats token ids for every chain and draw
    values = values.transpose(*variable.dims)
    if "draw" not in variable.dims:
        writer.write(str(values.name), values.values)
        return
    for span in draw_spans(values):
        writer.write(str(values.name), values.isel(draw=span).values, slice(None), span)


def _step_losses(ds: xr.Dataset) -> list[tuple[slice, np.ndarray[tuple[int, ...], np.dtype[np.float64]]]]:
    losses, found = ds["sampling_loss_micro"], []
    for start in range(0, losses.sizes["step"], STEPS_READ_AT_ONCE):
        span = slice(start, min(start + STEPS_READ_AT_ONCE, losses.sizes["step"]))
        means = losses.isel(step=span).mean(["batch_sampling", "token_pos"], dtype=np.float64)
        found.append((span, means.transpose("chain", "step").values))
    return found


def _first_bad_step(ds: xr.Dataset, chain: int) -> int:
    """Steps that a diverged chain took; 0 where they were not kept."""
    if "sampling_loss_micro" not in ds:
        return 0
    finite = np.isfinite(np.concatenate([losses[chain] for _, losses in _step_losses(ds)]))
    return int(finite.argmin()) if not finite.all() else len(finite)


FORMS: dict[str, Callable[[xr.Dataset, Path], None]] = {".nc": _netcdf, ".parquet": _parquet, ".zarr": _todays, "": _todays}
