"""Which elements move, gathered into one flat vector, whatever the architecture.

Weights, gradient, noise and sampler state of a chain are vectors of this one length. They are float32 masters for models in
half precision, since there the noise of a step would be lost in rounding (float64 models stay float64). Of a model that is
spread over several devices they lie on the first, and its parameters get their part of them on their own.
"""

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from devinterp.errors import InputTypeError, InputValueError, got

REAL_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Piece:
    """The moving elements of one parameter, and where they lie in the flat vector."""

    name: str
    parameter: Tensor
    index: Tensor | None
    """flat positions of the moving elements in the parameter; None = all of them"""
    start: int
    stop: int

    def anchor(self, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of this piece at the checkpoint: a view where the whole parameter moves."""
        flat = self.parameter.reshape(-1)
        return flat[start:stop] if self.index is None else flat[self.index[start:stop]]

    def shaped(self, flat: Tensor) -> Tensor:
        """This piece's stretch of a flat vector (or of a stack of them); of a whole parameter in its shape.

        In the parameter's own shape a leaf needs no view in the graph. Autograd would run the views, made before anything
        else, after everything else, and hold all gradients until then.
        """
        stretch = flat[..., self.start : self.stop]
        if self.index is not None:
            return stretch
        return stretch.view(*flat.shape[:-1], *self.parameter.shape)

    def place(self, leaf: Tensor, cast: bool = True) -> Tensor:
        """The parameter with its moving elements taken from `leaf`, differentiable in `leaf`."""
        leaf = leaf.to(self.parameter.device, self.parameter.dtype if cast else leaf.dtype)
        if self.index is None:
            return leaf
        return self.parameter.to(leaf.dtype).reshape(-1).index_copy(0, self.index, leaf).view(self.parameter.shape)


@dataclass(frozen=True)
class Selection:
    """The moving elements of a model: one flat vector of `size` elements."""

    pieces: tuple[Piece, ...]
    size: int
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, parameters: Mapping[str, Tensor], masks: Mapping[str, Tensor | None]) -> "Selection":
        return cls.of_indices(
            parameters,
            {name: None if mask is None else mask.bool().reshape(-1).nonzero().squeeze(1) for name, mask in masks.items()},
        )

    @classmethod
    def of_indices(cls, parameters: Mapping[str, Tensor], indices: Mapping[str, Tensor | None]) -> "Selection":
        """From the flat positions of the moving elements of each parameter; None = all of them."""
        pieces, start = [], 0
        for name, positions in indices.items():
            parameter = parameters[name]
            index = None if positions is None else positions.to(parameter.device)
            stop = start + (parameter.numel() if index is None else index.numel())
            pieces.append(Piece(name, parameter, index, start, stop))
            start = stop
        wide = any(piece.parameter.dtype == torch.float64 for piece in pieces)
        first = next(iter(parameters.values()))
        return cls(tuple(pieces), start, torch.float64 if wide else torch.float32, first.device)

    def initial(self) -> Tensor:
        """A new flat vector with the weights of the checkpoint."""
        flat = torch.empty(self.size, dtype=self.dtype, device=self.device)
        for piece in self.pieces:
            flat[piece.start : piece.stop] = piece.anchor(0, piece.stop - piece.start)
        return flat

    def leaves(self, flat: Tensor, gradient: Tensor | None = None) -> list[Tensor]:
        """One view of `flat` per piece, to differentiate by; autograd adds into `gradient` in place where it is given."""
        leaves = []
        for piece in self.pieces:
            leaf = piece.shaped(flat).detach().requires_grad_()
            if gradient is not None:
                leaf.grad = piece.shaped(gradient)
            leaves.append(leaf)
        return leaves

    def place(self, leaves: list[Tensor], cast: bool = True) -> dict[str, Tensor]:
        """The moved parameters by name, differentiable in the leaves; without `cast` in the dtype of the leaves."""
        return {piece.name: piece.place(leaf, cast) for piece, leaf in zip(self.pieces, leaves, strict=True)}

    def blocks(self, length: int) -> Iterator["Block"]:
        """The flat vector in pieces of `length`, each with its own view of the anchor."""
        for start in range(0, self.size, length):
            stop = min(start + length, self.size)
            parts = tuple(
                piece.anchor(max(start, piece.start) - piece.start, min(stop, piece.stop) - piece.start).to(self.device)
                for piece in self.pieces
                if piece.start < stop and start < piece.stop
            )
            yield Block(slice(start, stop), parts, self.dtype)


@dataclass(frozen=True)
class Block:
    """A stretch of the flat vector."""

    where: slice
    parts: tuple[Tensor, ...]
    dtype: torch.dtype

    @property
    def length(self) -> int:
        return int(self.where.stop - self.where.start)

    @property
    def anchor(self) -> Tensor:
        """w0 on this stretch. Large float32 parameters are read where the model keeps them, without a copy."""
        joined = self.parts[0] if len(self.parts) == 1 else torch.cat([part.to(self.dtype) for part in self.parts])
        return joined.to(self.dtype)


def check_masks(model: nn.Module, masks: Any) -> dict[str, Tensor | None]:
    """The moving parameters in the model's order, each with its mask; None = the whole parameter."""
    parameters = dict(model.named_parameters())
    if masks is None:
        chosen = {name: None for name, p in parameters.items() if p.requires_grad or not p.is_floating_point()}
        if not chosen:
            allowed = "a model with parameters that require gradients"
            fix = "Call model.requires_grad_(True), or name the parameters to move in param_masks."
            raise InputValueError(got("model", "all parameters frozen", allowed, fix))
        return {name: _check_mask(name, parameters[name], None) for name in chosen}
    if not isinstance(masks, Mapping):
        raise InputTypeError(got("param_masks", masks, "a dict: parameter name -> mask or None", "None = full model."))
    if not masks:
        raise InputValueError(got("param_masks", masks, "a dict with at least one parameter", "None = full model."))
    for name in masks:
        if name not in parameters:
            raise InputValueError(_unknown(model, name, parameters))
    return {name: _check_mask(name, p, masks[name]) for name, p in parameters.items() if name in masks}


def _unknown(model: nn.Module, name: Any, parameters: Mapping[str, Tensor]) -> str:
    every = dict(model.named_parameters(remove_duplicate=False))
    if name in every:
        canonical = next(other for other, p in parameters.items() if p is every[name])
        fix = f"Both names are one tensor; use {canonical!r}."
        return got("param_masks", name, f"the first name of a tied weight, {canonical!r}", fix)
    close = difflib.get_close_matches(str(name), list(parameters), n=3, cutoff=0.3)
    return got("param_masks", name, "names from model.named_parameters()", f"The closest are {close}.")


def _check_mask(name: str, parameter: Tensor, mask: Any) -> Tensor | None:
    shown = f"param_masks[{name!r}]"
    if "parametrizations" in name.split("."):
        fix = "Fold it in (torch.nn.utils.parametrize.remove_parametrizations), or leave it out of param_masks."
        raise InputValueError(got(f"model parameter {name!r}", "part of a parametrised weight", "a weight itself", fix))
    if parameter.dtype not in REAL_DTYPES:
        allowed = f"one of {[str(dtype) for dtype in REAL_DTYPES]}"
        fix = "Name the parameters to move in param_masks without it, or load the model unquantised."
        raise InputTypeError(got(f"model parameter {name!r}", str(parameter.dtype), allowed, fix))
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise InputTypeError(got(shown, type(mask), "a bool tensor or None", "Try torch.ones_like(p, dtype=bool)."))
    if mask.shape != parameter.shape:
        raise InputValueError(got(shown, tuple(mask.shape), f"of the parameter's shape {tuple(parameter.shape)}", ""))
    if mask.dtype != torch.bool and not ((mask == 0) | (mask == 1)).all():
        fix = "A fraction does not make an element move less, it would change its law."
        raise InputValueError(got(shown, "a mask with other values", "made of 0 and 1", fix))
    if not mask.bool().any():
        raise InputValueError(got(shown, "all False", "a mask with at least one True", "Leave the parameter out."))
    return None if mask.bool().all() else mask
