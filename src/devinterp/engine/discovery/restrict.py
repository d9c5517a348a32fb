"""The language of restrictions: "l0h1", "l0 mlp", "embed", "encoder/l0h1 q", a parameter name."""

import difflib
import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

from devinterp.engine.discovery.masks import Parts, union
from devinterp.engine.discovery.mlp import Units
from devinterp.engine.discovery.structure import Layer, Mixer, Structure, structure
from devinterp.errors import InputTypeError, InputValueError, got

GRAMMAR = re.compile(
    r"l(?P<layer>\d{1,9}) ?(?:(?P<part>attn|mixer|cross|mlp|norm)"
    r"|(?P<cross>cross)? ?h(?P<head>\d{1,9}) ?(?P<roles>qk|ov|q|k|v|o)?"
    r"|(?P<cross_group>cross)? ?g(?P<group>\d{1,9})|e(?P<expert>\d{1,9})|n(?P<first>\d{1,9})(?::(?P<stop>\d{1,9}))?)?"
)
FORMS = "full, l0, l0h1, l0h1 q|k|v|o|qk|ov, l0g0, l0 attn|mixer|cross|mlp|norm, l0e3, l0n0:64, embed, unembed, pos, rest"


def select(model: nn.Module, restriction: Any, inputs: Any = None) -> Parts:
    """What a restriction, or a list of them, selects; in the model's order of parameters."""
    asked = [restriction] if isinstance(restriction, str) else restriction
    if not isinstance(asked, list | tuple) or not all(isinstance(text, str) for text in asked):
        raise InputTypeError(got("restriction", restriction, "a string or a list of strings", "Try 'l0h1'."))
    if not asked:
        raise InputValueError(got("restriction", restriction, "a list with at least one member", "Try ['l0h0', 'l0h1']."))
    if any(text.strip().lower() == "full" for text in asked):
        if not isinstance(restriction, str):
            fix = "It is every parameter already: pass 'full' alone."
            raise InputValueError(got("restriction", restriction, "a list without 'full'", fix))
        return {name: None for name, _ in model.named_parameters()}
    chosen = union(_one(model, text, inputs) for text in asked)
    return {name: chosen[name] for name, _ in model.named_parameters() if name in chosen}


def _one(model: nn.Module, text: str, inputs: Any) -> Parts:
    named = dict(model.named_parameters(remove_duplicate=False))
    if text in named:
        first = {id(p): name for name, p in model.named_parameters()}
        return {first[id(named[text])]: None}
    stack, _, rest = text.rpartition("/")
    wanted = " ".join(rest.lower().split())
    match = GRAMMAR.fullmatch(wanted)
    if match is None and wanted not in ("embed", "unembed", "pos", "rest"):
        close = difflib.get_close_matches(text, list(named), n=3, cutoff=0.6)
        fix = f"The closest parameters are {close}." if close else "See docs/components.md."
        raise InputValueError(got("restriction", text, f"a parameter name or one of the forms {FORMS}", fix))
    found = structure(model, inputs)
    if match is None:
        if stack:
            raise InputValueError(got("restriction", text, f"{wanted!r} without a stack", f"Try {wanted!r}."))
        parts: Parts = getattr(found, wanted)
        return _filled(parts, text, f"this model has no {wanted!r} that can be told from the rest", found)
    layers = _stack(found, stack, text)
    number = int(match["layer"])
    if number >= len(layers):
        raise _absent(text, f"there is no layer {number}", found)
    return _in_layer(layers[number], match, text, found)


def _stack(found: Structure, stack: str, text: str) -> tuple[Layer, ...]:
    if not found.stacks:
        raise _absent(text, "this model has no list of blocks", found)
    if not stack:
        return found.layers
    wanted = stack.lower()
    names = [name for name in found.stacks if name.lower() == wanted]
    names = names or [name for name in found.stacks if wanted in name.lower().split(".")]
    names = names or [name for name in found.stacks if wanted in name.lower()]
    if len(names) != 1:
        fix = f"{'Several' if names else 'None'} match; name one of them."
        raise InputValueError(got("restriction", text, f"STACK/... with STACK part of one of {list(found.stacks)}", fix))
    return found.stacks[names[0]]


