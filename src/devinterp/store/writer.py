"""Writing a run: made in one piece, then whole chunks, each written once by the chain that owns it."""

import errno
import json
import os
import re
import tempfile
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from torch import Tensor
from zarr.codecs import ZstdCodec

from devinterp.errors import InputValueError, StorageError, StoreError, got, shown
from devinterp.store.durable import digest_of, free_bytes, size_of, sync_tree, write_durably
from devinterp.store.folder import Digests, RunFolder
from devinterp.store.reader import store_at
from devinterp.store.schema import Variable, chunks


def check_output_path(output_path: Any) -> Path | None:
    """The path as given, or an error before any compute. An existing directory is looked at by the caller."""
    return None if output_path is None else check_path(output_path)


def check_path(output_path: Any) -> Path:
    if not isinstance(output_path, str | os.PathLike):
        raise InputValueError(got("output_path", output_path, "a local path or None", "Try 'runs/first'."))
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:(//|:)", os.fspath(output_path)):
        raise InputValueError(got("output_path", output_path, "a local path", "Write locally, then copy the folder."))
    try:
        path = Path(output_path).expanduser()
        os.stat(path.absolute())
        is_other = not path.is_dir()
    except FileNotFoundError:
        is_other = path.is_symlink()  # to nothing
    except (OSError, ValueError, RuntimeError) as error:  # too long, a file among the parents, a null byte, nobody's home
        raise InputValueError(got("output_path", output_path, "a path of this file system", f"{error}.")) from error
    if is_other:
        raise InputValueError(
            got("output_path", str(path), "a new or a run's directory", "It is a file, or a link to nothing: choose another.")
        )
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if not path.exists() and not os.access(parent, os.W_OK | os.X_OK):
        raise InputValueError(
            got("output_path", str(path), "in a writable directory", f"{shown(str(parent))} is not writable.")
        )
    return path


CHUNKS_WAITING = 4
"""Chunks that one chain may have on their way to the disk before it waits for them"""


def background() -> Executor:
    """The thread that writes chunks while chains go on."""
    return ThreadPoolExecutor(1, thread_name_prefix="devinterp-store")


class StoreWriter:
    """A run's store while it is written. Every chain writes its own chunks only."""

    def __init__(self, path: Path, variables: Mapping[str, Variable], folder: RunFolder | None = None):
        self.path, self.variables, self.folder = path, variables, folder

    def __reduce__(self) -> tuple[Any, ...]:
        return StoreWriter, (self.path, self.variables, self.folder)

    @cached_property
    def _root(self) -> zarr.Group:
        return zarr.open_group(self.path, mode="r+", zarr_format=3, use_consolidated=False)

    def create(self, sizes: Mapping[str, int], metadata: Mapping[str, Any]) -> None:
        """The whole hierarchy, empty."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        root = zarr.create_group(self.path, zarr_format=3, attributes={"metadata": metadata, "completed": 0})
        for name, variable in self.variables.items():
            create_array(root, name, variable, sizes)

    def constants(self) -> list[Path]:
        """The files that do not change while the run goes on."""
        return sorted(file for file in self.path.rglob("*") if file.is_file() and file != self.path / "zarr.json")

    def write(self, name: str, value: Any, *region: int | slice) -> None:
        self.array(name)[region or ...] = np.asarray(value)

    def copy(self, names: Iterable[str], source: Path | str) -> None:
        """Take these arrays from another store of the same layout."""
        other = stored_group(source, ours=True)
        for name in names:
            mine, theirs = self.array(name), array_of(other, name, source)
            step = mine.chunks[0] if mine.shape else 1
            for start in range(0, mine.shape[0], step):
                mine[start : start + step] = theirs[start : start + step]

    def files(self, names: Iterable[str], chain: int | None = None) -> list[Path]:
        """The chunks of these variables that are on the disk; of one chain, where a chain is given."""
        found = []
        for name in names:
            folder = self.path / name / "c"
            folder = folder if chain is None else folder / str(chain)
            found += [folder] if folder.is_file() else [file for file in folder.rglob("*") if file.is_file()]
        return sorted(found)

    def digests(self, files: Iterable[Path]) -> Digests:
        return {file.relative_to(self.path).as_posix(): digest_of(file) for file in files}

    def finish(self) -> None:
        """The last write of a run, after all others are on the disk."""
        if self.folder is None:
            self._root.attrs["completed"] = 1
        else:
            sync_tree(self.path)
            mark_completed(self.path, 1)

    def status(self, chain: int) -> int | None:
        """None where it cannot be read."""
        try:
            return int(np.asarray(self.array("chain_status")[chain]))
        except (OSError, ValueError, RuntimeError):  # a damaged file, which will be written again
            return None

    def diverged_at(self, chain: int) -> int:
        return int(np.asarray(self.array("diverged_at")[chain]))

    def array(self, name: str) -> "zarr.Array[Any]":
        return array_of(self._root, name, self.path)


def stored_group(at: Path | str, *, ours: bool = False) -> zarr.Group:
    """The arrays of a store that is not written to, after it was looked at."""
    return zarr.open_group(store_at(at, ours=ours), mode="r", zarr_format=3, use_consolidated=False)


def array_of(root: zarr.Group, name: str, at: Path | str) -> "zarr.Array[Any]":
    array = root.get(name)
    if not isinstance(array, zarr.Array):
        raise StoreError(f"the store {shown(str(at))} has no array {name!r}: it is damaged. Choose another output_path.")
    return array


def mark_completed(path: Path, completed: int) -> None:
    """Set the flag in the root's attributes so that a power failure cannot leave half of them."""
    root = json.loads((path / "zarr.json").read_bytes())
    if root["attributes"]["completed"] == completed:
        return
    root["attributes"]["completed"] = completed
    write_durably(path / "zarr.json", json.dumps(root, indent=2).encode())


class Rows:
    """Rows on their way to the store: copied to a chunk's own memory, written once by another thread when it is whole.

    Rows kept as they come would lie scattered between the large tensors of a step, and fragment memory to a multiple of it.
    """

    def __init__(self, store: StoreWriter, chain: int | None, thread: Executor):
        self._store, self._chain, self._thread = store, chain, thread
        self._held: dict[str, Tensor] = {}
        self._count: dict[str, int] = defaultdict(int)
        self._written: dict[str, int] = defaultdict(int)
        self._arrays: dict[str, zarr.Array[Any]] = {}
        self._writing: deque[Future[Path]] = deque()
        self._done: list[Path] = []

    def append(self, name: str, row: Tensor) -> None:
        """One row; on a GPU it is not waited for."""
        if name not in self._held:
            self._held[name] = row.new_empty(self._chunk(name), *row.shape)
        self._held[name][self._count[name]] = row
        self._count[name] += 1
        if self._count[name] == len(self._held[name]):
            self._write(name)

    def flush(self) -> None:
        """Write what is held."""
        for name in list(self._held):
            self._write(name)

    def written(self) -> list[Path]:
        """Wait for what is being written; the chunks that are on their way to the disk since the last call."""
        while self._writing:
            self._done.append(self._writing.popleft().result())
        done, self._done = self._done, []
        return done

    @property
    def has_written(self) -> bool:
        """Whether a chunk has become whole since the last call of `written`."""
        return bool(self._writing or self._done)

    def state(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Copies of the rows that are held, and how many of each variable are in whole chunks."""
        held = {name: rows[: self._count[name]].clone() for name, rows in self._held.items()}
        return held, dict(self._written)

    def restore(self, held: Mapping[str, Tensor], written: Mapping[str, int]) -> None:
        """Of a new one; the rows held are on the device of those to come."""
        self._written.update(written)
        for name, rows in held.items():
            for row in rows:
                self.append(name, row)

    def _chunk(self, name: str) -> int:
        """Rows of the chunk that begins."""
        array = self._arrays.setdefault(name, self._store.array(name))
        along = int(self._chain is not None and "chain" in self._store.variables[name].dims)
        chunk, at = array.chunks[along], self._written[name]
        return int(min(chunk - at % chunk, array.shape[along] - at))  # a longer run may go on within a chunk

    def _write(self, name: str) -> None:
        start, held = self._written[name], self._held.pop(name)[: self._count.pop(name)]
        rows = slice(start, start + len(held))
        chain = () if self._chain is None else (self._chain,)
        array = self._arrays[name]
        while len(self._writing) >= CHUNKS_WAITING:
            self._done.append(self._writing.popleft().result())
        place = (*chain, start // array.chunks[len(chain)])
        path = self._store.path.joinpath(name, "c", *map(str, place), *("0" for _ in range(array.ndim - len(place))))
        self._writing.append(self._thread.submit(_write_chunk, array, (*chain, rows), held, path))
        self._written[name] = rows.stop


def _write_chunk(array: "zarr.Array[Any]", region: tuple[int | slice, ...], rows: Tensor, path: Path) -> Path:
    array[region] = rows.cpu().numpy()
    return path


def create_array(root: zarr.Group, name: str, variable: Variable, sizes: Mapping[str, int]) -> None:
    root.create_array(
        name,
        shape=tuple(sizes[dim] for dim in variable.dims),
        chunks=chunks(name, variable, sizes),
        dtype=variable.dtype,
        fill_value=np.nan if variable.dtype.startswith("float") else (-1 if name == "diverged_at" else 0),
        compressors=ZstdCodec(level=1, checksum=True),
        dimension_names=variable.dims,
        attributes={"long_name": variable.meaning, "units": variable.unit, **(variable.attributes or {})},
        # a chunk of NaN is a result; one that is absent was not computed
        config={"write_empty_chunks": True},
    )


def stored_bytes(variables: Mapping[str, Variable], sizes: Mapping[str, int]) -> int:
    """Uncompressed size; losses compress by a tenth at best."""
    return sum(
        np.dtype(variable.dtype).itemsize * int(np.prod([sizes[dim] for dim in variable.dims], dtype=np.int64))
        for variable in variables.values()
    )


def check_space(
    path: Path | None, variables: Mapping[str, Variable], sizes: Mapping[str, int], count: int = 1, extra: int = 0
) -> None:
    """Whether `count` runs of this size, and `extra` bytes beside them, fit where they will be written."""
    folder, stored = (Path(tempfile.gettempdir()), 0) if path is None else (path, size_of(path))
    needed, free = count * stored_bytes(variables, sizes) + extra - stored, free_bytes(folder)
    if needed > free:
        raise StorageError(
            errno.ENOSPC,
            f"the run needs about {needed:,} bytes, {free:,} are free ({needed - free:,} short). Free some, choose another "
            "output_path, or take fewer draws or observable batches",
            str(folder),
        )


@contextmanager
def made_beside(path: Path) -> Iterator[Path]:
    """An empty folder to be filled and renamed to `path`; what is left of it in the end is removed.

    It has the permissions of any new folder, and lies in one of an unpredictable name that is nobody else's to enter.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name[:64]}.", dir=path.parent, ignore_cleanup_errors=True) as private:
        made = Path(private) / "store"
        made.mkdir()
        yield made
