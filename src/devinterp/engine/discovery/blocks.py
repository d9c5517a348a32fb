"""What the parts of one block are: token mixers with their heads, feed-forward parts, norms of the residual stream."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import nn

from devinterp.engine.discovery.heads import Heads, find_heads
from devinterp.engine.discovery.probe import Run, is_norm, run
from devinterp.engine.discovery.trace import Trace


@dataclass(frozen=True)
class Found:
    """A token mixer inside a module, with names relative to that module."""

    path: str
    kind: str
    params: frozenset[str]
    heads: Heads | None


@dataclass
class Look:
    """The parameters of a module by what they are for, with names relative to it."""

    mixers: list[Found] = field(default_factory=list)
    mlp: set[str] = field(default_factory=set)
    norm: set[str] = field(default_factory=set)
    run: Run | None = None


class Looker:
    """Looks at modules of a model, once per kind: same place in the block, class, shapes and head counts."""

    def __init__(self, model: nn.Module, trace: Trace):
        self.modules = dict(model.named_modules())
        self.trace = trace
        self.known: dict[object, Look] = {}

    def kids(self, path: str) -> list[str]:
        """Executed children, through containers; children that never ran."""
        found: list[str] = []
        for name, child in self.modules[path].named_children():
            inner = f"{path}.{name}" if path else name
            if not any(True for _ in child.parameters()):
                continue
            container = inner not in self.trace.calls and isinstance(child, nn.ModuleList | nn.ModuleDict | nn.Sequential)
            found += self.kids(inner) if container else [inner]
        return found

    def look(self, path: str, place: str, flat: bool = False) -> Look:
        """The parts of the module at `path`; `flat`: it is a whole block whose children do not mix tokens."""
        module = self.modules[path]
        key = (place, flat, _kind(module), path in self.trace.calls)
        if key not in self.known:
            self.known[key] = self._look(path, flat)
        return self.known[key]

    def _look(self, path: str, flat: bool) -> Look:
        module = self.modules[path]
        names = {name for name, _ in module.named_parameters()}
        matrices = {name for name, p in module.named_parameters() if p.dim() > 1}
        if is_norm(module) or not matrices:
            return Look(norm=names)
        if path not in self.trace.calls:
            if "att" in (path.rpartition(".")[2] + type(module).__name__).lower():
                return Look([Found("", "cross", frozenset(names), None)])
            return Look(mlp=names)
        run = self.probe(path)
        look = Look(self._mixers(path, run, flat))
        taken = {name for mixer in look.mixers for name in mixer.params}
        left = names - taken
        norms = self._residual_norms(module, run, left)
        look.norm, look.mlp, look.run = norms & left, left - norms, run if left - norms else None
        return look

    def probe(self, path: str, draw: int = 0) -> Run:
        try:
            return run(self.modules[path], self.trace.calls[path], draw)
        except Exception as error:
            shown = f"{path} ({type(self.modules[path]).__name__})"
            raise ProbeError(f"{shown} could not be run alone: {type(error).__name__}: {error}") from error

    def again(self, path: str, draw: int) -> Run | None:
        """Another draw; none where the module then fails or overflows."""
        try:
            run = self.probe(path, draw)
        except ProbeError:
            return None
        return run if run.output.isfinite().all() else None

    def _mixers(self, path: str, run: Run, flat: bool) -> list[Found]:
        """The mixer of this module, or those of its children where it has none of its own."""
        kind = run.mixes(run.output)
        if not kind:
            return []
        module = self.modules[path]
        heads = find_heads(run, lambda draw: self.again(path, draw))
        inner = [kid for kid in self.kids(path) if kid in self.trace.calls and self._has_matrix(kid)]
        if heads is None:
            below = [self._inside(kid, path) for kid in inner]
            found = [mixer for mixers in below for mixer in mixers if mixer.heads is not None]
            names = frozenset(name for name, _ in module.named_parameters())
            return found or [Found("", kind, names - self._residual_norms(module, run, set(names)), None)]
        used = heads.upstream | {heads.parameter}
        region = _common(name for name in used if not _is_norm_at(module, name))
        rest = [
            kid for kid in inner if region and not _within(_cut(kid, path), region) and not _within(region, _cut(kid, path))
        ]
        others = [mixer for kid in rest for mixer in self._inside(kid, path)]
        if flat and not region:
            params = set(used) | ({heads.bias} if heads.bias else set()) | self._siblings(module, used)
        else:
            params = {name for name, _ in module.named_parameters() if not region or _within(name, region)}
        params -= self._norms_around(module, run, heads) | {name for mixer in others for name in mixer.params}
        return [Found(region, kind, frozenset(params), heads), *others]

    def _inside(self, kid: str, path: str) -> list[Found]:
        """Mixers of a child, with names relative to the parent."""
        run = self.probe(kid)
        prefix = _cut(kid, path)
        return [_moved(mixer, prefix) for mixer in self._mixers(kid, run, flat=False)]

    def _has_matrix(self, path: str) -> bool:
        return any(p.dim() > 1 for p in self.modules[path].parameters())

    def _siblings(self, module: nn.Module, used: Iterable[str]) -> set[str]:
        """Parameters beside those used, in the same leaf module (a bias that softmax cancels)."""
        owners = {name.rpartition(".")[0] for name in used} - {""}
        return {name for name, _ in module.named_parameters() if name.rpartition(".")[0] in owners}

    def _norms_around(self, module: nn.Module, run: Run, heads: Heads) -> set[str]:
        """Norms before the mixer's first matrix, or after its output projection: of the residual stream."""
        owners = {name.rpartition(".")[0] for name in heads.upstream if not _is_norm_at(module, name)}
        starts = [i for i, path in enumerate(run.order) if path in owners]
        ends = [i for i, path in enumerate(run.order) if path == heads.output]
        return _norms_outside(module, run, min(starts, default=0), max(ends, default=len(run.order)))

    def _residual_norms(self, module: nn.Module, run: Run, left: set[str]) -> set[str]:
        """Norms before the first, or after the last matrix of what is left."""
        owners = {name.rpartition(".")[0] for name in left if not _is_norm_at(module, name)}
        used = [i for i, path in enumerate(run.order) if path in owners]
        return _norms_outside(module, run, min(used, default=len(run.order)), max(used, default=-1))


