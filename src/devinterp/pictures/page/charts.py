"""Charts of a report, as Vega-Lite made by Altair. They hold no data and no text of the user: rows are put in by the page.

A name from a store reaches a chart as a value of a row, never as part of an expression or of a field's name.
"""

from typing import Any

from devinterp.errors import PackageMissing
from devinterp.pictures.style import COLOURS, NEGATIVE, POSITIVE

SHAPES = ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "triangle-right")
DASHES = ([1, 0], [6, 3], [2, 2], [8, 3, 2, 3], [4, 2], [10, 4], [1, 3])
"""One fewer than colours, so that the ninth series has the first one's colour and another shape"""
LEGEND: dict[str, Any] = {"orient": "top", "title": None, "columns": 6, "labelLimit": 160, "symbolOpacity": 1}
TWO_ERRORS = "± 2 standard errors"


def altair() -> Any:
    try:
        import altair as alt
    except ImportError as error:
        raise PackageMissing("Altair", "a report", "'devinterp[report]'") from error
    return alt


def script() -> str:
    """Vega, Vega-Lite and Vega-Embed, as one script."""
    try:
        import vl_convert
    except ImportError as error:
        raise PackageMissing("vl-convert-python", "a report", "'devinterp[report]'") from error
    bundle: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    return bundle


def specifications() -> dict[str, dict[str, Any]]:
    """All charts by name."""
    made = {
        "checkpoints": checkpoints(True),
        "checkpoints by name": checkpoints(False),
        "traces": traces(),
        "influences": influences(),
        "responses": responses(),
        "sequences": by_sequence(),
        "points": points(),
    }
    charts = {}
    for name, chart in made.items():
        charts[name] = chart.to_dict()
        charts[name].pop("$schema")
        charts[name].pop("config", None)  # the page's, by its colours
        charts[name]["autosize"] = {"type": "fit-x", "contains": "padding"}
    return charts


def _base() -> Any:
    alt = altair()
    return alt.Chart(alt.NamedData(name="rows"), width="container")


def _series(field: str, lines: bool = False) -> dict[str, Any]:
    """Encodings that tell series apart, by colour and by something else; legends of equal form become one."""
    alt = altair()
    legend = alt.Legend(**LEGEND)
    found = {"color": alt.Color(f"{field}:N", sort=None, scale=alt.Scale(range=list(COLOURS)), legend=legend)}
    if lines:
        return found | {"strokeDash": alt.StrokeDash(f"{field}:N", sort=None, scale=alt.Scale(range=DASHES), legend=legend)}
    return found | {"shape": alt.Shape(f"{field}:N", sort=None, scale=alt.Scale(range=list(SHAPES)), legend=legend)}


def _signed(field: str, title: str) -> Any:
    """Colour of values around zero; the page sets the limits."""
    alt = altair()
    scale = alt.Scale(range=[NEGATIVE, "#FFFFFF", POSITIVE], domainMid=0, clamp=True, interpolate="rgb")
    return alt.Color(f"{field}:Q", scale=scale, legend=alt.Legend(title=title, gradientLength=160))


def _tips(**fields: tuple[str, str] | str) -> list[Any]:
    """field=title of names, field=(title, format) of numbers."""
    alt = altair()
    return [
        alt.Tooltip(f"{field}:N", title=what)
        if isinstance(what, str)
        else alt.Tooltip(f"{field}:Q", title=what[0], format=what[1])
        for field, what in fields.items()
    ]


def checkpoints(is_training: bool) -> Any:
    """Rows: at, series, llc, low, high, sem, loss, name."""
    alt = altair()
    chosen = alt.selection_point(fields=["series"], bind="legend", name="chosen")
    if is_training:  # the page sets the steps that are marked
        x = alt.X("at:Q", title="training step", scale=alt.Scale(type="symlog"), axis=alt.Axis(values=[], format=",d"))
    else:
        x = alt.X("name:N", title="checkpoint", sort=None, axis=alt.Axis(labelLimit=140, labelAngle=-30))
    y = alt.Y("llc:Q", title=f"LLC (dimensionless), {TWO_ERRORS}", scale=alt.Scale(zero=False))
    base = (
        _base()
        .transform_calculate(look="datum.series")
        .encode(x=x, opacity=alt.condition(chosen, alt.value(1), alt.value(0.12)))
    )
    series = _series("series")
    # by another name, since dashes in the legend would tear its shapes
    dashed = alt.StrokeDash("look:N", sort=None, scale=alt.Scale(range=DASHES), legend=None)
    tips = _tips(name="checkpoint", series="of", llc=("LLC", ".4"), sem=("standard error", ".2"), loss=("loss (nats)", ".4"))
    line = base.mark_line().encode(y=y, color=series["color"], strokeDash=dashed)
    bars = base.mark_rule().encode(y=alt.Y("low:Q", title=""), y2="high:Q", color=series["color"])
    dots = base.mark_point(filled=True, size=60).encode(y=y, tooltip=tips, **series)
    return (line + bars + dots).add_params(chosen).properties(height=320)


