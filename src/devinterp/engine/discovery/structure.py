"""The components of a model, found by autograd: no table of architectures, no configuration.

structure(model).layers[0].mixers[0].heads[1]  ->  {parameter name: Mask, or None for the whole parameter}
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from devinterp.engine.discovery.blocks import Found, Look, Looker, ProbeError
from devinterp.engine.discovery.masks import Parts, union
from devinterp.engine.discovery.mlp import Units, find_experts, find_neurons
from devinterp.engine.discovery.stacks import find_stacks
from devinterp.engine.discovery.tables import find_tables
from devinterp.engine.discovery.trace import quiet, trace
from devinterp.errors import DevinterpInputError, InputTypeError, InputValueError, got


@dataclass(frozen=True)
class Mixer:
    """What moves information between tokens: attention, a state-space model, a convolution."""

    path: str
    kind: str
    """"self", or "cross" where it reads another sequence only"""
    params: tuple[str, ...]
    heads: tuple[Parts, ...]
    group_of: tuple[int, ...]
    """the group (of keys and values) of each head"""
    roles: tuple[dict[str, Parts], ...]
    """for each head: q, k, v, o and gate -> its part"""
    o_path: str | None
    o_param: str | None
    attention: bool
    """its name says attention"""

    @property
    def whole(self) -> Parts:
        return dict.fromkeys(self.params)


@dataclass(frozen=True)
class Layer:
    """One block: its mixers, `mlp` and `norm` partition its parameters."""

    index: int
    params: tuple[str, ...]
    mixers: tuple[Mixer, ...]
    mlp: Parts
    norm: Parts
    experts: tuple[Parts, ...]
    neurons: Sequence[Parts]

    @property
    def attn(self) -> Parts:
        """Self-attention; in a block without any, its other mixer."""
        mine = [mixer for mixer in self.mixers if mixer.kind == "self"]
        return union(mixer.whole for mixer in [m for m in mine if m.attention] or mine)

    @property
    def main(self) -> tuple[Mixer, ...]:
        """The mixers whose heads are the layer's heads: self-attention, or other mixers of the own sequence."""
        mine = [mixer for mixer in self.mixers if mixer.kind == "self" and mixer.heads]
        return tuple([m for m in mine if m.attention] or mine)


