"""The options that all sampling commands share: what to sample, and one option for every setting."""

import functools
import inspect
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from devinterp.cli.inputs import check_source, load_model, tokenize
from devinterp.errors import InputValueError, got

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

JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as one line of JSON, for programs.")]

SKIPPED = ("sampling_method_kwargs",)  # from the TOML file only


@dataclass(frozen=True)
class Job:
    """What a sampling command is asked for. Options are checked when it is made; model and text are loaded when first used."""

    model_name: str
    data: str
    observable: list[str]
    output: str | None
    config: Path | None
    revision: str | None
    column: str
    split: str
    context: int
    sequences: int
    device: str | None
    given: dict[str, Any]

    def __post_init__(self) -> None:
        _ = self.settings
        check_source("--data", self.data)
        for name, source in self.sources.items():
            check_source(f"--observable {name}", source)

    @cached_property
    def settings(self) -> dict[str, Any]:
        return merge_settings(self.config, self.given)

    @cached_property
    def sources(self) -> dict[str, str]:
        """Observables by name."""
        return split_observables(self.observable)

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        return load_model(self.model_name, self.revision)

    @property
    def model(self) -> Any:
        return self._loaded[0]

    @property
    def tokenizer(self) -> Any:
        return self._loaded[1]

    @cached_property
    def dataset(self) -> Any:
        tokens = self._tokens("--data", self.data)
        typer.echo(f"{len(tokens)} sequences of {self.context} tokens from {self.data!r}", err=True)
        return tokens

    @cached_property
    def observables(self) -> dict[str, Any]:
        return {name: self._tokens(f"--observable {name}", source) for name, source in self.sources.items()}

    def _tokens(self, option: str, source: str) -> Any:
        return tokenize(option, source, self.tokenizer, self.column, self.split, self.context, self.sequences)

    def path(self, command: str) -> str:
        """Where the store goes: as asked, or named after command and model."""
        named = f"{command}-{Path(self.model_name).name}" + (f"-{self.revision}" if self.revision else "")
        given = self.output or named
        return given if "://" in given else str(Path(given))


def data_options() -> list[inspect.Parameter]:
    """The options that say what to sample."""
    options: dict[str, tuple[Any, Any, Any]] = {
        "data": (str, typer.Option(help="Text (.txt), .jsonl or .parquet file, or a hub dataset."), inspect.Parameter.empty),
        "observable": (
            list[str] | None, typer.Option(help="NAME=DATA: also record the losses of this text. May be repeated."), None,
        ),
        "output": (str | None, typer.Option(help="Path or URL of the store to be.  [default: COMMAND-MODEL]"), None),
        "config": (Path | None, typer.Option(help="TOML file with any of the sampling settings."), None),
        "revision": (str | None, typer.Option(help="Revision of a hub model."), None),
        "column": (str, typer.Option(help="Column of the text."), "text"),
        "split": (str, typer.Option(help="Split of a hub dataset."), "train"),
        "context": (int, typer.Option(min=2, help="Tokens per sequence."), 256),
        "sequences": (int, typer.Option(min=1, help="Sequences to use of each dataset, at most."), 10_000),
        "device": (str | None, typer.Option(help="Where to compute, for example cuda:1."), None),
    }  # fmt: skip
    return [_keyword(name, Annotated[kind, option], default) for name, (kind, option, default) in options.items()]


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def sampling_options() -> list[inspect.Parameter]:
    """One option per setting, made from the one table of settings."""
    from devinterp.engine.settings import Paths, Settings

    options = []
    for item in (*fields(Settings), *fields(Paths)):
        if item.name in SKIPPED:
            continue
        default = CHOSEN.get(item.name, item.default)
        flag = "--" + item.name.replace("_", "-")
        names = (f"{flag}/--no-{item.name.replace('_', '-')}",) if isinstance(default, bool) else (flag,)
        annotation: Any = str if str in (item.type, *get_args(item.type)) else float if default is None else type(default)
        shown = "none" if default is None else str(default)
        option = typer.Option(*names, help=item.metadata["meaning"], show_default=shown, rich_help_panel="Sampling")
        options.append(
            inspect.Parameter(
                item.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[annotation | None, option]
            )
        )
    return options


def sampling_command(command: Callable[..., None]) -> Callable[..., None]:
    """Turn `command(job, *, own options)` into one that takes MODEL, its own options, and those of data and sampling."""
    own = list(inspect.signature(command).parameters.values())[1:]
    help_ = "Directory of a Hugging Face causal language model, or a hub id."
    model = _keyword("model", Annotated[str, typer.Argument(help=help_)], inspect.Parameter.empty)
    data, sampling = data_options(), sampling_options()
    parameters = [model, *own, *data, *sampling]

    @functools.wraps(command)
    def run(**given: Any) -> None:
        of_data = {p.name: given.pop(p.name) for p in data} | {"model_name": given.pop("model")}
        of_data["observable"] = of_data["observable"] or []
        settings = {p.name: given.pop(p.name) for p in sampling}
        command(Job(**of_data, given=settings), **given)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run


def merge_settings(config: Path | None, given: dict[str, Any]) -> dict[str, Any]:
    """What is taken: the command line's own choices, overridden by the file, overridden by the options."""
    from devinterp.engine.settings import Paths, Settings, settings_and_paths

    from_file: dict[str, Any] = {}
    if config is not None:
        if not config.is_file():
            raise InputValueError(got("--config", str(config), "an existing TOML file", "Check the path."))
        try:
            from_file = tomllib.loads(config.read_text())
        except tomllib.TOMLDecodeError as error:
            raise InputValueError(got("--config", str(config), "valid TOML", str(error))) from error
        known = {item.name for item in (*fields(Settings), *fields(Paths))}
        if unknown := sorted(set(from_file) - known):
            raise InputValueError(got("--config", unknown, f"made of {sorted(known)}", "Remove or rename them."))
    chosen = CHOSEN | from_file | {name: value for name, value in given.items() if value is not None}
    if isinstance(chosen["lr"], str) and chosen["lr"] != "auto":
        try:
            chosen["lr"] = float(chosen["lr"])
        except ValueError as error:
            raise InputValueError(got("--lr", chosen["lr"], "a number or auto", "Try --lr auto.")) from error
    settings_and_paths(**chosen)  # so that a wrong one is said before a model is loaded
    return chosen


def split_observables(given: list[str]) -> dict[str, str]:
    found = {}
    for item in given:
        name, separator, source = item.partition("=")
        if not separator or not name or not source or name == "data" or name in found:
            fix = "Give each name once; 'data' is the sampling data. Try --observable code=code.txt."
            raise InputValueError(got("--observable", item, "NAME=DATA", fix))
        found[name] = source
    return found
