"""Datasets as the engine sees them: every row checked once, then rows by number."""

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from devinterp.engine.batch import IDS, IGNORED, Batch
from devinterp.engine.columns import INTEGERS, Numbers, Source, Table, blocks, columns_of, key_of, spans_of
from devinterp.errors import InputTypeError, InputValueError, got

KEPT_IN_MEMORY = 256 * 2**20
"""Datasets up to this many bytes are held as tensors; larger ones are read row by row"""

SCANNED_AT_ONCE = 10_000
LONGEST_NAME = 64


@dataclass(frozen=True)
class Column:
    """One column of a dataset, of which every row was looked at."""

    shape: tuple[int, ...]
    """of a row"""
    dtype: torch.dtype
    smallest: int
    largest: int
    """of integers; otherwise 0"""
    digest: str

    @property
    def row_bytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


@dataclass(frozen=True)
class Rows:
    """A dataset. Made by `check_rows`, which has scanned every row."""

    source: Source
    form: str
    """how a loss function takes its batches"""
    columns: Mapping[str, Column]

    @property
    def num_rows(self) -> int:
        return len(self.source)

    @property
    def length(self) -> int:
        """Tokens of a row; 1 where rows are no sequences of tokens."""
        return self.columns["input_ids"].shape[0] if "input_ids" in self.columns else 1

    @property
    def elements(self) -> int:
        """Numbers in the widest column of a row, by which rows are joined."""
        return max(int(np.prod(column.shape, dtype=np.int64)) for column in self.columns.values())

    @property
    def largest_id(self) -> int:
        """Of the token ids and of labels, which are tokens too."""
        return max((self.columns[name].largest for name in ("input_ids", "labels") if name in self.columns), default=0)

    def batch(self, numbers: Numbers) -> Batch:
        """These rows, with nothing derived from them."""
        kept = self._kept
        if kept is not None:
            where = torch.as_tensor(numbers)
            return Batch({name: column[where] for name, column in kept.items()}, self.form)
        return Batch({name: _read(self.source, name, numbers) for name in self.columns}, self.form)

    def spans(self) -> Iterator[Numbers]:
        """The numbers of all rows, a bounded number at a time."""
        return spans_of(self.source, sum(column.row_bytes for column in self.columns.values()))

    @cached_property
    def _kept(self) -> Mapping[str, Tensor] | None:
        if not isinstance(self.source, Table):
            return {name: self.source.columns[name] for name in self.columns}
        if self.num_rows * sum(column.row_bytes for column in self.columns.values()) > KEPT_IN_MEMORY:
            return None
        every = np.arange(self.num_rows)
        return {name: _read(self.source, name, every) for name in self.columns}

    def fingerprints(self, what: str) -> dict[str, str]:
        """What is compared of a dataset: one entry for each column, so that what differs can be named."""
        return column_digests(what, {name: column.digest for name, column in self.columns.items()})


def column_digests(what: str, digests: Mapping[str, str]) -> dict[str, str]:
    """Token ids go by the name of the whole, other columns by their own."""
    return {what if name == "input_ids" else f"{what} column {name!r}": digest for name, digest in digests.items()}


def _read(source: Source, name: str, numbers: Numbers) -> Tensor:
    if name == "input_ids" and isinstance(source, Table):
        table = source.dataset.with_format("arrow")[key_of(numbers)]
        return _as_matrix(table.column("input_ids"))
    return source.read(name, numbers)


def _as_matrix(column: Any) -> Tensor:
    import pyarrow.compute as pc

    flat = pc.list_flatten(column).combine_chunks().to_numpy(zero_copy_only=False)
    return torch.from_numpy(np.array(flat, dtype=np.int64).reshape(len(column), -1))


def _scan(argument: str, dataset: Any) -> Iterator[tuple[int, Tensor]]:
    """Blocks of token ids with the number of their first row; refuses rows of unequal length."""
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
                "equal length. Try tokenize_and_concatenate, or pad them and keep the attention_mask, or drop the shorter rows."
            )
        if column.null_count or pc.list_flatten(column).null_count:
            raise InputValueError(f"{argument}: rows {start} to {start + len(lengths) - 1} hold nulls. Drop them.")
        yield start, _as_matrix(column)
        start += len(lengths)


def check_rows(argument: str, dataset: Any, at_least: int, has_loss_fn: bool = False) -> Rows:
    """Scan every row of every column: shapes, dtypes, ranges. Raises before anything else happens."""
    source = columns_of(argument, dataset)
    if "input_ids" not in source.names and not has_loss_fn:
        fix = (
            f"It has the columns {source.names}; tokenize text with tokenize_and_concatenate, or pass a loss_fn(model, batch)."
        )
        raise InputValueError(got(argument, "data without 'input_ids'", "data with 'input_ids', or a loss_fn", fix))
    if len(source) < at_least:
        what = "sequences" if "input_ids" in source.names else "rows"
        fix = f"Add {what}, or make batch_size (for observables also batches_per_draw) smaller."
        raise InputValueError(got(argument, f"{len(source)} {what}", f"at least {at_least} {what}", fix))
    if not source.names:
        raise InputValueError(got(argument, "data without columns", "at least one column of numbers", "Try (x, y)."))
    for name in source.names:
        if not name.strip() or not name.isprintable() or len(name) > LONGEST_NAME:
            allowed = f"a name of 1 to {LONGEST_NAME} printable characters"
            raise InputValueError(got(f"{argument} column", name, allowed, "Rename it, for example to 'x'."))
    columns = {name: _column(argument, source, name, has_loss_fn) for name in source.names}
    if "input_ids" in columns:
        _check_beside_tokens(argument, columns)
    if not has_loss_fn and "attention_mask" in columns and columns["attention_mask"].smallest == 1:
        del columns["attention_mask"]  # it leaves nothing out
    form = IDS if list(columns) == ["input_ids"] else source.form
    return Rows(source, form, columns)


