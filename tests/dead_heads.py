"""An independent test of head masks: kill one head, and see which parameters no longer matter.

The discovery under test looks at one module alone and decides which indices belong to a head. Here the head is silenced
inside the whole, running model: its slice of what the attention function returns, or of what enters the output
projection, is multiplied by zero. Elements of the mixer's parameters that had a loss gradient and lose it are exactly
those through which only this head speaks. They must be the head's mask, less what it shares; what a group of heads
shares must fall silent with the whole group, and not before.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from zoo import TOKENS, tiny_tokens

Elements = dict[str, Tensor]
"""Booleans of the parameter's shape, by parameter name."""

ROWS = 4
"""Sequences per batch."""


@dataclass(frozen=True)
class Attempt:
    """How heads are killed. Later attempts are for mixers whose heads the simpler ones cannot tell apart."""

    inside: bool = True
    """In the attention function's result; otherwise at the output projection's input."""
    frozen: bool = False
    """Norms' statistics are constants in the backward pass: a norm over all heads would couple them."""
    everywhere: bool = False
    """The same head of all layers: a table of position biases made by one layer and used by all."""
    batches: int = 8
    """Gradients are joined over batches, so that a gradient that happens to be zero in one does not count."""


ATTEMPTS = (
    Attempt(batches=2),
    Attempt(),
    Attempt(frozen=True),
    Attempt(inside=False),
    Attempt(inside=False, frozen=True),
    Attempt(everywhere=True),
    Attempt(everywhere=True, inside=False, frozen=True),
)


class Subject:
    """The model, how to run it, and which of its modules call transformers' attention function with how many heads."""

    def __init__(self, model: nn.Module, inputs: Mapping[str, Tensor] | None):
        self.model, self.inputs = model, inputs
        self.named = dict(model.named_parameters())
        self.calls: dict[nn.Module, int] = {}
        with torch.no_grad(), _attention_calls(model, self._look):
            self.loss({}, 0)

    def _look(self, module: nn.Module, output: Tensor) -> Tensor:
        if output.shape[:2] == (ROWS, TOKENS):  # not an attention over layers, say
            self.calls[module] = output.shape[2]
        return output

    def loss(self, swapped: Mapping[str, Tensor], batch: int) -> Tensor:
        """Cross entropy against random labels, so that no token and no position is special."""
        tokens = tiny_tokens(ROWS, seed=batch)
        feed: dict[str, Tensor] = {"input_ids": tokens}
        if self.inputs is not None:
            feed = {
                name: tokens.roll(i, -1) if value.dtype == torch.long else value
                for i, (name, value) in enumerate(self.inputs.items())
            }
        torch.manual_seed(batch)
        if hasattr(self.model, "W_E"):  # TransformerLens names its input otherwise
            output = torch.func.functional_call(self.model, dict(swapped), (tokens,))
        else:
            output = torch.func.functional_call(self.model, dict(swapped), (), feed)
        logits = getattr(output, "logits", output)
        labels = torch.randint(logits.shape[-1], logits.shape[:-1], generator=torch.Generator().manual_seed(100 + batch))
        return nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten())

    def twins(self, path: str) -> set[nn.Module]:
        """The module, all inside it, and other modules that are made of the same parameters."""
        module = self.model.get_submodule(path)
        own = {id(p) for p in module.parameters()}
        same = [m for m in self.model.modules() if type(m) is type(module) and own & {id(p) for p in m.parameters()}]
        return {inner for m in same for inner in m.modules()} if own else set(module.modules())

    def parameters(self, mixer: Any) -> dict[str, nn.Parameter]:
        names = dict.fromkeys([*mixer.params, *(name for head in mixer.heads for name in head)])
        return {name: self.named[name] for name in names}


