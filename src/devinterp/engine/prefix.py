"""What the moving weights cannot change is computed once: the modules that finish before the first moving one starts.

Found on one forward pass, with no table of architectures: the prefix is every outermost module that holds no moving parameter
and finishes before the parent of the first module that owns one starts. On a replay those modules return what they returned
before. Most of that is never looked at; a NaN in its place shows which, and costs no memory. It is used only where a replay
at moved weights equals a plain pass bit by bit (`forward.py`).
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from devinterp.engine.batch import Batch
from devinterp.engine.checkpoint import Checkpoint
from devinterp.engine.stand_ins import Cut, stand_ins

KEPT_BYTES = 2**28
"""of recorded outputs of observables; what is beyond is computed again for every draw"""

Outputs = dict[nn.Module, Any]


@dataclass(frozen=True)
class Prefix:
    """The modules whose outputs are constants of a batch, in the order in which they run."""

    modules: tuple[nn.Module, ...]
    needed: frozenset[nn.Module]
    """those whose output is looked at again; the others return NaN"""
    closed_by: nn.Module
    """where a recording can stop"""

    def replay(self, recorded: Outputs) -> dict[nn.Module, Callable[..., Any]]:
        """Stand-ins that return what was recorded."""
        return {module: _returns(recorded[module]) for module in self.modules if module in recorded}


def _returns(output: Any) -> Callable[..., Any]:
    return lambda *_, **__: output


@dataclass
class Recorder:
    """What frozen modules return on each batch: one pass for all chains, and all runs, that step together.

    The outputs on the last `keep` sampling batches are held, and those on observables as far as `KEPT_BYTES` go.
    """

    checkpoint: Checkpoint
    prefixes: Sequence[Prefix]
    keep: int
    kept_bytes: int = KEPT_BYTES
    _batches: "OrderedDict[Hashable, Outputs]" = field(default_factory=OrderedDict)
    _observables: dict[Hashable, Outputs] = field(default_factory=dict)

    def on_batch(self, key: Hashable, batch: Batch) -> Outputs:
        """Outputs on a sampling batch, which `key` stands for."""
        if key not in self._batches:
            while len(self._batches) >= self.keep:
                self._batches.popitem(last=False)
            self._batches[key] = self._record(batch)
        return self._batches[key]

    def on_observable(self, key: Hashable, batch: Batch) -> Outputs:
        """Outputs on rows of an observable, which are the same at every draw."""
        if key in self._observables:
            return self._observables[key]
        outputs = self._record(batch)
        size = sum(_num_bytes(output) for output in outputs.values())
        if size <= self.kept_bytes:
            self.kept_bytes -= size
            self._observables[key] = outputs
        return outputs

    def _record(self, batch: Batch) -> Outputs:
        modules = {module for prefix in self.prefixes for module in prefix.modules}
        needed = frozenset().union(*(prefix.needed for prefix in self.prefixes))
        return record(self.checkpoint, modules, needed, {prefix.closed_by for prefix in self.prefixes}, batch)


@torch.no_grad()
def record(
    checkpoint: Checkpoint, modules: Iterable[nn.Module], needed: frozenset[nn.Module], ends: set[nn.Module], batch: Batch
) -> Outputs:
    """Outputs of these modules at the checkpoint; the pass stops when all of `ends` have been reached."""
    outputs: Outputs = {}
    waited_for = set(ends)

    def recording(module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def stand_in(*arguments: Any, **named: Any) -> Any:
            outputs[module] = output = forward(*arguments, **named)
            if module not in needed:
                outputs[module] = mapped(output, _unseen)
            return output

        return stand_in

    def ending(module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def stand_in(*arguments: Any, **named: Any) -> Any:
            waited_for.discard(module)
            if not waited_for:
                raise Cut
            return forward(*arguments, **named)

        return stand_in

    forwards: dict[nn.Module, Callable[..., Any]] = {}
    for module in modules:
        forwards[module] = recording(module, module.forward)
    for module in ends:
        forwards[module] = ending(module, forwards.get(module, module.forward))
    try:
        with stand_ins(forwards):
            checkpoint.losses({}, batch, checkpoint.buffers())
    except Cut:
        pass
    return outputs


def mapped(output: Any, change: Callable[[Tensor], Any]) -> Any:
    """An output with its tensors changed; what is neither a tensor nor a plain container is left alone."""
    if isinstance(output, Tensor):
        return change(output)
    if type(output) in (tuple, list):
        return type(output)(mapped(item, change) for item in output)
    if type(output) is dict:
        return {key: mapped(item, change) for key, item in output.items()}
    return output


def _unseen(tensor: Tensor) -> Tensor:
    """NaN of this shape in the memory of one number."""
    if not tensor.is_floating_point():
        return tensor
    return tensor.new_full((), float("nan")).expand(tensor.shape)


def _num_bytes(output: Any) -> int:
    sizes: list[int] = []
    mapped(output, lambda t: sizes.append(t.untyped_storage().nbytes()))
    return sum(sizes)


def _replays(checkpoint: Checkpoint, forwards: Mapping[nn.Module, Callable[..., Any]], batch: Batch, plain: Tensor) -> bool:
    try:
        with stand_ins(forwards):
            return torch.equal(checkpoint.losses({}, batch, checkpoint.buffers()), plain)
    except RuntimeError:  # the next module writes to what it gets
        return False


def _has_empty(output: Any) -> bool:
    found: list[bool] = []
    mapped(output, lambda t: found.append(not t.numel()))
    return any(found)


def find_prefix(checkpoint: Checkpoint, moving: Iterable[str], batch: Batch) -> Prefix | None:
    """The prefix of a run in which the parameters named move; None where there is none."""
    parameters = dict(checkpoint.model.named_parameters())
    moves = {id(parameters[name]) for name in moving}
    modules, closed_by = _before_the_first_moving(checkpoint, moves, batch)
    if not modules or closed_by is None:
        return None
    everything = Prefix(modules, frozenset(modules), closed_by)
    recorded = record(checkpoint, modules, everything.needed, {closed_by}, batch)
    if set(recorded) != set(modules):
        return None
    needed = _looked_at(checkpoint, everything, recorded, batch)
    return None if needed is None else Prefix(modules, needed, closed_by)


@torch.no_grad()
def _before_the_first_moving(
    checkpoint: Checkpoint, moves: set[int], batch: Batch
) -> tuple[tuple[nn.Module, ...], nn.Module | None]:
    """Outermost frozen modules called once, finished before the first owner's parent starts, which is the second."""
    model = checkpoint.model
    owners = {m for m in model.modules() if any(id(p) in moves for p in m.parameters(recurse=False))}
    closing = owners | {m for m in model.modules() if any(child in owners for child in m.children())}
    frozen = {m for m in model.modules() if not any(id(p) in moves for p in m.parameters())}
    calls: dict[nn.Module, int] = {}
    finished: list[nn.Module] = []
    running: list[nn.Module] = []
    closed_by: list[nn.Module] = []

    def following(module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def stand_in(*arguments: Any, **named: Any) -> Any:
            calls[module] = calls.get(module, 0) + 1
            if module in closing and not closed_by:
                closed_by.append(module)
            running.append(module)
            output = forward(*arguments, **named)
            running.pop()
            if module in frozen and not closed_by and not any(outer in frozen for outer in running):
                finished.append(module)
            return output

        return stand_in

    with stand_ins({module: following(module, module.forward) for module in model.modules()}):
        checkpoint.losses({}, batch, checkpoint.buffers())
    return tuple(module for module in finished if calls[module] == 1), closed_by[0] if closed_by else None


@torch.no_grad()
def _looked_at(checkpoint: Checkpoint, prefix: Prefix, recorded: Outputs, batch: Batch) -> frozenset[nn.Module] | None:
    """Modules whose output changes the loss when it is NaN; None where replaying does not give the loss."""
    plain = checkpoint.losses({}, batch, checkpoint.buffers())
    shown: Mapping[nn.Module, Any] = recorded
    needed = []
    for module in (None, *prefix.modules):
        if module is not None and _has_empty(recorded[module]):  # of an expert that no token chose, for example
            needed.append(module)
            continue
        tried = dict(shown) if module is None else {**shown, module: mapped(recorded[module], _unseen)}
        if _replays(checkpoint, prefix.replay(tried), batch, plain):
            shown = tried
        elif module is None:
            return None
        else:
            needed.append(module)
    return frozenset(needed)