def _column(argument: str, source: Source, name: str, has_loss_fn: bool) -> Column:
    shown = f"{argument}[{name!r}]"
    scanned = blocks(argument, source, name)
    if name == "input_ids" and isinstance(source, Table):
        scanned = _scan(argument, source.dataset)
    digest, limits, block = xxhash.xxh3_128(), [], None
    for start, block in scanned:
        if not block.numel():
            raise InputValueError(got(shown, f"rows of shape {tuple(block.shape[1:])}", "rows that hold numbers", ""))
        if block.is_floating_point():
            _check_finite(shown, block, start)
        else:
            limits += [int(block.min()), int(block.max())]
        if name == "input_ids":
            _check_ids(argument, block, start)
        elif name == "attention_mask":
            _check_attention(argument, block, start)
        elif name == "labels":
            _check_labels(argument, block, start, are_tokens=not has_loss_fn)
        digest.update(block.contiguous().view(torch.uint8).numpy().data)
    if block is None:
        raise InputValueError(got(argument, "data without rows", "at least one row", "Look at how it was made."))
    shape, dtype = tuple(block.shape[1:]), block.dtype
    told = f"{len(source)} rows of {shape[0]}" if name == "input_ids" else f"{len(source)} rows of {shape}, {dtype}"
    digest.update(told.encode())
    return Column(shape, dtype, min(limits, default=0), max(limits, default=0), digest.hexdigest())


def _check_finite(shown: str, block: Tensor, start: int) -> None:
    wrong = ~torch.isfinite(block).flatten(1).all(1) if block.dim() > 1 else ~torch.isfinite(block)
    if wrong.any():
        row = start + int(wrong.nonzero()[0])
        raise InputValueError(f"{shown}: row {row} holds NaN or infinite numbers: must be finite. Drop it, or fill them in.")


def _check_ids(argument: str, block: Tensor, start: int) -> None:
    shown = f"{argument}['input_ids']"
    if block.dim() != 2 or block.dtype not in INTEGERS:
        fix = "Tokenize the text first, for example with tokenize_and_concatenate."
        raise InputTypeError(
            got(shown, f"{block.dtype} of shape {tuple(block.shape)}", "integer token ids (rows, tokens)", fix)
        )
    if block.shape[1] < 2:
        raise InputValueError(
            f"{argument}: sequences of length {block.shape[1]}: must have at least 2 tokens, since the loss predicts each "
            "token from those before it. Try a larger max_length in tokenize_and_concatenate."
        )
    if block.min() < 0:
        row = start + int((block.amin(1) < 0).nonzero()[0])
        raise InputValueError(
            f"{argument}: row {row} holds the negative id {block.min()}: token ids must be >= 0. Positions to be left out "
            f"are {IGNORED} in a column 'labels', or 0 in a column 'attention_mask'."
        )


def _check_attention(argument: str, block: Tensor, start: int) -> None:
    shown = f"{argument}['attention_mask']"
    if block.is_floating_point() or (block.dtype != torch.bool and not ((block == 0) | (block == 1)).all()):
        raise InputValueError(got(shown, f"{block.dtype} with other values", "made of 0 and 1", "1 = a token, 0 = padding."))
    empty = ~block.bool().flatten(1).any(1) if block.dim() > 1 else ~block.bool()
    if empty.any():
        row = start + int(empty.nonzero()[0])
        raise InputValueError(f"{shown}: row {row} is all 0, a sequence of padding alone. Drop such rows.")


def _check_labels(argument: str, block: Tensor, start: int, are_tokens: bool) -> None:
    shown = f"{argument}['labels']"
    if are_tokens and block.dtype not in INTEGERS:
        raise InputTypeError(got(shown, str(block.dtype), "integers", "They are token ids; for others pass a loss_fn."))
    wrong = (block < 0) & (block != IGNORED)
    if are_tokens and wrong.any():
        row = start + int(wrong.reshape(len(block), -1).any(1).nonzero()[0])
        raise InputValueError(
            f"{shown}: row {row} holds {block[wrong][0]}: must be token ids, or {IGNORED} where there is no loss. Replace it."
        )
    if block.dim() == 1 and not block.is_floating_point() and (block == IGNORED).any():
        row = start + int((block == IGNORED).nonzero()[0])
        raise InputValueError(f"{shown}: row {row} is {IGNORED}, so it has no loss. Drop such rows.")


def _check_beside_tokens(argument: str, columns: Mapping[str, Column]) -> None:
    length = columns["input_ids"].shape[0]
    mask = columns.get("attention_mask")
    if mask is not None and mask.shape != (length,):
        fix = "It says which of the input_ids are tokens: keep the two as the tokenizer made them."
        raise InputValueError(got(f"{argument}['attention_mask']", f"rows of shape {mask.shape}", f"of shape ({length},)", fix))


def warn_about_padding(ids: Tensor, pad_token_id: int | None) -> None:
    """Pads have losses like any token; without a word they would be averaged in."""
    if pad_token_id is not None and (share := float((ids[:, -1] == pad_token_id).float().mean())) > 0.25:
        warnings.warn(
            f"{share:.0%} of the sequences looked at end in the padding token {pad_token_id}: its losses count like any "
            "other token's. Keep the tokenizer's attention_mask in the dataset, which leaves them out, or take sequences "
            "without padding (tokenize_and_concatenate makes such).",
            UserWarning,
            stacklevel=2,
        )
