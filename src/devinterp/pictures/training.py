"""LLC and loss over the checkpoints of a training run."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from devinterp.errors import InputTypeError, InputValueError, got
from devinterp.pictures.style import axes_of, legend_above, looks, shortened

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.axes import Axes

SAMPLING_DATA = "sampling data"


def plot_llc_over_checkpoints(results: "Mapping[Any, xr.Dataset] | xr.Dataset", *, ax: "Axes | None" = None) -> "Axes":
    """LLC at each checkpoint, of the sampling data and of every observable; bars show two standard errors.

    Keys with a number each (1000, "step-1000") are training steps: they lie on an axis that is logarithmic from the first step
    after 0 on. Other keys lie side by side, in the order given.

    Args:
        results: checkpoint -> what `devinterp.compute_llc` returned, all at one n_beta and localization; or one table with the
            dim `checkpoint`, and `restriction` where there are components, each of which is a line of its own then.
        ax: where to draw; None = a new figure.

    Returns:
        The Axes.

    Raises:
        DevinterpInputError: these are no such results, or their settings differ, so that they cannot be compared.
        PackageMissing: matplotlib is not installed.
    """
    found = _by_checkpoint(results)
    lines = _lines(found, ("llc_mean", "llc_sem"), ("llc_observable", "llc_observable_sem"))
    _check_settings(found)
    ax = axes_of(ax, (7, 4.2))
    _draw(lines, Steps.of(list(found)), ax)
    first = next(iter(found.values())).attrs
    told = [f"{name} {first[name]:g}" for name in ("n_beta", "localization") if name in first]
    ax.set_ylabel("local learning coefficient (dimensionless)\nbars: two standard errors")
    ax.annotate(", ".join(told), (0.99, 0.02), xycoords="axes fraction", ha="right", va="bottom", fontsize="small", color="0.3")
    return ax


def plot_loss_over_checkpoints(results: "Mapping[Any, xr.Dataset] | xr.Dataset", *, ax: "Axes | None" = None) -> "Axes":
    """Loss of the model itself at each checkpoint, on the sampling data and on every observable.

    Args:
        results, ax: as in `plot_llc_over_checkpoints`.

    Returns:
        The Axes.

    Raises:
        As `plot_llc_over_checkpoints`.
    """
    found = {label: _of_whole(result) for label, result in _by_checkpoint(results).items()}
    lines = _lines(found, ("init_loss", None), ("init_loss_observable", None))
    ax = axes_of(ax, (7, 4.2))
    _draw(lines, Steps.of(list(found)), ax)
    ax.set_ylabel("loss at the checkpoint (nats per token)")
    return ax


@dataclass(frozen=True)
class Steps:
    """Where checkpoints lie on an axis."""

    at: tuple[float, ...]
    names: tuple[str, ...]
    is_training: bool
    """by training step; otherwise side by side"""

    @classmethod
    def of(cls, labels: Sequence[Any]) -> "Steps":
        found = [step_of(label) for label in labels]
        steps = [step for step in found if step is not None]
        if len(steps) == len(labels) == len(set(steps)):
            order = sorted(steps)
            return cls(tuple(steps), tuple(f"{step:g}" for step in steps), steps == order or steps == order[::-1])
        return cls(tuple(map(float, range(len(labels)))), tuple(shortened(str(label), 24) for label in labels), False)


def step_of(label: Any) -> float | None:
    """The training step that a label of a checkpoint tells: itself, or the one whole number in it."""
    if isinstance(label, int | float):
        return float(label)
    numbers = re.findall(r"\d+", str(label)[:200])
    return float(numbers[0]) if len(numbers) == 1 and len(numbers[0]) < 16 else None


Line = tuple[list[float], list[float] | None]
"""Values at the checkpoints, and their standard errors"""


def _by_checkpoint(results: Any) -> "dict[Any, xr.Dataset]":
    """Checkpoint (its training step, where a table tells it) -> its result."""
    if hasattr(results, "data_vars") and "checkpoint" in results.dims:
        labels = results["step" if "step" in results.coords else "checkpoint"].values.tolist()
        return {label: results.isel(checkpoint=number) for number, label in enumerate(labels)}
    if hasattr(results, "data_vars") or not isinstance(results, Mapping) or not results:
        fix = "Try {step: devinterp.compute_llc(samples), ...}."
        raise InputTypeError(got("results", type(results), "a dict: checkpoint -> result of compute_llc, not empty", fix))
    return dict(results)


def _of_whole(result: "xr.Dataset") -> "xr.Dataset":
    """The first restriction, that of the whole model: all have one loss at the checkpoint."""
    return result.isel(restriction=0) if "restriction" in result.dims else result


def _lines(
    results: "Mapping[Any, xr.Dataset]", of_all: tuple[str, str | None], of_observable: tuple[str, str | None]
) -> dict[str, Line]:
    needed = [name for name in of_all if name is not None]
    for label, result in results.items():
        if missing := [name for name in needed if name not in result]:
            fix = "Pass what devinterp.compute_llc returned."
            raise InputValueError(got(f"results[{label!r}]", missing, "present", fix))

    def line(names: tuple[str, str | None], **at: Any) -> Line:
        values, errors = ([float(result[name].sel(at)) for result in results.values()] if name else None for name in names)
        return values or [], errors

    first = next(iter(results.values()))
    if "restriction" in first.dims:
        return {str(name): line(of_all, restriction=name) for name in first["restriction"].values}
    everywhere = [set(result["observable"].values.tolist()) if "observable" in result else set() for result in results.values()]
    shared = sorted(set.intersection(*everywhere))
    return {SAMPLING_DATA: line(of_all), **{str(name): line(of_observable, observable=name) for name in shared}}


def _check_settings(results: "Mapping[Any, xr.Dataset]") -> None:
    names = ("n_beta", "localization", "llc_weight_decay")
    seen = sorted({repr([result.attrs.get(name) for name in names]) for result in results.values()})
    # a table of runs whose settings differ has them by run
    if len(seen) > 1 or any(isinstance(result.attrs.get(name), dict) for result in results.values() for name in names):
        fix = "LLCs can be compared at equal settings only: draw each setting by itself."
        raise InputValueError(got("results", seen, f"of one {names}", fix))


def _draw(lines: Mapping[str, Line], steps: Steps, ax: "Axes") -> None:
    for (name, (values, errors)), look in zip(lines.items(), looks(), strict=False):
        bars = None if errors is None else [2 * error for error in errors]
        ax.errorbar(steps.at, values, yerr=bars, color=look.colour, marker=look.marker, linestyle=look.dash, markersize=4.5,
                    linewidth=1.4, capsize=3, label=shortened(name))  # fmt: skip
    if steps.is_training:
        ax.set_xlabel("training step")
        ax.set_xscale("symlog", linthresh=min((at for at in steps.at if at > 0), default=1), linscale=0.5)
    else:
        ax.set_xlabel("checkpoint")
    many = len(steps.at) > 8
    ax.set_xticks(steps.at, steps.names, rotation=30 if many or not steps.is_training else 0,
                  ha="right" if many or not steps.is_training else "center")  # fmt: skip
    ax.minorticks_off()
    ax.grid(alpha=0.3)
    legend_above(ax, columns=3)
