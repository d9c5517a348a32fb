"""Experts, from which of them one token reaches; neurons, from which rows each hidden feature needs."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from devinterp.engine.discovery.heads import bare_output
from devinterp.engine.discovery.masks import Mask, Parts
from devinterp.engine.discovery.probe import Run, noise
from devinterp.engine.discovery.supports import Supports

Rows = dict[tuple[str, int], tuple[tuple[int, ...], ...]]
"""(parameter, axis) -> for each neuron its indices"""


@dataclass(frozen=True)
class Units(Sequence[Parts]):
    """The neurons of a feed-forward part, made when asked for: there are thousands."""

    size: int
    rows: Rows
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


@dataclass(frozen=True)
class Down:
    """The matrix out of the neurons: a module, or a bare parameter."""

    name: str
    path: str | None
    columns: int
    """the axis of the neurons"""
    count: int

    def features(self, run: Run) -> list[Tensor]:
        """Its input, summed over tokens, one line per use."""
        if self.path is not None:
            return [run.at_tokens(record.input, last=False) for record in run.records if record.path == self.path]
        output = bare_output(run, self.name, run.leaves[self.name], sparse=True)
        return [] if output is None else [output.every]


def find_neurons(run: Run, again: Callable[[int], Run], names: set[str]) -> Units | None:
    """Neurons: the input features of a matrix to which rows of earlier matrices belong one to one.

    Of several such matrices the widest counts: adapters and low-rank corrections are narrow.
    """
    best: Units | None = None
    runs = [run]
    for down in _downs(run, names):
        if down.count > max(1, len(best or ())):
            best = _decoded(runs, again, down, names) or best
    return best


def _downs(run: Run, names: set[str]) -> Iterator[Down]:
    seen = set()
    for record in run.records:
        if record.weight in names and record.groups == 1 and record.input.requires_grad and record.weight not in seen:
            seen.add(record.weight)
            yield Down(record.weight, record.path, 1 - record.axis, record.input.shape[-1])
    for name, leaf in run.raw.items():
        if name in names and leaf.dim() == 2 and (output := bare_output(run, name, leaf, sparse=True)) is not None:
            yield Down(name, None, 1 - output.rows, len(output.every))


def _decoded(runs: list[Run], again: Callable[[int], Run], down: Down, names: set[str]) -> Units | None:
    """Number the hidden features in binary: a row belongs to the feature whose bits the seeds that need it spell.

    A rectifier lets each neuron through in some draws only.
    """
    supports = [Supports(run, only=names, skip={down.name}) for run in runs]
    everything = torch.ones(down.count, dtype=torch.bool)
    if not supports[0].keys or not _needed(runs[:1], supports[:1], down, everything).any():
        return None
    for draws in (2, 4):
        while len(runs) < draws:
            runs.append(again(len(runs)))
        supports += [Supports(run, only=names, skip={down.name}) for run in runs[len(supports) :]]
        if any(each.keys != supports[0].keys for each in supports):
            return None
        rows = _spelled(runs, supports, down)
        matrices = [lines for (name, _), lines in rows.items() if runs[0].leaves[name].dim() > 1]
        covered = {neuron for lines in matrices for neuron, line in enumerate(lines) if line}
        if len(covered) == down.count and not _passed_by(runs[0], supports[0], down, rows):
            rows[down.name, down.columns] = tuple((i,) for i in range(down.count))
            return Units(down.count, rows, {name: tuple(runs[0].leaves[name].shape) for name, _ in rows})
        if len(covered) == down.count or len(covered) < down.count / 2:
            return None
    return None


def _spelled(runs: Sequence[Run], supports: Sequence[Supports], down: Down) -> Rows:
    """(parameter, axis) -> for each feature the indices that serve it alone."""
    code = torch.zeros(supports[0].size, dtype=torch.long)
    unique = torch.ones(supports[0].size, dtype=torch.bool)
    for bit in range((down.count - 1).bit_length()):
        on = torch.tensor([bool(i >> bit & 1) for i in range(down.count)])
        one, zero = (_needed(runs, supports, down, chosen) for chosen in (on, ~on))
        unique &= one ^ zero
        code += one.long() << bit
    rows: Rows = {}
    for (name, axis), where in supports[0].keys.items():
        if unique[where].any():
            lines: list[list[int]] = [[] for _ in range(down.count)]
            codes = code[where].tolist()
            for index in unique[where].nonzero().flatten().tolist():
                if codes[index] < down.count:
                    lines[codes[index]].append(index)
            rows[name, axis] = tuple(map(tuple, lines))
    return rows


def _passed_by(run: Run, supports: Supports, down: Down, rows: Rows) -> bool:
    """Do the rows act otherwise than through the matrix out, as features of the residual stream do?"""
    downs = [record for record in run.records if record.path == down.path]
    records = [record for record in supports.records if (record.weight, record.axis) in rows]
    if not downs or not records:
        return False
    seed = (run.output * noise(run.output.shape, run.output.device)).sum()
    outputs = [record.output for record in records]
    total = torch.autograd.grad(seed, outputs, retain_graph=True, materialize_grads=True)
    after = torch.autograd.grad(seed, [record.output for record in downs], retain_graph=True, materialize_grads=True)
    inputs = [record.input for record in downs]
    before = torch.autograd.grad([record.output for record in downs], inputs, after, retain_graph=True, materialize_grads=True)
    through = torch.autograd.grad(inputs, outputs, before, retain_graph=True, materialize_grads=True)
    for record, whole, part in zip(records, total, through, strict=True):
        mine = sorted({index for line in rows[record.weight, record.axis] for index in line})
        if not torch.allclose(whole[..., mine], part[..., mine], rtol=1e-2, atol=1e-4 * float(whole.abs().max())):
            return True
    return False


def _needed(runs: Sequence[Run], supports: Sequence[Supports], down: Down, chosen: Tensor) -> Tensor:
    needed = torch.zeros(supports[0].size, dtype=torch.bool)
    for run, support in zip(runs, supports, strict=True):
        for features in down.features(run):
            line = features[chosen.to(features.device)]
            needed |= support.of(line @ noise(line.shape, line.device))[0]
    return needed
