"""Commands that sample, one function each: thin over the public calls."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from devinterp.cli.inputs import load_model
from devinterp.cli.options import CHOSEN, Job, JsonOption, sampling_command
from devinterp.cli.printing import (
    chains_of,
    estimates_of,
    print_chains,
    print_diagnosis,
    print_json,
    print_summary,
    print_table,
    settings_of,
)
from devinterp.cli.tables import means_between, pairs_of, print_means, print_pairs, print_responses, responses_of
from devinterp.errors import InputValueError, got

SaveOption = Annotated[Path | None, typer.Option(help="Also write the result to this new Zarr store.")]


@sampling_command
def sample_command(job: Job, *, as_json: JsonOption = False) -> None:
    """Sample around a checkpoint and store the losses of every draw, for analyses to come."""
    from devinterp.slt.sampling import sample

    path = job.path("samples")
    samples = sample(job.model, job.dataset, job.observables, output_path=path, device=job.device, **job.settings)
    if as_json:
        print_json({"store": str(path), "settings": settings_of(samples), "chains": chains_of(samples)})
        return
    print_chains(samples)
    typer.echo(
        f"\nsaved in {str(path)!r}; from Python: devinterp.compute_llc({str(path)!r}), devinterp.compute_bif({str(path)!r})"
    )


@sampling_command
def llc_command(job: Job, *, as_json: JsonOption = False) -> None:
    """Sample around a checkpoint and print its local learning coefficient."""
    from devinterp.slt.llc import compute_llc
    from devinterp.slt.sampling import sample

    path = job.path("llc")
    samples = sample(job.model, job.dataset, job.observables, output_path=path, device=job.device, **job.settings)
    result = compute_llc(samples)
    if as_json:
        print_json({"store": str(path), **estimates_of(samples, result)})
        return
    print_summary(samples, result)
    print_diagnosis(samples)
    typer.echo(f"\nsaved in {str(path)!r}: losses at every draw and all settings. Look again with devinterp show.")


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
    as_json: JsonOption = False,
) -> None:
    """Find settings for a model by short pilot chains, with reasons, and write them to a file for --config."""
    from devinterp.slt.calibration import calibrate

    if save.exists():
        raise InputValueError(got("--save", str(save), "a new file", "Choose another name."))
    given = {name: value for name, value in job.given.items() if value is not None}
    options = {"accuracy": accuracy, "max_steps": max_steps, "largest_excess": largest_excess, "device": job.device}
    found = calibrate(job.model, job.dataset, **{"n_beta": CHOSEN["n_beta"]} | given | options)
    lines = [
        f"{name} = {json.dumps(value)}" for name, value in found.settings.items() if name != "device" and value is not None
    ]
    save.write_text("\n".join(lines) + "\n")
    if as_json:
        print_json({"settings": found.settings, "reasons": found.reasons, "saved": str(save)})
        return
    typer.echo(f"\n{found}")
    typer.echo(f"\nsettings in {str(save)!r}; take them with: devinterp llc MODEL --data DATA --config {str(save)!r}")


@sampling_command
def bif_command(
    job: Job,
    *,
    method: Annotated[str, typer.Option(help="Influence between: token or sequence.")] = "sequence",
    covariance: Annotated[bool, typer.Option(help="Covariances instead of correlations.")] = False,
    top: Annotated[int, typer.Option(help="How many of the strongest pairs to print.")] = 20,
    save: SaveOption = None,
    as_json: JsonOption = False,
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
    means = means_between(compute_bif(samples, correlation_method="sequence"))
    strongest = compute_bif(samples, top_k=top, **options)
    pairs, measure = pairs_of(strongest, job.tokenizer), strongest.attrs["measure"]
    if save is not None:
        compute_bif(samples, output_path=save, **options)
    if as_json:
        saved = {} if save is None else {"saved": str(save)}
        print_json({"store": str(path), "mean_correlations": means, "measure": measure, "pairs": pairs, **saved})
        return
    print_means(means)
    typer.echo(f"\nstrongest pairs of {method}s ({measure})")
    print_pairs(pairs)
    if save is not None:
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
    as_json: JsonOption = False,
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
    responses = responses_of(tree, job.tokenizer)
    if save is not None:
        tree.to_zarr(save, consolidated=False)
    example = path_of_run(path, tree["susceptibilities"].wr.values.tolist()[0])
    if as_json:
        saved = {} if save is None else {"saved": str(save)}
        unit = "nats squared" if raw else "z-scores"
        print_json({"store": str(example), "unit": unit, "responses": responses, "failed": tree.attrs["failed"], **saved})
        return
    print_responses(responses, raw)
    if save is not None:
        typer.echo(f"\nsusceptibilities in {str(save)!r}")
    typer.echo(f"\nsamples in {str(example)!r} and its like; the same command goes on where it stopped")


def components_command(
    model: Annotated[str, typer.Argument(help="Directory of a Hugging Face causal language model, or a hub id.")],
    restriction: Annotated[str | None, typer.Argument(help="Show what this selects, for example 'l0h1'.")] = None,
    revision: Annotated[str | None, typer.Option(help="Revision of a hub model.")] = None,
    as_json: JsonOption = False,
) -> None:
    """List the components of a model, or show the weights of one."""
    from devinterp.engine.discovery import structure
    from devinterp.engine.discovery.listing import inventory
    from devinterp.slt.weight_restrictions import create_param_masks, preview_weight_restriction

    loaded, _ = load_model(model, revision)
    total = sum(p.numel() for p in loaded.parameters())
    if restriction is not None:
        masks = create_param_masks(loaded, restriction, dense=False)
        if not as_json:
            preview_weight_restriction(loaded, masks)
            return
        sizes = {name: p.numel() for name, p in loaded.named_parameters()}
        chosen = {name: sizes[name] if mask is None else mask.numel for name, mask in masks.items()}
        print_json({"restriction": restriction, "weights": sum(chosen.values()), "of": total, "parameters": chosen})
        return
    counts = list(inventory(loaded, structure(loaded)))
    if as_json:
        print_json({"weights": total, "components": [{"name": name.strip(), "weights": count} for name, count in counts]})
        return
    rows = [("component", "weights", "share")]
    rows += [(name, f"{count:,}", f"{count / total:.2%}") for name, count in counts]
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
