"""What calibration tried: the LLC against localization, with verdicts."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.figure import Figure


def plot_calibration(table: "xr.Dataset", chosen: float) -> "Figure":
    """LLC of each case at each localization that was tried, two standard errors; sick pilots are crosses with their verdict.

    Args:
        table: of a `Calibration`.
        chosen: the localization that was taken, marked by a line.

    Returns:
        A matplotlib Figure, to be saved or shown by the caller.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    for number, case in enumerate(table.case.values):
        rows = table.sel(case=case)
        values: Any = rows.llc.values
        axis.errorbar(rows.localization, values, yerr=2 * rows.llc_sem, fmt="-", color=f"C{number}", capsize=3, label=str(case))
        for at, value, verdict in zip(rows.localization.values, values, rows.verdict.values, strict=True):
            axis.plot(at, value, "o" if verdict == "healthy" else "x", color=f"C{number}")
    for at, fault in zip(table.localization.values, table.fault.values, strict=True):
        if fault:
            axis.annotate(str(fault)[:48], (at, 0.02), xycoords=("data", "axes fraction"), rotation=90, fontsize=7, color="0.4")
    axis.axvline(chosen, color="0.7", zorder=0, label=f"chosen: {chosen:g}")
    axis.set_xscale("log")
    axis.set_xlabel("localization (per squared weight)")
    axis.set_ylabel("local learning coefficient of the pilots")
    axis.legend(frameon=False)
    axis.grid(alpha=0.3)
    return figure
