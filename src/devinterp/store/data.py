"""What is stored of the data of a run: token ids; of other data the numbers of the rows, and columns that are small."""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from devinterp.engine.batches import Batches
from devinterp.engine.observables import Observable, stored_name
from devinterp.engine.rows import Column
from devinterp.errors import InputValueError
from devinterp.store.schema import TOKEN_IDS, StoredColumn

COLUMN_BYTES = 2**24
"""Up to this size the columns of an observable are stored with it; its token ids always are"""


@dataclass(frozen=True)
class Data:
    """The sampling data and the observables of a run, as far as its store tells of them."""

    batches: Batches
    observables: tuple[Observable, ...]

    @cached_property
    def columns(self) -> dict[str, Column]:
        """Of the sampling data; an attention_mask that observables alone have is one too."""
        columns = dict(self.batches.rows.columns)
        for observable in self.observables:
            if "attention_mask" in observable.batch.columns:
                columns.setdefault("attention_mask", Column(columns["input_ids"].shape, torch.int64, 0, 1, ""))
        return columns

    @property
    def is_plain(self) -> bool:
        """Token sequences and nothing else."""
        return list(self.columns) == ["input_ids"]

    @property
    def masked(self) -> bool:
        """Whether some losses do not count, and are NaN."""
        return self.batches.masked or any(observable.batch.counted is not None for observable in self.observables)

    @cached_property
    def kept(self) -> list[StoredColumn]:
        """Columns that are stored."""
        most = max(map(len, self.observables), default=0)
        return [
            self._described(name, column)
            for name, column in self.columns.items()
            if name == "input_ids" or most * column.row_bytes <= COLUMN_BYTES
        ]

    def _described(self, name: str, column: Column) -> StoredColumn:
        if name == "input_ids":
            return TOKEN_IDS
        tokens = "input_ids" in self.columns and column.shape == (self.batches.rows.length,)
        known = stored_name(name, "dataset column")
        dims = ("token",) if tokens else tuple(f"{known}_dim_{i}" for i in range(len(column.shape)))
        dtype = str(column.dtype).removeprefix("torch.")
        return StoredColumn(name, known, dims, "float32" if dtype == "bfloat16" else dtype, f"column {name!r}")

    def sizes(self) -> dict[str, int]:
        """Of the dims of columns."""
        return {dim: n for kept in self.kept for dim, n in zip(kept.dims, self.columns[kept.column].shape, strict=True)}

    def check_names(self, others: Iterable[str]) -> None:
        """Refuse columns that would be stored under one of the other names of this store, of variables or of dims."""
        taken = {name.casefold() for name in others}
        for kept, observable in itertools.product(self.kept, self.observables):
            name = f"{kept.name}_{observable.name}"
            if name.casefold() in taken:
                raise InputValueError(
                    f"dataset column {kept.column!r}: with these observables it would be stored as {name!r}, which is taken. "
                    "Rename the column."
                )
            taken.add(name.casefold())

    def values(self) -> Iterator[tuple[str, npt.NDArray[Any]]]:
        """What is stored of every observable's data."""
        for observable in self.observables:
            for kept in self.kept:
                column = observable.batch.columns.get(kept.column)
                if column is None:  # an attention_mask that leaves nothing out
                    column = torch.ones_like(observable.batch.columns["input_ids"])
                yield f"{kept.name}_{observable.name}", (column.float() if column.dtype == torch.bfloat16 else column).numpy()
            if not self.is_plain:
                yield f"row_{observable.name}", np.asarray(observable.numbers)

    def told(self) -> dict[str, Any]:
        """For the metadata; nothing of plain token sequences."""
        if self.is_plain:
            return {}
        objective, length = self.batches.objective, self.batches.rows.length
        of_tokens = not objective.of_decoder and length == objective.positions + (objective.shift or 0)
        return {
            "data": {
                "columns": {name: list(column.shape) for name, column in self.columns.items()},
                "stored_columns": {kept.name: kept.column for kept in self.kept},
                "shift": objective.shift if of_tokens and "input_ids" in self.columns else None,
                "masked": self.masked,
            }
        }
