"""All that chains are between two steps, as tensors and numbers, and back."""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from devinterp.engine.chain import Walk
from devinterp.errors import StoreError

Tensors = dict[str, Tensor]


def state_of(walk: Walk) -> tuple[Tensors, dict[str, Any]]:
    """The tensors (views where that is possible) and the numbers from which `restore` makes the same walk.

    weights, sampler.* (chain, element); generators (chain, byte); unseen (step, chain); buffer.* of train_mode.
    """
    walker = walk.walker
    tensors = {"weights": walker.weights, "generators": torch.stack([rng.get_state() for rng in walker.rngs])}
    tensors |= {f"sampler.{name}": vector for name, vector in walker.kept.items()}
    numbers: dict[str, Any] = {"sampler": _plain_fields(walk)}
    if walk.plan.settings.train_mode:
        tensors |= {f"buffer.{name}": buffer.clone() for name, buffer in walker.buffers.items()}
    diverged = {str(chain): at for chain, at in walk.watch.diverged.items()}
    numbers |= {"diverged": diverged, "unseen": [t for t, _ in walk.watch.unseen]}
    if walk.watch.unseen:
        tensors["unseen"] = torch.stack([sums for _, sums in walk.watch.unseen])
    return tensors, numbers


def restore(walk: Walk, steps_taken: int, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
    """Put a new walk where another one was.

    Raises:
        StoreError: these are not the tensors of such a walk.
    """
    walker, watch = walk.walker, walk.watch
    expected, _ = state_of(walk)
    given = {name: tensor for name, tensor in tensors.items() if name != "unseen"}
    shapes = [{name: (t.shape, t.dtype) for name, t in of.items()} for of in (expected, given)]
    if shapes[0] != shapes[1]:
        raise StoreError("the stored state is not that of such chains")
    walker.weights.copy_(tensors["weights"])
    for rng, state in zip(walker.rngs, tensors["generators"], strict=True):
        rng.set_state(state.clone())  # a row of its own: the generator reads from the start of the storage
    for name, vector in _named(tensors, "sampler.").items():
        walker.kept[name].copy_(vector)
    if numbers["sampler"]:
        walker.states = [replace(state, **numbers["sampler"]) for state in walker.states]
    for name, buffer in _named(tensors, "buffer.").items():
        walker.buffers[name].copy_(buffer)
    watch.diverged = {int(chain): at for chain, at in numbers["diverged"].items()}
    unseen = list(tensors.get("unseen", torch.empty(0)).to(walker.weights.device))
    watch.unseen = list(zip(numbers["unseen"], unseen, strict=True))
    walk.steps_taken = steps_taken


def _plain_fields(walk: Walk) -> dict[str, Any]:
    """What is no tensor in a sampler's state, and equal in all blocks: the number of steps taken."""
    state = walk.walker.states[0]
    plain = {} if state is None else {item.name: getattr(state, item.name) for item in fields(state)}
    return {name: value for name, value in plain.items() if name not in walk.walker.kept}


def _named(tensors: Mapping[str, Tensor], prefix: str) -> Tensors:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
