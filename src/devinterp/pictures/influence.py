"""Influences between the sequences of several observables."""

import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_influences(
    matrix: npt.NDArray[Any], starts: Mapping[str, int], summary: Mapping[str, tuple[float, float]], title: str = ""
) -> "Figure":
    """The matrix, with lines between observables, and the mean influence within and across them.

    Args:
        matrix: influences between sequences, shape (batch, batch).
        starts: name of each observable -> its first sequence, in order.
        summary: label -> (mean influence, its standard error); bars show two standard errors.
        title: above both panels; say the sampler's settings here.

    Returns:
        A matplotlib Figure, to be saved or shown by the caller.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.3, 1))
    off_diagonal = np.where(np.eye(len(matrix), dtype=bool), np.nan, matrix)
    limit = float(np.nanquantile(np.abs(off_diagonal), 0.99)) or 1.0
    image = left.imshow(off_diagonal, cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
    edges = [*starts.values(), len(matrix)]
    for edge in edges[1:-1]:
        left.axhline(edge - 0.5, color="black", linewidth=0.8)
        left.axvline(edge - 0.5, color="black", linewidth=0.8)
    middles = [(a + b - 1) / 2 for a, b in itertools.pairwise(edges)]
    left.set_xticks(middles, list(starts))
    left.set_yticks(middles, list(starts))
    left.set_title("influence between sequences", fontsize=10)
    figure.colorbar(image, ax=left, shrink=0.85)
    means, errors = zip(*summary.values(), strict=True)
    right.bar(range(len(means)), means, yerr=[2 * error for error in errors], capsize=4, color="0.75")
    right.set_xticks(range(len(means)), list(summary))
    right.axhline(0, color="black", linewidth=0.8)
    right.set_title("mean over pairs; bars: two standard errors", fontsize=10)
    figure.suptitle(title, fontsize=10)
    return figure
