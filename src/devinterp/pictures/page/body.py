"""The sections of a report."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from devinterp.pictures.page.html import Raw, joined, table, tag

Values = Mapping[str, Any]

FOOT = "LLCs depend on n_beta and localization: compare them at one setting only. This file opens no connection."
CORRELATION = (
    "Correlation between the losses of two sequences under the posterior: they rise and fall together where they use the same "
    "weights. The standard error of one entry is about 1 / sqrt(number of independent draws). Sequences with the tokens of an "
    "earlier one are left out."
)
PAIRS = "The strongest pairs of tokens among the sequences whose text is shown."


def body(title: str, subtitle: str, values: Values, facts: Sequence[tuple[str, Any]], settings: Sequence[tuple[str, Any]],
         notes: Sequence[str]) -> Raw:  # fmt: skip
    """All sections that there is something for."""
    many = len(values["checkpoints"]) > 1
    components = any(run["restriction"] != values["full"] for run in values["runs"])
    sections = [
        ("verdicts", "Verdicts", [verdicts(values, notes)]),
        ("what", "What was run", [definitions(facts), tag("h3", "Settings"), definitions(settings, "two")]),
        ("runs", "Runs", [runs_table(values["runs"], values["full"])]),
        ("checkpoints", "LLC over checkpoints", llc_charts(components)) if many else None,
        ("chains", "Chains", chains()),
        ("text", "Text", texts(values)) if any(values["texts"]) else None,
        ("influences", "Influences", influences(values)) if any(values["influences"]) else None,
        ("components", "Components", component_charts(values)) if components else None,
    ]
    there = [section for section in sections if section is not None]
    links = [tag("a", name, href=f"#{id_}") for id_, name, _ in there]
    head = tag("header", tag("h1", title), tag("p", subtitle, class_="soft"))
    nav = tag("nav", tag("div", *links, tag("button", "light / dark", type="button", id="theme")))
    shown = [tag("section", tag("h2", name), *parts, id=id_) for id_, name, parts in there]
    foot = tag("footer", tag("p", FOOT))
    return Raw(joined([head, nav, tag("main", *shown), foot, tag("div", id="tip", role="status", hidden="")]))


def definitions(rows: Sequence[tuple[str, Any]], class_: str | None = None) -> Raw:
    return tag("dl", *[part for name, value in rows for part in (tag("dt", name), tag("dd", value))], class_=class_)


def verdicts(values: Values, notes: Sequence[str]) -> Raw:
    """In sentences: how many runs can be believed, and what is wrong with the others."""
    runs = values["runs"]
    if len(runs) == 1:
        return tag("ul", *[tag("li", line) for line in (*runs[0]["sentences"], *notes)])
    sick = [run for run in runs if set(run["verdicts"]) != {"healthy"}]
    count = f"{len(runs) - len(sick)} of {len(runs)} runs are" if sick else f"All {len(runs)} runs are"
    first = f"{count} healthy: their chains are level, without spikes, and agree." + (f" {len(sick)} are not:" if sick else "")
    if len(sick) == len(runs):
        first = f"None of {len(runs)} runs is healthy:"
    lines = [_told(verdict, advice, of) for (verdict, advice), of in _complaints(sick).items()]
    whole = [run for run in runs if run["restriction"] == values["full"] and math.isfinite(run["llc"])]
    trend = []
    if len(whole) > 1:
        low, high = min(whole, key=lambda run: run["llc"]), max(whole, key=lambda run: run["llc"])
        ends = " and ".join(f"{run['llc']:.4g} ± {run['sem']:.2g} at {run['name']}" for run in (low, high))
        trend = [tag("p", f"The LLC of the whole model lies between {ends}.")]
    return Raw(joined([*trend, tag("p", first), tag("ul", *lines) if lines else Raw(""), *[tag("p", note) for note in notes]]))


def _complaints(runs: Sequence[Values]) -> dict[tuple[str, str], list[tuple[str, str]]]:
    """(verdict, advice) -> the runs that it is said of, each with its chains and the reason."""
    found: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for run in runs:
        chains: dict[tuple[str, str, str], list[int]] = {}
        for chain, what in enumerate(zip(run["verdicts"], run["advice"], run["reasons"], strict=True)):
            if what[0] != "healthy":
                chains.setdefault(what, []).append(chain)
        count = len(run["verdicts"])
        for (verdict, advice, reason), which in chains.items():
            who = "all chains" if len(which) == count > 1 else f"chain{'s' * (len(which) > 1)} {', '.join(map(str, which))}"
            found.setdefault((verdict, advice), []).append((run["name"], f"{who} ({reason})"))
    return found


def _told(verdict: str, advice: str, of: Sequence[tuple[str, str]]) -> Raw:
    """One complaint: of a run in a sentence, of several with a list that opens."""
    fix = f" Try {advice}." if advice else ""
    names = list(dict.fromkeys(name for name, _ in of))
    if len(of) == 1:
        ((name, why),) = of
        return tag("li", tag("b", name), f": {verdict}, {why}.{fix}")
    where = tag("ul", *[tag("li", tag("b", name), f": {why}") for name, why in of])
    shown = names[0] if len(names) == 1 else f"{len(names)} runs"
    return tag("li", tag("b", shown), f": {verdict}.{fix}", tag("details", tag("summary", "Which chains, and why"), where))


def runs_table(runs: Sequence[Values], full: str) -> Raw:
    """One row for each run; a click shows its chains."""
    columns = ["checkpoint", "component", "LLC", "± s.e.", "verdict", "R-hat", "ESS", "loss (nats)", "step size lr"]
    rows = []
    for run in runs:
        bad = [verdict for verdict in dict.fromkeys(run["verdicts"]) if verdict != "healthy"]
        told = ", ".join(bad) or "healthy"
        verdict = (told, tag("span", told, class_="sick" if bad else "healthy"))
        component = "whole model" if run["restriction"] == full else run["restriction"]
        estimate = [
            _number(run["llc"], 4),
            _number(run["sem"], 2),
            verdict,
            _number(run["rhat"], 3, "f"),
            _number(run["ess"], 3),
        ]
        rows.append([run["checkpoint"], component, *estimate, _number(run["loss"], 4), _number(run["lr"], 3)])
    caption = (
        "LLC (dimensionless) on the sampling data with its standard error. Click a heading to sort, a row to see its chains."
    )
    return table(columns, rows, caption, data_run=list(range(len(runs))))


def _number(value: float, digits: int, form: str = "g") -> tuple[float, str]:
    return value, "not known" if math.isnan(value) else f"{value:.{digits}{form}}"


def llc_charts(components: bool) -> list[Raw]:
    of_whole = "The LLC of the whole model, on the sampling data and on each observable. Click the legend to single out a line."
    parts = [tag("p", of_whole), chart("llc-whole")]
    if components:
        of_part = "The LLC where only the weights of one component move, on the sampling data."
        parts += [tag("h3", "Components"), tag("p", of_part), chart("llc-components")]
    return parts


def chains() -> list[Raw]:
    band = tag("p", "The grey band is the LLC of all chains with two standard errors.", class_="soft")
    return [choices(run="run"), tag("ul", id="run-sentences"), chart("traces"), band]


def chart(id_: str) -> Raw:
    return tag("div", id=id_, class_="chart")


def choices(**labels: str) -> Raw:
    """Select elements by id (with "-" for "_"); the page fills them."""
    made = [tag("label", label, tag("select", id=id_.replace("_", "-"))) for id_, label in labels.items()]
    return tag("div", *made, class_="choices")


def texts(values: Values) -> list[Raw]:
    low, high = values["colours"]
    gradient = f"background: linear-gradient(to right, {low}cd, transparent, {high}cd)"
    scale = [
        tag("span", id="text-scale-low"),
        tag("i", style=gradient),
        tag("span", id="text-scale-high"),
        tag("span", id="text-unit"),
    ]
    told = "Each token on the colour of its value. Point at a token to read it"
    if any(found is not None and found["tokens"] for found in values["influences"]):
        told += "; click one to see which tokens' losses move with its own"
    chosen = choices(text_checkpoint="checkpoint", text_measure="colour", text_observable="observable")
    return [tag("p", told + "."), chosen, tag("div", *scale, class_="scale"), tag("div", id="texts")]


def influences(values: Values) -> list[Raw]:
    pairs = [(at, pair) for at, found in enumerate(values["influences"]) if found is not None for pair in found["pairs"]]
    rows = [[(pair["value"], f"{pair['value']:+.3f}"), *map(_side, pair["sides"])] for _, pair in pairs]
    strongest = table(["correlation", "token", "other token"], rows, PAIRS, data_at=[at for at, _ in pairs])
    chosen = choices(influence_checkpoint="checkpoint", influence_order="order")
    return [tag("p", CORRELATION), chosen, chart("influence-chart"), tag("div", strongest, id="pairs")]


def _side(side: Values) -> tuple[str, Raw]:
    """A token in its context, and where it is."""
    place = f"{side['observable']} {side['sequence']}:{side['position']}"
    parts = [tag("span", side["before"], class_="before"), tag("mark", side["token"]), " ", tag("span", place, class_="soft")]
    return place, Raw(joined(parts))


def component_charts(values: Values) -> list[Raw]:
    parts = [
        choices(component_checkpoint="checkpoint"),
        tag("p", id="component-note", class_="soft"),
        tag("h3", "Responses"),
        tag("p", "Mean susceptibility of each component to each observable, in standard deviations over all tokens."),
        chart("responses"),
        tag("h3", "Matrix"),
        tag("p", "Mean susceptibility of each component (rows) to each sequence (columns)."),
        chart("by-sequence"),
        tag("h3", "Tokens on principal components"),
        choices(point_kind="colour"),
        tag("p", id="point-note", class_="soft"),
        chart("points"),
    ]
    return parts if any(isinstance(found, dict) for found in values["responses"]) else parts[:2]