@dataclass
class Report:
    mixers: int = 0
    """Mixers with heads."""
    heads: int = 0
    groups: int = 0
    """Groups of several heads, each killed as a whole."""
    unseen: int = 0
    """Elements of masks that never had a gradient, about which nothing can be said."""
    silent: list[str] = field(default_factory=list)
    """Mixers that no loss gradient reaches, such as one that only chooses where patches end: not checked."""
    how: dict[str, Attempt] = field(default_factory=dict)
    """By mixer: the attempt that settled it."""
    failures: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.failures

    def __str__(self) -> str:
        if self.failures:
            return "; ".join(self.failures[:3]) + (f"; and {len(self.failures) - 3} more" if len(self.failures) > 3 else "")
        return f"pass: {self.heads} heads" if self.mixers else "no heads"


def check_heads(model: nn.Module, structure: Any, inputs: Mapping[str, Tensor] | None = None) -> Report:
    """Kill every head, and every group of heads, of every mixer. `inputs` fixes the model's inputs; default `input_ids` only."""
    with torch.random.fork_rng(devices=[]):
        subject = Subject(model, inputs)
        report = Report()
        for stack, layers in structure.stacks.items():
            mixers = [mixer for layer in layers for mixer in layer.mixers if mixer.heads]
            for mixer in mixers:
                peers = [other for other in mixers if (other.kind, len(other.heads)) == (mixer.kind, len(mixer.heads))]
                _settle(subject, mixer, peers, report, f"{stack} {mixer.path}")
        if report.silent and not report.mixers:
            report.failures.append("no loss gradient reaches any mixer with heads")
        report.failures += _missed(subject, structure)
    return report


def _settle(subject: Subject, mixer: Any, peers: list[Any], report: Report, title: str) -> None:
    """Try the attempts until one finds nothing wrong."""
    reached = _alive(subject, subject.parameters(mixer), [], frozenset(), ATTEMPTS[0])
    if not any(elements.any() for elements in reached.values()):
        report.silent.append(mixer.path)
        return
    report.mixers += 1
    report.heads += len(mixer.heads)
    report.groups += len({g for g in mixer.group_of if mixer.group_of.count(g) > 1})
    plainest: list[str] = []
    first, *later = ATTEMPTS
    for attempt in dict.fromkeys([first, *list(report.how.values())[-1:], *later]):  # layers tend to be alike
        found, unseen = _check(subject, mixer, peers if attempt.everywhere else [mixer], attempt)
        if not found:
            report.how[mixer.path] = attempt
            report.unseen += unseen
            return
        plainest = plainest or found
    report.failures += [f"{title} {words}" for words in plainest]


def _missed(subject: Subject, structure: Any) -> list[str]:
    """Calls of the attention function with several heads, of which the structure has none."""
    mixers = [mixer for layers in structure.stacks.values() for layer in layers for mixer in layer.mixers if mixer.heads]
    known = {module for mixer in mixers for module in subject.twins(mixer.path)}
    names = {module: name for name, module in subject.model.named_modules()}
    return [
        f"{names.get(module, '?')} attends with {heads} heads; none were found"
        for module, heads in subject.calls.items()
        if heads > 1 and module not in known
    ]


def _check(subject: Subject, mixer: Any, victims: list[Any], attempt: Attempt) -> tuple[list[str], int]:
    """What is wrong, in words, and how many elements of the masks never had a gradient."""
    parameters = subject.parameters(mixer)
    masks = [_dense(head, parameters) for head in mixer.heads]
    failures = []
    with _frozen_norms(subject.model.get_submodule(mixer.path)) if attempt.frozen else contextlib.nullcontext():
        alive = _alive(subject, parameters, victims, frozenset(), attempt)
        for name, dead in _units(mixer):
            rest = [h for h in range(len(masks)) if h not in dead]
            still = _alive(subject, parameters, victims, dead, attempt)
            if not any((_union(masks, dead, parameter) & alive[parameter]).any() for parameter in parameters):
                failures.append(f"{name}: no element of its mask ever had a gradient")
            for parameter in parameters:
                lost = alive[parameter] & ~still[parameter]
                expected = _union(masks, dead, parameter) & ~_union(masks, rest, parameter) & alive[parameter]
                # With no head left even what all heads share is silent, and that is not part of any one of them.
                extra = lost & ~expected if rest else torch.zeros_like(lost)
                missing = expected & ~lost
                if extra.any() or missing.any():
                    failures.append(f"{name} {parameter}: {_words(missing, extra)}")
            if failures and attempt != ATTEMPTS[0]:
                break  # only the plainest attempt's words are kept
    unseen = sum(int((_union(masks, range(len(masks)), p) & ~alive[p]).sum()) for p in parameters)
    return failures, unseen


