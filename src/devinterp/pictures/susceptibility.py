"""Susceptibilities of components: the matrix over tokens, and the mean response to each observable."""

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from devinterp.errors import InputTypeError, got
from devinterp.pictures.style import axes_of, check_one_run, diverging, legend_above, limit_of, looks, shortened
from devinterp.pictures.texts import unit_of

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.axes import Axes


def plot_susceptibilities(result: "xr.DataTree | xr.Dataset", *, ax: "Axes | None" = None) -> "Axes":
    """The susceptibility of every component (rows) to every token, sequence or observable (columns).

    Args:
        result: of `compute_susceptibilities` or `susceptibilities`, or its `/susceptibilities`. Standardise values of the
            two-chain estimator: raw ones are not comparable between components.
        ax: where to draw; None = a new figure.

    Returns:
        The Axes. Columns lie in the order of the result.

    Raises:
        DevinterpInputError: these are no susceptibilities.
        PackageMissing: matplotlib is not installed.
    """
    sus = table_of(result)
    values, components = sus.sus.transpose("wr", "sus_flat").values, [str(name) for name in sus.wr.values]
    ax = axes_of(ax, (8.5, 1.6 + 0.28 * len(components)))
    limit = limit_of(values)
    image = ax.imshow(values, cmap=diverging(), vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
    names, numbers = sus.attrs["dataset_id_to_name"], sus.dataset_id.values
    starts = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(numbers)]
    middles = [(start + stop - 1) / 2 for start, stop in itertools.pairwise(starts)]
    for edge in starts[1:-1]:
        ax.axvline(edge - 0.5, color="black", linewidth=0.8)
    ax.set_xticks(middles, [shortened(str(names[numbers[start]]), 24) for start in starts[:-1]])
    ax.set_yticks(range(len(components)), [shortened(name, 24) for name in components])
    ax.tick_params(length=0)
    ax.set_xlabel(f"{_rows_of(sus)}, by observable")
    ax.set_ylabel("component")
    bar = ax.figure.colorbar(image, ax=ax, extend="both")
    bar.set_label(f"susceptibility ({unit_of(sus)})\nnegative: expression")
    return ax


def plot_responses(result: "xr.DataTree | xr.Dataset", *, ax: "Axes | None" = None) -> "Axes":
    """Mean susceptibility of each component to each observable, as bars.

    Where the result was computed with mean_over="dataset" its standard errors are drawn, twice on either side. Errors of single
    tokens, measured in the same draws, do not average, so that means of tokens have none.

    Args:
        result, ax: as in `plot_susceptibilities`.

    Returns:
        The Axes.

    Raises:
        As `plot_susceptibilities`.
    """
    sus = table_of(result)
    components, names = [str(name) for name in sus.wr.values], [str(name) for name in sus.attrs["dataset_id_to_name"]]
    ax = axes_of(ax, (7, 1.4 + (0.2 + 0.16 * len(names)) * len(components)))
    means, errors = means_of(sus)
    height, places = 0.8 / len(names), np.arange(len(components))
    for number, (name, look) in enumerate(zip(names, looks(), strict=False)):
        bars = None if errors is None else 2 * errors[number]
        ax.barh(places + number * height, means[number], height, xerr=bars, color=look.colour, hatch=look.hatch, alpha=0.85,
                edgecolor="white", linewidth=0.4, error_kw={"capsize": 2, "linewidth": 1}, label=shortened(name))  # fmt: skip
    ax.set_yticks(places + height * (len(names) - 1) / 2, [shortened(name, 24) for name in components])
    ax.invert_yaxis()
    ax.axvline(0, color="black", linewidth=0.8)
    ax.grid(axis="x", alpha=0.3)
    told = "" if errors is None else "; bars: two standard errors"
    ax.set_xlabel(f"mean susceptibility ({unit_of(sus)}; negative: expression{told})")
    ax.set_ylabel("component")
    legend_above(ax, columns=4)
    return ax


def means_of(sus: "xr.Dataset") -> tuple[npt.NDArray[Any], npt.NDArray[Any] | None]:
    """Of every observable and component, shape (observable, component), with errors where rows are observables."""
    numbers = sus.dataset_id.values
    values = sus.sus.transpose("sus_flat", "wr").values
    ids = range(len(sus.attrs["dataset_id_to_name"]))
    means = np.stack([values[numbers == number].mean(axis=0) for number in ids])
    if _rows_of(sus) != "observables" or "sus_sem" not in sus:
        return means, None
    errors = sus.sus_sem.transpose("sus_flat", "wr").values
    return means, np.stack([errors[numbers == number][0] for number in ids])


def table_of(result: "xr.DataTree | xr.Dataset") -> "xr.Dataset":
    """The susceptibilities themselves."""
    found: Any = result
    if hasattr(result, "children"):
        found = result["susceptibilities"].to_dataset() if "susceptibilities" in result.children else None
    if not hasattr(found, "data_vars") or "sus" not in found or "dataset_id_to_name" not in found.attrs:
        fix = "Pass what compute_susceptibilities() returned."
        raise InputTypeError(got("result", type(result), "susceptibilities", fix))
    check_one_run("result", found["sus"].dims, {"sus_flat", "wr"})
    table: xr.Dataset = found
    return table


def _rows_of(sus: "xr.Dataset") -> str:
    if "target_position" in sus.coords:
        return "tokens"
    return "sequences" if "batch" in sus.coords else "observables"
