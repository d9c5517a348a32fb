"""Susceptibilities of components to tokens: means per observable, and principal components."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_susceptibilities(
    components: Sequence[str],
    means: Mapping[str, Sequence[float]],
    projections: Mapping[str, npt.NDArray[Any]],
    shares: Sequence[float],
    title: str = "",
) -> "Figure":
    """Mean susceptibility of each component to each observable, and tokens on the first two principal components.

    Args:
        components: their names.
        means: observable -> mean standardised susceptibility of each component.
        projections: observable -> coordinates of its tokens, shape (token, 2).
        shares: share of the variance on each of the two components.
        title: above both panels; say the sampler's settings here.

    Returns:
        A matplotlib Figure, to be saved or shown by the caller.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    height = 0.8 / len(means)
    for number, (name, values) in enumerate(means.items()):
        left.barh(np.arange(len(components)) + number * height, values, height, label=name)
    left.set_yticks(np.arange(len(components)) + height * (len(means) - 1) / 2, components)
    left.invert_yaxis()
    left.axvline(0, color="black", linewidth=0.8)
    left.set_xlabel("mean standardised susceptibility (negative: expression)")
    left.legend(frameon=False)
    for name, points in projections.items():
        right.scatter(points[:, 0], points[:, 1], s=5, alpha=0.35, linewidths=0, label=name)
    # a few extreme tokens would squeeze the rest into a dot
    everything = np.concatenate(list(projections.values()))
    low, high = np.quantile(everything, [0.005, 0.995], axis=0)
    margin = 0.15 * (high - low)
    right.set_xlim(low[0] - margin[0], high[0] + margin[0])
    right.set_ylim(low[1] - margin[1], high[1] + margin[1])
    right.set_xlabel(f"first principal component ({shares[0]:.0%} of the variance)")
    right.set_ylabel(f"second principal component ({shares[1]:.0%})")
    right.set_title("tokens (99 % of them in view)", fontsize=10)
    right.legend(frameon=False, markerscale=3)
    figure.suptitle(title, fontsize=10)
    return figure
