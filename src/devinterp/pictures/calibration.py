"""What calibration tried: the LLC against localization, and which cases do not work where."""

import textwrap
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from devinterp.errors import InputTypeError, got
from devinterp.pictures.style import axes_of, legend_above, looks, sequential, shortened

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.axes import Axes

MOST_NUMBERS = 12
"""cases side by side whose cells still have room for a number"""


class Calibrated(Protocol):
    """What `devinterp.calibrate` returns."""

    @property
    def settings(self) -> dict[str, Any]: ...
    @property
    def table(self) -> "xr.Dataset": ...


def plot_calibration(calibration: Calibrated, *, ax: "Axes | None" = None) -> "Axes":
    """LLC of each case at each localization that was tried, with two standard errors; crosses where it does not work, and why.

    Args:
        calibration: what `devinterp.calibrate` returned.
        ax: where to draw; None = a new figure.

    Returns:
        The Axes.

    Raises:
        DevinterpInputError: this is no calibration.
        PackageMissing: matplotlib is not installed.
    """
    table, chosen = _parts(calibration)
    ax = axes_of(ax, (7, 4.8))
    works = table.fault.values == ""
    for case, look in zip(table.case.values, looks(), strict=False):
        rows = table.sel(case=case)
        values: Any = rows.llc.values
        ax.errorbar(
            rows.localization,
            values,
            yerr=2 * rows.llc_sem,
            color=look.colour,
            linestyle=look.dash,
            capsize=3,
            label=shortened(str(case)),
        )
        ax.plot(rows.localization[works], values[works], look.marker, color=look.colour)
        ax.plot(rows.localization[~works], values[~works], "x", color=look.colour, markersize=9)
    for at, fault in zip(table.localization.values, table.fault.values, strict=True):
        ax.annotate(
            textwrap.fill(str(fault), 38), (at, 0.03), xycoords=("data", "axes fraction"), xytext=(4, 0),
            textcoords="offset points", rotation=90, fontsize=7, color="0.25",
        )  # fmt: skip
    ax.axvline(chosen, color="0.6", linestyle=":", zorder=0, label=f"chosen: {chosen:g}")
    ax.set_xscale("log")
    ax.set_xlim(table.localization.values.min() / 1.6, table.localization.values.max() * 1.6)
    ax.set_xticks(table.localization.values, [f"{at:g}" for at in table.localization.values])
    ax.minorticks_off()
    ax.set_xlabel("localization (per squared weight)")
    ax.set_ylabel("local learning coefficient of the pilots (dimensionless)\nbars: two standard errors; crosses: does not work")
    legend_above(ax, columns=3)
    ax.grid(alpha=0.3)
    return ax


def plot_calibration_plane(calibration: Calibrated, *, ax: "Axes | None" = None) -> "Axes":
    """The plane of localizations and cases: the LLC of the pilots as colour, a cross where they do not work, the choice framed.

    For a sweep, whose cases are too many for lines.

    Args:
        calibration, ax: as in `plot_calibration`.

    Returns:
        The Axes.

    Raises:
        As `plot_calibration`.
    """
    table, chosen = _parts(calibration)
    table = table.sortby("localization", ascending=False).transpose("localization", "case")
    cases, places = [str(case) for case in table.case.values], table.localization.values
    ax = axes_of(ax, (2.5 + max(3.5, 0.55 * min(len(cases), 24)), 2.6 + 0.45 * len(places)))
    image = ax.imshow(table.llc.values, cmap=sequential(), aspect="auto", interpolation="nearest")
    dark = 0.45 * np.nanmin(table.llc.values) + 0.55 * np.nanmax(table.llc.values)
    for row, column in np.ndindex(table.llc.shape):
        one = table.isel(localization=row, case=column)
        value, works = float(one.llc), one.verdict.item() == "healthy" and not one.fault.item()
        text = (f"{value:.3g}" if len(cases) <= MOST_NUMBERS else "") + ("" if works else " x")
        if np.isfinite(value):
            ax.text(column, row, text, ha="center", va="center", fontsize="small", color="white" if value <= dark else "black")
    from matplotlib.patches import Rectangle

    at = float(np.flatnonzero(places == chosen)[0])
    ax.add_patch(
        Rectangle((-0.5, at - 0.5), len(cases), 1, fill=False, edgecolor="#D55E00", linewidth=2.5, clip_on=False, zorder=3)
    )
    told = {True: " (chosen)", False: ""}
    notes = [
        " (does not work)" if fault else told[place == chosen] for place, fault in zip(places, table.fault.values, strict=True)
    ]
    ax.set_yticks(range(len(places)), [f"{place:g}{note}" for place, note in zip(places, notes, strict=True)])
    shown = range(0, len(cases), -(-len(cases) // 24))
    ax.set_xticks(list(shown), [shortened(cases[number], 24) for number in shown], rotation=30, ha="right")
    ax.set_xlabel("case (model, restriction)")
    ax.set_ylabel("localization (per squared weight)")
    bar = ax.figure.colorbar(image, ax=ax)
    bar.set_label("LLC of the pilots (dimensionless)\nx: does not work; grey: not tried")
    return ax


def _parts(calibration: Calibrated) -> tuple["xr.Dataset", float]:
    if not hasattr(calibration, "table") or not hasattr(calibration, "settings"):
        raise InputTypeError(got("calibration", type(calibration), "what devinterp.calibrate returned", "Pass it whole."))
    return calibration.table, float(calibration.settings["localization"])
