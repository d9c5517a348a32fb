"""Loss and LLC over training, with error bars."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_llc_over_training(
    steps: Sequence[int],
    losses: Mapping[str, Sequence[float]],
    llcs: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    title: str = "",
) -> "Figure":
    """Two panels over a logarithmic axis of training steps (linear before the first step after 0).

    Args:
        steps: training steps of the checkpoints, ascending.
        losses: name -> loss at each checkpoint, nats per token.
        llcs: name -> (LLC, its standard error) at each checkpoint; bars show two standard errors.
        title: above both panels; say the sampler's settings here, since the values depend on them.

    Returns:
        A matplotlib Figure, to be saved or shown by the caller.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 6.5), layout="constrained")
    above, below = figure.subplots(2, sharex=True)
    # one colour for a name, in both panels
    colours = {name: f"C{number}" for number, name in enumerate(dict.fromkeys([*losses, *llcs]))}
    for name, values in losses.items():
        above.plot(steps, values, "o-", label=name, markersize=4, color=colours[name])
    for name, (values, errors) in llcs.items():
        bars = [2 * error for error in errors]
        below.errorbar(steps, values, yerr=bars, fmt="o-", capsize=3, label=name, markersize=4, color=colours[name])
    above.set_ylabel("loss (nats per token)")
    below.set_ylabel("local learning coefficient")
    below.set_xlabel("training step")
    first = next((step for step in steps if step > 0), 1)
    below.set_xscale("symlog", linthresh=first, linscale=0.5)
    below.set_xticks(list(steps), [str(step) for step in steps], minor=False)
    below.minorticks_off()
    for axis in (above, below):
        axis.legend(frameon=False)
        axis.grid(alpha=0.3)
    figure.suptitle(title, fontsize=10)
    return figure
