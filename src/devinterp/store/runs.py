"""The store of one run: what it holds, and whether what lies at its path is that very run."""

import atexit
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import nn

from devinterp.engine.chain import Plan
from devinterp.engine.metrics import METRICS
from devinterp.engine.settings import Settings
from devinterp.engine.tokens import Observable
from devinterp.errors import InputValueError, RunMismatchError, StoreError, got, shown
from devinterp.store.identity import differences, versions
from devinterp.store.reader import metadata_of, open_store
from devinterp.store.samples import root_of
from devinterp.store.schema import Variable, variables
from devinterp.store.writer import StoreWriter


def plain(value: dict[str, Any]) -> dict[str, Any]:
    """As it will be read back from JSON, so that equal means equal."""
    plain: dict[str, Any] = json.loads(json.dumps(value))
    return plain


def metadata_for(
    settings: Settings, model: nn.Module, observables: Sequence[Observable], fingerprint: dict[str, Any], device: torch.device
) -> dict[str, Any]:
    """Enough to repeat the run; `config` has the form that devinterp 2.0 wrote."""
    return {
        "config": {
            "sampler": plain(settings.stored()),
            "observables": [{"obs_id": o.name, "batches_per_draw": o.num_batches} for o in observables],
        },
        "model": {
            "class": type(model).__name__,
            "parameters": sum(p.numel() for p in model.parameters()),
            "dtypes": sorted({str(p.dtype) for p in model.parameters()}),
        },
        "device": str(device.type),
        "identity": fingerprint,
        "versions": versions(),
    }


def stored_run(path: Path | None, fingerprint: dict[str, Any], sizes: Mapping[str, int]) -> xr.DataTree | None:
    """The run at `path` when it is the one asked for; refuses any other thing that is there."""
    if path is None or not path.exists():
        return None
    try:
        known = open_store(path, ours=True)
        metadata = metadata_of(known)
    except StoreError as error:
        fix = "Nothing was changed. Choose another output_path."
        raise InputValueError(got("output_path", str(path), "new, or a run of devinterp", fix)) from error
    if "identity" not in metadata:
        raise RunMismatchError(str(path), ["identity: this store has none (devinterp 2.0 wrote none)"])
    if lines := differences(metadata["identity"], fingerprint):
        raise RunMismatchError(str(path), lines)
    root_of(known)
    if other := {str(dim): size for dim, size in known.sizes.items() if size != sizes.get(str(dim))}:
        raise StoreError(f"the store {str(path)!r} has the sizes {shown(other)}: it was changed. Choose another output_path.")
    missing = [name for name in ("step_size", "computed") if name not in metadata]
    missing += [name for name in ("chain_status", "diverged_at") if name not in known]
    if missing:
        raise StoreError(f"the store {str(path)!r} lacks {missing}: it was changed. Choose another output_path.")
    return known


def layout(settings: Settings, length: int, observables: Sequence[Observable]) -> tuple[dict[str, Variable], dict[str, int]]:
    """The stored variables of a run, and the sizes of their dims."""
    described = variables(
        [observable.name for observable in observables],
        METRICS if settings.save_metrics else (),
        settings.match_sampling_input_ids_across_chains,
    )
    sizes = {
        "chain": settings.num_chains,
        "draw": settings.num_draws,
        "step": settings.num_steps,
        "batch": settings.batch_size * settings.gradient_accumulation_steps,
        "token": length,
        "token_pos": length - 1,
        **{f"batch_{observable.name}": len(observable.ids) for observable in observables},
    }
    return described, sizes


def unsampled(settings: Settings, length: int, observables: Sequence[Observable]) -> xr.Dataset:
    """The dataset that a run will store, in shape alone: arrays of one repeated zero, which take no memory."""
    described, sizes = layout(settings, length, observables)
    arrays = {
        name: (variable.dims, np.broadcast_to(np.zeros((), variable.dtype), tuple(sizes[dim] for dim in variable.dims)))
        for name, variable in described.items()
    }
    listed = [{"obs_id": observable.name} for observable in observables]
    return xr.Dataset(arrays, attrs={"metadata": {"config": {"sampler": {}, "observables": listed}}})


def open_writer(path: Path | None, plan: Plan, metadata: dict[str, Any], known: xr.DataTree | None) -> StoreWriter:
    described, sizes = layout(plan.settings, plan.batches.tokens.length, plan.observables)
    if known is not None and path is not None:
        return StoreWriter(path, described)
    if path is None:
        folder = tempfile.mkdtemp(prefix="devinterp-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        path = Path(folder) / "run"
    store = StoreWriter.create(path, described, sizes, metadata)
    for name, start in (("chain", 0), ("draw", 0), ("step", 1), ("token_pos", 0)):
        store.write(name, range(start, start + sizes[name]))
    store.write("n_beta", plan.settings.n_beta)
    for observable in plan.observables:
        store.write(f"input_ids_{observable.name}", observable.ids)
    return store
