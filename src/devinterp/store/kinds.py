"""How each kind of value is read into a fingerprint: plain data, arrays, functions, classes and their instances."""

import enum
import functools
import logging
import re
import types
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Callable, Iterator, Mapping
from dataclasses import is_dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from devinterp.store.code import installed, installed_name, namespace_use

if TYPE_CHECKING:
    from devinterp.store.fingerprints import Reader

ATOMS = (type(None), bool, int, float, complex, str, bytes, type(...), type(NotImplemented))
SHOWN = (torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size, np.dtype, PurePath, range)
"""Small values that are told apart by their text"""
MAPPINGS = (dict, OrderedDict, defaultdict, Counter, types.MappingProxyType)
SEQUENCES = (list, tuple, deque)
SETS = (set, frozenset)
BUILTINS = (types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType, types.MethodWrapperType,
            types.ClassMethodDescriptorType, np.ufunc)  # fmt: skip
DESCRIPTORS = (types.MemberDescriptorType, types.GetSetDescriptorType)
FIELD = type(vars(namedtuple("FIELD", "a"))["a"])
"""Of named tuples, whose classes list their fields as well"""
CONTENT = (dict, list, tuple, set, frozenset, str, int, float, bytes)
"""Bases whose instances hold more than their attributes"""
ABSTRACT = ("abc", "typing", "collections.abc", "_collections_abc")
"""Modules whose classes give their instances no state"""
NOT_OF_CLASSES = re.compile(
    "__(module|doc|dict|weakref|annotations|annotate.*|firstlineno|static_attributes|dataclass_.*|parameters|orig_bases)__"
    "|_abc_impl|__annotations_cache__"
)
NOT_OF_CONFIGS = {
    "_name_or_path", "name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "_commit_hash", "device",
    "use_cache", "return_dict", "output_attentions", "output_hidden_states", "gradient_checkpointing",
}  # fmt: skip
"""Where a model came from and how it is called: no number depends on them"""

Kind = Callable[["Reader", Any], bytes]


def read(reader: "Reader", value: Any) -> bytes:
    """Any value that is neither an atom nor a torch module."""
    if isinstance(value, type):
        return _class(reader, value)
    kind = next((kind for kinds, kind in KINDS if isinstance(value, kinds)), _object)
    return kind(reader, value)


def _mapping(reader: "Reader", value: Mapping[Any, Any]) -> bytes:
    if type(value) not in MAPPINGS:
        return _object(reader, value)
    entries = reader.pairs({key: reader.of(entry) for key, entry in value.items()})
    return reader.join(type(value).__name__, entries, reader.of(getattr(value, "default_factory", None)))


def _sequence(reader: "Reader", value: Any) -> bytes:
    known = type(value) in SEQUENCES
    return reader.join(type(value).__name__, *map(reader.of, value)) if known else _object(reader, value)


def _set(reader: "Reader", value: Any) -> bytes:
    known = type(value) in SETS
    return reader.join(type(value).__name__, *sorted(map(reader.of, value))) if known else _object(reader, value)


def _tensor(reader: "Reader", value: Tensor) -> bytes:
    if type(value) not in (Tensor, nn.Parameter) or value.layout != torch.strided or value.is_quantized or value.is_meta:
        return reader.unreadable(f"a {type(value).__qualname__} of {value.layout} and {value.dtype}")
    flat = value.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    return reader.join("tensor", str(value.dtype), str(tuple(value.shape)), flat.view(torch.uint8).numpy().data)


def _array(reader: "Reader", value: Any) -> bytes:
    if value.dtype.hasobject:
        return reader.join("objects", str(value.shape), reader.of(value.tolist()))
    return reader.join("array", value.dtype.str, str(value.dtype.descr), str(value.shape), value.tobytes())