def _units(mixer: Any) -> Iterator[tuple[str, frozenset[int]]]:
    """What is killed together: each head, each group of several, everything."""
    count = len(mixer.heads)
    for head in range(count):
        yield f"head {head}", frozenset([head])
    for group in sorted(set(mixer.group_of)):
        members = frozenset(h for h, g in enumerate(mixer.group_of) if g == group)
        if 1 < len(members) < count:
            yield f"group {group}", members
    yield "all heads", frozenset(range(count))


def _words(missing: Tensor, extra: Tensor) -> str:
    """Both differences with the indices they touch along each axis."""
    parts = []
    for what, elements in (("claimed but alive without it", missing), ("dead without it but not claimed", extra)):
        if elements.any():
            axes = [elements.nonzero()[:, axis].unique().tolist() for axis in range(elements.dim())]
            parts.append(f"{int(elements.sum())} of {elements.numel()} {what} (" + " x ".join(map(_short, axes)) + ")")
    return ", ".join(parts)


def _short(indices: list[int]) -> str:
    if len(indices) > 2 and indices == list(range(indices[0], indices[-1] + 1)):
        return f"{indices[0]}:{indices[-1] + 1}"
    return str(indices[:12]) + ("..." if len(indices) > 12 else "")


# -- masks and gradients --


def _dense(head: Mapping[str, Any], parameters: Mapping[str, nn.Parameter]) -> Elements:
    return {
        name: torch.ones(parameters[name].shape, dtype=torch.bool)
        if mask is None
        else mask.dense().reshape(parameters[name].shape)
        for name, mask in head.items()
    }


def _union(masks: list[Elements], heads: Any, parameter: str) -> Tensor:
    union = torch.zeros((), dtype=torch.bool)
    for head in heads:
        union = union | masks[head].get(parameter, union)
    return union


def _alive(
    subject: Subject, parameters: Mapping[str, nn.Parameter], victims: list[Any], dead: frozenset[int], attempt: Attempt
) -> Elements:
    """Elements with a loss gradient in at least one of the batches while the `dead` heads of the `victims` are killed."""
    alive = {name: torch.zeros(parameter.shape, dtype=torch.bool) for name, parameter in parameters.items()}
    with contextlib.ExitStack() as stack:
        stack.enter_context(_gradients(subject.model, parameters))
        swapped: dict[str, Tensor] = {}
        for victim in victims:
            swapped |= _kill(stack, subject, victim, dead, attempt.inside)
        for batch in range(attempt.batches):
            # Not autograd.grad: a reversible network writes its layers' gradients by itself.
            subject.loss(swapped, batch).backward(retain_graph=bool(swapped))
            for name, parameter in parameters.items():
                if parameter.grad is not None:
                    alive[name] |= parameter.grad != 0
                    parameter.grad = None
    return alive


