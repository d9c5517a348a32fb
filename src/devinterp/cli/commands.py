"""One function per command: thin over the public calls."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from devinterp.cli.inputs import load_model, load_tokenizer
from devinterp.cli.options import CHOSEN, Job, sampling_command
from devinterp.cli.printing import print_chains, print_diagnosis, print_settings, print_summary, print_table
from devinterp.errors import DevinterpError, InputValueError, got

if TYPE_CHECKING:
    import numpy as np
    import xarray as xr

SaveOption = Annotated[Path | None, typer.Option(help="Also write the result to this new Zarr store.")]


@sampling_command
def llc_command(job: Job) -> None:
    """Sample around a checkpoint and print its local learning coefficient."""
    from devinterp.slt.llc import compute_llc
    from devinterp.slt.sampling import sample

    path = job.path("llc")
    samples = sample(job.model, job.dataset, job.observables, output_path=path, device=job.device, **job.settings)
    print_summary(samples, compute_llc(samples))
    print_diagnosis(samples)
    typer.echo(f"\nsaved in {str(path)!r}: losses at every draw and all settings. Look again with devinterp show.")


def show_command(store: Annotated[Path, typer.Argument(help="Directory of a store.")]) -> None:
    """Summarise a store: settings, chains, losses, LLC; of a sweep, the LLC of each run."""
    from devinterp.cli.sweeping import print_sweep
    from devinterp.slt.llc import compute_llc
    from devinterp.store.reader import open_store
    from devinterp.store.samples import root_of
    from devinterp.store.sweeps import is_sweep, open_sweep

    if is_sweep(store):
        print_sweep(open_sweep(store))
        return
    samples = open_store(store)
    root_of(samples)
    print_settings(samples)
    print_chains(samples)
    try:
        result = compute_llc(samples, on_diverged="drop")
    except DevinterpError as error:
        typer.echo(f"no LLC: {error}")
        return
    print_summary(samples, result)
    print_diagnosis(samples)


def diagnose_command(store: Annotated[Path, typer.Argument(help="Directory of a store.")]) -> None:
    """Say whether the chains of a store can be believed, why not, and what to change."""
    from devinterp.slt.diagnosis import describe, diagnose

    typer.echo(describe(diagnose(store)))


@sampling_command
def calibrate_command(
    job: Job,
    *,
    accuracy: Annotated[float, typer.Option(help="Relative standard error of the LLC that is aimed at.")] = 0.03,
    max_steps: Annotated[int, typer.Option(help="Longest burn-in of a pilot.")] = 1000,
    largest_excess: Annotated[float | None, typer.Option(help="Rise of the loss that is still local, in nats.")] = None,
    save: Annotated[Path, typer.Option(help="TOML file for the settings found, to be given as --config.")] = Path(
        "calibrated.toml"
    ),
) -> None:
    """Find settings for a model by short pilot chains, with reasons, and write them to a file for --config."""
    from devinterp.slt.calibration import calibrate

    if save.exists():
        raise InputValueError(got("--save", str(save), "a new file", "Choose another name."))
    given = {name: value for name, value in job.given.items() if value is not None}
    options = {"accuracy": accuracy, "max_steps": max_steps, "largest_excess": largest_excess, "device": job.device}
    found = calibrate(job.model, job.dataset, **{"n_beta": CHOSEN["n_beta"]} | given | options)
    typer.echo(f"\n{found}")
    lines = [
        f"{name} = {json.dumps(value)}" for name, value in found.settings.items() if name != "device" and value is not None
    ]
    save.write_text("\n".join(lines) + "\n")
    typer.echo(f"\nsettings in {str(save)!r}; take them with: devinterp llc MODEL --data DATA --config {str(save)!r}")


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
) -> None:
    """Write verdicts, charts, tables and texts of runs as one HTML file that opens without a network."""
    from devinterp.slt.report import report

    decoder = None if tokenizer is None else load_tokenizer(tokenizer)
    path = report(
        runs[0] if len(runs) == 1 else runs, output, tokenizer=decoder, sampling_task=sampling_task, estimator=estimator,
        sequences=sequences, title=title,
    )  # fmt: skip
    typer.echo(f"report in {str(path)!r} ({path.stat().st_size / 2**20:.1f} MiB); open it with a browser")


def verify_command(store: Annotated[Path, typer.Argument(help="Directory of a store.")]) -> None:
    """Compare every file of a store with what was written; exit code 1 where one differs."""
    from devinterp.store.verification import verify

    found = verify(store)
    for file, of in found.damaged.items():
        typer.echo(f"damaged or missing: {file} ({of})")
    against = "its own checksum" if found.without_digests else "its digest"
    typer.echo(f"{found.checked} files of {store} compared with {against}: {len(found.damaged) or 'none'} damaged")
    if found.damaged:
        typer.echo("The call that made the store computes again what is damaged, and nothing else.")
        raise typer.Exit(1)


@sampling_command
def bif_command(
    job: Job,
    *,
    method: Annotated[str, typer.Option(help="Influence between: token or sequence.")] = "sequence",
    covariance: Annotated[bool, typer.Option(help="Covariances instead of correlations.")] = False,
    top: Annotated[int, typer.Option(help="How many of the strongest pairs to print.")] = 20,
    save: SaveOption = None,
) -> None:
    """Sample around a checkpoint and print which sequences or tokens influence each other most."""
    from devinterp.slt.bif import compute_bif, sample_for
    from devinterp.slt.bif_blocks import Options

    options: dict[str, Any] = {"correlation_method": method, "compute_covariance": covariance}
    Options(**options, top_k=top)
    checked = Options(**options, output_path=save)
    _need_observables(job, "--observable code=code.txt")
    path = job.path("bif")
    samples = sample_for(
        checked if save is not None else Options(**options, top_k=top),
        job.model, job.dataset, job.observables, output_path=path, device=job.device, **job.settings,
    )  # fmt: skip
    _print_between_observables(compute_bif(samples, correlation_method="sequence"))
    strongest = compute_bif(samples, top_k=top, **options)
    measure = strongest.attrs["measure"]
    typer.echo(f"\nstrongest pairs of {method}s ({measure})")
    for pair in range(strongest.sizes["pair"]):
        one = strongest.isel(pair=pair)
        texts = [_text(job.tokenizer, strongest, one, side) for side in ("1", "2")]
        typer.echo(f"  {float(one.influences):+.3g}  {texts[0]}  ~  {texts[1]}")
    if save is not None:
        compute_bif(samples, output_path=save, **options)
        typer.echo(f"\ninfluences in {str(save)!r}")
    typer.echo(f"\nsamples in {str(path)!r}; from Python: devinterp.compute_bif({str(path)!r})")


@sampling_command
def susceptibilities_command(
    job: Job,
    *,
    components: Annotated[
        str, typer.Option(help="heads, groups, attn, mlp or layers; or names as in 'l0h1,l0 mlp'.")
    ] = "heads",
    estimator: Annotated[str, typer.Option(help="two_chain or one_chain.")] = "two_chain",
    raw: Annotated[bool, typer.Option(help="Do not standardise (raw values are not comparable across components).")] = False,
    save: SaveOption = None,
) -> None:
    """Sample once per component and print how each responds to the observables. Go on with the same command."""
    from devinterp.slt.requests import path_of_run
    from devinterp.slt.susceptibilities import check_options, susceptibilities
    from devinterp.store.matrices import check_new_path

    check_options(estimator, not raw, None, True, "raise")
    if save is not None:
        check_new_path(save)
    _need_observables(job, "--observable code=code.txt")
    path = job.path("susceptibilities")
    tree = susceptibilities(
        job.model, job.dataset, {"data": job.dataset, **job.observables}, restrictions_of(job.model, components),
        sampling_task="data", include_sampling_task=True,
        estimator=estimator, standardize=not raw, output_path=path, device=job.device, **job.settings,
    )  # fmt: skip
    _print_susceptibilities(tree, job.tokenizer, raw)
    sus_names = tree["susceptibilities"].wr.values.tolist()
    if save is not None:
        tree.to_zarr(save, consolidated=False)
        typer.echo(f"\nsusceptibilities in {str(save)!r}")
    example = path_of_run(path, sus_names[0])
    typer.echo(f"\nsamples in {str(example)!r} and its like; the same command goes on where it stopped")


def components_command(
    model: Annotated[str, typer.Argument(help="Directory of a Hugging Face causal language model, or a hub id.")],
    restriction: Annotated[str | None, typer.Argument(help="Show what this selects, for example 'l0h1'.")] = None,
    revision: Annotated[str | None, typer.Option(help="Revision of a hub model.")] = None,
) -> None:
    """List the components of a model, or show the weights of one."""
    from devinterp.engine.discovery import structure
    from devinterp.engine.discovery.listing import inventory
    from devinterp.slt.weight_restrictions import create_param_masks, preview_weight_restriction

    loaded, _ = load_model(model, revision)
    if restriction is not None:
        preview_weight_restriction(loaded, create_param_masks(loaded, restriction))
        return
    total = sum(p.numel() for p in loaded.parameters())
    rows = [("component", "weights", "share")]
    rows += [(name, f"{count:,}", f"{count / total:.2%}") for name, count in inventory(loaded, structure(loaded))]
    print_table(rows)
    typer.echo(f"\n{total:,} weights in all. Show one with: devinterp components MODEL l0h0")


def _need_observables(job: Job, example: str) -> None:
    if not job.sources:
        raise InputValueError(got("--observable", "none", "at least one NAME=DATA", f"Try {example}."))


def restrictions_of(model: Any, components: str, option: str = "--components") -> dict[str, Any]:
    """The whole model, and a restriction for every component named."""
    from devinterp.engine.discovery import structure
    from devinterp.engine.discovery.listing import KINDS, component_names

    if components in KINDS:
        names = component_names(structure(model), components)
        if not names:
            fix = "Look at: devinterp components MODEL."
            raise InputValueError(got(option, components, "something that the model has", fix))
    else:
        names = [name.strip() for name in components.split(",") if name.strip()]
    return {"full": None, **{name: name for name in names}}


def _print_between_observables(result: "xr.Dataset") -> None:
    """Mean influence within and between observables, a sequence with itself left out."""
    import numpy as np

    names, starts = zip(*result.attrs["observables"].items(), strict=True)
    owner = np.searchsorted(starts, np.arange(result.sizes["batch_1"]), side="right") - 1
    values = np.where(np.eye(len(owner), dtype=bool), np.nan, result.influences.values)
    typer.echo("\nmean correlation between the losses of two sequences")
    rows = [("", *names)]
    for i, name in enumerate(names):
        rows.append((f"  {name}", *(f"{np.nanmean(values[owner == i][:, owner == j]):+.3f}" for j in range(len(names)))))
    print_table(rows)


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


def _print_susceptibilities(tree: "xr.DataTree", tokenizer: Any, raw: bool) -> None:
    sus, context = tree["susceptibilities"].to_dataset(), tree["context"].to_dataset()
    names = sus.attrs["dataset_id_to_name"]
    typer.echo("\nmean susceptibility" + (" (nats squared)" if raw else " (z-scores of each component)"))
    rows = [("", *names, "most expressed token")]
    for wr in sus.wr.values:
        values = sus.sus.sel(wr=wr).values
        means = [values[sus.dataset_id.values == number].mean() for number in range(len(names))]
        rows.append((f"  {wr}", *(f"{mean:+.3g}" for mean in means), _token(sus, context, tokenizer, int(values.argmin()))))
    print_table(rows)


def _token(sus: "xr.Dataset", context: "xr.Dataset", tokenizer: Any, row: int) -> str:
    where = (context.dataset_id.values == sus.dataset_id.values[row]) & (context.batch.values == sus.batch.values[row])
    ids: np.ndarray[Any, Any] = context.input_ids.values[where]
    at = int(sus.target_position.values[row])
    return f"{tokenizer.decode(ids[max(0, at - 4) : at])!r} [{tokenizer.decode(ids[at : at + 1])!r}]"
