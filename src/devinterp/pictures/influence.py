"""The matrix of influences between sequences."""

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from devinterp.analysis.clusters import clusters_of
from devinterp.errors import InputValueError, got
from devinterp.pictures.style import COLOURS, axes_of, check_one_run, diverging, limit_of, shortened
from devinterp.pictures.texts import MANY, measure_of

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis


def plot_influences(result: "xr.Dataset", *, clusters: int | None = None, ax: "Axes | None" = None) -> "Axes":
    """Influences between sequences as a matrix; a sequence with itself is left grey.

    Args:
        result: of `compute_bif` with correlation_method="sequence" or average_tokenwise_bif=True.
        clusters: None keeps the order of the observables, with lines between them. A number sorts the sequences by hierarchical
            clustering, with lines between so many clusters and, on the left, a strip with the colour of each one's observable.
        ax: where to draw; None = a new figure.

    Returns:
        The Axes. Rows and columns are sequences in the order drawn.

    Raises:
        DevinterpInputError: the result is of another form, or `clusters` is no number of clusters.
        PackageMissing: matplotlib is not installed.
    """
    values, owners = _matrix(result)
    rows, columns, groups, by = result.batch_1.values, result.batch_2.values, owners, "observable"
    of_columns = owners_of(result, columns)
    if clusters is not None:
        found, by = influence_clusters(result, clusters), "cluster"
        order = found.order.values
        values, rows, columns, owners = values[np.ix_(order, order)], rows[order], columns[order], owners[order]
        groups = of_columns = found.cluster.values[order].astype(str)
    ax = axes_of(ax, (6.2, 5.2))
    off_diagonal = np.where(np.equal.outer(rows, columns), np.nan, values)
    limit = limit_of(off_diagonal)
    image = ax.imshow(off_diagonal, cmap=diverging(), vmin=-limit, vmax=limit, interpolation="nearest", aspect="auto")
    for axis, names, line in ((ax.yaxis, groups, ax.axhline), (ax.xaxis, of_columns, ax.axvline)):
        _mark(axis, names, line)
    ax.tick_params(length=0)
    ax.set_xlabel(f"sequence, by {by}")
    ax.set_ylabel(f"sequence, by {by}")
    if clusters is not None:
        _strip(owners, ax)
    bar = ax.figure.colorbar(image, ax=ax, extend="both", shrink=0.9)
    bar.set_label(f"influence between sequences ({measure_of(result)})")
    return ax


def influence_clusters(result: "xr.Dataset", count: int) -> "xr.Dataset":
    """Clusters of sequences that influence each other alike: average linkage of the distances 1 - correlation.

    Args:
        result: of `compute_bif` with correlation_method="sequence" or average_tokenwise_bif=True, the same sequences on both
            sides.
        count: of clusters, at most.

    Returns:
        Dataset over `batch_1`: `cluster`, numbered from 0, and `observable`; and `order` (rank): positions of the
        sequences such that clusters lie side by side.

    Raises:
        DevinterpInputError: the result is of another form, or `count` is no number of clusters.
    """
    import xarray as xr

    values, owners = _matrix(result)
    if not np.array_equal(result.batch_1.values, result.batch_2.values):
        raise InputValueError("result: clusters need the same sequences on both sides. Leave out batch_index_range_1 and _2.")
    if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= len(values):
        raise InputValueError(got("clusters", count, f"a whole number from 1 to {len(values)}", "Try 4."))
    sign = -1 if "sign reversed" in str(result.attrs.get("measure", "")) else 1
    found, order = clusters_of(sign * values, count)
    return xr.Dataset(
        {"cluster": ("batch_1", found), "observable": ("batch_1", owners), "order": ("rank", order)},
        coords={"batch_1": result.batch_1.values},
    )


def owners_of(result: "xr.Dataset", numbers: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The observable that each sequence belongs to."""
    names, starts = zip(*sorted(result.attrs["observables"].items(), key=lambda item: item[1]), strict=True)
    return np.array(names, dtype=object)[np.searchsorted(starts, numbers, side="right") - 1]


def _matrix(result: "xr.Dataset") -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """The values, and the observable of each row."""
    dims = result["influences"].dims if "influences" in result else ()
    check_one_run("result", [dim for dim in dims if dim in MANY], set())
    if dims != ("batch_1", "batch_2"):
        fix = "Compute them with correlation_method='sequence', without queries and top_k."
        raise InputValueError(got("result", dims, "influences over (batch_1, batch_2)", fix))
    return result["influences"].values, owners_of(result, result.batch_1.values)


def _mark(axis: "Axis", names: npt.NDArray[Any], line: Callable[..., Any]) -> None:
    """Names of groups of neighbours, and lines between them."""
    starts = [0, *(np.flatnonzero(names[1:] != names[:-1]) + 1).tolist(), len(names)]
    for edge in starts[1:-1]:
        line(edge - 0.5, color="black", linewidth=0.8)
    middles = [(start + stop - 1) / 2 for start, stop in itertools.pairwise(starts)]
    axis.set_ticks(middles, [shortened(str(names[start]), 16) for start in starts[:-1]])


def _strip(owners: npt.NDArray[Any], ax: "Axes") -> None:
    """Colours of the rows' observables, left of the matrix, and their legend."""
    from matplotlib.patches import Patch, Rectangle

    names = list(dict.fromkeys(sorted(owners.tolist())))
    colours = dict(zip(names, itertools.cycle(COLOURS), strict=False))
    side = ax.get_yaxis_transform()
    for row, run in itertools.groupby(range(len(owners)), key=lambda row: owners[row]):
        rows = list(run)
        ax.add_patch(
            Rectangle((-0.03, rows[0] - 0.5), 0.02, len(rows), color=colours[row], transform=side, clip_on=False, linewidth=0)
        )
    ax.tick_params(axis="y", pad=12)
    ax.legend(handles=[Patch(color=colours[name], label=shortened(str(name), 20)) for name in names], loc="lower left",
              bbox_to_anchor=(0.0, 1.0), ncols=4, frameon=False, fontsize="small", title="observable (strip on the left)",
              title_fontsize="small", alignment="left")  # fmt: skip
