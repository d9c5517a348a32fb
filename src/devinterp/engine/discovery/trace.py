"""One forward pass of the whole model: which modules ran, in which order, with what arguments."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from devinterp.engine.discovery.probe import SEED, Call
from devinterp.errors import InputTypeError, InputValueError, got

LENGTHS = (11, 13, 17, 19, 7, 5)
"""tokens of the trial input: a number that is no dimension of the model, so that axes can be told by their size"""
POOL = 1000


@dataclass
class Trace:
    """What happened in one forward pass."""

    feed: Call
    ids: list[Tensor]
    """the integer inputs, flattened: token ids"""
    calls: dict[str, Call] = field(default_factory=dict)
    order: dict[str, int] = field(default_factory=dict)
    output: Any = None


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and autograd, whatever the caller has set; flags and random state as they were, afterwards."""
    flags = [(module, module.training) for module in model.modules()]
    every_gpu = range(torch.cuda.device_count())
    kinds = {p.device.type for p in model.parameters()} | {"cpu"}
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(torch.random.fork_rng(every_gpu))
            for kind in kinds - {"meta"}:
                stack.enter_context(torch.autocast(kind, enabled=False))
            model.eval()
            torch.default_generator.manual_seed(SEED)
            yield
    finally:
        for module, training in flags:
            module.training = training


def trace(model: nn.Module, inputs: Any) -> Trace:
    """Run the model on trial tokens, or on the caller's inputs."""
    sizes = {size for p in model.parameters() for size in p.shape}
    if inputs is not None:
        given = _given(inputs)
        for feed in (_short(given, sizes), given):
            try:
                return _traced(model, feed)
            except Exception as error:
                failed = error
        fix = "They are passed to the model as they are: a tensor as its first argument, a dict by name."
        raise InputValueError(f"inputs: the model failed on them with {type(failed).__name__}: {failed}. {fix}") from failed
    first: Exception | None = None
    for length in [n for n in LENGTHS if n not in sizes] or LENGTHS:
        try:
            return _traced(model, _trial(model, length))
        except Exception as error:
            first = first or error
    fix = "Pass inputs=, a dict of keyword arguments (or a tensor of token ids) on which it runs."
    raise InputValueError(
        f"model: {type(model).__name__} could not run on token ids alone ({type(first).__name__}: {first}). {fix}"
    ) from first


def _traced(model: nn.Module, feed: Call) -> Trace:
    found = Trace(feed, _token_ids(feed))
    handles = []

    def note(path: str) -> Any:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.order.setdefault(path, len(found.order))
            found.calls.setdefault(path, Call(args, kwargs))

        return before

    try:
        for path, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(note(path), with_kwargs=True))
        with torch.no_grad():
            buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
            found.output = functional_call(model, buffers, feed.args, feed.kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _token_ids(feed: Call) -> list[Tensor]:
    named = [(f"{i}_input_ids", value) for i, value in enumerate(feed.args[:1])] + list(feed.kwargs.items())
    whole = [(name, v.flatten()) for name, v in named if isinstance(v, Tensor) and not v.is_floating_point() and v.numel()]
    return [v for name, v in whole if name.endswith("input_ids")] or [v for _, v in whole[:1]]


def _given(inputs: Any) -> Call:
    if isinstance(inputs, Tensor):
        return Call((inputs,), {})
    if isinstance(inputs, Mapping):
        return Call((), dict(inputs))
    raise InputTypeError(got("inputs", type(inputs), "a tensor of token ids, or a dict of the model's arguments", ""))


def _short(feed: Call, sizes: set[int]) -> Call:
    """One sequence of few tokens, fewer still for a decoder: axes and sequences can then be told by their sizes."""
    ids = next(iter([v for v in (*feed.args, *feed.kwargs.values()) if isinstance(v, Tensor) and v.dim() == 2]), None)
    length = None if ids is None else next((n for n in LENGTHS if n <= ids.shape[1] and n not in sizes), None)
    if ids is None or length is None:
        return feed

    def cut(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dim() < 2 or len(value) != len(ids):
            return value
        return value[:1, : _decoded(length) if name.startswith("decoder_") else length]

    return Call(tuple(cut("", v) for v in feed.args), {name: cut(name, v) for name, v in feed.kwargs.items()})


def _decoded(length: int) -> int:
    return max(length - 4, 3)


def _trial(model: nn.Module, length: int) -> Call:
    device = next(p.device for p in model.parameters())
    names = inspect.signature(model.forward).parameters
    ids = _ids(model, length).to(device)
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in names.values())
    cached = "use_cache" in names or (open_ended and hasattr(getattr(model, "config", None), "use_cache"))
    kwargs: dict[str, Any] = {"use_cache": False} if cached else {}
    if "decoder_input_ids" in names:
        kwargs["decoder_input_ids"] = ids.flip(1)[:, : _decoded(length)]
    return Call((), {"input_ids": ids, **kwargs}) if "input_ids" in names else Call((ids,), kwargs)


def _ids(model: nn.Module, length: int) -> Tensor:
    """Token ids in no order, far from special ones where there is room."""
    vocabulary = _vocabulary(model)
    settings = vars(model.config) if hasattr(getattr(model, "config", None), "__dict__") else {}
    special = {value for name, value in settings.items() if name.endswith("token_id") and isinstance(value, int)}
    pool = [i for i in range(min(vocabulary, POOL)) if i not in special]
    pool = pool if len(pool) >= length else list(range(vocabulary)) * length
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(SEED))
    return torch.tensor([[pool[int(i)] for i in order[:length]]])


def _vocabulary(model: nn.Module) -> int:
    """As the configuration says; otherwise the largest table; otherwise few enough ids for any."""
    for config in filter(None, (getattr(model, "config", None), getattr(model, "cfg", None))):
        inner = config.get_text_config() if hasattr(config, "get_text_config") else config
        for name in ("vocab_size", "d_vocab"):
            if isinstance(size := getattr(inner, name, None), int) and size > 1:
                return size
    tables = [module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding)]
    return max(tables, default=8)
