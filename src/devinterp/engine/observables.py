"""Named datasets whose losses are recorded at every draw, always on the same rows."""

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xxhash

from devinterp.engine.batch import Batch
from devinterp.engine.columns import Numbers, is_columns
from devinterp.engine.rows import Rows, check_rows, column_digests
from devinterp.errors import InputTypeError, InputValueError, got
from devinterp.errors import shown as shown_value


@dataclass(frozen=True)
class Observable:
    """A named dataset whose losses are recorded at every draw, always on the same rows."""

    name: str
    """as stored"""
    batch: Batch
    """the fixed rows"""
    numbers: Numbers
    """of these rows in the dataset that was given"""
    num_batches: int

    def __len__(self) -> int:
        return len(self.batch)

    @property
    def largest_id(self) -> int:
        """Of the token ids and of labels, which are tokens too."""
        columns = self.batch.columns
        return max((int(columns[name].max()) for name in ("input_ids", "labels") if name in columns), default=0)

    @property
    def tokens(self) -> int:
        """In all; of rows that are no sequences, their number."""
        columns = self.batch.columns
        return columns["input_ids"].numel() if "input_ids" in columns else len(self)

    @property
    def elements(self) -> int:
        """Numbers in the widest column of a row."""
        return max(column[0].numel() for column in self.batch.columns.values())

    def fingerprints(self) -> dict[str, str]:
        """What is compared of it: one entry for each column."""
        digests = {}
        for name, column in self.batch.columns.items():
            values = column.contiguous().view(torch.uint8).numpy()
            digests[name] = xxhash.xxh3_128_hexdigest(f"{tuple(column.shape)}".encode() + values.tobytes())
        return column_digests(f"observable {self.name}", digests)


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


def check_observables(
    given: Any, rows: Rows, batch_size: int, batches_per_draw: int, seed: int, has_loss_fn: bool = False
) -> tuple[Observable, ...]:
    """Each observable as data or `(data, k)`, with its rows fixed by `seed`; of the same columns as the dataset."""
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
        own = check_rows(argument, dataset, at_least=wanted, has_loss_fn=has_loss_fn)
        _check_alike(argument, own, rows, has_loss_fn)
        # Python's own generator, so that the rows are those that devinterp 2.0 chose for the same seed
        numbers = np.asarray(random.Random(seed).sample(range(own.num_rows), wanted))
        found[name.casefold()] = original, Observable(name, own.batch(numbers), numbers, num_batches)
    return tuple(observable for _, observable in found.values())


def _check_alike(argument: str, own: Rows, rows: Rows, has_loss_fn: bool) -> None:
    if own.length != rows.length:
        fix = "Tokenize both with the same max_length."
        raise InputValueError(got(argument, f"length {own.length}", f"as long as dataset: {rows.length}", fix))
    optional = set() if has_loss_fn else {"attention_mask"}  # one that leaves nothing out has been left out
    if own.form != rows.form and has_loss_fn:
        raise InputTypeError(got(argument, f"a {own.form}", f"a {rows.form}, as dataset", "A loss_fn takes one kind of batch."))
    if set(own.columns) ^ set(rows.columns) <= optional:
        for name in set(own.columns) & set(rows.columns):
            shapes = own.columns[name].shape, rows.columns[name].shape
            if shapes[0] != shapes[1]:
                raise InputValueError(got(f"{argument}[{name!r}]", f"rows of {shapes[0]}", f"as in dataset: {shapes[1]}", ""))
        return
    fix = "Give it the same columns (Dataset.select_columns, rename_column)."
    raise InputValueError(
        got(argument, f"data with {list(own.columns)}", f"of the columns of dataset: {list(rows.columns)}", fix)
    )


def _split(name: str, value: Any, batches_per_draw: int) -> tuple[Any, int]:
    if not isinstance(value, tuple | list) or is_columns(value):
        return value, batches_per_draw
    shown = f"observables[{name!r}]"
    if len(value) != 2 or isinstance(value[1], bool) or not isinstance(value[1], int) or value[1] < 1:
        raise InputValueError(
            f"{shown}={type(value).__name__} of {len(value)} with {shown_value(value[-1:])} last: must be a dataset, or "
            "(dataset, number of batches >= 1). Try (dataset, 3)."
        )
    return value[0], value[1]
