"""Influences and susceptibilities in a few numbers with their text: as plain values, and as tables."""

from typing import TYPE_CHECKING, Any

import typer

from devinterp.cli.printing import print_table

if TYPE_CHECKING:
    import numpy as np
    import xarray as xr


def means_between(result: "xr.Dataset") -> dict[str, dict[str, float]]:
    """Mean influence within and between observables, a sequence with itself left out."""
    import numpy as np

    names, starts = zip(*result.attrs["observables"].items(), strict=True)
    owner = np.searchsorted(starts, np.arange(result.sizes["batch_1"]), side="right") - 1
    values = np.where(np.eye(len(owner), dtype=bool), np.nan, result.influences.values)
    of = {name: owner == i for i, name in enumerate(names)}
    return {one: {other: float(np.nanmean(values[of[one]][:, of[other]])) for other in names} for one in names}


def print_means(means: dict[str, dict[str, float]]) -> None:
    typer.echo("\nmean correlation between the losses of two sequences")
    rows = [("", *means)]
    rows += [(f"  {name}", *(f"{mean:+.3f}" for mean in of.values())) for name, of in means.items()]
    print_table(rows)


def pairs_of(strongest: "xr.Dataset", tokenizer: Any) -> list[dict[str, Any]]:
    """The pairs of a result with `top_k`, each side by its text."""
    pairs = [strongest.isel(pair=pair) for pair in range(strongest.sizes["pair"])]
    return [
        {"influence": float(pair.influences), **{name: _text(tokenizer, strongest, pair, side) for name, side in SIDES.items()}}
        for pair in pairs
    ]


SIDES = {"first": "1", "second": "2"}


def print_pairs(pairs: list[dict[str, Any]]) -> None:
    for pair in pairs:
        typer.echo(f"  {pair['influence']:+.3g}  {pair['first']}  ~  {pair['second']}")


def _text(tokenizer: Any, result: "xr.Dataset", one: "xr.Dataset", side: str) -> str:
    """A sequence by its beginning; a token with what stands before it."""
    sequence = int(one[f"batch_{side}"])
    name, start = max(((n, s) for n, s in result.attrs["observables"].items() if s <= sequence), key=lambda item: item[1])
    ids, sequence = result.input_ids.values[sequence], sequence - start
    position = f"target_position{'' if side == '1' else '_T'}"
    if position not in one:
        return f"{name} {sequence} {tokenizer.decode(ids[:12])!r}"
    at = int(one[position])
    return f"{name} {sequence}:{at} {tokenizer.decode(ids[max(0, at - 6) : at])!r} [{tokenizer.decode(ids[at : at + 1])!r}]"


def responses_of(tree: "xr.DataTree", tokenizer: Any) -> list[dict[str, Any]]:
    """Of each component: its mean susceptibility to each observable, and the token that it expresses most."""
    sus, context = tree["susceptibilities"].to_dataset(), tree["context"].to_dataset()
    found = []
    for wr in sus.wr.values:
        values = sus.sus.sel(wr=wr).values
        means = {
            name: float(values[sus.dataset_id.values == number].mean())
            for number, name in enumerate(sus.attrs["dataset_id_to_name"])
        }
        token = _token(sus, context, tokenizer, int(values.argmin()))
        found.append({"component": str(wr), "means": means, "most_expressed": token})
    return found


def print_responses(responses: list[dict[str, Any]], raw: bool) -> None:
    typer.echo("\nmean susceptibility" + (" (nats squared)" if raw else " (z-scores of each component)"))
    cells = [
        (f"  {one['component']}", *(f"{mean:+.3g}" for mean in one["means"].values()), one["most_expressed"])
        for one in responses
    ]
    print_table([("", *responses[0]["means"], "most expressed token"), *cells])


def _token(sus: "xr.Dataset", context: "xr.Dataset", tokenizer: Any, row: int) -> str:
    where = (context.dataset_id.values == sus.dataset_id.values[row]) & (context.batch.values == sus.batch.values[row])
    ids: np.ndarray[Any, Any] = context.input_ids.values[where]
    at = int(sus.target_position.values[row])
    return f"{tokenizer.decode(ids[max(0, at - 4) : at])!r} [{tokenizer.decode(ids[at : at + 1])!r}]"
