"""The forms in which influences are asked for: the whole matrix, that of a few queries, the strongest pairs."""

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray as xr

from devinterp.analysis.moments import Floats, Strongest
from devinterp.engine.progress import Progress
from devinterp.slt.bif_blocks import Sides
from devinterp.store.matrices import MatrixWriter
from devinterp.store.traces import Numbers


def whole(sides: Sides, progress: bool) -> xr.Dataset:
    """The matrix of all pairs, in memory."""
    coords = matrix_coords(sides)
    check_memory(sides)
    values = np.empty((len(sides.options.layers), *map(len, coords.values())), dtype=np.float32)
    for rows, columns, block in _matrix_blocks(sides, progress):
        values[:, rows, columns] = block
    return xr.Dataset(_named(sides, tuple(coords), values), coords={dim: (dim, at) for dim, at in coords.items()})


def write_whole(sides: Sides, writer: MatrixWriter, progress: bool) -> None:
    """The matrix of all pairs, block by block to a store."""
    coords = matrix_coords(sides)
    writer.create(sides.options.layers, coords, (sides.block, sides.block, *map(len, list(coords.values())[2:])))
    for rows, columns, block in _matrix_blocks(sides, progress):
        for name, layer in zip(sides.options.layers, block, strict=True):
            writer.write(name, rows, columns, layer)


def matrix_coords(sides: Sides) -> dict[str, Numbers]:
    """The dims of the whole matrix, with their coordinates."""
    coords: dict[str, Numbers] = {"batch_1": sides.rows, "batch_2": sides.columns}
    if not sides.options.per_token:
        return coords
    positions = _positions(sides)
    return coords | {"target_position": positions, "target_position_T": positions}


def _named(sides: Sides, dims: tuple[str, ...], values: Floats) -> dict[str, tuple[tuple[str, ...], Floats]]:
    return {name: (dims, layer) for name, layer in zip(sides.options.layers, values, strict=True)}


def _matrix_blocks(sides: Sides, progress: bool) -> Iterator[tuple[slice, slice, Floats]]:
    length = sides.length
    with Progress(sides.num_blocks, "influences", progress) as bar:
        for rows, columns, product in sides.blocks():
            pairs = product.reshape(len(product), rows.stop - rows.start, length, -1, length).swapaxes(2, 3)
            yield rows, columns, pairs if sides.options.per_token else pairs[..., 0, 0]
            bar.update()


def of_queries(sides: Sides, progress: bool) -> xr.Dataset:
    """The influence of every trace of the first side on each query."""
    per_token, layers = sides.query_positions is not None, len(sides.options.layers)
    values = np.empty((layers, len(sides.columns), len(sides.rows), sides.traces.length), dtype=np.float32)
    with Progress(sides.num_blocks, "influences", progress) as bar:
        for rows, columns, product in sides.blocks():
            shape = (layers, columns.stop - columns.start, rows.stop - rows.start, -1)
            values[:, columns, rows] = product.swapaxes(1, 2).reshape(shape)
            bar.update()
    dims = ("query", "batch_1", "target_position") if per_token else ("query", "batch_1")
    result = xr.Dataset(
        _named(sides, dims, values if per_token else values[..., 0]),
        coords={"batch_1": sides.rows, "query_batch": ("query", sides.columns)},
    )
    if sides.query_positions is None:
        return result
    asked = sides.query_positions + sides.traces.first_position
    return result.assign_coords(target_position=_positions(sides), query_target_position=("query", asked))


def _positions(sides: Sides) -> Numbers:
    return np.arange(sides.traces.length) + sides.traces.first_position


def strongest(sides: Sides, top_k: int, progress: bool) -> xr.Dataset:
    """The entries of largest size: of the matrix, or for each query."""
    length, layers = sides.length, len(sides.options.layers)
    if sides.options.queries is None:
        found = [Strongest.none(top_k, layers)]
        for rows, columns, product in _matrix_blocks(sides, progress):
            row_ids, column_ids = _trace_numbers(sides.rows[rows], length), _trace_numbers(sides.columns[columns], length)
            block = product.swapaxes(2, 3) if sides.options.per_token else product
            matrix = block.reshape(layers, len(row_ids), len(column_ids))
            found[0].add(_without_repeats(sides, matrix, row_ids, column_ids, length), row_ids, column_ids)
        return _table(sides, found, length, ("pair",))
    found = [Strongest.none(top_k, layers) for _ in sides.columns]
    at = np.zeros_like(sides.columns) if sides.query_positions is None else sides.query_positions
    query_ids = sides.columns * length + at
    with Progress(sides.num_blocks, "influences", progress) as bar:
        for rows, columns, product in sides.blocks():
            row_ids = _trace_numbers(sides.rows[rows], length)
            others = np.where(row_ids[:, None] == query_ids[columns], np.float32(np.nan), product)
            for number in range(columns.start, columns.stop):
                found[number].add(others[..., [number - columns.start]], row_ids, query_ids[[number]])
            bar.update()
    return _table(sides, found, length, ("query", "rank"))


def _without_repeats(sides: Sides, block: Floats, rows: Numbers, columns: Numbers, length: int) -> Floats:
    """NaN for traces with themselves, and for pairs that stand in the matrix the other way round too."""
    mirrored = np.isin(columns // length, sides.rows)[None, :] & np.isin(rows // length, sides.columns)[:, None]
    repeated = (rows[:, None] > columns[None, :]) & mirrored | (rows[:, None] == columns[None, :])
    return np.where(repeated, np.float32(np.nan), block)


def _table(sides: Sides, found: list[Strongest], length: int, dims: tuple[str, ...]) -> xr.Dataset:
    """The strongest entries as a table, with the sequences, positions and tokens that they stand for."""
    first, ids = sides.traces.first_position, sides.traces.tokens()
    size = max(len(best.rows) for best in found)

    def column(values: list[npt.NDArray[Any]], fill: Any) -> tuple[tuple[str, ...], npt.NDArray[Any]]:
        padded = np.stack([np.concatenate([v, np.full(size - len(v), fill, v.dtype)]) for v in values])
        return dims, padded if len(dims) == 2 else padded[0]

    table = {n: column([best.values[i] for best in found], np.nan) for i, n in enumerate(sides.options.layers)}
    for suffix, numbers in (("1", [b.rows for b in found]), ("2", [b.columns for b in found])):
        table[f"batch_{suffix}"] = column([n // length for n in numbers], -1)
        if sides.options.per_token:
            ending = "" if suffix == "1" else "_T"
            table[f"target_position{ending}"] = column([n % length + first for n in numbers], -1)
            if ids is not None:
                table[f"token{ending}"] = column([ids[n // length, n % length + first] for n in numbers], -1)
    return xr.Dataset(table)


def _trace_numbers(sequences: Numbers, length: int) -> Numbers:
    return (sequences[:, None] * length + np.arange(length)).ravel()


def check_memory(sides: Sides) -> None:
    """Refuse a matrix in memory that is larger than the machine's."""
    shape = tuple(map(len, matrix_coords(sides).values()))
    needed = 4 * len(sides.options.layers) * int(np.prod(shape, dtype=np.int64))
    if "SC_PHYS_PAGES" in os.sysconf_names and needed > 0.9 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
        raise MemoryError(
            f"the influences of shape {shape} take {needed / 2**30:.1f} GiB, more than this machine's memory. Pass "
            "output_path to write them block by block, or ask for queries, top_k or a smaller batch_index_range."
        )
