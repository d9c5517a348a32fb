"""Experts, from which of them one token reaches; neurons, from which rows each hidden feature needs."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from devinterp.engine.discovery.masks import Mask, Parts
from devinterp.engine.discovery.probe import Record, Run, noise
from devinterp.engine.discovery.supports import Supports


@dataclass(frozen=True)
class Units(Sequence[Parts]):
    """The neurons of a feed-forward part, made when asked for: there are thousands."""

    size: int
    rows: dict[tuple[str, int], tuple[tuple[int, ...], ...]]
    """(parameter, axis) -> for each neuron its indices"""
    shapes: dict[str, tuple[int, ...]]

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Parts:  # type: ignore[override]
        if not -self.size <= index < self.size:
            raise IndexError(index)
        return self.select([index % self.size])

    def __iter__(self) -> Iterator[Parts]:
        return (self[i] for i in range(self.size))

    def select(self, neurons: Iterable[int]) -> Parts:
        """Several neurons together."""
        chosen = list(neurons)
        parts: Parts = {}
        for (name, axis), rows in self.rows.items():
            mask = Mask.of(self.shapes[name], {axis: [i for neuron in chosen for i in rows[neuron]]})
            parts[name] = None if mask.whole else mask
        return {name: mask for name, mask in parts.items() if mask is None or mask.numel}

    def renamed(self, names: dict[str, str]) -> "Units":
        rows = {(names[name], axis): lines for (name, axis), lines in self.rows.items()}
        return Units(self.size, rows, {names[name]: shape for name, shape in self.shapes.items()})


def find_experts(module: nn.Module, run: Run, names: set[str]) -> tuple[Parts, ...]:
    """Experts: the indices of stacked parameters, or the modules of a list, of which one token reaches only some."""
    line = run.at_tokens(run.output, last=True)
    seed = line @ noise(line.shape, line.device)
    return _stacked(run, names, seed) or _listed(module, run, names, seed)


def _stacked(run: Run, names: set[str], seed: Tensor) -> tuple[Parts, ...]:
    raw = {name: leaf for name, leaf in run.raw.items() if name in names and leaf.dim() > 1}
    if not any(leaf.dim() == 3 for leaf in raw.values()):
        return ()
    grads = torch.autograd.grad(seed, list(raw.values()), retain_graph=True, allow_unused=True)
    reached = {
        name: tuple((grad != 0).flatten(1).any(1).tolist()) for name, grad in zip(raw, grads, strict=True) if grad is not None
    }
    stacks = [name for name, used in reached.items() if raw[name].dim() == 3 and 0 < sum(used) < len(used)]
    if not stacks:
        return ()
    pattern, owners = reached[stacks[0]], {name.rpartition(".")[0] for name in stacks}
    members = [name for name in reached if name.rpartition(".")[0] in owners and reached[name] == pattern]
    shapes = {name: tuple(raw[name].shape) for name in members}
    return tuple({name: Mask.of(shape, {0: [e]}) for name, shape in shapes.items()} for e in range(len(pattern)))


def _listed(module: nn.Module, run: Run, names: set[str], seed: Tensor) -> tuple[Parts, ...]:
    for path, child in module.named_modules():
        if not isinstance(child, nn.ModuleList | nn.ModuleDict) or len(child) < 2:
            continue
        prefixes = [f"{path}.{name}." if path else f"{name}." for name, _ in child.named_children()]
        members = [[name for name in names if name.startswith(prefix)] for prefix in prefixes]
        if not all(members) or len({type(c) for c in child.children()}) > 1:
            continue
        records = [r for r in run.records if r.output.requires_grad and any(r.weight.startswith(p) for p in prefixes)]
        if not records:
            continue
        grads = torch.autograd.grad(seed, [r.output for r in records], retain_graph=True, allow_unused=True)
        used = {r.weight for r, grad in zip(records, grads, strict=True) if grad is not None and grad.any()}
        reached = sum(any(name in used for name in member) for member in members)
        if 0 < reached < len(prefixes):
            return tuple(dict.fromkeys(member) for member in members)
    return ()


def find_neurons(runs: Sequence[Run], names: set[str]) -> Units | None:
    """Neurons: the input features of the last matrix to which rows of earlier matrices belong one to one."""
    done: set[str] = set()
    for record in reversed(runs[0].records):
        if record.weight in names and record.groups == 1 and record.path not in done and record.input.requires_grad:
            done.add(record.path)
            units = _decoded(runs, record, names)
            if units is not None:
                return units
    return None


def _decoded(runs: Sequence[Run], down: Record, names: set[str]) -> Units | None:
    """Number the hidden features in binary: a row belongs to the feature whose bits the seeds that need it spell."""
    count = down.input.shape[-1]
    bits = max(1, (count - 1).bit_length())
    supports = [Supports(run, only=names, skip={down.weight}) for run in runs]
    if count < 2 or not supports[0].records or any(s.size != supports[0].size for s in supports):
        return None
    code = torch.zeros(supports[0].size, dtype=torch.long)
    unique = torch.ones(supports[0].size, dtype=torch.bool)
    for bit in range(bits):
        on = torch.tensor([bool(i >> bit & 1) for i in range(count)])
        one, zero = (_needed(runs, supports, down.path, chosen) for chosen in (on, ~on))
        unique &= one ^ zero
        code += one.long() << bit
    rows: dict[tuple[str, int], tuple[tuple[int, ...], ...]] = {}
    covered = torch.zeros(count, dtype=torch.bool)
    for (name, axis), where in supports[0].keys.items():
        if not any(name in (r.weight, r.bias) for r in supports[0].records) or not unique[where].any():
            continue
        lines: list[list[int]] = [[] for _ in range(count)]
        for index in unique[where].nonzero().flatten().tolist():
            if (neuron := int(code[where][index])) < count:
                lines[neuron].append(index)
                covered[neuron] = True
        rows[name, axis] = tuple(map(tuple, lines))
    if not covered.all():
        return None
    rows[down.weight, 1 - down.axis] = tuple((i,) for i in range(count))
    return Units(count, rows, {name: tuple(runs[0].leaves[name].shape) for name, _ in rows})


def _needed(runs: Sequence[Run], supports: Sequence[Supports], path: str, chosen: Tensor) -> Tensor:
    needed = torch.zeros(supports[0].size, dtype=torch.bool)
    for run, support in zip(runs, supports, strict=True):
        for record in run.records:
            if record.path == path and chosen.any():
                line = run.at_tokens(record.input, last=False)[chosen.to(record.input.device)]
                needed |= support.of(line @ noise(line.shape, line.device))[0]
    return needed
