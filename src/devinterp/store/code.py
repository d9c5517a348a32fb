"""What belongs to an installed package, and what a piece of code takes from outside of itself."""

import dis
import importlib.util
import sys
import sysconfig
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

HOMES = {"site-packages", "dist-packages"}
BY_TEXT = {"globals", "eval", "exec", "__import__", "import_module"}
"""Ways to reach anything at all by a name that is made when the code runs"""
BY_TEXT_IN_MODULES = {"getattr", "vars", "dir", "__dict__"}
LOADS = {"LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"}


@lru_cache(maxsize=10_000)
def installed(module: str) -> bool:
    """Whether a module is of Python itself or of an installed package, and so known by its name."""
    top = module.partition(".")[0]
    if top in ("", "__main__"):
        return False
    if top == "devinterp":
        return True
    found = sys.modules.get(top)
    places = [getattr(found, "__file__", None) or "", *map(str, getattr(found, "__path__", []))]
    places = [place for place in places if place]
    if not places:
        return top in sys.builtin_module_names or top in sys.stdlib_module_names
    paths = [Path(place) for place in places]
    standard = Path(sysconfig.get_path("stdlib"))
    return all(HOMES & set(path.parts) or standard in path.parents for path in paths)


def installed_name(cls: type) -> str | None:
    """The name under which an installed package has this very class; None for all other classes."""
    if not installed(cls.__module__):
        return None
    found: Any = sys.modules.get(cls.__module__)
    for part in cls.__qualname__.split("."):
        found = getattr(found, part, None)
    hidden = found is None and cls.__module__ in ("builtins", "types", "typing")  # such as the class of None
    return f"{cls.__module__}.{cls.__qualname__}" if found is cls or hidden else None


@dataclass(frozen=True)
class NamespaceUse:
    """Names that code, and the code inside it, looks up."""

    globals: tuple[str, ...]
    names: frozenset[str]
    """of globals, attributes and imports alike, and texts that may be such names"""
    imports: tuple[tuple[int, str], ...]
    """level (0 = absolute) and name of modules that are imported when the code runs"""

    def imports_of(self, home: Mapping[str, Any]) -> list[str]:
        """Full names of the modules imported, those of installed packages left out."""
        package = str(home.get("__package__") or "")
        full = [
            importlib.util.resolve_name("." * level + name, package) if level and package else "." * level + name
            for level, name in self.imports
        ]
        return sorted({name for name in full if not _known(name)})

    def by_text(self, home: Mapping[str, Any]) -> list[str]:
        """Built-in functions used that may reach anything."""
        return sorted(BY_TEXT & (set(self.globals) - home.keys() | self.names & {"import_module"}))

    @staticmethod
    def loaded(name: str) -> types.ModuleType | None:
        return sys.modules.get(name)


def _known(name: str) -> bool:
    if name.partition(".")[0] not in sys.modules:  # not imported yet, so that its place is unknown
        return name.partition(".")[0] in sys.stdlib_module_names
    return installed(name)


@lru_cache(maxsize=10_000)
def namespace_use(code: types.CodeType) -> NamespaceUse:
    used: set[str] = set()
    names: set[str] = set()
    imports: set[tuple[int, str]] = set()
    for part in _nested(code):
        names |= set(part.co_names) | {text for text in part.co_consts if isinstance(text, str) and text.isidentifier()}
        instructions = [found for found in dis.get_instructions(part) if found.opname != "EXTENDED_ARG"]
        for number, instruction in enumerate(instructions):
            if instruction.opname in LOADS:
                used.add(instruction.argval)
            elif instruction.opname == "IMPORT_NAME":
                # the two before it load the level and the names
                imports.add((int(instructions[number - 2].argval or 0), instruction.argval))
    return NamespaceUse(tuple(sorted(used)), frozenset(names), tuple(sorted(imports)))


def _nested(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _nested(constant)
