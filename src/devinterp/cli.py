"""The command line: thin over the public calls.

Exit codes: 0 done; 1 the run or the estimate failed (a chain diverged, a store is damaged); 2 an argument cannot be used;
130 interrupted.
"""

import inspect
import logging
import os
import sys
import tomllib
import warnings
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from devinterp.errors import DevinterpError, DevinterpInputError, InputValueError, StoreError, got

if TYPE_CHECKING:
    import xarray as xr

app = typer.Typer(
    help="What a network has learned, read from the geometry of its loss around a checkpoint.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

CHOSEN: dict[str, Any] = {
    "sampling_method": "leimkuhler_matthews",
    "lr": "auto",
    "n_beta": 30.0,
    "localization": 300.0,
    "num_burnin_steps": 50,
    "num_draws": 100,
}
"""What the command line takes where the user says nothing: settings in use for language models of many sizes. They define
what is measured, so they are printed with every result."""

SKIPPED = ("sampling_method_kwargs",)  # from the TOML file only


@app.callback()
def main_options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Options before the command."""


def _sampling_options() -> list[inspect.Parameter]:
    """One option per setting, made from the one table of settings."""
    from devinterp.engine.settings import Settings

    options = []
    for item in fields(Settings):
        if item.name in SKIPPED:
            continue
        default = CHOSEN.get(item.name, item.default)
        flag = "--" + item.name.replace("_", "-")
        names = (f"{flag}/--no-{item.name.replace('_', '-')}",) if isinstance(default, bool) else (flag,)
        annotation: Any = str if item.name in ("lr", "sampling_method") else type(default)
        if default is None:
            annotation = float
        shown = "none" if default is None else str(default)
        option = typer.Option(*names, help=item.metadata["meaning"], show_default=shown, rich_help_panel="Sampling")
        options.append(
            inspect.Parameter(
                item.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[annotation | None, option]
            )
        )
    return options


def with_sampling_options(command: Callable[..., None]) -> Callable[..., None]:
    """Replace the command's `**settings` by an option for each setting."""
    own = [p for p in inspect.signature(command).parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    parameters = [*own, *_sampling_options()]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


@app.command("llc")
@with_sampling_options
def llc_command(
    model: Annotated[str, typer.Argument(help="Directory of a Hugging Face causal language model, or a hub id.")],
    *,
    data: Annotated[str, typer.Option(help="Text (.txt), .jsonl or .parquet file, or a hub dataset.")],
    observable: Annotated[
        list[str] | None, typer.Option(help="NAME=DATA: also record its losses and LLC. May be repeated.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Where the store goes.  [default: llc-MODEL]")] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file with any of the sampling settings.")] = None,
    revision: Annotated[str | None, typer.Option(help="Revision of a hub model.")] = None,
    column: Annotated[str, typer.Option(help="Column of the text.")] = "text",
    split: Annotated[str, typer.Option(help="Split of a hub dataset.")] = "train",
    context: Annotated[int, typer.Option(help="Tokens per sequence.")] = 256,
    sequences: Annotated[int, typer.Option(help="Sequences to use of each dataset, at most.")] = 10_000,
    device: Annotated[str | None, typer.Option(help="Where to compute, for example cuda:1.")] = None,
    **settings: Any,
) -> None:
    """Sample around a checkpoint and print its local learning coefficient."""
    chosen = _settings(config, settings)
    named = {"data": data, **_observables(observable or [])}
    loaded, tokenizer = _load_model(model, revision)
    tokens = {name: _tokenize(source, tokenizer, column, split, context, sequences) for name, source in named.items()}

    from devinterp.slt.llc import compute_llc
    from devinterp.slt.sampling import sample

    path = output or Path(f"llc-{Path(model).name}" + (f"-{revision}" if revision else ""))
    dataset = tokens.pop("data")
    typer.echo(f"{len(dataset)} sequences of {context} tokens from {data}")
    samples = sample(loaded, dataset, tokens, output_path=path, device=device, **chosen)
    _print_summary(samples, compute_llc(samples))
    typer.echo(f"\nsaved in {path}: losses at every draw and all settings. Look again with: devinterp show {path}")


@app.command("show")
def show_command(store: Annotated[Path, typer.Argument(help="Directory of a store.")]) -> None:
    """Summarise a store: settings, chains, losses, LLC."""
    from devinterp.slt.llc import compute_llc
    from devinterp.store.reader import open_store

    samples = open_store(store)
    _print_settings(samples)
    _print_chains(samples)
    try:
        result = compute_llc(samples, on_diverged="drop")
    except DevinterpError as error:
        typer.echo(f"no LLC: {error}")
        return
    _print_summary(samples, result)


def _settings(config: Path | None, given: dict[str, Any]) -> dict[str, Any]:
    """What is taken: the command line's own choices, overridden by the file, overridden by the options."""
    from devinterp.engine.settings import Settings

    from_file: dict[str, Any] = {}
    if config is not None:
        if not config.is_file():
            raise InputValueError(got("--config", str(config), "an existing TOML file", "Check the path."))
        try:
            from_file = tomllib.loads(config.read_text())
        except tomllib.TOMLDecodeError as error:
            raise InputValueError(got("--config", str(config), "valid TOML", str(error))) from error
        known = {item.name for item in fields(Settings)}
        if unknown := sorted(set(from_file) - known):
            raise InputValueError(got("--config", unknown, f"made of {sorted(known)}", "Remove or rename them."))
    chosen = CHOSEN | from_file | {name: value for name, value in given.items() if value is not None}
    if isinstance(chosen["lr"], str) and chosen["lr"] != "auto":
        try:
            chosen["lr"] = float(chosen["lr"])
        except ValueError as error:
            raise InputValueError(got("--lr", chosen["lr"], "a number or auto", "Try --lr auto.")) from error
    Settings(**chosen)  # so that a wrong one is said before a model is loaded
    return chosen


def _observables(given: list[str]) -> dict[str, str]:
    found = {}
    for item in given:
        name, separator, source = item.partition("=")
        if not separator or not name or not source or name == "data":
            fix = "Try --observable code=code.txt ('data' is the sampling data)."
            raise InputValueError(got("--observable", item, "NAME=DATA", fix))
        found[name] = source
    return found


def _load_model(model: str, revision: str | None) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    if not sys.stderr.isatty():
        disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, revision=revision)
        return AutoModelForCausalLM.from_pretrained(model, revision=revision), tokenizer
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        fix = f"Check the path or name. ({reason})"
        raise InputValueError(got("MODEL", model, "a directory with a model and tokenizer, or a hub id", fix)) from error


def _tokenize(source: str, tokenizer: Any, column: str, split: str, context: int, sequences: int) -> Any:
    from devinterp.utils import tokenize_and_concatenate

    text = _load_text(source, column, split)
    made = tokenize_and_concatenate(text, tokenizer, max_length=context, column_name=column,
                                    add_bos_token=tokenizer.bos_token_id is not None)  # fmt: skip
    return made.select(range(min(len(made), sequences)))


def _load_text(source: str, column: str, split: str) -> Any:
    from datasets import Dataset, load_dataset

    path = Path(source)
    if path.suffix == ".txt" and path.is_file():
        return Dataset.from_dict({column: [path.read_text()]})
    readers = {".jsonl": Dataset.from_json, ".json": Dataset.from_json, ".parquet": Dataset.from_parquet}
    if path.suffix in readers and path.is_file():
        return readers[path.suffix](str(path))
    if path.exists() or path.suffix in (*readers, ".txt"):
        problem = "no such file" if not path.exists() else "unknown ending"
        raise InputValueError(got("--data", source, "a .txt, .jsonl or .parquet file, or a hub dataset", f"{problem}."))
    try:
        return load_dataset(source, split=split)
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise InputValueError(got("--data", source, "a file or a hub dataset", f"Check the name. ({reason})")) from error


def _print_settings(samples: "xr.DataTree") -> None:
    from devinterp.store.reader import metadata_of

    metadata = metadata_of(samples)
    typer.echo("settings")
    for name, value in metadata["config"]["sampler"].items():
        typer.echo(f"  {name:<40} {value}")
    if "model" in metadata:
        model = metadata["model"]
        typer.echo(f"  {'model':<40} {model['class']}, {model['parameters']:,} parameters")


def _print_chains(samples: "xr.DataTree") -> None:
    from devinterp.store.schema import STATUS_MEANINGS

    ds = samples.to_dataset()
    typer.echo("chains")
    if "chain_status" not in ds:
        typer.echo(f"  {ds.sizes['chain']} chains, made by devinterp 2.0 (no status kept)")
        return
    for chain, (status, at) in enumerate(zip(ds["chain_status"].values, ds["diverged_at"].values, strict=True)):
        taken = int(ds["step_loss"].isel(chain=chain).notnull().sum())
        losses = ds["step_loss"].isel(chain=chain, step=slice(0, taken))
        span = f"loss {float(losses[0]):.4f} -> {float(losses[-1]):.4f}" if taken else "no step written yet"
        where = f" after {at} steps" if at >= 0 else ""
        typer.echo(f"  {chain}: {STATUS_MEANINGS[status]}{where}, {taken} of {ds.sizes['step']} steps written, {span}")


def _print_summary(samples: "xr.DataTree", result: "xr.Dataset") -> None:
    step_size = samples.attrs.get("metadata", {}).get("step_size", {})
    typer.echo("")
    typer.echo(f"LLC    {float(result.llc_mean):.3f} ± {float(result.llc_sem):.3f} (standard error)")
    if "llc_observable" in result:
        for name in result.observable.values:
            one = result.sel(observable=name)
            typer.echo(f"       {float(one.llc_observable):.3f} ± {float(one.llc_observable_sem):.3f} on {name}")
    typer.echo(f"       R-hat {float(result.rhat):.3f}, effective sample size {float(result.ess_bulk):.0f} "
               f"of {result.sizes['chain'] * result.sizes['draw']} draws in {result.sizes['chain']} chains")  # fmt: skip
    if result.attrs["dropped_chains"]:
        typer.echo(f"       chains left out: {result.attrs['dropped_chains']}")
    typer.echo(f"at     n_beta {result.attrs['n_beta']:g}, localization {result.attrs.get('localization', 0):g}, "
               f"{result.attrs.get('sampling_method')}" + (f", lr {step_size['lr']:.3g}" if step_size else ""))  # fmt: skip
    typer.echo("       (compare LLCs at equal n_beta and localization only)")
    if not float(result.rhat) < 1.05:
        typer.echo(f"note   R-hat {float(result.rhat):.3f} is not below 1.05: the chains may not have levelled off together. "
                   "Try more burn-in steps, or a larger localization.")  # fmt: skip


def main() -> None:
    """Run the command line; errors are one message, exit codes as in the module's docstring."""
    debug = "--debug" in sys.argv
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for name in ("httpx", "transformers", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.showwarning = _show_warning
    if not sys.stderr.isatty():  # bars are for terminals
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    try:
        app(standalone_mode=False)
    except typer.Exit as exit_:
        sys.exit(exit_.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        typer.echo("interrupted; ask again with the same options to run the chains that are not complete", err=True)
        sys.exit(130)
    except Exception as error:
        if debug:
            raise
        sys.exit(_report(error))


def _report(error: Exception) -> int:
    usage = getattr(error, "format_message", None)
    typer.echo(f"error: {usage() if usage else error}", err=True)
    if usage or (isinstance(error, DevinterpInputError) and not isinstance(error, StoreError)):
        return 2
    if not isinstance(error, DevinterpError | OSError):
        typer.echo(f"({type(error).__name__}; devinterp --debug ... shows where)", err=True)
    return 1


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    typer.echo(f"warning: {message}", err=True)