class ProbeError(RuntimeError):
    """A module could not be run alone."""


def _norms_outside(module: nn.Module, run: Run, start: int, end: int) -> set[str]:
    places = {path: i for i, path in reversed(list(enumerate(run.order)))}
    return {
        name
        for name, _ in module.named_parameters()
        if _is_norm_at(module, name) and not start < places.get(name.rpartition(".")[0], start) <= end
    }


def _is_norm_at(module: nn.Module, name: str) -> bool:
    return is_norm(module.get_submodule(name.rpartition(".")[0]))


def _kind(module: nn.Module) -> object:
    shapes = tuple((name, tuple(p.shape)) for name, p in module.named_parameters(remove_duplicate=False))
    counts = tuple(
        (path, name, value)
        for path, child in module.named_modules()
        for name, value in sorted(vars(child).items())
        if type(value) is int and ("head" in name or "group" in name)
    )
    return type(module).__name__, shapes, counts


def _common(names: Iterable[str]) -> str:
    """The innermost module that holds all these parameters (a leaf's parent, since a projection is no mixer)."""
    paths = [name.split(".")[:-1] for name in names]
    if len(paths) == 1:
        return ".".join(paths[0])
    shared = []
    for level in zip(*paths, strict=False):
        if len(set(level)) > 1:
            break
        shared.append(level[0])
    return ".".join(shared)


def _within(path: str, region: str) -> bool:
    return path == region or path.startswith(f"{region}.")


def _cut(path: str, parent: str) -> str:
    return path[len(parent) + 1 :] if parent else path


def _moved(mixer: Found, prefix: str) -> Found:
    def at(name: str | None) -> str | None:
        return None if name is None else f"{prefix}.{name}" if name else prefix

    heads = mixer.heads
    if heads is not None:
        heads = Heads(
            at(heads.output),
            f"{prefix}.{heads.parameter}",
            at(heads.bias),
            frozenset(f"{prefix}.{name}" for name in heads.upstream),
            tuple({f"{prefix}.{name}": mask for name, mask in head.items()} for head in heads.heads),
            tuple(
                {role: {f"{prefix}.{name}": mask for name, mask in parts.items()} for role, parts in roles.items()}
                for roles in heads.roles
            ),
            heads.group_of,
        )
    params = frozenset(f"{prefix}.{name}" for name in mixer.params)
    return Found(f"{prefix}.{mixer.path}".rstrip("."), mixer.kind, params, heads)
