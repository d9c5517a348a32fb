"""What all pictures share: axes, colours that colour blindness and print leave apart, legends, limits of colour scales."""

import itertools
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from devinterp.errors import InputTypeError, InputValueError, PackageMissing, got

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000", "#7F7F7F")
"""Okabe and Ito (2008) without its yellow, which paper swallows"""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)), (0, (3, 1.5)), (0, (8, 3)), "-", "-")
HATCHES = ("", "///", "...", "xxx", "\\\\\\", "++", "oo", "**")
NEGATIVE, MIDDLE, POSITIVE = "#D55E00", "#FFFFFF", "#0072B2"
"""of values with a sign, in pictures and reports"""


@dataclass(frozen=True)
class Look:
    """How one line, set of points or group of bars looks: no two by colour alone."""

    colour: str
    marker: str
    dash: Any
    hatch: str


def looks() -> Iterator[Look]:
    """One after another, from the beginning again after the last colour with the markers moved on by one."""
    for turn in itertools.count():
        for number, colour in enumerate(COLOURS):
            other = (number + turn) % len(COLOURS)
            yield Look(colour, MARKERS[other], DASHES[other], HATCHES[other])


def axes_of(ax: "Axes | None", size: tuple[float, float]) -> "Axes":
    """The axes given, or those of a new figure of pyplot, which notebooks show by themselves."""
    try:
        from matplotlib import pyplot
        from matplotlib.axes import Axes
    except ImportError as error:
        raise PackageMissing("matplotlib", "a picture", "'devinterp[plots]'") from error
    if ax is None:
        _, ax = pyplot.subplots(figsize=size, layout="constrained")
    if not isinstance(ax, Axes):
        raise InputTypeError(got("ax", ax, "an Axes of matplotlib, or None", "Try: figure, ax = pyplot.subplots()."))
    return ax


def diverging(behind_text: bool = False) -> "Colormap":
    """Orange below zero, white at zero, blue above; grey where there is no value. The lighter one is for black letters."""
    from matplotlib.colors import LinearSegmentedColormap

    light, dark = ["#E58A3C", MIDDLE, "#4FA3D1"], ["#A04000", NEGATIVE, MIDDLE, POSITIVE, "#004A75"]
    colours = LinearSegmentedColormap.from_list("devinterp", light if behind_text else dark)
    return colours.with_extremes(bad="#BFBFBF")


def sequential() -> "Colormap":
    """From dark to light, with the order of the values kept in grey."""
    from matplotlib import colormaps

    return colormaps["cividis"].with_extremes(bad="#BFBFBF")


def limit_of(values: npt.NDArray[Any], share: float = 0.99) -> float:
    """Of a colour scale around zero: nearly all values lie within it, so that a few extreme ones do not bleach the rest."""
    sizes = np.abs(values[np.isfinite(values)])
    return float(np.quantile(sizes, share)) or float(sizes.max()) or 1.0 if sizes.size else 1.0


def check_one_run(argument: str, dims: Iterable[Hashable], expected: set[str]) -> None:
    """Refuse a table of many runs where one is drawn."""
    if more := sorted(str(dim) for dim in dims if dim not in expected):
        fix = f"Choose one, as in .sel({more[0]}=...)."
        raise InputValueError(got(argument, more, f"of one run, over {sorted(expected)}", fix))


def legend_above(ax: "Axes", columns: int = 2, scale: float = 1.0) -> None:
    """Over the axes, where it hides nothing."""
    ax.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=columns, markerscale=scale, frameon=False, fontsize="small",
              borderaxespad=0.2)  # fmt: skip


def shortened(text: str, longest: int = 40) -> str:
    """Of bounded length, in the middle of which something may be left out, without control characters; `$` is no formula."""
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    text = text if len(text) <= longest else text[: longest // 2] + "…" + text[-(longest // 2 - 1) :]
    return text.replace("$", r"\$")
