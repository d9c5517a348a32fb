"""The store of one run: what it holds, and whether what lies at its path is that very run."""

import atexit
import json
import logging
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from torch import nn

from devinterp.engine.batches import Batches
from devinterp.engine.metrics import METRICS
from devinterp.engine.observables import Observable
from devinterp.engine.settings import Settings
from devinterp.engine.walker import Plan
from devinterp.errors import InputValueError, RunMismatchError, StoreError, got, shown
from devinterp.store.data import Data
from devinterp.store.folder import RunFolder
from devinterp.store.guard import attributes_of, check_kinds, check_store
from devinterp.store.identity import differences, versions
from devinterp.store.lock import only_writer
from devinterp.store.metadata import check_metadata
from devinterp.store.reader import open_store
from devinterp.store.samples import root_of
from devinterp.store.schema import RUNNING, Variable, variables
from devinterp.store.writer import StoreWriter, mark_completed

logger = logging.getLogger("devinterp")


def plain(value: dict[str, Any]) -> dict[str, Any]:
    """As it will be read back from JSON, so that equal means equal."""
    plain: dict[str, Any] = json.loads(json.dumps(value))
    return plain


def metadata_for(
    settings: Settings,
    model: nn.Module,
    batches: Batches,
    observables: Sequence[Observable],
    fingerprint: dict[str, Any],
    device_type: str,
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
        "device": device_type,
        "identity": fingerprint,
        "versions": versions(),
        **Data(batches, tuple(observables)).told(),
    }


MORE = ("num_chains", "num_draws")
"""Settings of which a larger value extends a stored run"""


@dataclass(frozen=True)
class Stored:
    """A run that lies at the path asked for, and is the one asked for or the beginning of it."""

    metadata: dict[str, Any]
    completed: bool
    """nothing is left to do, and nothing is damaged"""


def stored_run(path: Path | None, fingerprint: dict[str, Any], sizes: Mapping[str, int]) -> Stored | None:
    """The run at `path`, of which `sizes` are the dims, when it is the one asked for; refuses any other thing that is there."""
    known = None if path is None else recognised(path, fingerprint, sizes, str(path))
    if path is None or known is None or not known.completed:
        return known
    return replace(known, completed=not RunFolder(path).damage(known.metadata["identity"]["num_chains"]))


def recognised(path: Path, fingerprint: dict[str, Any], sizes: Mapping[str, int], at: str) -> Stored | None:
    """As `stored_run`, by its records alone: `completed` as they say. `at` is where the caller has it."""
    folder = RunFolder(path)
    record = folder.record()
    if record is None and not path.exists():
        folder.check_ours()
        return None
    attributes = _attributes(path, record, at)
    if record is not None and path.exists() and not folder.holds(record, attributes):
        fix = f"It holds none of the files of the run that {folder.path.name!r} speaks of. Nothing was changed; choose another."
        raise InputValueError(got("output_path", at, "new, or a run of devinterp", fix))
    metadata = check_metadata(attributes["metadata"] if record is None else record["metadata"])
    stored = metadata.get("identity")
    if not isinstance(stored, dict):
        raise RunMismatchError(at, ["identity: this store has none (devinterp 2.0 wrote none)"])
    lines = differences(stored, fingerprint)
    missing = [name for name in ("step_size", "computed") if name not in metadata]
    if missing and not lines:
        raise StoreError(f"the store {shown(at)} lacks {missing}: it was changed. Choose another output_path.")
    if not lines:
        if record is None and attributes.get("completed") == 1:
            _check_sizes(at, sizes)
        return Stored(metadata, attributes.get("completed") == 1)
    different = {name for name in {**stored, **fingerprint} if stored.get(name) != fingerprint.get(name)}
    if different <= set(MORE) and len(lines) == len(different):
        if all(stored[name] <= fingerprint[name] for name in MORE):
            return Stored(metadata, completed=False)
        lines[-1] += ". A stored run is not shortened: open it and take a part with .isel(chain=..., draw=...)"
    raise RunMismatchError(at, lines)


def _check_sizes(at: str, sizes: Mapping[str, int]) -> None:
    """Of a store that has come without its folder, and so without digests of its layout."""
    known = root_of(open_store(at, ours=True))
    if other := {str(dim): size for dim, size in known.sizes.items() if size != sizes.get(str(dim))}:
        raise StoreError(f"the store {shown(at)} has the sizes {shown(other)}: it was changed. Choose another output_path.")
    if missing := [name for name in ("chain_status", "diverged_at") if name not in known]:
        raise StoreError(f"the store {shown(at)} lacks {missing}: it was changed. Choose another output_path.")


def _attributes(path: Path, record: Mapping[str, Any] | None, at: str) -> dict[str, Any]:
    """Of the store's root alone: any other file may be damaged, which the same call mends."""
    fix = "Nothing was changed. Choose another output_path."
    try:
        if path.exists():
            check_kinds(path)
    except (StoreError, OSError) as error:
        raise InputValueError(got("output_path", at, "a folder of plain files", fix)) from error
    try:
        attributes = attributes_of(path)
        check_metadata(attributes.get("metadata"))
        return attributes
    except StoreError as error:
        if record is not None:
            return {}
        raise InputValueError(got("output_path", at, "new, or a run of devinterp", fix)) from error