def _in_layer(layer: Layer, match: re.Match[str], text: str, found: Structure) -> Parts:
    if match["head"] or match["group"]:
        return _heads(layer, match, text, found)
    if match["expert"]:
        return _at(layer.experts, int(match["expert"]), "expert", text, found)
    if match["first"]:
        return _neurons(layer, int(match["first"]), match["stop"], text, found)
    cross = [mixer for mixer in layer.mixers if mixer.kind == "cross"]
    choices: dict[str | None, Callable[[], Parts]] = {
        None: lambda: dict.fromkeys(layer.params),
        "attn": lambda: layer.attn,
        "mixer": lambda: union(mixer.whole for mixer in layer.mixers),
        "cross": lambda: union(mixer.whole for mixer in cross),
        "mlp": lambda: layer.mlp,
        "norm": lambda: layer.norm,
    }
    part = match["part"]
    return _filled(choices[part](), text, f"layer {layer.index} has no {part or 'parameters'}", found)


def _heads(layer: Layer, match: re.Match[str], text: str, found: Structure) -> Parts:
    cross = bool(match["cross"] or match["cross_group"])
    mixers = [m for m in layer.mixers if m.kind == "cross" and m.heads] if cross else list(layer.main)
    if not mixers:
        kinds = ", ".join(mixer.path for mixer in layer.mixers) or "no token mixer"
        raise _absent(text, f"layer {layer.index} has no {'cross-attention ' * cross}heads ({kinds})", found)
    if len(mixers) > 1:
        fix = f"Take heads from structure(model) of one of {[mixer.path for mixer in mixers]}."
        raise InputValueError(got("restriction", text, "a layer with one kind of heads", fix))
    mixer = mixers[0]
    if match["group"]:
        groups = [_group(mixer, group) for group in range(max(mixer.group_of) + 1)]
        return _at(groups, int(match["group"]), "group", text, found)
    head = _at(mixer.heads, int(match["head"]), "head", text, found)
    if not match["roles"]:
        return head
    roles = mixer.roles[int(match["head"])]
    return _filled(union(roles[role] for role in match["roles"]), text, f"the head has no {match['roles']}", found)


def _group(mixer: Mixer, group: int) -> Parts:
    return union(head for head, of in zip(mixer.heads, mixer.group_of, strict=True) if of == group)


def _neurons(layer: Layer, first: int, stop: str | None, text: str, found: Structure) -> Parts:
    end = first + 1 if stop is None else int(stop)
    if not isinstance(layer.neurons, Units):
        raise _absent(text, f"layer {layer.index} has no neurons that can be told apart", found)
    if not first < end <= len(layer.neurons):
        raise _absent(text, f"neurons {first}:{end} of {len(layer.neurons)} are no range", found)
    return layer.neurons.select(range(first, end))


def _at(units: Sequence[Parts], index: int, kind: str, text: str, found: Structure) -> Parts:
    if index >= len(units):
        why = f"{kind} {index} of {len(units)}" if units else f"the layer has no {kind}s"
        raise _absent(text, why, found)
    return _filled(units[index], text, f"{kind} {index} holds no parameters", found)


def _filled(parts: Parts, text: str, why: str, found: Structure) -> Parts:
    if not parts:
        raise _absent(text, why, found)
    return parts


def _absent(text: str, why: str, found: Structure) -> InputValueError:
    return InputValueError(got("restriction", text, "a component of the model", f"Here {why}. {describe(found)}"))


def describe(found: Structure) -> str:
    """What the model has, in a sentence or two."""
    stacks = []
    for name, layers in found.stacks.items():
        runs = [(what, list(these)) for what, these in itertools.groupby(layers, key=_inventory)]
        if len(runs) == 1:
            told = f"layers {_span(layers)}; each with {runs[0][0]}"
        else:
            told = "; ".join(f"layer{'s' * (len(these) > 1)} {_span(these)} with {what}" for what, these in runs)
        stacks.append(f"{name}: {told}" if len(found.stacks) > 1 else told)
    tables = [kind for kind in ("embed", "pos", "unembed", "rest") if getattr(found, kind)]
    has = "; ".join(stacks) or "no layers"
    return f"The model has {has}. Outside: {', '.join(tables) or 'nothing'}."


def _inventory(layer: Layer) -> str:
    main, cross = layer.main, [m for m in layer.mixers if m.kind == "cross" and m.heads]
    counts = [("heads", len(m.heads)) for m in main] + [("groups", max(m.group_of) + 1) for m in main]
    counts += [("cross heads", len(m.heads)) for m in cross]
    counts += [("experts", len(layer.experts)), ("neurons", len(layer.neurons))]
    return ", ".join(f"{what} 0-{count - 1}" for what, count in counts if count) or "no heads"


def _span(layers: Iterable[Layer]) -> str:
    numbers = [layer.index for layer in layers]
    return f"{numbers[0]}-{numbers[-1]}" if len(numbers) > 1 else str(numbers[0])
