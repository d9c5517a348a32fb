"""Writing a run: made in one piece, then whole chunks, each written once by the chain that owns it."""

import errno
import os
import re
import shutil
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

from devinterp.errors import InputValueError, StoreError, got, shown
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
        is_other = False
    except (OSError, ValueError, RuntimeError) as error:  # too long, a file among the parents, a null byte, nobody's home
        raise InputValueError(got("output_path", output_path, "a path of this file system", f"{error}.")) from error
    if is_other:
        raise InputValueError(got("output_path", str(path), "a new or a run's directory", "It is a file: choose another."))
    if path.is_symlink() and not path.exists():
        raise InputValueError(
            got("output_path", str(path), "a new or a run's directory", "It is a link to nothing: remove it.")
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

    def __init__(self, path: Path, variables: Mapping[str, Variable]):
        self.path, self.variables = path, variables

    def __reduce__(self) -> tuple[Any, ...]:
        return StoreWriter, (self.path, self.variables)

    @cached_property
    def _root(self) -> zarr.Group:
        return zarr.open_group(self.path, mode="r+", zarr_format=3, use_consolidated=False)

    @classmethod
    def create(
        cls, path: Path, variables: Mapping[str, Variable], sizes: Mapping[str, int], metadata: Mapping[str, Any]
    ) -> "StoreWriter":
        """Make the whole hierarchy beside `path` and rename it there, so that a store is never half made."""
        with made_beside(path) as made:
            root = zarr.create_group(made, zarr_format=3, attributes={"metadata": metadata, "completed": 0})
            for name, variable in variables.items():
                create_array(root, name, variable, sizes)
            made.rename(path)
        return cls(path, variables)

    def write(self, name: str, value: Any, *region: int | slice) -> None:
        self._array(name)[region or ...] = np.asarray(value)

    @contextmanager
    def rows(self, chain: int | None, thread: Executor) -> Iterator["Rows"]:
        """Gathers the rows of one chain (None: of all chains at once); the tail is written also when the chain breaks off."""
        gathered = Rows(self, chain, thread)
        try:
            yield gathered
        finally:
            gathered.flush()

    def copy(self, names: Iterable[str], source: Path) -> None:
        """Take these arrays from another store of the same layout."""
        other = StoreWriter(source, self.variables)
        for name in names:
            mine, theirs = self._array(name), other._array(name)
            step = mine.chunks[0] if mine.shape else 1
            for start in range(0, mine.shape[0], step):
                mine[start : start + step] = theirs[start : start + step]

    def finish(self) -> None:
        """The last write of a run."""
        self._root.attrs["completed"] = 1

    def status(self) -> list[int]:
        return [int(status) for status in np.asarray(self._array("chain_status")[...])]

    def diverged_at(self, chain: int) -> int:
        return int(np.asarray(self._array("diverged_at")[chain]))

    def _array(self, name: str) -> zarr.Array[Any]:
        array = self._root.get(name)
        if not isinstance(array, zarr.Array):
            raise StoreError(
                f"the store {shown(str(self.path))} has no array {name!r}: it is damaged. Choose another output_path."
            )
        return array


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
        self._writing: deque[Future[None]] = deque()

    def append(self, name: str, row: Tensor) -> None:
        """One row; on a GPU it is not waited for."""
        if name not in self._held:
            array = self._arrays.setdefault(name, self._store._array(name))
            along = int("chain" in self._store.variables[name].dims)
            length = min(array.chunks[along], array.shape[along] - self._written[name])
            self._held[name] = row.new_empty(length, *row.shape)
        self._held[name][self._count[name]] = row
        self._count[name] += 1
        if self._count[name] == len(self._held[name]):
            self._write(name)

    def flush(self) -> None:
        """Write what is held, and wait until everything is written."""
        for name in list(self._held):
            self._write(name)
        while self._writing:
            self._writing.popleft().result()

    def _write(self, name: str) -> None:
        start, held = self._written[name], self._held.pop(name)[: self._count.pop(name)]
        rows = slice(start, start + len(held))
        chain = () if self._chain is None else (self._chain,)
        while len(self._writing) >= CHUNKS_WAITING:
            self._writing.popleft().result()
        self._writing.append(self._thread.submit(_write_chunk, self._arrays[name], (*chain, rows), held))
        self._written[name] = rows.stop


def _write_chunk(array: "zarr.Array[Any]", region: tuple[int | slice, ...], rows: Tensor) -> None:
    array[region] = rows.cpu().numpy()


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


def check_space(path: Path | None, variables: Mapping[str, Variable], sizes: Mapping[str, int], count: int = 1) -> None:
    """Whether `count` runs of this size fit where they will be written."""
    folder = Path(tempfile.gettempdir()) if path is None else next(p for p in path.absolute().parents if p.exists())
    needed, free = count * stored_bytes(variables, sizes), shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
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