@dataclass(frozen=True)
class Structure:
    """The stacks of blocks of a model and what lies outside them; together they partition the parameters."""

    stacks: dict[str, tuple[Layer, ...]]
    default: str | None
    embed: Parts
    pos: Parts
    unembed: Parts
    rest: Parts
    shapes: dict[str, tuple[int, ...]]

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The blocks of the largest stack."""
        return () if self.default is None else self.stacks[self.default]


_CACHE: "WeakKeyDictionary[nn.Module, dict[object, Structure]]" = WeakKeyDictionary()


def structure(model: nn.Module, inputs: Tensor | Mapping[str, Any] | None = None) -> Structure:
    """The components of a model. Takes a few forward passes, once per model; the model is left as it was.

    Args:
        model: any torch module that runs eagerly.
        inputs: arguments on which it runs, where token ids alone are not enough.

    Raises:
        InputValueError: the model cannot be run, or one of its modules cannot be run alone.
    """
    if not isinstance(model, nn.Module):
        raise InputTypeError(got("model", type(model), "a torch.nn.Module", "Load it first."))
    if not any(True for _ in model.parameters()):
        raise InputValueError(got("model", type(model).__name__, "a module with parameters", "It has none to select."))
    shapes = tuple((name, tuple(p.shape)) for name, p in model.named_parameters())
    known = _CACHE.setdefault(model, {})
    asked = _signature(inputs)
    for key in [(shapes, asked)] if inputs is not None else [key for key in known if key[0] == shapes]:  # type: ignore[index]
        if key in known:
            return known[key]
    try:
        with quiet(model):
            found = _Discovery(model, inputs).structure()
    except DevinterpInputError:
        raise
    except Exception as error:  # from the model's own code, run on noise
        shown = f"{type(error).__name__}: {error}" if not isinstance(error, ProbeError) else str(error)
        fix = "Select parameters by their names instead, which needs no discovery."
        raise InputValueError(f"model: its components cannot be found: {shown}. {fix}") from error
    _CACHE[model] = {(shapes, asked): found}
    return found


def _signature(inputs: Any) -> object:
    if isinstance(inputs, Mapping):
        return tuple(sorted((name, str(getattr(value, "shape", value))) for name, value in inputs.items()))
    return None if inputs is None else str(getattr(inputs, "shape", inputs))


class _Discovery:
    """The work of `structure`."""

    def __init__(self, model: nn.Module, inputs: Any):
        self.model = model
        self.trace = trace(model, inputs)
        self.names = {id(p): name for name, p in model.named_parameters()}
        self.paths = dict(model.named_parameters(remove_duplicate=False))
        self.shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        self.looker = Looker(model, self.trace)
        self.units: dict[object, tuple[tuple[Parts, ...], Units | None]] = {}

    def structure(self) -> Structure:
        stacks = find_stacks(self.model, self.trace)
        layers = {path: tuple(self._layer(i, roots) for i, roots in enumerate(b)) for path, b in stacks.items()}
        inside = {name for blocks in layers.values() for layer in blocks for name in layer.params}
        tables = find_tables(self.model, self.trace, stacks, inside)
        tables["unembed"] -= inside
        taken = inside.union(*tables.values())
        embed, pos, unembed = (self._in_order(tables[kind]) for kind in ("embed", "pos", "unembed"))
        rest = self._in_order(set(self.shapes) - taken)
        return Structure(layers, self._largest(layers), embed, pos, unembed, rest, self.shapes)

    def _in_order(self, names: set[str]) -> Parts:
        return dict.fromkeys(name for name in self.shapes if name in names)

    def _largest(self, layers: dict[str, tuple[Layer, ...]]) -> str | None:
        def size(path: str) -> int:
            names = {name for layer in layers[path] for name in layer.params}
            return sum(self.model.get_parameter(name).numel() for name in names)

        return max(layers, key=size, default=None)

    def _canonical(self, root: str) -> dict[str, str]:
        """Name inside the module at `root` -> name in the model."""
        prefix = f"{root}." if root else ""
        module = self.looker.modules[root]
        return {name: self.names[id(self.paths[prefix + name])] for name, _ in module.named_parameters()}

    def _layer(self, index: int, roots: Iterable[str]) -> Layer:
        roots = list(roots)
        kids = [kid for root in roots for kid in ((self.looker.kids(root) or [root]) if len(roots) == 1 else [root])]
        looks = [(kid, self.looker.look(kid, _cut(kid, roots))) for kid in kids]
        if len(roots) == 1 and not any(found.kind == "self" for _, look in looks for found in look.mixers):
            whole = self.looker.look(roots[0], "", flat=True)
            if any(found.heads for found in whole.mixers) or (whole.mixers and not any(look.mixers for _, look in looks)):
                looks = [(roots[0], whole)]
        mixers = [self._mixer(path, found) for path, look in looks for found in look.mixers]
        mlp = {self._canonical(path)[name] for path, look in looks for name in look.mlp}
        params = {self.names[id(p)] for root in roots for p in self.looker.modules[root].parameters()}
        mlp -= {name for mixer in mixers for name in mixer.params}
        norm = params - mlp - {name for mixer in mixers for name in mixer.params}
        experts, neurons = self._units(roots, looks)
        return Layer(
            index, tuple(self._in_order(params)), tuple(mixers), self._in_order(mlp), self._in_order(norm), experts, neurons
        )

    def _mixer(self, path: str, found: Found) -> Mixer:
        names = self._canonical(path)
        inner = f"{path}.{found.path}".strip(".") if found.path else path
        params = tuple(self._in_order({names[name] for name in found.params}))
        called = f"{inner.rpartition('.')[2]} {type(self.looker.modules[inner]).__name__}".lower()
        heads = found.heads
        if heads is None:
            return Mixer(inner, found.kind, params, (), (), (), None, None, "att" in called)
        parts = tuple(_renamed(head, names) for head in heads.heads)
        roles = tuple({role: _renamed(part, names) for role, part in per_head.items()} for per_head in heads.roles)
        o_path = None if heads.output is None else f"{path}.{heads.output}".strip(".")
        return Mixer(inner, found.kind, params, parts, heads.group_of, roles, o_path, names[heads.parameter], "att" in called)

    def _units(self, roots: list[str], looks: list[tuple[str, Look]]) -> tuple[tuple[Parts, ...], Sequence[Parts]]:
        """Experts, and the widest neurons: of one part of the block, or across parts."""
        experts: tuple[Parts, ...] = ()
        neurons: list[Units | None] = []
        parts = [(path, look) for path, look in looks if look.mlp and path in self.trace.calls]
        for path, look in parts:
            if id(look) not in self.units:
                self.units[id(look)] = self._probed(path, look)
                look.run = None  # the graph holds a copy of the parameters
            names = self._canonical(path)
            inner_experts, inner_neurons = self.units[id(look)]
            experts = experts or tuple(_renamed(expert, names) for expert in inner_experts)
            neurons.append(inner_neurons and inner_neurons.renamed(names))
        if len(parts) > 1 and len(roots) == 1 and roots[0] in self.trace.calls:
            neurons.append(self._spread(roots[0], looks))
        return experts, max((units for units in neurons if units is not None), key=len, default=())

    def _probed(self, path: str, look: Look) -> tuple[tuple[Parts, ...], Units | None]:
        if look.run is None:
            return (), None
        experts = find_experts(self.looker.modules[path], look.run, look.mlp)
        inside = {name for expert in experts for name in expert}
        return experts, find_neurons(look.run, lambda draw: self.looker.probe(path, draw), look.mlp - inside)

    def _spread(self, root: str, looks: list[tuple[str, Look]]) -> Units | None:
        key = tuple(id(look) for _, look in looks)
        if key not in self.units:
            names = {f"{path}.{name}"[len(root) + 1 :] if path != root else name for path, look in looks for name in look.mlp}
            try:
                run = self.looker.probe(root)
            except ProbeError:
                return None
            self.units[key] = (), find_neurons(run, lambda draw: self.looker.probe(root, draw), names)
        units = self.units[key][1]
        return units and units.renamed(self._canonical(root))


def _cut(kid: str, roots: list[str]) -> str:
    for number, root in enumerate(roots):
        if kid == root or kid.startswith(f"{root}."):
            return f"{number}:{kid[len(root) :]}"
    return kid


def _renamed(parts: Mapping[str, Any], names: Mapping[str, str]) -> Parts:
    return {names[name]: mask for name, mask in parts.items()}
