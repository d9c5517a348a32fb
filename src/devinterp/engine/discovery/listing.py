"""The components of a model by name, for people and for loops over all of a kind."""

from collections.abc import Iterator

from torch import nn

from devinterp.engine.discovery.masks import Parts
from devinterp.engine.discovery.restrict import select
from devinterp.engine.discovery.structure import Layer, Structure

KINDS = ("heads", "groups", "attn", "mlp", "layers")


def component_names(found: Structure, kind: str) -> list[str]:
    """Names of all components of a kind in the largest stack, as `create_param_masks` takes them."""
    return [name for layer in found.layers for name in _names(layer, kind)]


def _names(layer: Layer, kind: str) -> list[str]:
    at, main = f"l{layer.index}", layer.main
    if kind == "heads":
        return [f"{at}h{head}" for head in range(len(main[0].heads))] if len(main) == 1 else []
    if kind == "groups":
        return [f"{at}g{group}" for group in range(max(main[0].group_of) + 1)] if len(main) == 1 else []
    if kind == "attn":
        return [f"{at} attn"] if layer.attn else []
    if kind == "mlp":
        return [f"{at} mlp"] if layer.mlp else []
    return [at]


def inventory(model: nn.Module, found: Structure) -> Iterator[tuple[str, int]]:
    """Every component, parts indented under their layer, with its number of weights."""
    shapes = {name: p.numel() for name, p in model.named_parameters()}

    def size(parts: Parts) -> int:
        return sum(shapes[name] if mask is None else mask.numel for name, mask in parts.items())

    for table in ("embed", "pos"):
        if getattr(found, table):
            yield table, size(getattr(found, table))
    for layer in found.layers:
        yield f"l{layer.index}", sum(shapes[name] for name in layer.params)
        for part in ("attn", "mlp", "norm"):
            if parts := getattr(layer, part):
                yield f"  l{layer.index} {part}", size(parts)
        for name in _names(layer, "heads"):
            yield f"  {name}", size(select(model, name))
        if layer.experts:
            yield f"  l{layer.index}e0 ... l{layer.index}e{len(layer.experts) - 1}, each", size(layer.experts[0])
        if len(layer.neurons):
            yield f"  l{layer.index}n0 ... l{layer.index}n{len(layer.neurons) - 1}, each", size(layer.neurons[0])
    for table in ("unembed", "rest"):
        if getattr(found, table):
            yield table, size(getattr(found, table))
    for stack in found.stacks:
        if stack != found.default:
            layers = found.stacks[stack]
            every = {name for layer in layers for name in layer.params}
            yield f"{stack}/l0 ... {stack}/l{len(layers) - 1}, together", sum(shapes[name] for name in every)
