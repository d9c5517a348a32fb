"""Where a checkpoint comes from, said in a way that any process can load it from: by its name, never by its weights."""

import os
import re
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from devinterp.errors import InputTypeError, InputValueError, got

_LOADING = threading.RLock()
"""transformers patches torch while it loads: two at once would leave weights that were never read. A function that makes a
model may seed torch's one generator: two at once would take each other's numbers."""


@dataclass(frozen=True)
class Pretrained:
    """A causal language model as `save_pretrained` wrote it: a directory, or a hub id and a revision of it."""

    source: str
    """absolute, where it is a directory"""
    revision: str | None = None

    def load(self, argument: str = "checkpoint") -> nn.Module:
        """The model, in eval mode and on the CPU. Code that comes with a checkpoint is never run.

        Raises:
            InputValueError: there is no such checkpoint, or it lacks weights of the model that it names.
        """
        with _LOADING, _told(self, argument):
            model, found = _transformers().AutoModelForCausalLM.from_pretrained(
                self.source, revision=self.revision, trust_remote_code=False, output_loading_info=True
            )
        # transformers fills them with random numbers, and only warns
        if random := sorted(str(name) for key in ("missing_keys", "mismatched_keys") for name in found[key]):
            what = f"a checkpoint with all weights of its {type(model).__name__}"
            fix = f"It lacks {len(random)} of them, or has them in another shape: {', '.join(random[:3])}."
            raise InputValueError(got(argument, str(self), what, fix))
        checked: nn.Module = model
        return checked

    def tokenizer(self, argument: str = "checkpoint") -> Any:
        """The tokenizer that lies beside the model."""
        with _LOADING, _told(self, argument):
            # without the False, transformers asks at a terminal whether to run the code that comes with a checkpoint
            found = _transformers().AutoTokenizer.from_pretrained(self.source, revision=self.revision, trust_remote_code=False)
        if len(found.get_vocab()) <= len(found.all_special_tokens):  # transformers makes up an empty one where there is none
            fix = "It has none; name another."
            raise InputValueError(got(argument, str(self), "a model with a tokenizer beside it", fix))
        return found

    def check(self, argument: str = "checkpoint") -> None:
        """Whether it is there, from its small files alone; raises as `load` does."""
        with _LOADING, _told(self, argument):
            _transformers().AutoConfig.from_pretrained(self.source, revision=self.revision, trust_remote_code=False)
        folder = Path(self.source)
        if folder.is_dir() and not any(file.suffix in (".safetensors", ".bin") for file in folder.iterdir()):
            raise InputValueError(got(argument, str(self), "a directory with weights", "It has a config.json only."))

    def __str__(self) -> str:
        return self.source + (f"@{self.revision}" if self.revision else "")


@dataclass(frozen=True)
class Made:
    """A model that a function returns. Processes other than this one need a function that can be pickled."""

    make: Callable[[], nn.Module]

    def load(self, argument: str = "checkpoint") -> nn.Module:
        """What the function returns, checked to be a module."""
        with _LOADING:
            model = self.make()
        if not isinstance(model, nn.Module):
            raise InputTypeError(got(argument, model, "a function that returns an nn.Module", f"{self} returned this."))
        return model

    def check(self, argument: str = "checkpoint") -> None:
        """Nothing is known of a function before it is called."""

    def __str__(self) -> str:
        return f"{getattr(self.make, '__qualname__', type(self.make).__name__)}()"


Origin = Pretrained | Made


def origin_of(given: Any, argument: str = "checkpoint") -> Origin:
    """Of a path, "hub id", "hub id@revision", a function that returns a module, or an origin.

    Raises:
        InputValueError, InputTypeError: it is none of them, or a path to nothing. Hub ids are not looked up here.
    """
    if isinstance(given, Pretrained | Made):
        return given
    if isinstance(given, nn.Module):
        fix = "Pass a function that returns the model, or where it is saved: it is loaded when its turn comes."
        raise InputTypeError(got(argument, type(given), "a path, a hub id or a function", fix))
    if callable(given):
        return Made(given)
    if not isinstance(given, str | os.PathLike) or isinstance(os.fspath(given), bytes):
        fix = "Try 'checkpoints/step500' or 'EleutherAI/pythia-14m@step512'."
        raise InputTypeError(got(argument, given, "a path, a hub id or a function that returns a module", fix))
    return named(given, argument)


