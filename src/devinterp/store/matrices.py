"""Results larger than memory, written block by block; they appear at their path only when they are whole."""

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import xarray as xr
import zarr

from devinterp.errors import InputValueError, got
from devinterp.store.reader import open_store
from devinterp.store.schema import Variable
from devinterp.store.writer import check_path, check_space, create_array, made_beside


def check_new_path(output_path: Any) -> Path:
    """A path at which nothing is yet."""
    path = check_path(output_path)
    if path.exists():
        raise InputValueError(got("output_path", str(path), "new", "Something is there; nothing was changed. Choose another."))
    return path


class MatrixWriter:
    """Matrices of one shape with their coordinates. Until `finish` they lie beside their path, removed if anything fails."""

    def __init__(self, output_path: str | os.PathLike[str]):
        self.path = check_new_path(output_path)

    def __enter__(self) -> Self:
        self._stack = ExitStack()
        self._made = self._stack.enter_context(made_beside(self.path))
        self._root = zarr.create_group(self._made, zarr_format=3)
        return self

    def create(self, names: Sequence[str], coords: Mapping[str, np.ndarray[Any, Any]], chunks: tuple[int, ...]) -> None:
        """The arrays of these names with these coordinates, which are their dims."""
        sizes = {dim: len(values) for dim, values in coords.items()}
        described = {name: Variable(tuple(coords), "float32", name, chunks=chunks) for name in names}
        check_space(self.path, described, sizes)
        for name, variable in described.items():
            create_array(self._root, name, variable, sizes)
        self._arrays: dict[str, Any] = {name: self._root[name] for name in names}
        for dim, values in coords.items():
            self._add(dim, (dim,), values)

    def write(self, name: str, rows: slice, columns: slice, block: np.ndarray[Any, Any]) -> None:
        self._arrays[name][rows, columns] = block

    def finish(self, attributes: Mapping[str, Any], arrays: Mapping[str, xr.DataArray]) -> None:
        """The last writes, then the rename."""
        for name, array in arrays.items():
            self._add(name, tuple(map(str, array.dims)), array.values)
        self._root.attrs.update(dict(attributes))
        self._made.rename(self.path)

    def open(self) -> xr.Dataset:
        return open_store(self.path, ours=True).to_dataset()

    def _add(self, name: str, dims: tuple[str, ...], values: np.ndarray[Any, Any]) -> None:
        described = Variable(dims, str(values.dtype), name, chunks=values.shape)
        create_array(self._root, name, described, dict(zip(dims, values.shape, strict=True)))
        array: Any = self._root[name]
        array[...] = values

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()
