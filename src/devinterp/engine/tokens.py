"""Token datasets as the engine sees them: checked once, then rows by number."""

import random
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from devinterp.errors import InputTypeError, InputValueError, got

KEPT_IN_MEMORY = 256 * 2**20
"""Datasets up to this many bytes of int64 tokens are held as one array; larger ones are read row by row."""

SCANNED_AT_ONCE = 10_000

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Tokens:
    """A dataset of equal-length token sequences. Made by `check_tokens`, which has scanned every row."""

    dataset: Any
    num_rows: int
    length: int
    largest: int
    digest: str

    @cached_property
    def _array(self) -> Ids | None:
        if self.num_rows * self.length * 8 > KEPT_IN_MEMORY:
            return None
        return np.concatenate([rows for _, rows in _scan("dataset", self.dataset)])

    def rows(self, numbers: npt.NDArray[np.int64]) -> Ids:
        """Token ids, shape (len(numbers), length)."""
        if self._array is not None:
            return self._array[numbers]
        table = self.dataset.with_format("arrow")[numbers.tolist()]
        return _as_matrix(table.column("input_ids"), self.length)


@dataclass(frozen=True)
class Observable:
    """A named dataset whose losses are recorded at every draw, always on the same rows."""

    name: str
    """as stored"""
    ids: Ids
    """the fixed token ids, shape (batch_{obs}, token)"""
    num_batches: int

    @property
    def digest(self) -> str:
        return xxhash.xxh3_128_hexdigest(f"{self.ids.shape}".encode() + self.ids.tobytes())


def _as_matrix(column: Any, length: int) -> Ids:
    import pyarrow.compute as pc

    flat = pc.list_flatten(column).combine_chunks().to_numpy(zero_copy_only=False)
    return np.ascontiguousarray(flat.astype(np.int64, copy=False).reshape(-1, length))


def _scan(argument: str, dataset: Any) -> Iterator[tuple[int, Ids]]:
    """Blocks of rows with the number of their first one; refuses rows of unequal length."""
    import pyarrow as pa
    import pyarrow.compute as pc

    length, start = None, 0
    for table in dataset.with_format("arrow").iter(batch_size=SCANNED_AT_ONCE):
        column = table.column("input_ids")
        if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
                or pa.types.is_fixed_size_list(column.type)):  # fmt: skip
            shown = got(f"{argument}['input_ids']", str(column.type), "one list of integers per row", "")
            raise InputTypeError(shown + "Tokenize the text first, for example with tokenize_and_concatenate.")
        if not pa.types.is_integer(column.type.value_type):
            allowed = "integer token ids"
            fix = f"Cast them: {argument}.cast_column('input_ids', datasets.Sequence(datasets.Value('int64')))."
            raise InputTypeError(got(f"{argument}['input_ids']", str(column.type.value_type), allowed, fix))
        lengths = np.asarray(pc.fill_null(pc.list_value_length(column), -1))
        length = int(lengths[0]) if length is None else length
        if (wrong := np.flatnonzero(lengths != length)).size:
            row = int(wrong[0])
            raise InputValueError(
                f"{argument}: row {start + row} has {lengths[row]} tokens, row 0 has {length}: all sequences must have "
                "equal length. Try tokenize_and_concatenate, or drop the shorter rows."
            )
        if column.null_count or pc.list_flatten(column).null_count:
            raise InputValueError(f"{argument}: rows {start} to {start + len(lengths) - 1} hold nulls. Drop them.")
        yield start, _as_matrix(column, length)
        start += len(lengths)


