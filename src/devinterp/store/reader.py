"""Opening stores: ours, and those of devinterp 2.0."""

import os
from pathlib import Path
from typing import Any

import xarray as xr
from zarr.storage import LocalStore

from devinterp.errors import DevinterpError, InputTypeError, StoreError, got, shown
from devinterp.store.guard import check_store
from devinterp.store.metadata import check_metadata, is_number
from devinterp.store.objects import is_url

AS_STORED: dict[str, Any] = {
    "mask_and_scale": False, "decode_times": False, "decode_timedelta": False,
    "concat_characters": False, "decode_coords": False,
}  # fmt: skip
"""No attribute of an array changes its numbers"""


def open_store(path: str | os.PathLike[str], *, ours: bool = False) -> xr.DataTree:
    """The stored run, lazily: arrays are read when used. Works while the run is going on.

    The one way by which stores are read: nothing of a store is decoded before `check_store` has passed it. `ours` is for stores
    that were just written, or whose sizes the caller compares with those asked for.
    """
    if not isinstance(path, str | os.PathLike):
        raise InputTypeError(got("path", path, "the path of a store", "Give the output_path of a run."))
    name = shown(os.fspath(path), 300)
    try:
        return xr.open_datatree(store_at(path, ours=ours), engine="zarr", consolidated=False, zarr_format=3, **AS_STORED)
    except DevinterpError:
        raise
    except Exception as error:  # whatever a damaged store makes of zarr and xarray
        reason = shown(f"{type(error).__name__}: {error}", 300)
        raise StoreError(f"{name} cannot be read as a store: {reason}. Ask for another copy, or run it again.") from error


def store_at(path: str | os.PathLike[str], *, ours: bool = False) -> Any:
    """What zarr reads, after it was looked at."""
    if is_url(path):
        from devinterp.store.remote_reader import checked_store

        return checked_store(os.fspath(path), ours=ours)
    folder = Path(path).absolute()
    name = shown(os.fspath(path), 300)
    try:
        found = (folder / "zarr.json").is_file()
    except (OSError, ValueError) as error:  # too long, or a null byte
        raise StoreError(f"{name} is not a store: {error}. Give the output_path of a run.") from error
    if not found:
        raise StoreError(f"{name} is not a store: it has no zarr.json. Give the output_path of a run.")
    check_store(folder, ours=ours)
    return LocalStore(folder, read_only=True)  # a path that holds "::" would be taken for a URL


def metadata_of(samples: xr.DataTree | xr.Dataset) -> dict[str, Any]:
    return check_metadata(samples.attrs.get("metadata"))


def n_beta_of(samples: xr.Dataset) -> float:
    """Stored as a variable by us, in the metadata by devinterp 2.0."""
    if "n_beta" in samples:
        variable = samples["n_beta"]
        stored: Any = variable.values.item() if variable.size == 1 else variable.shape
    else:
        stored = metadata_of(samples)["config"]["sampler"].get("n_beta")
    if not is_number(stored) or stored < 0:
        raise StoreError(f"the samples have no usable n_beta (found {shown(stored)}); no LLC can be computed from them.")
    return float(stored)


def observable_names(samples: xr.Dataset) -> list[str]:
    """Stored names of the observables, from the metadata: names may be prefixes of one another."""
    listed = metadata_of(samples)["config"].get("observables", []) if "metadata" in samples.attrs else []
    return [item["obs_id"] for item in listed if f"loss_{item['obs_id']}" in samples]


def shift_of(samples: xr.Dataset) -> int | None:
    """Loss t is of the token at t + this; None where it is of no token, or of one of a decoder."""
    data = metadata_of(samples).get("data") if "metadata" in samples.attrs else None
    shift: int | None = 1 if data is None else data["shift"]
    return shift


def is_masked(samples: xr.Dataset) -> bool:
    """Whether losses that do not count, of padding for one, are stored as NaN."""
    data = metadata_of(samples).get("data") if "metadata" in samples.attrs else None
    return data is not None and bool(data["masked"])
