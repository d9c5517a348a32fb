"""Traces of the chains of a run, with the running LLC and the verdict on each."""

from typing import TYPE_CHECKING

import numpy as np

from devinterp.errors import InputValueError, got
from devinterp.pictures.style import axes_of, check_one_run, legend_above, looks

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.axes import Axes


def plot_traces(diagnosis: "xr.Dataset", *, ax: "Axes | None" = None) -> "Axes":
    """Each chain's trace n_beta (L(w) - L(w0)), whose mean is its LLC; its LLC over the draws so far; its verdict.

    The trace is thin, the running LLC thick. The band is the LLC over all chains with two standard errors. The axis on the
    right has the same in nats of loss.

    Args:
        diagnosis: of `devinterp.diagnose`.
        ax: where to draw; None = a new figure.

    Returns:
        The Axes.

    Raises:
        DevinterpInputError: this is no diagnosis.
        PackageMissing: matplotlib is not installed.
    """
    if missing := {"trace", "llc_running", "verdict"} - set(diagnosis):
        raise InputValueError(got("diagnosis", sorted(missing), "present", "Pass what devinterp.diagnose(samples) returned."))
    check_one_run("diagnosis", diagnosis["trace"].dims, {"chain", "draw"})
    ax = axes_of(ax, (7.5, 4.5))
    draws = np.arange(1, diagnosis.sizes["draw"] + 1)
    for chain, look in zip(range(diagnosis.sizes["chain"]), looks(), strict=False):
        one = diagnosis.isel(chain=chain)
        name = f"chain {one.chain.item() if 'chain' in one.coords else chain}: {one.verdict.item()}"
        ax.plot(draws, one.trace, color=look.colour, linewidth=0.6, alpha=0.45)
        ax.plot(draws, one.llc_running, color=look.colour, linewidth=2, linestyle=look.dash, label=name)
    mean, error = float(diagnosis.llc_mean), float(diagnosis.mcse)
    if np.isfinite(mean):
        ax.axhspan(mean - 2 * error, mean + 2 * error, color="0.85", zorder=0, label=f"LLC {mean:.4g} ± {error:.2g}")
    n_beta = float(diagnosis.attrs["n_beta"])
    if n_beta > 0:
        right = ax.secondary_yaxis("right", functions=(lambda x: np.asarray(x) / n_beta, lambda x: np.asarray(x) * n_beta))
        right.set_ylabel("loss above the checkpoint's (nats)")
    ax.set_xlim(1, max(2, draws[-1]))
    ax.set_xlabel("draw (thin: the trace; thick: its mean so far)")
    ax.set_ylabel("n_beta (loss - loss at checkpoint)\nits mean is the LLC (dimensionless)")
    legend_above(ax)
    return ax
