"""A sweep as a TOML file: its keys are the arguments of `devinterp.sweep` and of `sample`, and how texts become tokens."""

import tomllib
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from devinterp.cli.inputs import tokenize
from devinterp.cli.options import CHOSEN
from devinterp.errors import DevinterpInputError, InputTypeError, InputValueError, got

TEXT: dict[str, tuple[type, Any]] = {
    "tokenizer": (str, None), "column": (str, "text"), "split": (str, "train"),
    "context": (int, 256), "sequences": (int, 10_000),
}  # fmt: skip
"""How texts become tokens; the tokenizer is that of the first checkpoint where none is named"""
NEEDED = ("checkpoints", "dataset", "output_path")
OTHERS = ("observables", "weight_restrictions", "sampling_task", "on_diverged", "device", "devices")
EXAMPLE = "Try [checkpoints] with lines such as step512 = 'EleutherAI/pythia-14m@step512'."


@dataclass(frozen=True)
class StudyFile:
    """What a file asks for, its keys and their types checked; texts and tokenizer are read when first used."""

    path: Path
    given: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> "StudyFile":
        from devinterp.engine.settings import Paths, Settings

        if not path.is_file():
            raise InputValueError(got("STUDY", str(path), "an existing TOML file", "Check the path."))
        try:
            given = tomllib.loads(path.read_text())
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise InputValueError(got("STUDY", str(path), "valid TOML", str(error))) from error
        known = {item.name for item in (*fields(Settings), *fields(Paths))} | {*NEEDED, *OTHERS, *TEXT}
        if unknown := sorted(set(given) - known):
            raise InputValueError(got("STUDY", unknown, f"made of {sorted(known)}", "Remove or rename them."))
        if missing := [name for name in NEEDED if name not in given]:
            raise InputValueError(got("STUDY", str(path), f"with {', '.join(NEEDED)}", f"It lacks {', '.join(missing)}."))
        file = cls(path, given)
        file._check()
        return file

    def _check(self) -> None:
        from devinterp.engine.settings import settings_and_paths

        for name, (kind, _) in TEXT.items():
            value = self.given.get(name)
            if name in self.given and (not isinstance(value, kind) or isinstance(value, bool)):
                raise InputTypeError(got(name, value, f"of type {kind.__name__}", "Look at docs/sweeps.md."))
        for name, least in (("context", 2), ("sequences", 1)):
            if self.text(name) < least:
                raise InputValueError(got(name, self.text(name), f"at least {least}", f"Try {TEXT[name][1]}."))
        for name in ("dataset", "output_path"):
            if not isinstance(self.given[name], str):
                raise InputTypeError(got(name, self.given[name], "text in quotes", "Try 'stories.txt'."))
        if not isinstance(observables := self.given.get("observables", {}), dict):
            raise InputTypeError(got("observables", observables, "a table", "Try [observables] with a line code = 'code.txt'."))
        for name, value in observables.items():
            source = value[0] if isinstance(value, list) and len(value) == 2 else value
            if not isinstance(source, str):
                fix = f"Try {name} = 'code.txt', or ['code.txt', 5] for 5 batches of it."
                raise InputTypeError(
                    got(f"observables.{name}", value, "a file or dataset, or that and a number of batches", fix)
                )
        _ = self.checkpoints
        settings_and_paths(**self.settings)

    @property
    def folder(self) -> Path:
        """What relative paths are relative to."""
        return self.path.absolute().parent

    @property
    def output_path(self) -> Path:
        return self.folder / Path(self.given["output_path"]).expanduser()

    @property
    def settings(self) -> dict[str, Any]:
        """Of `sample`: the command line's own choices, overridden by the file."""
        return CHOSEN | {name: value for name, value in self.given.items() if name not in {*NEEDED, *OTHERS, *TEXT}}

    def text(self, name: str) -> Any:
        return self.given.get(name, TEXT[name][1])

    @cached_property
    def checkpoints(self) -> dict[str, Any]:
        from devinterp.engine.origin import revisions
        from devinterp.slt.sweep_study import origins_of

        given = self.given["checkpoints"]
        if isinstance(given, str):
            return dict(origins_of(self._found(given)))
        if not isinstance(given, dict):
            raise InputTypeError(got("checkpoints", given, "a table, or a folder of checkpoints", EXAMPLE))
        found: dict[str, Any] = {}
        for name, value in given.items():
            if not isinstance(value, str | list):
                raise InputTypeError(got(f"checkpoints.{name}", value, "a path, a hub id or a list of revisions", EXAMPLE))
            new = dict(revisions(name, value)) if isinstance(value, list) else {name: self._found(value)}
            if twice := sorted(set(new) & set(found)):
                raise InputValueError(got("checkpoints", twice, "names that differ", "Give each its own line."))
            found |= new
        return dict(origins_of(found))

    @cached_property
    def _tokenizer(self) -> Any:
        from devinterp.engine.origin import Pretrained, named

        if (name := self.text("tokenizer")) is not None:
            return named(self._found(name), "tokenizer").tokenizer("tokenizer")
        first = next(iter(self.checkpoints.values()))
        if not isinstance(first, Pretrained):
            raise InputValueError(got("tokenizer", None, "given", "Try tokenizer = 'EleutherAI/pythia-14m'."))
        try:
            return first.tokenizer("checkpoints")
        except DevinterpInputError as error:
            raise InputValueError(f"{error} Try tokenizer = 'EleutherAI/pythia-14m'.") from error

    def arguments(self) -> dict[str, Any]:
        """Of `devinterp.sweep`."""
        observables = {name: self._observable(name, value) for name, value in self.given.get("observables", {}).items()}
        arguments: dict[str, Any] = {
            "checkpoints": self.checkpoints,
            "dataset": self._tokens("dataset", self.given["dataset"]),
            "observables": observables,
            "output_path": self.output_path,
            **{name: self.given[name] for name in ("sampling_task", "on_diverged", "device", "devices") if name in self.given},
        }
        if "weight_restrictions" in self.given:
            arguments["weight_restrictions"] = self._restrictions(self.given["weight_restrictions"])
        return arguments | self.settings

    def _restrictions(self, given: Any) -> Any:
        """A table: name -> restriction; a list of restrictions; or a kind of components, looked up in the first checkpoint."""
        from devinterp.cli.commands import restrictions_of

        full: dict[str, Any] = {"full": None}
        if isinstance(given, dict):
            return full | {name: value for name, value in given.items() if name != "full"}
        if isinstance(given, list) and all(isinstance(name, str) for name in given):
            return full | {name: name for name in given if name != "full"}
        if isinstance(given, str):
            return restrictions_of(next(iter(self.checkpoints.values())).load(), given, "weight_restrictions")
        fix = "Try ['l0h0', 'l0 mlp'], or 'heads'."
        raise InputTypeError(got("weight_restrictions", given, "a table, a list of names or a kind of component", fix))

    def _observable(self, name: str, value: Any) -> Any:
        source, *batches = value if isinstance(value, list) else [value]
        tokens = self._tokens(f"observables.{name}", source)
        return (tokens, *batches) if batches else tokens

    @cached_property
    def _made(self) -> dict[str, Any]:
        """Tokens by source: the sampling data are often an observable too."""
        return {}

    def _tokens(self, key: str, source: str) -> Any:
        if source not in self._made:
            column, split, context, sequences = (self.text(name) for name in ("column", "split", "context", "sequences"))
            self._made[source] = tokenize(key, self._found(source), self._tokenizer, column, split, context, sequences)
        return self._made[source]

    def _found(self, given: str) -> str:
        """A path relative to the file's folder, where there is one; otherwise as given: a hub id."""
        path = self.folder / Path(given).expanduser()
        return str(path) if given and path.exists() else given
