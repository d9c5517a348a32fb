"""One module of a model run alone on noise, with autograd watching.

Its structure is asked for, not what these weights do with it: parameters are replaced by random ones of the same shape, the
hidden state by noise. A frozen, pruned, half-precision or zero-initialised model gives the same answer as any other.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

SEED = 7


@dataclass(frozen=True)
class Call:
    """What a module was called with in a forward pass of the model."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Record:
    """A matrix at work: output = input @ weight^T along `axis` of the weight (the rows), or in `groups` diagonal blocks."""

    path: str
    weight: str
    bias: str | None
    input: Tensor
    output: Tensor
    axis: int
    groups: int = 1


@dataclass
class Run:
    """The autograd graph of one module on noise, and what is known of it."""

    x: Tensor
    y: Tensor | None
    output: Tensor
    leaves: dict[str, Tensor]
    records: list[Record]
    order: list[str]
    raw: dict[str, Tensor] = field(default_factory=dict)
    """parameters used otherwise than by a matrix module"""

    @property
    def length(self) -> int:
        return self.x.shape[token_axis(self.x)]

    def lines(self, tensor: Tensor) -> Tensor:
        """The tensor as one line of features per token, in the order of the tokens where they have an axis of their own."""
        if self.length in tensor.shape[:-1]:
            axis = token_axis(tensor, self.length)
            return tensor.movedim(axis, 0).reshape(self.length, -1)
        return tensor.reshape(-1, tensor.shape[-1])

    def at_tokens(self, tensor: Tensor, last: bool) -> Tensor:
        """A random sum over the tokens of `tensor`, or its last token: one vector of features."""
        lines = self.lines(tensor)
        return lines[-1] if last else (lines * noise((len(lines), 1), lines.device).abs().add(0.5)).sum(0)

    def mixes(self, tensor: Tensor) -> str:
        """How tokens depend on others: "self" on the hidden state, "cross" on the other sequence alone, "" not at all."""
        if not tensor.requires_grad:
            return ""
        line = self.at_tokens(tensor, last=True)
        inputs = [self.x] if self.y is None else [self.x, self.y]
        mine, *others = torch.autograd.grad(line @ noise(line.shape, line.device), inputs, retain_graph=True, allow_unused=True)
        if mine is not None and int(self.lines(mine).any(1)[:-1].sum()) > (self.length not in tensor.shape[:-1]):
            return "self"
        return "cross" if others and others[0] is not None and others[0].any() else ""


