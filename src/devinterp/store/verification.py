"""Whether a store is what was written: every file against the digest that was taken when it was."""

import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import xarray as xr

from devinterp.errors import StoreError, shown
from devinterp.store.folder import RunFolder, damaged_files
from devinterp.store.objects import Objects, is_url
from devinterp.store.reader import open_store
from devinterp.store.remote import damaged_objects, looked_at
from devinterp.store.schema import COMPLETE
from devinterp.store.sweeps import Sweep, file_name, is_sweep
from devinterp.store.writer import array_of, stored_group


@dataclass
class Verified:
    """What was found."""

    checked: int = 0
    """files"""
    damaged: dict[str, str] = field(default_factory=dict)
    """file in the store -> what of the run it belongs to"""
    without_digests: bool = False
    """the store has come without its `.run` folder: chunks were read, and their checksums hold"""


def verify(store: str | os.PathLike[str]) -> Verified:
    """Look at every file of a run's store, or of all stores of a sweep, without changing anything.

    Each is compared with the digest in the folder beside the store (`<store>.run`). A store that has come without it is read
    chunk by chunk: each carries a checksum, and none may be missing of a chain that is complete.

    Args:
        store: the run's `output_path`, a URL too: then every object is read; or that of a sweep: files are then named with
            their store before them, and runs that have not begun are left out.

    Raises:
        StoreError: this is no store, or a sweep of which no run has begun.
        StorageError: an object store cannot be reached.
    """
    if is_url(store):
        objects = Objects.of(os.fspath(store))
        with looked_at(objects) as (path, _):
            return _against_records(path, objects) or _read_through(objects.url, objects)
    if is_sweep(store):
        return _every_run(Path(store).expanduser())
    return _against_records(Path(store), None) or _read_through(Path(store), None)


def _every_run(folder: Path) -> Verified:
    sweep, found = Sweep.read(folder), Verified()
    names = [file_name(checkpoint, restriction) for checkpoint in sweep.checkpoints for restriction in sweep.of_each]
    begun = [name for name in names if (folder / name).exists()]
    if not begun:
        raise StoreError(f"no run of the sweep in {shown(str(folder), 300)} has begun.")
    for name in begun:
        run = verify(folder / name)
        found.checked += run.checked
        found.damaged |= {f"{name}/{file}": of for file, of in run.damaged.items()}
        found.without_digests |= run.without_digests
    return found


def _against_records(path: Path, objects: Objects | None) -> Verified | None:
    """The records lie beside `path`, what they speak of too or in an object store; None where there are none."""
    folder, found = RunFolder(path), Verified()
    record = folder.record()
    if record is None:
        return None
    found.checked += len(record["digests"] or {}) + 1
    found.damaged |= dict.fromkeys(folder.damaged_layout(), "the run's layout")
    for name, part in folder.parts().items():
        progress = part.progress()
        if progress is None:
            continue
        of = name if not progress.chains else f"chains {list(progress.chains)}"
        found.checked += len(progress.digests)
        damaged = damaged_files(path, progress.digests) if objects is None else damaged_objects(objects, progress.digests)
        found.damaged |= dict.fromkeys(damaged, of)
    return found


def _read_through(path: Path | str, objects: Objects | None) -> Verified:
    found = Verified(without_digests=True)
    ds = open_store(path).to_dataset()
    root = stored_group(path)
    complete = _complete_chains(ds)
    for name in map(str, ds.variables):
        array, dims = array_of(root, name, path), ds[name].dims
        chunks = [range(-(-size // length)) for size, length in zip(array.shape, array.chunks, strict=True)]
        for place in np.ndindex(*map(len, chunks)):
            file = "/".join([name, "c", *map(str, place)])
            of = f"chains [{place[0]}]" if "chain" in dims else "what all chains share"
            found.checked += 1
            try:
                array.get_block_selection(place) if place else array[...]
            except (OSError, ValueError, RuntimeError):
                found.damaged[file] = of
            else:
                may_be_missing = name == "diverged_at" or ("chain" in dims and place[0] not in complete)
                there = Path(path, file).exists() if objects is None else f"{objects.name}/{file}" in objects.tags
                if not there and not may_be_missing:
                    found.damaged[file] = of
    return found


def _complete_chains(ds: xr.Dataset) -> set[int]:
    """Of a store of devinterp 2.0, which keeps no status, all that there are."""
    if "chain_status" not in ds:
        return set(range(ds.sizes.get("chain", 0)))
    try:
        return {chain for chain, value in enumerate(ds["chain_status"].values) if value == COMPLETE}
    except (OSError, ValueError, RuntimeError):
        return set()
