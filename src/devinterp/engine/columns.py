"""Datasets of any kind as named columns of numbers: Hugging Face and torch datasets, dicts and tuples of tensors."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from devinterp.engine.batch import DICT, TUPLE
from devinterp.errors import InputTypeError, InputValueError, got

READ_BYTES = 2**25
"""Rows that are looked at together"""

Numbers = npt.NDArray[np.int64]

KINDS = "a datasets.Dataset, a torch Dataset, or a dict or tuple of tensors"


@dataclass(frozen=True)
class InMemory:
    """Columns that are held as tensors."""

    columns: Mapping[str, Tensor]
    form: str

    @property
    def names(self) -> list[str]:
        return list(self.columns)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def read(self, name: str, numbers: Numbers) -> Tensor:
        return self.columns[name][torch.as_tensor(numbers)]


@dataclass(frozen=True)
class Table:
    """Columns of a Hugging Face dataset, in the dtypes of its torch format: int64 and float32."""

    argument: str
    dataset: Any
    names: list[str]
    form: str = DICT

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, name: str, numbers: Numbers) -> Tensor:
        shown = f"{self.argument}[{name!r}]"
        values = self.dataset.with_format("numpy", columns=[name])[key_of(numbers)][name]
        if isinstance(values, np.ndarray) and values.dtype == object:
            shapes = [np.shape(value) for value in values]
            wrong = [i for i, shape in enumerate(shapes) if shape != shapes[0]]
            if wrong and all(value is not None for value in values):
                raise _ragged(self.argument, name, int(numbers[0]), shapes[0], int(numbers[wrong[0]]), shapes[wrong[0]])
        return as_tensor(shown, values)


Source = InMemory | Table


def key_of(numbers: Numbers) -> slice | list[int]:
    """Rows as a dataset is asked for them: a slice is read much faster than a list."""
    whole = len(numbers) > 0 and (np.diff(numbers) == 1).all()
    return slice(int(numbers[0]), int(numbers[-1]) + 1) if whole else numbers.tolist()


def columns_of(argument: str, dataset: Any) -> Source:
    """A dataset as its columns; what cannot be one is refused."""
    from datasets import Dataset, IterableDataset
    from torch.utils.data import Dataset as TorchDataset

    if isinstance(dataset, IterableDataset):
        shown = got(argument, type(dataset), "a datasets.Dataset with random access", "")
        raise InputTypeError(shown + "Take a part: datasets.Dataset.from_list(list(stream.take(1000))).")
    if isinstance(dataset, Dataset):
        return Table(argument, dataset, _numeric_columns(dataset))
    if isinstance(dataset, Mapping) and dataset and not any(isinstance(part, Dataset) for part in dataset.values()):
        return _in_memory(argument, dict(dataset), DICT)
    if is_columns(dataset):
        return _in_memory(argument, {f"item_{i}": part for i, part in enumerate(dataset)}, TUPLE)
    if isinstance(dataset, TorchDataset):
        return _in_memory(argument, *_read_whole(argument, dataset))
    fix = "Try datasets.Dataset.from_dict({'input_ids': rows}), or (x, y)."
    raise InputTypeError(got(argument, type(dataset), KINDS, fix))


def is_columns(value: Any) -> bool:
    """Whether this is a tuple of columns, such as (x, y)."""
    return isinstance(value, tuple) and bool(value) and all(isinstance(part, Tensor | np.ndarray) for part in value)


def spans_of(source: Source, row_bytes: int) -> Iterator[Numbers]:
    """The numbers of all rows, a bounded number at a time."""
    at_once = max(1, READ_BYTES // max(1, row_bytes))
    for start in range(0, len(source), at_once):
        yield np.arange(start, min(start + at_once, len(source)))


def blocks(argument: str, source: Source, name: str) -> Iterator[tuple[int, Tensor]]:
    """All rows of a column, a bounded number at a time, with the number of the first; refuses rows of unequal shape."""
    first = source.read(name, np.arange(1))[0]
    for numbers in spans_of(source, first.numel() * 8):
        block = source.read(name, numbers)
        if block.shape[1:] != first.shape:
            raise _ragged(argument, name, 0, tuple(first.shape), int(numbers[0]), tuple(block.shape[1:]))
        yield int(numbers[0]), block


def as_tensor(shown: str, values: Any) -> Tensor:
    """Numbers as a tensor on the CPU: tensors in their own dtype, other arrays in int64, float32 or bool."""
    if isinstance(values, Tensor):
        is_number = values.dtype == torch.bool or values.is_floating_point() or values.dtype in INTEGERS
        if values.layout != torch.strided or not is_number or values.is_quantized:
            raise InputTypeError(got(shown, f"{values.layout} {values.dtype}", "a dense tensor of real numbers", "Convert it."))
        return values.detach().cpu().contiguous()
    try:
        array = np.asarray(values)
    except ValueError as error:  # of unequal lengths
        raise InputTypeError(got(shown, type(values), "rows of equal shape", f"{error}.")) from error
    if array.dtype.kind not in "biuf":
        fix = "Make numbers of it (a processor, an encoding), or leave it out, for example with dataset.remove_columns."
        raise InputTypeError(got(shown, f"an array of {array.dtype}", "numbers, the same shape in every row", fix))
    if array.dtype == np.uint64 and array.size and array.max() > np.iinfo(np.int64).max:
        raise InputValueError(got(shown, f"{array.max()}", "at most 2^63 - 1", "Such numbers have no integer dtype in torch."))
    kind = {"b": np.bool_, "f": np.float32}.get(array.dtype.kind, np.int64)
    with np.errstate(over="ignore"):  # infinite ones are refused, with their row
        return torch.from_numpy(np.array(array, dtype=kind, order="C"))


TOKENS = ("input_ids", "attention_mask", "labels")
"""Columns whose meaning is fixed, and whose integers are int64"""

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def _ragged(
    argument: str, name: str, row: int, shape: tuple[int, ...], other: int, another: tuple[int, ...]
) -> InputValueError:
    return InputValueError(
        f"{argument}[{name!r}]: row {other} has shape {another}, row {row} has {shape}: all rows must have equal shape. Pad "
        "tokens (with an attention_mask), resize images, or drop the odd rows."
    )


def _in_memory(argument: str, given: Mapping[Any, Any], form: str) -> InMemory:
    columns: dict[str, Tensor] = {}
    for name, values in given.items():
        if not isinstance(name, str):
            raise InputTypeError(got(argument, name, "a dict whose keys are strings", "They are the columns: try 'x'."))
        column = as_tensor(f"{argument}[{name!r}]", values)
        columns[name] = column.long() if name in TOKENS and column.dtype in INTEGERS else column
    lengths = {name: len(column) if column.dim() else None for name, column in columns.items()}
    first = next(iter(lengths))
    for name, length in lengths.items():
        if length is None:
            fix = "Rows come first: shape (rows, ...)."
            raise InputValueError(got(f"{argument}[{name!r}]", "a single number", "a column with one entry for each row", fix))
        if length != lengths[first]:
            raise InputValueError(
                f"{argument}: column {name!r} has {length} rows, {first!r} has {lengths[first]}: must be equally many. Are "
                "they of the same data?"
            )
    return InMemory(columns, form)


def _read_whole(argument: str, dataset: Any) -> tuple[dict[str, Any], str]:
    """A torch dataset, row by row, as columns."""
    if not hasattr(dataset, "__len__"):
        fix = "Take a part: (torch.stack(xs), torch.stack(ys))."
        raise InputTypeError(got(argument, type(dataset), "a torch Dataset with a length", fix))
    rows = [dataset[i] for i in range(len(dataset))]
    kinds = {type(row) for row in rows}
    if not rows or not (all(issubclass(kind, Mapping) for kind in kinds) or kinds <= {tuple, list}):
        fix = "Try torch.utils.data.TensorDataset(x, y)."
        raise InputTypeError(got(argument, [kind.__name__ for kind in kinds], "rows that are all tuples, or all dicts", fix))
    form, named = TUPLE, [{f"item_{i}": part for i, part in enumerate(row)} for row in rows]
    if issubclass(next(iter(kinds)), Mapping):
        form, named = DICT, [dict(row) for row in rows]
    for i, row in enumerate(named):
        if row.keys() != named[0].keys():
            raise InputValueError(
                f"{argument}: row {i} has the columns {list(row)}, row 0 has {list(named[0])}: must be equal."
            )
    return {name: _stacked(argument, name, [row[name] for row in named]) for name in named[0]}, form


def _stacked(argument: str, name: str, values: list[Any]) -> Any:
    for i, value in enumerate(values):
        if np.shape(value) != np.shape(values[0]):
            raise _ragged(argument, name, 0, np.shape(values[0]), i, np.shape(value))
    return torch.stack(values) if all(isinstance(value, Tensor) for value in values) else values


def _numeric_columns(dataset: Any) -> list[str]:
    """All columns; beside token ids, without those of text, which no model takes."""
    names = list(dataset.column_names)
    if "input_ids" not in names:
        return names
    schema = dataset.features.arrow_schema
    return [name for name in names if name == "input_ids" or not _is_text(schema.field(name).type)]


def _is_text(kind: Any) -> bool:
    import pyarrow.types as types

    while types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        kind = kind.value_type
    return bool(types.is_string(kind) or types.is_large_string(kind))