def named(given: str | os.PathLike[str], argument: str = "checkpoint") -> Pretrained:
    """Of the path of a directory, "hub id" or "hub id@revision"."""
    text = os.fspath(given)
    try:
        path = Path(text).expanduser()
        if path.is_dir() and text:
            return Pretrained(str(path.absolute()))
    except (OSError, ValueError, RuntimeError) as error:  # too long, a null byte, nobody's home
        raise InputValueError(got(argument, text, "a directory or a hub id", f"{error}.")) from error
    source, at, revision = text.partition("@")
    is_id = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", source, re.ASCII)
    if isinstance(given, str) and is_id and bool(at) == bool(revision):
        return Pretrained(source, revision or None)
    fix = "There is no such directory. Try 'EleutherAI/pythia-14m@step512' for the hub."
    raise InputValueError(got(argument, text, "the directory of a model, 'hub id' or 'hub id@revision'", fix))


def revisions(model: str, names: Sequence[str]) -> dict[str, Pretrained]:
    """Revisions of one hub model as the checkpoints of a sweep, by their names.

        devinterp.sweep(devinterp.revisions("EleutherAI/pythia-14m", ["step512", "step1000"]), ...)

    Args:
        model: hub id, for example "EleutherAI/pythia-14m".
        names: branches, tags or commits, in the order wanted.

    Returns:
        name -> where it is loaded from. Nothing is looked up or downloaded here.

    Raises:
        DevinterpInputError: `model` is no hub id, or a name is not text or given twice.
    """
    if isinstance(names, str) or not isinstance(names, Sequence) or not all(isinstance(n, str) and n for n in names):
        raise InputTypeError(got("names", names, "a list of names of revisions", "Try ['step512', 'step1000']."))
    if len(set(names)) != len(names):
        raise InputValueError(got("names", list(names), "each name once", "Remove what is there twice."))
    if not isinstance(model, str) or "@" in model:
        fix = "Try revisions('EleutherAI/pythia-14m', ['step512', 'step1000'])."
        raise InputValueError(got("model", model, "a hub id without a revision", fix))
    source = named(model, "model").source
    return {name: Pretrained(source, name) for name in names}


def checkpoints_in(folder: str | os.PathLike[str], argument: str = "checkpoints") -> dict[str, Pretrained]:
    """The checkpoints that a training run has left in a folder, by their names and in the order of their steps.

    Each is a directory such as `checkpoint-500` (the Trainer's form), `step-000342` or `1000` with a `config.json`. Others,
    such as logs or `tmp-checkpoint-500` that is still being written, are not.
    """
    path = Path(folder).expanduser().absolute()
    fix = "Try the output_dir of a Trainer, or a dict: name -> path."
    if not path.is_dir():
        raise InputValueError(got(argument, os.fspath(folder), "a folder of checkpoints, or a dict", fix))
    numbered = ((re.fullmatch(r"[A-Za-z]*[-_]?([0-9]{1,18})", entry.name), entry) for entry in path.iterdir())
    found = [(int(match[1]), entry) for match, entry in numbered if match and (entry / "config.json").is_file()]
    if not found:
        what = "a folder of checkpoints such as checkpoint-500, each with a config.json"
        raise InputValueError(got(argument, os.fspath(folder), what, fix))
    return {entry.name: Pretrained(str(entry)) for _, entry in sorted(found, key=lambda item: (item[0], item[1].name))}


def _transformers() -> Any:
    """The module that transformers puts in its own place at the end of its import.

    A thread that waits for another's import of it, as in a worker that receives a model while it loads one, is given the
    first, in which there is nothing.
    """
    import transformers  # noqa: F401

    return sys.modules["transformers"]


@contextmanager
def quiet() -> Iterator[None]:
    """No bars of transformers for the length of the block: there is one for the whole."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextmanager
def _told(origin: Pretrained, argument: str) -> Iterator[None]:
    """Errors of transformers as ours: what was asked for, and the first line of what went wrong."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = f"{type(error).__name__}: {str(error).strip().split(chr(10))[0]}"
        fix = f"Check the path or name. ({reason})"
        raise InputValueError(got(argument, str(origin), "the directory of a model, or a hub id", fix)) from error
