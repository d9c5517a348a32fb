"""From the name of a component to the weights that move: `create_param_masks(model, "l0h1")`."""

import itertools
import math
import sys
from collections.abc import Mapping
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from devinterp.engine.discovery.masks import Mask, runs
from devinterp.engine.discovery.restrict import select
from devinterp.errors import DevinterpInputError, InputTypeError, InputValueError, got
from devinterp.slt.control import CONTROL
from devinterp.store.sweeps import FULL

RUNS_SHOWN = 4


@overload
def create_param_masks(
    model: nn.Module, restriction: str | list[str], *, inputs: Any = None, dense: Literal[True] = True
) -> dict[str, Tensor | None]: ...
@overload
def create_param_masks(
    model: nn.Module, restriction: str | list[str], *, inputs: Any = None, dense: Literal[False]
) -> dict[str, Mask | None]: ...
def create_param_masks(
    model: nn.Module, restriction: str | list[str], *, inputs: Any = None, dense: bool = True
) -> dict[str, Tensor | None] | dict[str, Mask | None]:
    """Masks of a component of the model, for `param_masks` of `sample`.

    Components are found by running the model's parts on noise and looking at which elements their outputs depend on: there is
    no table of architectures. This takes a few forward passes, once per model; the model and the random state are left
    as they were. `docs/components.md` defines every component.

    Args:
        model: any torch module that runs eagerly: Hugging Face, TransformerLens or custom.
        restriction: "full", "l0" (a block), "l0h1" (a head with its keys and values), "l0h1 q" (or k, v, o, qk, ov), "l0g0"
            (a group of heads with shared keys and values), "l0 attn", "l0 mixer", "l0 cross", "l0 mlp", "l0 norm", "l0e3"
            (an expert), "l0n0:64" (MLP neurons), "embed", "unembed", "pos", "rest", or a parameter name. Another stack than
            the largest by a part of its name: "encoder/l0h1". A list selects the union.
        inputs: what the model runs on, where token ids alone are not enough: a tensor of token ids (batch, token), or a dict
            of arguments.
        dense: False returns `Mask` objects, which hold index sets instead of tensors as large as the parameters.

    Returns:
        Parameter name -> bool mask of the parameter's shape, or None for the whole parameter. Masks that depend on one axis
        are views that store that axis alone: clone before writing to one.

    Raises:
        InputValueError: no such component (the error lists those there are), or a model that cannot be examined.
        InputTypeError: a restriction that is no string.
    """
    if not isinstance(model, nn.Module):
        raise InputTypeError(got("model", type(model), "a torch.nn.Module", "Load it first."))
    chosen = select(model, restriction, inputs)
    if not dense:
        return chosen
    parameters = dict(model.named_parameters())
    return {name: None if mask is None else mask.dense(parameters[name].device) for name, mask in chosen.items()}


def preview_weight_restriction(model: nn.Module, masks: Mapping[str, Tensor | Mask | None], *, plain: bool = False) -> None:
    """Print what masks select: the elements of each parameter, how many, and which share of the model's weights.

    Args:
        model: the model that the masks are for.
        masks: parameter name -> bool mask of the parameter's shape, `Mask`, or None for the whole parameter.
        plain: print the selected parameter names alone, one per line.

    Raises:
        InputValueError: a name that is no parameter of the model, or a mask of another shape.
        InputTypeError: masks that are no dict of tensors, `Mask` or None.
    """
    if not isinstance(model, nn.Module):
        raise InputTypeError(got("model", type(model), "a torch.nn.Module", "Load it first."))
    parameters = dict(model.named_parameters())
    chosen = {name: _checked(name, mask, parameters) for name, mask in _mapping(masks).items()}
    if plain:
        sys.stdout.write("".join(f"{name}\n" for name, (_, count) in chosen.items() if count))
        return
    sys.stdout.write("\n".join(_table(chosen, parameters)) + "\n")


def _mapping(masks: Any) -> Mapping[str, Any]:
    if not isinstance(masks, Mapping):
        raise InputTypeError(got("masks", type(masks), "a dict: parameter name -> mask or None", "Try create_param_masks."))
    return masks