def _code(reader: "Reader", code: types.CodeType) -> bytes:
    counts = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags)
    names = (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
    constants = map(reader.of, code.co_consts)
    return reader.join("code", code.co_code, code.co_exceptiontable, repr(counts), repr(names), *constants)


def _function(reader: "Reader", function: types.FunctionType) -> bytes:
    code, home = function.__code__, function.__globals__
    module = str(home.get("__name__", ""))
    use = namespace_use(code)
    captured = {name: reader.named(name, held, use.names) for name, held in _captured(function)}
    own = (reader.pairs(captured), reader.of(function.__defaults__), reader.of(function.__kwdefaults__))
    if installed(module):  # not by __module__, which functools.wraps copies
        return reader.join("installed", module, code.co_qualname, *own)
    outside = {name: reader.named(name, home[name], use.names) for name in use.globals if name in home}
    outside |= {name: reader.unreadable(f"{name}(), which may reach anything") for name in use.by_text(home)}
    for name in use.imports_of(home):
        loaded = use.loaded(name)
        missing = f"import of {name}, which is not loaded yet"
        outside[f"import {name}"] = reader.unreadable(missing) if loaded is None else reader.named(name, loaded, use.names)
    return reader.join("function", _code(reader, code), *own, reader.pairs(outside), reader.of(vars(function)))


def _captured(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """Values captured from the functions around this one; those assigned later are left out."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:
            continue


def _builtin(reader: "Reader", value: Any) -> bytes:
    owner, name = getattr(value, "__self__", None), getattr(value, "__qualname__", value.__name__)
    static = isinstance(owner, types.ModuleType | type)
    if owner is not None and not static and type(owner).__name__ != "PyCapsule":
        return reader.join("builtin of", name, reader.of(owner))
    home: Any = owner if static else getattr(value, "__objclass__", type(value))
    module = str(getattr(value, "__module__", None) or getattr(home, "__module__", None) or home.__name__)
    return reader.join("builtin", module, name) if installed(module) else reader.unreadable(f"the C function {name}")


def _class(reader: "Reader", cls: type) -> bytes:
    if (name := installed_name(cls)) is not None:
        return reader.join("class", name)
    members = {name: reader.named(name, member) for name, member in vars(cls).items() if not NOT_OF_CLASSES.fullmatch(name)}
    bases = map(reader.of, cls.__bases__)
    return reader.join("class", cls.__qualname__, reader.of(type(cls)), reader.pairs(members), *bases)


def _member(reader: "Reader", value: enum.Enum) -> bytes:
    return reader.join("member", type(value).__qualname__, value.name, reader.of(value.value))


def _object(reader: "Reader", value: Any) -> bytes:
    """An instance: its class, and all of its state where that is known to lie open."""
    cls = type(value)
    if cls.__name__.endswith("Config") and callable(getattr(value, "to_dict", None)):
        return reader.join("config", reader.of(cls), reader.of(_without_origin(value.to_dict())))
    content = []
    for base in cls.__mro__:
        if base in CONTENT:
            content.append(reader.of(base(value)))
        elif not _open(base):
            return reader.unreadable(f"a {cls.__module__}.{cls.__qualname__}")
    if cls is object:  # made to be told apart from all others
        return reader.unreadable("an object()")
    state = dict(getattr(value, "__dict__", {}))
    slots = {name for base in cls.__mro__ for name, kind in vars(base).items() if isinstance(kind, DESCRIPTORS[0])}
    state |= {name: getattr(value, name) for name in slots if hasattr(value, name)}
    return reader.join(
        "object", reader.of(cls), *content, reader.pairs({n: reader.named(n, item) for n, item in state.items()})
    )


def _open(cls: type) -> bool:
    """Whether the state that a class gives its instances lies in their attributes."""
    known = cls is object or cls is types.SimpleNamespace or cls.__module__ in ABSTRACT
    return known or is_dataclass(cls) or not installed(cls.__module__)


def _without_origin(config: Any) -> Any:
    if isinstance(config, dict):
        return {name: _without_origin(value) for name, value in config.items() if name not in NOT_OF_CONFIGS}
    return [_without_origin(value) for value in config] if isinstance(config, list) else config


def _by(kind: str, *attributes: str) -> Kind:
    """What is known by some of its attributes."""
    return lambda reader, value: reader.join(kind, *(reader.named(name, getattr(value, name)) for name in attributes))


KINDS: tuple[tuple[Any, Kind], ...] = (
    (SHOWN, lambda reader, value: reader.join(type(value).__name__, str(value))),
    (logging.Logger, _by("logger", "name")),
    (enum.Enum, _member),
    (Tensor, _tensor),
    ((np.ndarray, np.generic), _array),
    (types.FunctionType, _function),
    (types.MethodType, _by("method", "__func__", "__self__")),
    (functools.partial, _by("partial", "func", "args", "keywords", "__dict__")),
    (type(functools.lru_cache(len)), _by("cache", "__wrapped__")),
    ((staticmethod, classmethod), _by("method of a class", "__func__")),
    (property, _by("property", "fget", "fset", "fdel")),
    (functools.cached_property, _by("cached property", "func")),
    (slice, _by("slice", "start", "stop", "step")),
    (re.Pattern, _by("pattern", "pattern", "flags")),
    (bytearray, lambda reader, value: reader.join("bytearray", bytes(value))),
    (types.CodeType, _code),
    (BUILTINS, _builtin),
    (DESCRIPTORS, _by("descriptor", "__name__")),
    (FIELD, _by("field")),
    (MAPPINGS, _mapping),
    (SEQUENCES, _sequence),
    (SETS, _set),
)
