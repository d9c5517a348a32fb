"""Loss traces of observables, put one after another along the batch, read a few sequences at a time."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray as xr

from devinterp.engine.observables import stored_name
from devinterp.errors import InputTypeError, InputValueError, StoreError, got
from devinterp.store.reader import metadata_of, observable_names, shift_of
from devinterp.store.samples import counted_of

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Traces:
    """The observables of a run as one batch of `num_sequences` sequences with `length` losses each."""

    ds: xr.Dataset
    names: tuple[str, ...]
    starts: tuple[int, ...]
    """number of each observable's first sequence, and the total"""
    sequence_level: bool
    """mean over the tokens of a sequence: one trace each"""
    mean_over_chains: bool

    @classmethod
    def of(cls, ds: xr.Dataset, names: Sequence[str], sequence_level: bool, mean_over_chains: bool) -> "Traces":
        sizes = [ds.sizes[f"batch_{name}"] for name in names]
        return cls(ds, tuple(names), (0, *map(int, np.cumsum(sizes))), sequence_level, mean_over_chains)

    @property
    def num_sequences(self) -> int:
        return self.starts[-1]

    @property
    def length(self) -> int:
        """Traces per sequence."""
        return 1 if self.sequence_level else self.ds.sizes["token_pos"]

    @property
    def groups(self) -> int:
        return 1 if self.mean_over_chains else self.ds.sizes["chain"]

    @property
    def observations(self) -> int:
        return self.groups * self.ds.sizes["draw"]

    def read(self, sequences: Numbers) -> npt.NDArray[Any]:
        """Traces of these sequences, shape (len(sequences) x length, observations)."""
        wanted, where = np.unique(sequences, return_inverse=True)
        parts = []
        for start, stop, name in zip(self.starts, self.starts[1:], self.names, strict=False):
            local = wanted[(wanted >= start) & (wanted < stop)] - start
            if local.size:
                parts.append(self._read(name, local))
        read = np.concatenate(parts)
        if len(wanted) < len(sequences) or (np.diff(where) < 0).any():
            read = read.reshape(len(wanted), self.length, -1)[where].reshape(-1, self.observations)
        return read

    def _read(self, name: str, local: Numbers) -> npt.NDArray[Any]:
        whole = len(local) == local[-1] - local[0] + 1  # a slice is read several times faster than a list of numbers
        chosen = slice(int(local[0]), int(local[-1]) + 1) if whole else local
        losses = self.ds[f"loss_{name}"].isel({f"batch_{name}": chosen})
        if self.sequence_level:
            losses = losses.mean("token_pos", dtype=np.float64)
        if self.mean_over_chains:
            losses = losses.mean("chain", dtype=np.float64).astype(losses.dtype)
        last = ("draw",) if self.mean_over_chains else ("chain", "draw")
        return losses.transpose(f"batch_{name}", ..., *last).values.reshape(len(local) * self.length, self.observations)

    @property
    def first_position(self) -> int:
        """That of the first loss of a sequence, as `target_position` counts: a next token's position counts from 1."""
        return shift_of(self.ds) or 0

    @cached_property
    def counted(self) -> npt.NDArray[np.bool_] | None:
        """Which losses count, shape (num_sequences, token_pos); None = all."""
        parts = [counted_of(self.ds, name) for name in self.names]
        known = [part for part in parts if part is not None]
        return np.concatenate(known) if known else None

    def tokens(self) -> Numbers | None:
        """Token ids by target_position, shape (sequences, position); None where losses are not those of tokens."""
        known = shift_of(self.ds) is not None and has_tokens(self.ds, self.names)
        return np.concatenate([contents_of(self.ds, name) for name in self.names]) if known else None

    def contents(self) -> dict[str, xr.DataArray]:
        """What all sequences are: `input_ids` (batch, position), or of other data `row` (batch), numbers in what was given."""
        name, dims = ("input_ids", ("batch", "position")) if has_tokens(self.ds, self.names) else ("row", ("batch",))
        return {name: xr.DataArray(np.concatenate([contents_of(self.ds, one) for one in self.names]), dims=dims)}


def has_tokens(ds: xr.Dataset, names: Sequence[str]) -> bool:
    """Whether these observables are sequences of tokens."""
    return all(f"input_ids_{name}" in ds for name in names)


def contents_of(ds: xr.Dataset, name: str) -> Numbers:
    """Token ids of an observable, shape (batch, token), or of other data the numbers of its rows, shape (batch,)."""
    if f"input_ids_{name}" not in ds:
        if f"row_{name}" not in ds:
            raise StoreError(f"the samples lack both input_ids_{name} and row_{name}. Ask for another copy.")
        rows: Numbers = ds[f"row_{name}"].values
        return rows
    ids: Numbers = ds[f"input_ids_{name}"].values
    ids = ids[(0,) * (ids.ndim - 2)]  # devinterp 2.0 repeats them for every chain and draw
    return ids


def chosen_observables(ds: xr.Dataset, argument: str, asked: Any) -> list[str]:
    """Stored names of the observables asked for, in that order; all of them in sorted order for "all" and None."""
    known = observable_names(ds)
    if not known:
        metadata_of(ds)  # without it there is no list of observables
        raise StoreError("the samples hold no observables: sample with observables={'name': dataset}.")
    if asked is None or (isinstance(asked, str) and asked == "all"):
        return sorted(known)
    if isinstance(asked, str) or not isinstance(asked, Sequence):
        raise InputTypeError(got(argument, asked, "'all' or a list of names", f"Try {known[:2]}."))
    names = [stored_name(name, argument) for name in asked]
    if not names or len(set(names)) < len(names):
        raise InputValueError(got(argument, asked, "a list of different names, at least one", f"There are {known}."))
    if unknown := [name for name in names if name not in known]:
        raise InputValueError(got(argument, asked, f"made of {known}", f"{unknown} are not among the samples."))
    return names