@contextlib.contextmanager
def _gradients(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """No parameter has a gradient at first, these can have one, and afterwards all is as it was."""
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    for parameter, _, _ in before:
        parameter.grad = None
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, wanted, gradient in before:
            parameter.requires_grad_(wanted)
            parameter.grad = gradient


# -- killing --


def _kill(stack: contextlib.ExitStack, subject: Subject, mixer: Any, dead: frozenset[int], inside: bool) -> dict[str, Tensor]:
    """Silence the heads while the stack is open. Returns parameters to replace during the forward pass."""
    heads = len(mixer.heads)
    modules = subject.twins(mixer.path)
    if inside and heads in {subject.calls.get(module) for module in modules}:

        def change(module: nn.Module, output: Tensor) -> Tensor:
            return _silence_axis(output, dead) if module in modules else output

        stack.enter_context(_attention_calls(subject.model, change))
        return {}
    if mixer.o_path is not None:
        for module in subject.twins(mixer.o_path):
            handle = module.register_forward_pre_hook(lambda _, args: (_silence_slices(args[0], heads, dead), *args[1:]))
            stack.callback(handle.remove)
        return {}
    # An output projection used as a bare tensor: its head axis, or else slices of its columns.
    return {mixer.o_param: _silence_weight(subject.named[mixer.o_param], heads, dead)}


def _silence_axis(x: Tensor, dead: frozenset[int]) -> Tensor:
    keep = torch.ones(x.shape[2], dtype=x.dtype)
    keep[list(dead)] = 0
    return x * keep[:, None]


def _silence_slices(x: Tensor, heads: int, dead: frozenset[int]) -> Tensor:
    keep = torch.ones(heads, dtype=x.dtype)
    keep[list(dead)] = 0
    return x * keep.repeat_interleave(x.shape[-1] // heads)


def _silence_weight(weight: Tensor, heads: int, dead: frozenset[int]) -> Tensor:
    if weight.dim() == 2:
        return _silence_slices(weight, heads, dead)
    axis = weight.shape.index(heads)
    keep = torch.ones([heads if a == axis else 1 for a in range(weight.dim())])
    keep.index_fill_(axis, torch.tensor(sorted(dead), dtype=torch.long), 0)
    return weight * keep


@contextlib.contextmanager
def _attention_calls(model: nn.Module, change: Callable[[nn.Module, Tensor], Tensor]) -> Iterator[None]:
    """Pass what transformers' plain attention functions return, `(batch, token, head, feature)`, through `change`."""

    def changed(original: Callable[..., Any]) -> Callable[..., Any]:
        def attention(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            output, *rest = original(module, *args, **kwargs)
            return (change(module, output), *rest)

        return attention

    files = {sys.modules[kind.__module__] for module in model.modules() for kind in type(module).__mro__}
    originals = {file: vars(file)["eager_attention_forward"] for file in files if "eager_attention_forward" in vars(file)}
    try:
        for file, original in originals.items():
            file.eager_attention_forward = changed(original)  # type: ignore[attr-defined]
        yield
    finally:
        for file, original in originals.items():
            file.eager_attention_forward = original  # type: ignore[attr-defined]


# -- norms --


class _ConstantStatistics(TorchFunctionMode):
    """Means and scales that a norm computes are constants, so that it acts on each feature by itself."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        if name in ("layer_norm", "rms_norm"):
            return self._norm(name, *args, **kwargs)
        if name == "normalize":
            return self._direction(*args, **kwargs)
        result = function(*args, **kwargs)
        return result.detach() if name in ("rsqrt", "sqrt", "mean", "var", "std", "norm", "vector_norm") else result

    @staticmethod
    def _direction(x: Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12) -> Tensor:
        return x / x.norm(p, dim, keepdim=True).clamp_min(eps).detach()

    @staticmethod
    def _norm(
        name: str, x: Tensor, shape: Any, weight: Tensor | None = None, bias: Any = None, eps: float | None = None
    ) -> Tensor:
        dims = tuple(range(-len(shape), 0))
        if name == "rms_norm":
            eps, bias = (bias, None) if isinstance(bias, float) else (eps, bias)
        centre = x.mean(dims, keepdim=True).detach() if name == "layer_norm" else 0.0
        scale = ((x - centre).square().mean(dims, keepdim=True) + (eps or 1e-6)).rsqrt().detach()
        y = (x - centre) * scale
        y = y if weight is None else y * weight
        return y if bias is None else y + bias


@contextlib.contextmanager
def _frozen_norms(root: nn.Module) -> Iterator[None]:
    norms = [m for m in root.modules() if "norm" in type(m).__name__.lower()]

    def frozen(forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with _ConstantStatistics():
                return forward(*args, **kwargs)

        return run

    try:
        for norm in norms:
            norm.forward = frozen(norm.forward)  # type: ignore[method-assign]
        yield
    finally:
        for norm in norms:
            norm.__dict__.pop("forward", None)
