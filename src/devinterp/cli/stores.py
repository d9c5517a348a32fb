"""Commands that read what is stored."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from devinterp.cli.options import JsonOption
from devinterp.cli.printing import (
    chains_of,
    estimates_of,
    print_chains,
    print_diagnosis,
    print_json,
    print_settings,
    print_summary,
    settings_of,
)
from devinterp.errors import DevinterpError


def show_command(
    store: Annotated[str, typer.Argument(help="Directory or URL of a store.")], *, as_json: JsonOption = False
) -> None:
    """Summarise a store: settings, chains, losses, LLC; of a sweep, the LLC of each run."""
    from devinterp.cli.sweeping import print_sweep, result_of
    from devinterp.slt.llc import compute_llc
    from devinterp.store.reader import open_store
    from devinterp.store.samples import root_of
    from devinterp.store.sweeps import is_sweep, open_sweep

    if is_sweep(store):
        tree = open_sweep(store)
        if as_json:
            print_json(result_of(tree, store))
        else:
            print_sweep(tree)
        return
    samples = open_store(store)
    root_of(samples)
    if not as_json:
        print_settings(samples)
        print_chains(samples)
    try:
        result = compute_llc(samples, on_diverged="drop")
    except DevinterpError as error:
        if as_json:
            told = {"settings": settings_of(samples), "chains": chains_of(samples), "no_llc": str(error)}
            print_json({"store": str(store), **told})
        else:
            typer.echo(f"no LLC: {error}")
        return
    if as_json:
        told = {"settings": settings_of(samples), "chains": chains_of(samples)}
        print_json({"store": str(store), **told, **estimates_of(samples, result)})
        return
    print_summary(samples, result)
    print_diagnosis(samples)


def diagnose_command(
    store: Annotated[str, typer.Argument(help="Directory or URL of a store.")], *, as_json: JsonOption = False
) -> None:
    """Say whether the chains of a store can be believed, why not, and what to change."""
    from devinterp.slt.diagnosis import describe, diagnose

    found = diagnose(store)
    if as_json:
        figures = {str(name): values.values.tolist() for name, values in found.data_vars.items() if "draw" not in values.dims}
        print_json({"store": str(store), **figures, **found.attrs})
        return
    typer.echo(describe(found))


def convert_command(
    store: Annotated[str, typer.Argument(help="Directory of a store, of this version or of devinterp 2.0.")],
    output: Annotated[Path, typer.Argument(help="New .nc or .parquet file; of a 2.0 store also a new .zarr store.")],
    *,
    as_json: JsonOption = False,
) -> None:
    """Write a store as NetCDF or Parquet, or one of devinterp 2.0 in today's layout. The store is left as it is."""
    from devinterp.slt.conversion import convert

    path = convert(store, output)
    size = sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())
    if as_json:
        print_json({"store": str(store), "output": str(path), "bytes": size})
        return
    typer.echo(f"{str(store)!r} as {str(path)!r} ({size / 1e6:.1f} MB)")


def report_command(
    runs: Annotated[list[Path], typer.Argument(help="A store, stores, or a folder of the stores of one sweep or suite.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The HTML file. An earlier report is replaced.")] = Path(
        "report.html"
    ),
    tokenizer: Annotated[str | None, typer.Option(help="Directory or hub id: shows tokens as text.")] = None,
    sampling_task: Annotated[
        str | None, typer.Option(help="Observable that holds sampling data, for susceptibilities of components.")
    ] = None,
    estimator: Annotated[str, typer.Option(help="Of susceptibilities: one_chain or two_chain.")] = "one_chain",
    sequences: Annotated[int, typer.Option(help="Sequences of each observable whose text is shown.")] = 4,
    title: Annotated[str | None, typer.Option(help="Of the page.  [default: the model's class]")] = None,
    as_json: JsonOption = False,
) -> None:
    """Write verdicts, charts, tables and texts of runs as one HTML file that opens without a network."""
    from devinterp.engine.origin import named
    from devinterp.slt.report import report

    decoder = None if tokenizer is None else named(tokenizer, "--tokenizer").tokenizer("--tokenizer")
    path = report(
        runs[0] if len(runs) == 1 else runs, output, tokenizer=decoder, sampling_task=sampling_task, estimator=estimator,
        sequences=sequences, title=title,
    )  # fmt: skip
    if as_json:
        print_json({"output": str(path), "bytes": path.stat().st_size})
        return
    typer.echo(f"report in {str(path)!r} ({path.stat().st_size / 2**20:.1f} MiB); open it with a browser")


def verify_command(
    store: Annotated[str, typer.Argument(help="Directory or URL of a store, or the folder of a sweep.")],
    *,
    as_json: JsonOption = False,
) -> None:
    """Compare every file of a store with what was written; exit code 1 where one differs."""
    from devinterp.store.verification import verify

    found = verify(store)
    if as_json:
        print_json({"store": str(store), **asdict(found)})
        raise typer.Exit(1 if found.damaged else 0)
    for file, of in found.damaged.items():
        typer.echo(f"damaged or missing: {file} ({of})")
    against = "its own checksum" if found.without_digests else "its digest"
    typer.echo(f"{found.checked} files of {store} compared with {against}: {len(found.damaged) or 'none'} damaged")
    if found.damaged:
        typer.echo("The call that made the store computes again what is damaged, and nothing else.")
        raise typer.Exit(1)
