"""Covariance and correlation of many traces, as standardised traces and blocked matrix products. Bare arrays only."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Floats = npt.NDArray[np.float32]


def standardised(traces: Tensor, covariance: bool, groups: int = 1) -> tuple[Tensor, Tensor]:
    """Traces z such that z_1 @ z_2.T is their Pearson correlation (or covariance), and which of them are constant.

        z = (x - mean x) / |x - mean x|,      for a covariance (x - mean x) / sqrt(observations - groups)

    Correlations of a constant trace are NaN.

    Args:
        traces: shape (series, observations), float32. Overwritten.
        covariance: scale for covariances.
        groups: observations come in this many groups of equal length (chains), each centred by its own mean.
    """
    series, observations = traces.shape
    grouped = traces.view(series, groups, -1)
    constant = (grouped.amax(2) == grouped.amin(2)).all(1)
    # twice in float32: the first difference is exact to rounding of the mean, the second removes what that left
    for _ in range(2):
        grouped -= grouped.mean(2, keepdim=True, dtype=torch.float64).to(traces.dtype)
    if covariance:
        scale = torch.full((series, 1), (observations - groups) ** 0.5, dtype=traces.dtype, device=traces.device)
    else:
        scale = torch.linalg.vector_norm(traces, dim=1, keepdim=True, dtype=torch.float64).to(traces.dtype)
    traces /= scale
    traces[constant] = 0.0 if covariance else float("nan")
    return traces, constant


def products(rows: Tensor, columns: Tensor, covariance: bool) -> Tensor:
    """Correlations (covariances) of standardised traces, shape (len(rows), len(columns))."""
    matrix = rows @ columns.T
    return matrix if covariance else matrix.clamp_(-1.0, 1.0)


@dataclass
class Strongest:
    """The k entries of largest size of a matrix that is seen a block at a time."""

    k: int
    values: Floats
    """shape (layers, entries): the matrix's own, and what belongs to them"""
    rows: npt.NDArray[np.int64]
    columns: npt.NDArray[np.int64]

    @classmethod
    def none(cls, k: int, layers: int = 1) -> "Strongest":
        return cls(k, np.empty((layers, 0), np.float32), np.empty(0, np.int64), np.empty(0, np.int64))

    def add(self, block: Floats, rows: npt.NDArray[np.int64], columns: npt.NDArray[np.int64]) -> None:
        """A block (layers, rows, columns) with the numbers of its rows and columns; entries that are NaN do not count."""
        sizes = np.abs(block[0]).ravel()
        sizes[np.isnan(sizes)] = -1.0
        chosen = np.argpartition(sizes, -self.k)[-self.k :] if sizes.size > self.k else np.arange(sizes.size)
        chosen = chosen[sizes[chosen] >= 0]
        row, column = np.unravel_index(chosen, block.shape[1:])
        values = np.concatenate([self.values, block.reshape(len(block), -1)[:, chosen]], axis=1)
        all_rows, all_columns = np.concatenate([self.rows, rows[row]]), np.concatenate([self.columns, columns[column]])
        # equal sizes in the order of the matrix, so that the result does not depend on the blocks
        order = np.lexsort((all_columns, all_rows, -np.abs(values[0])))[: self.k]
        self.values, self.rows, self.columns = values[:, order], all_rows[order], all_columns[order]


def spans(length: int, size: int) -> Iterator[slice]:
    """0..length in pieces of `size`."""
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))