def noise(shape: Sequence[int], device: torch.device, seed: int = SEED) -> Tensor:
    """Standard normal numbers from a generator of their own."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device)


def token_axis(tensor: Tensor, length: int | None = None) -> int:
    """The axis of the tokens: the first of this length, or of more than one."""
    sizes = tensor.shape[:-1] or tensor.shape
    return next((i for i, size in enumerate(sizes) if (size > 1 if length is None else size == length)), 0)


def jittered(name: str, parameter: Tensor, seed: int, draw: int) -> Tensor:
    """Random float32 values: matrices anew; vectors, where decays and scales have a range to keep, around their own.

    In every other draw vectors are new too, since their own may saturate something for good.
    """
    seed += SEED if parameter.dim() > 1 else SEED * (draw + 1)
    made = torch.rand(parameter.shape, generator=torch.Generator().manual_seed(seed)).to(parameter.device)
    if parameter.dim() > 1:
        return (made - 0.5) * math.sqrt(12 / max(parameter.shape[-2:]))
    own = parameter.detach().float()
    if draw % 2 or not own.any() or not own.isfinite().all():
        return made * 0.1 if name.endswith("bias") else made + 0.5
    return torch.where(own == 0, own.abs().mean(), own) * (made + 0.5)


def is_norm(module: nn.Module) -> bool:
    """By the name of the class: nothing else tells a norm from an activation."""
    return "norm" in type(module).__name__.lower() and not any(list(child.parameters()) for child in module.children())


def first_tensor(output: Any) -> Tensor | None:
    """The hidden state in what a module returned."""
    if isinstance(output, Tensor):
        return output if output.is_floating_point() else None
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, list | tuple):
        return next((found for item in output if (found := first_tensor(item)) is not None), None)
    return None


def run(module: nn.Module, call: Call, draw: int = 0) -> Run:
    """Run the module alone on noise in place of its hidden states."""
    state: dict[str, Tensor] = {}
    leaves: dict[str, Tensor] = {}
    for index, (name, parameter) in enumerate(module.named_parameters()):
        leaves[name] = state[name] = jittered(name, parameter, index, draw).requires_grad_()
    for name, buffer in module.named_buffers():
        state[name] = buffer.float() if buffer.is_floating_point() else buffer.clone()
    args, kwargs, x, y = _noisy(call, draw)
    records: list[Record] = []
    order: list[str] = []
    with ExitStack() as stack:
        for path, child in module.named_modules():
            stack.enter_context(_watched(path, child, records, order))
        result = first_tensor(functional_call(module, state, args, kwargs))
    if result is None or not result.requires_grad:
        raise RuntimeError(f"{type(module).__name__} returned no differentiable tensor")
    done = Run(x, y, result, leaves, records, order)
    used = {name for record in records for name in (record.weight, record.bias)}
    done.raw = {name: leaf for name, leaf in leaves.items() if name not in used}
    return done


def _noisy(call: Call, draw: int) -> tuple[tuple[Any, ...], dict[str, Any], Tensor, Tensor | None]:
    """Hidden states as noise: tensors of the first one's shape are the same sequence, others with its width another."""
    values = [*call.args, *call.kwargs.values()]
    states = [v for v in values if isinstance(v, Tensor) and v.is_floating_point() and v.dim() >= 2]
    if not states:
        raise RuntimeError("called without a hidden state")
    first = states[0]
    other = next((v for v in states if v.shape != first.shape and v.dim() == first.dim() and token_axis(v) == token_axis(first)
                  and v.shape[-1] == first.shape[-1] and v.shape[:1] == first.shape[:1]), None)  # fmt: skip
    sign = -1.0 if draw % 2 else 1.0  # what a rectifier blocks in one draw it passes in the next
    x = (sign * noise(first.shape, first.device, SEED + 2 * (draw // 2))).requires_grad_()
    y = None if other is None else (sign * noise(other.shape, other.device, SEED + 1 + 2 * (draw // 2))).requires_grad_()

    copies: dict[int, Tensor] = {}  # operations in place are legal on a copy; what was one tensor stays one

    def replaced(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point() and id(value) not in copies:
            if value.shape == first.shape:
                copies[id(value)] = x.clone()
            elif y is not None and other is not None and value.shape == other.shape:
                copies[id(value)] = y.clone()
        return copies.get(id(value), plain(value))

    return tuple(replaced(v) for v in call.args), {k: replaced(v) for k, v in call.kwargs.items()}, x, y


def plain(value: Any) -> Any:
    """Tensors in float32; caches left out."""
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, dict) and type(value) is dict:
        return {key: plain(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(plain(item) for item in value)
    return None if "cache" in type(value).__name__.lower() else value


@contextmanager
def _watched(path: str, module: nn.Module, records: list[Record], order: list[str]) -> Iterator[None]:
    hooks = []
    if is_norm(module):
        before, after = frozen_norm()
        hooks.append(module.register_forward_pre_hook(before, with_kwargs=True))
        hooks.append(module.register_forward_hook(after, with_kwargs=True))

    def seen(module: nn.Module, args: Any, output: Any) -> None:
        order.append(path)
        record = as_matrix(path, module, args[0] if args else None, output)
        if record is not None:
            records.append(record)

    if next(module.parameters(recurse=False), None) is not None:
        hooks.append(module.register_forward_hook(seen))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def frozen_norm() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Hooks by which a norm passes gradients elementwise: it couples the heads it spans, though none reads another."""
    held: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        held.append((args, kwargs))
        return tuple(_cut(v) for v in args), {k: _cut(v) for k, v in kwargs.items()}

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        args, kwargs = held.pop()
        inputs = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.requires_grad]
        if not inputs:
            return output
        if not isinstance(output, Tensor) or any(v.shape != output.shape for v in inputs):
            return module.forward(*args, **kwargs)
        for value in inputs:
            ratio = torch.where(value == 0, torch.ones_like(output), output / value).detach()
            output = output + ratio * (value - value.detach())
        return output

    return before, after


def _cut(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def as_matrix(path: str, module: nn.Module, given: Any, output: Any) -> Record | None:
    """The module as a matrix, told by its numbers: which axis of the weight holds the outputs."""
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    own = dict(module.named_parameters(recurse=False))
    if "weight" not in own or weight is None or weight.dim() != 2 or not isinstance(output, Tensor):
        return None
    if not isinstance(given, Tensor) or not given.is_floating_point() or not set(own) <= {"weight", "bias"}:
        return None
    prefix = f"{path}." if path else ""
    names = (prefix + "weight", prefix + "bias" if "bias" in own else None)
    with torch.no_grad():
        shift = bias if isinstance(bias, Tensor) else torch.zeros((), device=weight.device)
        into, out = given.shape[-1], output.shape[-1]
        x, y = given.reshape(-1, into)[:2], output.reshape(-1, out)[:2]
        near = 0.01 if weight.dtype in (torch.float32, torch.float64) else 0.1
        for axis, matrix in ((0, weight.T), (1, weight)):
            if tuple(matrix.shape) == (into, out) and torch.allclose(x @ matrix + shift, y, rtol=near, atol=near):
                return Record(path, *names, given, output, axis)
        groups = given.shape[-2] if given.dim() > 2 and given.shape[:-1] == output.shape[:-1] else 1
        if bias is None and groups > 1 and tuple(weight.shape) == (groups * out, into):
            blocks = torch.einsum("...gi,goi->...go", given, weight.view(groups, out, into))
            if torch.allclose(blocks, output, rtol=near, atol=near):
                return Record(path, *names, given, output, 0, groups)
    return None