def traces() -> Any:
    """Rows: draw, chain, value, running, nats, low, high."""
    alt = altair()
    chosen = alt.selection_point(fields=["chain"], bind="legend", name="chosen")
    seen, faint = (alt.condition(chosen, alt.value(most), alt.value(least)) for most, least in ((1, 0.06), (0.4, 0.03)))
    x = alt.X("draw:Q", title="draw (thin: the trace; thick: its mean so far)", scale=alt.Scale(nice=False, domainMin=1),
              axis=alt.Axis(tickCount=10))  # fmt: skip
    title = ["n_beta (loss - loss at checkpoint)", "its mean: the LLC (dimensionless)"]
    y = alt.Y("value:Q", title=title, scale=alt.Scale(zero=False))
    base = _base().encode(x=x)
    looks = _series("chain", lines=True)
    band = _base().mark_rect(opacity=0.15, color="grey").encode(y=alt.Y("min(low):Q", title=""), y2="max(high):Q")
    thin = base.mark_line(strokeWidth=0.7).encode(y=y, opacity=faint, color=looks["color"])
    thick = base.mark_line(strokeWidth=2.2).encode(y="running:Q", opacity=seen, **looks)
    tips = _tips(chain="chain", draw=("draw", "d"), value=("trace", ".4"), running=("LLC so far", ".4"),
                 nats=("loss above the checkpoint's (nats)", ".3"))  # fmt: skip
    dots = base.mark_point(size=40, filled=True, opacity=0).encode(y=y, tooltip=tips)
    return (band + thin + thick + dots).add_params(chosen).properties(height=300)


def influences() -> Any:
    """Rows: row, column, and of cells value, first, second, clusters; of the strips at the edges group."""
    alt = altair()
    blank = alt.Axis(labels=False, ticks=False, domain=False)
    x = alt.X("column:O", title="sequence", axis=blank, scale=alt.Scale(padding=0))
    y = alt.Y("row:O", title="sequence", axis=blank, scale=alt.Scale(padding=0))
    base = _base().mark_rect().encode(x=x, y=y)
    tips = _tips(value=("correlation", "+.3"), first="one", second="other", clusters="clusters")
    cells = base.transform_filter("isValid(datum.value)").encode(color=_signed("value", "correlation"), tooltip=tips)
    strips = base.transform_filter("isValid(datum.group)").encode(color=_series("group")["color"], tooltip=_tips(group="group"))
    return (cells + strips).resolve_scale(color="independent").properties(height=520)


def responses() -> Any:
    """Rows: component, observable, mean, low, high, sem. The page sets the height, by the number of bars."""
    alt = altair()
    y = alt.Y("component:N", sort=None, title="component", axis=alt.Axis(labelLimit=160))
    base = _base().encode(y=y, yOffset=alt.YOffset("observable:N", sort=None))
    title = ["mean susceptibility (z-score)", f"negative: expression; {TWO_ERRORS}"]
    tips = _tips(component="component", observable="observable", mean=("mean (z-score)", "+.3"), sem=("standard error", ".2"))
    bars = base.mark_bar(opacity=0.85).encode(
        x=alt.X("mean:Q", title=title, axis=alt.Axis(tickCount=8)), color=_series("observable")["color"], tooltip=tips
    )
    errors = base.mark_rule(strokeWidth=1.4, color="grey").encode(x=alt.X("low:Q", title=""), x2="high:Q")
    return bars + errors


def by_sequence() -> Any:
    """Rows: at, component, and of cells name, value; of the strip below group. The page sets the height."""
    alt = altair()
    blank = alt.Axis(labels=False, ticks=False, domain=False)
    x = alt.X("at:O", title="sequence", axis=blank, scale=alt.Scale(padding=0))
    y = alt.Y("component:N", sort=None, title="component", scale=alt.Scale(padding=0), axis=alt.Axis(labelLimit=160))
    base = _base().mark_rect().encode(x=x, y=y)
    tips = _tips(component="component", name="sequence", value=("susceptibility (z-score)", "+.3"))
    cells = base.transform_filter("isValid(datum.value)").encode(color=_signed("value", "z-score"), tooltip=tips)
    strip = base.transform_filter("isValid(datum.group)").encode(
        color=_series("group")["color"], tooltip=_tips(group="observable")
    )
    return (cells + strip).resolve_scale(color="independent")


def points() -> Any:
    """Rows: x, y, kind, observable, text."""
    alt = altair()
    chosen = alt.selection_point(fields=["kind"], bind="legend", name="chosen")
    tips = _tips(text="token, in its context", kind="kind", observable="observable", x=("first", "+.3"), y=("second", "+.3"))
    x, y = (
        axis(
            f"{field}:Q",
            title=f"{name} principal component (z-scores)",
            scale=alt.Scale(zero=False),
            axis=alt.Axis(tickCount=8),
        )
        for axis, field, name in ((alt.X, "x", "first"), (alt.Y, "y", "second"))
    )
    seen = alt.condition(chosen, alt.value(0.6), alt.value(0.04))
    made = _base().mark_point(filled=True, size=26).encode(x=x, y=y, opacity=seen, tooltip=tips, **_series("kind"))
    return made.add_params(chosen).interactive(name="view").properties(height=460)
