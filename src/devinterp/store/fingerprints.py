"""Values and functions of the caller's as fingerprints: equal ones are equal code on equal values.

Nothing is guessed. What cannot be read, such as an open file or a random generator, is `Unreadable`. A fingerprint does not
depend on file names, line numbers, addresses or the order of sets. Code that belongs to an installed package is known by its
name; all other code is read, with what it captures and with the globals that it uses. Against accident, not attack.
"""

import types
from collections.abc import Callable, Mapping
from typing import Any

import xxhash
from torch import nn

from devinterp.store.code import BY_TEXT_IN_MODULES, installed, installed_name
from devinterp.store.kinds import ATOMS, read

NOT_OF_MODULES = {
    "name_or_path",
    "generation_config",
    "warnings_issued",
    "gradient_checkpointing",
    "hf_device_map",
    "tokenizer",
}
"""Attributes of modules on which no number depends"""
MOST_OBJECTS = 100_000


class Unreadable(Exception):
    """A value that cannot be compared with another: what it is, and where it was found."""


def fingerprint(value: Any, model: nn.Module | None = None) -> str:
    """Of a function, or of any value; modules of `model` are known by their names in it.

    Raises:
        Unreadable: something in it cannot be compared.
    """
    try:
        return Reader(model).of(value).hex()
    except RecursionError as error:
        raise Unreadable("it is nested too deeply") from error


def architecture(model: nn.Module) -> str:
    """The module tree at whatever weights: classes, hyperparameters, and the code of classes that are not installed.

    What cannot be read counts by its type alone: a model may hold a tokenizer or a lock.
    """
    reader = Reader(model, strict=False)
    try:
        return reader.tree(model).hex()
    except (RecursionError, Unreadable):
        names = (f"{name} {type(module).__qualname__}" for name, module in model.named_modules())
        return reader.join("names", *names).hex()


def ties(model: nn.Module) -> dict[str, str]:
    """Names of parameters and buffers that are the very tensor of an earlier name, with that name."""
    first: dict[int, str] = {}
    tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return {name: first[id(t)] for name, t in tensors if first.setdefault(id(t), name) != name}


class Reader:
    """Reads values one inside the other. One that contains itself is there a reference to how far up it is."""

    def __init__(self, model: nn.Module | None = None, strict: bool = True):
        self._strict = strict
        self._names = {id(module): name for name, module in model.named_modules()} if model is not None else {}
        self._known: dict[int, bytes] = {}
        self._kept: list[Any] = []  # alive, so that no other value gets their address
        self._open: list[int] = []
        self._highest = 0
        """the outermost open value that what is read now refers to; what refers to none is known for good"""

    @staticmethod
    def join(*parts: bytes | memoryview | str) -> bytes:
        """The digest of parts that each keep their bounds."""
        total = xxhash.xxh3_128()
        for part in parts:
            raw = part.encode(errors="surrogatepass") if isinstance(part, str) else part
            total.update(len(raw).to_bytes(8, "little"))
            total.update(raw)
        return total.digest()

    def of(self, value: Any) -> bytes:
        if type(value) in ATOMS:
            return self.join(type(value).__name__, value if isinstance(value, str | bytes) else repr(value))
        if id(value) in self._known:
            return self._known[id(value)]
        return self._inside(value, lambda: self._read(value), keep=True)

    def named(self, name: str, value: Any, names: frozenset[str] = frozenset()) -> bytes:
        """A value under a name; of a module of the caller's, what has one of these names."""
        try:
            if not isinstance(value, types.ModuleType):
                return self.of(value)
            if installed(value.__name__):
                return self.join("module", value.__name__)
            if not names or names & BY_TEXT_IN_MODULES:
                return self.unreadable("a module of which anything may be used")
            used = sorted(names & vars(value).keys())
            return self._inside(value, lambda: self.pairs({n: self.named(n, vars(value)[n], names) for n in used}), keep=False)
        except Unreadable as error:
            raise Unreadable(f"{name}.{error}" if ": " in str(error) else f"{name}: {error}") from error

    def pairs(self, entries: Mapping[Any, bytes]) -> bytes:
        """Digests under names, in whatever order."""
        return self.join("pairs", *sorted(self.of(key) + digest for key, digest in entries.items()))

    def unreadable(self, what: str) -> bytes:
        """An error where two values have to be compared; otherwise what it is, and no more."""
        if self._strict:
            raise Unreadable(what)
        return self.join("unread", what)

    def tree(self, root: nn.Module) -> bytes:
        """Classes and attributes of all modules, and which of them are one module under several names."""
        modules = [*root.named_modules(remove_duplicate=False)]
        first = {id(module): name for name, module in reversed(modules)}
        parts = [
            self.join(name, first[id(module)], self.of(type(module)), self._attributes(module)) for name, module in modules
        ]
        return self.join("tree", *parts)

    def _read(self, value: Any) -> bytes:
        try:
            return self._module(value) if isinstance(value, nn.Module) else read(self, value)
        except (Unreadable, RecursionError):
            raise
        except Exception as error:  # the caller's own attributes and conversions run here
            return self.unreadable(f"a {type(value).__qualname__}, which fails with {type(error).__name__} when it is read")

    def _inside(self, value: Any, read: Callable[[], bytes], keep: bool) -> bytes:
        depth = len(self._open)
        if id(value) in self._open:
            up = self._open.index(id(value))
            self._highest = min(self._highest, up)
            return self.join("again", str(depth - up))
        if len(self._kept) > MOST_OBJECTS:
            raise Unreadable(f"more than {MOST_OBJECTS:,} objects")
        self._kept.append(value)
        outer, self._highest = self._highest, depth
        self._open.append(id(value))
        try:
            result = read()
        finally:
            self._open.pop()
            closed, self._highest = self._highest >= depth, min(outer, self._highest)
        if keep and closed:
            self._known[id(value)] = result
        return result

    def _module(self, module: nn.Module) -> bytes:
        """With its weights and training flags, unless it is one of the model's, which are known otherwise."""
        if id(module) in self._names:
            return self.join("of the model", self._names[id(module)])
        tensors = {name: self.of(tensor) for name, tensor in (*module.named_parameters(), *module.named_buffers())}
        flags = repr([part.training for part in module.modules()])
        return self.join("module", self.tree(module), self.of(ties(module)), self.pairs(tensors), flags)

    def _attributes(self, module: nn.Module) -> bytes:
        """Whatever was set on a module besides parameters, buffers and submodules."""
        hidden = NOT_OF_MODULES | vars(nn.Module()).keys()
        library = installed_name(type(module)) is not None  # the private attributes of libraries are caches and notes
        return self.pairs(
            {
                name: self.named(name, value)
                for name, value in vars(module).items()
                if name not in hidden and not (name.startswith("_") and (library or name.startswith("_is_hf")))
            }
        )
