"""Loss traces of observables, put one after another along the batch, read a few sequences at a time."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray as xr

from devinterp.engine.tokens import stored_name
from devinterp.errors import InputTypeError, InputValueError, StoreError, got
from devinterp.store.reader import metadata_of, observable_names

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

    def input_ids(self) -> xr.DataArray:
        """Token ids of all sequences, dims (batch, position)."""
        ids = [self.ds[f"input_ids_{name}"].values for name in self.names]
        # devinterp 2.0 repeats them for every chain and draw
        flat = [part[(0,) * (part.ndim - 2)] for part in ids]
        return xr.DataArray(np.concatenate(flat), dims=("batch", "position"))


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