def _checked(name: str, mask: Any, parameters: Mapping[str, Tensor]) -> tuple[str, int]:
    """Where the selected elements lie, in words, and how many they are."""
    if name not in parameters:
        fix = "Tied weights go by their first name. Are the masks of another model?"
        raise InputValueError(got("masks", name, "names from model.named_parameters()", fix))
    shape = tuple(parameters[name].shape)
    if mask is None:
        return "all", math.prod(shape)
    if not isinstance(mask, Tensor | Mask):
        raise InputTypeError(got(f"masks[{name!r}]", type(mask), "a bool tensor, a Mask or None", "Try create_param_masks."))
    if tuple(mask.shape) != shape:
        raise InputValueError(got(f"masks[{name!r}]", tuple(mask.shape), f"of the parameter's shape {shape}", ""))
    if isinstance(mask, Mask):
        return _words(mask), mask.numel
    if mask.dtype != torch.bool and not ((mask == 0) | (mask == 1)).all():
        raise InputValueError(got(f"masks[{name!r}]", "a mask with other values", "made of 0 and 1", "sample() refuses it."))
    chosen = mask.bool()
    count = int(chosen.sum())
    if not count:
        return "nothing", 0
    lines = [chosen.movedim(axis, 0).reshape(size, -1).any(1) for axis, size in enumerate(shape)]
    product = Mask.of(shape, {axis: line.nonzero().flatten().tolist() for axis, line in enumerate(lines)})
    return (_words(product) if product.numel == count else "scattered"), count


def _words(mask: Mask) -> str:
    return " + ".join(" x ".join(_axis(term.get(axis)) for axis in range(len(mask.shape))) for term in mask.terms)


def _axis(indices: tuple[int, ...] | None) -> str:
    if indices is None:
        return "all"
    pieces = [
        str(run.start) if run.stop == run.start + 1 else f"{run.start}:{run.stop}" + (f":{run.step}" if run.step else "")
        for run in runs(indices)
    ]
    more = [f"... ({len(pieces)} runs)"] if len(pieces) > RUNS_SHOWN else []
    return ",".join(pieces[:RUNS_SHOWN] + more)


def _table(chosen: Mapping[str, tuple[str, int]], parameters: Mapping[str, Tensor]) -> list[str]:
    rows = [("parameter", "shape", "selected", "elements", "of parameter")]
    for module, names in itertools.groupby(chosen, key=lambda name: ".".join(name.split(".")[:-2])):
        rows.append((module or "(model)", "", "", "", ""))
        for name in names:
            where, count = chosen[name]
            shape = " x ".join(map(str, parameters[name].shape))
            rows.append(
                (f"  {'.'.join(name.split('.')[-2:])}", shape, where, f"{count:,}", _share(count, parameters[name].numel()))
            )
    total, everything = sum(count for _, count in chosen.values()), sum(p.numel() for p in parameters.values())
    rows.append((f"total: {len(chosen)} parameters", "", "", f"{total:,}", f"{_share(total, everything)} of all weights"))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    number = max(len(row[3]) for row in rows)
    return [
        "  ".join(
            [*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3].rjust(number), row[4]]
        ).rstrip()
        for row in rows
    ]


def _share(part: int, whole: int) -> str:
    percent = 100 * part / max(whole, 1)
    return f"{percent:.0f} %" if percent >= 10 or not part else f"{percent:.2g} %"


def check_restrictions(given: Any, control: bool) -> list[str]:
    """Names of the restrictions, the whole model first."""
    if not isinstance(given, Mapping):
        raise InputTypeError(got("weight_restrictions", given, "a dict: name -> masks", "Try {'full': None, 'l0h0': 'l0h0'}."))
    if FULL not in given:
        fix = "Add 'full': None, the whole model."
        raise InputValueError(got("weight_restrictions", list(given), "a dict that holds 'full'", fix))
    if len(given) < 2:
        raise InputValueError(got("weight_restrictions", list(given), "'full' and at least one more", "Try 'l0h0': 'l0h0'."))
    seen: dict[str, str] = {}
    for name in given:
        if (
            not isinstance(name, str)
            or not name.strip()
            or len(name) > 100
            or "/" in name
            or "\\" in name
            or not name.isprintable()
        ):
            allowed = "a name of up to 100 printable characters without slashes"
            raise InputValueError(got("weight_restrictions", name, allowed, "It becomes part of a file name. Try 'l0h0'."))
        if (folded := name.casefold()) in seen:
            raise InputValueError(f"weight_restrictions: {name!r} and {seen[folded]!r} would share a file. Rename one of them.")
        seen[folded] = name
    if control and (taken := [name for name in given if name.casefold().startswith(f"{CONTROL}_")]):
        fix = f"A control takes such names for its own files. Rename {taken}."
        raise InputValueError(got("weight_restrictions", taken, f"names without {CONTROL + '_'!r} at their beginning", fix))
    return [FULL, *(name for name in given if name != FULL)]


def masks_of(model: nn.Module, name: str, value: Any) -> Any:
    """Masks as given, or of the component that is named."""
    if not isinstance(value, str | list):
        return value
    try:
        return create_param_masks(model, value)
    except DevinterpInputError as error:
        raise InputValueError(f"weight_restrictions[{name!r}]: {error}") from error
