"""A second device that any machine has: tensors that say they lie on "cpu:1", and do not mix with those on "cpu".

What an operator does there is what it does on the CPU, to the last bit; operators on tensors of both fail, as they do on two
GPUs.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

aten = torch.ops.aten
FIRST, SECOND = torch.device("cpu"), torch.device("cpu", 1)


class Placed(torch.Tensor):
    """A tensor on the second device."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "Placed":
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype, device=SECOND
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(function, args, kwargs or {})


def _computed(function: Any, args: Any, kwargs: Any) -> Any:
    given: list[torch.Tensor] = []
    tree_map(lambda part: given.append(part) if isinstance(part, torch.Tensor) else None, (args, kwargs))
    on_second = [part for part in given if isinstance(part, Placed)]
    # numbers, tensors of no dim, may go with tensors of any device
    on_first = [part for part in given if not isinstance(part, Placed) and part.dim()]
    asked = kwargs.get("device")
    moves = function in (aten._to_copy.default, aten.copy_.default)
    by_index = function in (aten.index.Tensor, aten.index_put_.default)  # indices may lie on the CPU
    if on_first and on_second and not moves and not by_index:
        raise RuntimeError(f"{function} on tensors of two devices")
    if asked is not None:
        to_second, kwargs = torch.device(asked) == SECOND, kwargs | {"device": FIRST}
    else:
        to_second = isinstance(given[0], Placed) if moves else bool(on_second)
    args, kwargs = tree_map(lambda part: part.inner if isinstance(part, Placed) else part, (args, kwargs))
    found = function(*args, **kwargs)
    itself = {id(part.inner): part for part in on_second}  # what is changed in place is returned

    def placed(part: Any) -> Any:
        if not (to_second and isinstance(part, torch.Tensor)):
            return part
        return itself[id(part)] if id(part) in itself else Placed(part)

    return tree_map(placed, found)


class _Everywhere(TorchDispatchMode):
    """Also tensors that are made on the second device from none there."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(function, args, kwargs or {})


@contextmanager
def two_devices() -> Iterator[None]:
    with _Everywhere():
        yield


def spread(model: torch.nn.Module, second: tuple[str, ...]) -> torch.nn.Module:
    """The modules of these names on the second device, each module with its inputs brought to it, as accelerate does."""
    for name, module in model.named_modules():
        there = any(name == other or name.startswith(f"{other}.") for other in second)
        if there:
            for key, parameter in list(module._parameters.items()):
                if parameter is not None:
                    moved = Placed(parameter.detach().clone())
                    module._parameters[key] = torch.nn.Parameter(moved, requires_grad=parameter.requires_grad)
            for key, buffer in list(module._buffers.items()):
                if buffer is not None:
                    module._buffers[key] = Placed(buffer.detach().clone())
        if not list(module.children()) or name in second:
            module.register_forward_pre_hook(_Brought(SECOND if there else FIRST), with_kwargs=True)
    return model


class _Brought:
    def __init__(self, device: torch.device):
        self.device = device

    def __call__(self, module: Any, args: Any, kwargs: Any) -> Any:
        return tree_map(lambda part: part.to(self.device) if isinstance(part, torch.Tensor) else part, (args, kwargs))