def check_tokens(argument: str, dataset: Any, at_least: int) -> Tokens:
    """Scan every row: lengths, dtype, range. Raises before anything else happens."""
    from datasets import Dataset, IterableDataset

    if isinstance(dataset, IterableDataset):
        shown = got(argument, type(dataset), "a datasets.Dataset with random access", "")
        raise InputTypeError(shown + "Take a part: datasets.Dataset.from_list(list(stream.take(1000))).")
    if not isinstance(dataset, Dataset):
        fix = "Try datasets.Dataset.from_dict({'input_ids': rows})."
        raise InputTypeError(got(argument, type(dataset), "a datasets.Dataset", fix))
    if "input_ids" not in dataset.column_names:
        fix = f"It has the columns {dataset.column_names}; tokenize the text with tokenize_and_concatenate."
        raise InputValueError(got(argument, "Dataset without 'input_ids'", "a Dataset with an 'input_ids' column", fix))
    num_rows = len(dataset)
    if num_rows < at_least:
        fix = "Add sequences, or make batch_size (for observables also batches_per_draw) smaller."
        raise InputValueError(got(argument, f"{num_rows} sequences", f"at least {at_least} sequences", fix))
    length, largest, digest = 0, -1, xxhash.xxh3_128()
    for start, block in _scan(argument, dataset):
        length = block.shape[1]
        if length < 2:
            raise InputValueError(
                f"{argument}: sequences of length {length}: must have at least 2 tokens, since the loss predicts each "
                "token from those before it. Try a larger max_length in tokenize_and_concatenate."
            )
        if block.min() < 0:
            row = start + int(np.flatnonzero(block.min(axis=1) < 0)[0])
            raise InputValueError(
                f"{argument}: row {row} holds the negative id {block.min()}: token ids must be >= 0. Ignored positions "
                "(-100) are not supported: take sequences without padding, or a loss_fn."
            )
        largest = max(largest, int(block.max()))
        digest.update(block.tobytes())
    digest.update(f"{num_rows} rows of {length}".encode())
    return Tokens(dataset, num_rows, length, largest, digest.hexdigest())


def stored_name(name: Any, argument: str = "observables") -> str:
    """An observable's name in the store: `a-b` -> `a_b`, and a leading digit gets an underscore."""
    if not isinstance(name, str):
        raise InputTypeError(got(argument, name, "a string", "Try 'code'."))
    mapped = "".join(c if c.isalnum() or c == "_" else "_" for c in name)
    mapped = "_" + mapped if mapped[:1].isdigit() else mapped
    if not re.fullmatch(r"[A-Za-z0-9_]{1,64}", mapped) or not mapped.strip("_"):
        allowed = "a name of 1 to 64 letters, digits, '-', '_' or '.', with at least one letter or digit"
        raise InputValueError(got(argument, name, allowed, "Rename it, for example to 'code'."))
    if mapped == "sampling":
        raise InputValueError(got(argument, name, "another name: this one is taken", "Try 'train'."))
    return mapped


def check_observables(given: Any, length: int, batch_size: int, batches_per_draw: int, seed: int) -> tuple[Observable, ...]:
    """Each observable as a dataset or `(dataset, k)`, with its rows fixed by `seed`."""
    if not isinstance(given, Mapping):
        fix = "Try {'code': dataset}, or {} for none."
        raise InputTypeError(got("observables", given, "a dict: name -> dataset or (dataset, batches)", fix))
    found: dict[str, tuple[str, Observable]] = {}
    for original, value in given.items():
        name = stored_name(original)
        if name.casefold() in found:
            other = found[name.casefold()][0]
            raise InputValueError(
                f"observables: {original!r} and {other!r} would both be stored as {name!r}. Rename one of them."
            )
        dataset, num_batches = _split(original, value, batches_per_draw)
        argument, wanted = f"observables[{original!r}]", num_batches * batch_size
        tokens = check_tokens(argument, dataset, at_least=wanted)
        if tokens.length != length:
            fix = "Tokenize both with the same max_length."
            raise InputValueError(got(argument, f"length {tokens.length}", f"as long as dataset: {length}", fix))
        # Python's own generator, so that the rows are those that devinterp 2.0 chose for the same seed
        chosen = random.Random(seed).sample(range(tokens.num_rows), wanted)
        found[name.casefold()] = original, Observable(name, tokens.rows(np.asarray(chosen)), num_batches)
    return tuple(observable for _, observable in found.values())


def _split(name: str, value: Any, batches_per_draw: int) -> tuple[Any, int]:
    if not isinstance(value, tuple | list):
        return value, batches_per_draw
    shown = f"observables[{name!r}]"
    if len(value) != 2 or isinstance(value[1], bool) or not isinstance(value[1], int) or value[1] < 1:
        raise InputValueError(
            f"{shown}={type(value).__name__} of {len(value)} with {value[-1:]!r} last: must be a dataset, or "
            "(dataset, number of batches >= 1). Try (dataset, 3)."
        )
    return value[0], value[1]


def warn_about_padding(ids: Ids, pad_token_id: int | None) -> None:
    """Pads have losses like any token; without a word they would be averaged in."""
    if pad_token_id is not None and (share := float((ids[:, -1] == pad_token_id).mean())) > 0.25:
        warnings.warn(
            f"{share:.0%} of the sequences looked at end in the padding token {pad_token_id}: its losses count like any "
            "other token's. Take sequences without padding (tokenize_and_concatenate makes such), or a loss_fn.",
            UserWarning,
            stacklevel=2,
        )
