"""Opening stores: ours, and those of devinterp 2.0."""

import os
from pathlib import Path
from typing import Any

import xarray as xr

from devinterp.errors import StoreError


def open_store(path: str | os.PathLike[str]) -> xr.DataTree:
    """The stored run, lazily: arrays are read when used. Works while the run is going on."""
    folder = Path(path)
    if not (folder / "zarr.json").is_file():
        raise StoreError(f"{folder} is not a store: it has no zarr.json. Give the output_path of a run.")
    try:
        return xr.open_datatree(folder, engine="zarr", consolidated=False)
    except (OSError, ValueError, KeyError) as error:
        raise StoreError(f"{folder} cannot be read as a store: {error}") from error


def metadata_of(samples: xr.DataTree | xr.Dataset) -> dict[str, Any]:
    metadata = samples.attrs.get("metadata")
    if not isinstance(metadata, dict) or not isinstance(metadata.get("config"), dict):
        raise StoreError("the samples carry no run metadata: they were not made by sample(), or their attributes were lost.")
    return metadata


def n_beta_of(samples: xr.Dataset) -> float:
    """Stored as a variable by us, in the metadata by devinterp 2.0."""
    if "n_beta" in samples:
        return float(samples["n_beta"])
    stored = metadata_of(samples)["config"].get("sampler", {}).get("n_beta")
    if isinstance(stored, bool) or not isinstance(stored, int | float):
        raise StoreError(f"the samples have no usable n_beta (found {stored!r}); no LLC can be computed from them.")
    return float(stored)


def observable_names(samples: xr.Dataset) -> list[str]:
    """Stored names of the observables, from the metadata: names may be prefixes of one another."""
    listed = metadata_of(samples)["config"].get("observables", []) if "metadata" in samples.attrs else []
    return [item["obs_id"] for item in listed if f"loss_{item['obs_id']}" in samples]
