"""Tokens in the plane, by the susceptibilities of all components to them: principal components, or UMAP."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from devinterp.analysis.projection import principal_components
from devinterp.errors import InputTypeError, InputValueError, PackageMissing, got
from devinterp.pictures.style import axes_of, legend_above, looks, shortened
from devinterp.pictures.susceptibility import table_of

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.axes import Axes

IN_VIEW = (0.005, 0.995)
"""Quantiles of the coordinates between which the view lies: a few extreme tokens would squeeze the rest into a dot"""


def plot_projection(
    result: "xr.DataTree | xr.Dataset",
    *,
    method: str = "pca",
    kinds: Sequence[Any] | None = None,
    ax: "Axes | None" = None,
) -> "Axes":
    """Each token (or sequence) as a point, by the susceptibilities of all components to it, coloured by kind.

    Susceptibilities are scaled to variance 1 for each component before they are projected. Two-chain values contain a term
    that is a number per component times a number per token, and often fills the first axis: take one-chain values.

    Args:
        result: of `compute_susceptibilities` or `susceptibilities`, of at least two components.
        method: "pca", or "umap" (needs umap-learn; its random state is fixed).
        kinds: a label for every row, for example of `token_kinds`; None = the observable.
        ax: where to draw; None = a new figure.

    Returns:
        The Axes.

    Raises:
        DevinterpInputError: these are no susceptibilities of two components, or an option cannot be used.
        PackageMissing: matplotlib, or for "umap" umap-learn, is not installed.
    """
    sus = table_of(result)
    if method not in ("pca", "umap"):
        raise InputValueError(got("method", method, "'pca' or 'umap'", "Try 'pca'."))
    labels = _kinds(sus, kinds)
    points, names = project(sus, method)
    ax = axes_of(ax, (6, 5.4))
    shown = sorted(dict.fromkeys(labels.tolist()), key=lambda kind: -int((labels == kind).sum()))
    for kind, look in zip(shown, looks(), strict=False):
        those = points[labels == kind]
        ax.scatter(those[:, 0], those[:, 1], s=9, color=look.colour, marker=look.marker, alpha=0.5, linewidths=0,
                   label=f"{shortened(str(kind), 30)} ({len(those)})", rasterized=len(those) > 2000)  # fmt: skip
    low, high = np.quantile(points, IN_VIEW, axis=0)
    margin = np.where(high > low, 0.1 * (high - low), 1.0)
    ax.set_xlim(low[0] - margin[0], high[0] + margin[0])
    ax.set_ylim(low[1] - margin[1], high[1] + margin[1])
    ax.set_xlabel(names[0])
    ax.set_ylabel(names[1])
    legend_above(ax, columns=3, scale=2)
    return ax


def project(sus: "xr.Dataset", method: str) -> tuple[npt.NDArray[np.float64], tuple[str, str]]:
    """Points in the plane, shape (sus_flat, 2), and the names of the axes."""
    values = sus.sus.transpose("sus_flat", "wr").values.astype(np.float64)
    deviation = values.std(axis=0)
    usable = np.isfinite(deviation) & (deviation > 0)
    if usable.sum() < 2 or len(values) < 3:
        found = f"{int(usable.sum())} components and {len(values)} rows"
        raise InputValueError(f"result: {found} that vary; a plane needs two components and three rows.")
    scaled = (values[:, usable] - values[:, usable].mean(axis=0)) / deviation[usable]
    if method == "umap":
        return _umap(scaled), ("UMAP 1 (no unit)", "UMAP 2 (no unit)")
    points, _, shares = principal_components(scaled)
    first, second = (
        f"principal component {n} ({share:.0%} of the variance; z-scores)" for n, share in zip((1, 2), shares, strict=True)
    )
    return points, (first, second)


def _umap(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    try:
        import umap
    except ImportError as error:
        raise PackageMissing("UMAP", "plot_projection(method='umap')", "umap-learn") from error
    neighbours = min(15, len(values) - 1)
    points = umap.UMAP(n_neighbors=neighbours, random_state=0, n_jobs=1).fit_transform(values)
    return np.array(points, dtype=np.float64)


def _kinds(sus: "xr.Dataset", kinds: Sequence[Any] | None) -> npt.NDArray[Any]:
    if kinds is None:
        names: npt.NDArray[Any] = np.array(sus.attrs["dataset_id_to_name"], dtype=object)[sus.dataset_id.values]
        return names
    if isinstance(kinds, str) or not hasattr(kinds, "__len__"):
        raise InputTypeError(got("kinds", kinds, "a label for every row", "Try token_kinds(result, tokenizer)."))
    if len(kinds) != sus.sizes["sus_flat"]:
        raise InputValueError(
            got("kinds", f"{len(kinds)} labels", f"{sus.sizes['sus_flat']}, one for every row", "Look at result.sus_flat.")
        )
    return np.array([str(kind) for kind in kinds], dtype=object)
