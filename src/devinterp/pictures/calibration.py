"""What calibration tried: the LLC against localization, and why some do not work."""

import textwrap
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.figure import Figure


def plot_calibration(table: "xr.Dataset", chosen: float) -> "Figure":
    """LLC of each case at each localization that was tried, with two standard errors; crosses where it does not work, and why.

    Args:
        table: of a `Calibration`.
        chosen: the localization that was taken, marked by a line.

    Returns:
        A matplotlib Figure, to be saved or shown by the caller.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    works = table.fault.values == ""
    for number, case in enumerate(table.case.values):
        rows, colour = table.sel(case=case), f"C{number}"
        values: Any = rows.llc.values
        axis.errorbar(rows.localization, values, yerr=2 * rows.llc_sem, fmt="-", color=colour, capsize=3, label=str(case))
        axis.plot(rows.localization[works], values[works], "o", color=colour)
        axis.plot(rows.localization[~works], values[~works], "x", color=colour, markersize=9)
    for at, fault in zip(table.localization.values, table.fault.values, strict=True):
        axis.annotate(
            textwrap.fill(str(fault), 38), (at, 0.03), xycoords=("data", "axes fraction"), xytext=(4, 0),
            textcoords="offset points", rotation=90, fontsize=7, color="0.4",
        )  # fmt: skip
    axis.axvline(chosen, color="0.7", zorder=0, label=f"chosen: {chosen:g}")
    axis.set_xscale("log")
    axis.set_xlim(table.localization.values.min() / 1.6, table.localization.values.max() * 1.6)
    axis.set_xticks(table.localization.values, [f"{at:g}" for at in table.localization.values])
    axis.minorticks_off()
    axis.set_xlabel("localization (per squared weight)")
    axis.set_ylabel("local learning coefficient of the pilots")
    axis.legend(frameon=False)
    axis.grid(alpha=0.3)
    return figure