def layout(
    settings: Settings, batches: Batches, observables: Sequence[Observable]
) -> tuple[dict[str, Variable], dict[str, int]]:
    """The stored variables of a run, and the sizes of their dims."""
    data = Data(batches, tuple(observables))
    described = partial(
        variables,
        [observable.name for observable in observables],
        METRICS if settings.save_metrics else (),
        settings.match_sampling_input_ids_across_chains,
        numbered=not data.is_plain,
        masked=data.masked,
    )
    sizes = {
        "chain": settings.num_chains,
        "draw": settings.num_draws,
        "step": settings.num_steps,
        "batch": settings.batch_size * settings.gradient_accumulation_steps,
        "token_pos": batches.objective.positions,
        **{f"batch_{observable.name}": len(observable) for observable in observables},
        **data.sizes(),
    }
    data.check_names([*described(columns=()), *sizes])
    return described(columns=data.kept), sizes


def unsampled(settings: Settings, batches: Batches, observables: Sequence[Observable]) -> xr.Dataset:
    """The dataset that a run will store, in shape alone: arrays of one repeated zero, which take no memory."""
    described, sizes = layout(settings, batches, observables)
    arrays = {
        name: (variable.dims, np.broadcast_to(np.zeros((), variable.dtype), tuple(sizes[dim] for dim in variable.dims)))
        for name, variable in described.items()
    }
    for observable in observables:
        if (counted := observable.batch.counted) is not None:
            arrays[f"init_loss_{observable.name}"] = (f"batch_{observable.name}", "token_pos"), np.where(counted, 0, np.nan)
    listed = [{"obs_id": observable.name} for observable in observables]
    told = Data(batches, tuple(observables)).told()
    return xr.Dataset(arrays, attrs={"metadata": {"config": {"sampler": {}, "observables": listed}, **told}})


@contextmanager
def only_writer_of(path: Path | None) -> Iterator[RunFolder | None]:
    """The folder beside a store, held against other processes; None for a temporary run.

    Raises:
        RunLocked: another process that is alive holds it.
    """
    if path is None:
        yield None
        return
    folder = RunFolder(path)
    folder.path.mkdir(parents=True, exist_ok=True)
    locked = False  # what another process holds is not cleared
    try:
        with only_writer(folder.path):
            locked = True
            try:
                yield folder
            finally:
                folder.clear_unmade()
    finally:
        if locked:
            folder.remove_if_empty()


def open_writer(
    folder: RunFolder | None, plan: Plan, metadata: dict[str, Any], known: Stored | None, resume: bool = True
) -> StoreWriter:
    """The store of a run, made, or put in order where an earlier call left it. The caller is its only writer."""
    described, sizes = layout(plan.settings, plan.batches, plan.observables)
    if folder is None:
        temporary = Path(tempfile.mkdtemp(prefix="devinterp-"))
        atexit.register(shutil.rmtree, temporary, ignore_errors=True)
        store = StoreWriter(temporary / "run", described)
        lay_out(store, plan, sizes, metadata)
        return store
    store = StoreWriter(folder.store, described, folder)
    folder.clear_litter()
    metadata = plain(metadata if known is None else known.metadata | {key: metadata[key] for key in ("config", "identity")})
    if known is not None:
        _put_in_order(folder, known, metadata, resume)
    record = folder.record()
    if record is None or record["metadata"] != metadata:
        folder.write({"metadata": metadata, "digests": {} if record is None else record["digests"]})
    # laid out again on every call that has something to do, so that no file of another origin is ever relied on
    made = StoreWriter(folder.making, described)
    lay_out(made, plan, sizes, metadata)
    folder.put_in_place(made.digests(made.constants()), metadata, is_new=known is None)
    check_store(folder.store.absolute(), ours=True)
    for chain in set(range(plan.settings.num_chains)) - folder.finished_chains():
        if store.status(chain) != RUNNING:  # a reader is not to take it for finished
            store.write("chain_status", RUNNING, chain)
    return store


def lay_out(store: StoreWriter, plan: Plan, sizes: Mapping[str, int], metadata: Mapping[str, Any]) -> None:
    """The whole hierarchy of a run, and what is known before it starts."""
    store.create(sizes, metadata)
    for name, start in (("chain", 0), ("draw", 0), ("step", 1), ("token_pos", 0)):
        store.write(name, range(start, start + sizes[name]))
    store.write("n_beta", plan.settings.n_beta)
    for name, values in Data(plan.batches, plan.observables).values():
        store.write(name, values)


def _put_in_order(folder: RunFolder, known: Stored, metadata: Mapping[str, Any], resume: bool) -> None:
    """Forget what is damaged; open again what is to become longer."""
    if (folder.store / "zarr.json").exists() and not known.completed:
        with suppress(OSError, ValueError, KeyError):  # damaged: it is laid out again
            mark_completed(folder.store, 0)
    longer = metadata["identity"]["num_draws"] != known.metadata["identity"]["num_draws"]
    for name, part in folder.parts().items():
        progress = part.progress()
        if progress is None:
            continue
        damaged = part.damaged(progress)
        if damaged:
            logger.warning("%r: %s damaged or missing; %s is computed again", str(folder.store), ", ".join(damaged), name)
            for file in damaged:
                (folder.store / file).unlink(missing_ok=True)
        lost = not progress.finished and progress.state is not None and part.state(progress) is None
        if lost:
            logger.warning("%r: the state of %s is damaged; it is computed again", str(folder.store), name)
        if damaged or lost or (not resume and not progress.finished) or (name == "baseline" and _is_larger(known, metadata)):
            part.forget()
        elif longer and name != "baseline":
            part.reopen(progress, known.metadata["identity"])


def _is_larger(known: Stored, metadata: Mapping[str, Any]) -> bool:
    return any(metadata["identity"][name] != known.metadata["identity"][name] for name in MORE)
