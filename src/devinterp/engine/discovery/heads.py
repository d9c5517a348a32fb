"""Heads of a token mixer, from what its output projection's inputs depend on.

A head is a slice of the input of the output projection whose first and last feature both need something (the query) that no
other slice needs. Too fine a split shares its queries, too coarse a one holds two: the finest valid split is the heads.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from devinterp.engine.discovery.masks import Mask, Parts, union
from devinterp.engine.discovery.probe import Record, Run, noise
from devinterp.engine.discovery.supports import Supports

DRAWS = 5


@dataclass(frozen=True)
class Output:
    """The output projection: where its input features lie in its weight, and those features (last token, all tokens)."""

    path: str | None
    parameter: str
    bias: str | None
    shape: tuple[int, ...]
    rows: int
    """the axis of the outputs"""
    groups: int
    last: Tensor
    every: Tensor

    def columns(self, start: int, stop: int) -> Mask:
        """The elements that read the features [start, stop)."""
        if self.groups > 1:
            height, width = self.shape[0] // self.groups, self.shape[1]
            blocks = range(start // width, -(-stop // width))
            rows = [row for block in blocks for row in range(block * height, (block + 1) * height)]
            columns = range(width) if stop - start >= width else range(start % width, (stop - 1) % width + 1)
            return Mask.of(self.shape, {0: rows, 1: columns})
        others = [axis for axis in range(len(self.shape)) if axis != self.rows]
        flat = torch.arange(start, stop)
        places = torch.unravel_index(flat, [self.shape[axis] for axis in others])
        return Mask.of(self.shape, {axis: set(place.tolist()) for axis, place in zip(others, places, strict=True)})


@dataclass(frozen=True)
class Heads:
    """Heads of one mixer, with parameter names inside it."""

    output: str | None
    parameter: str
    bias: str | None
    upstream: frozenset[str]
    heads: tuple[Parts, ...]
    roles: tuple[dict[str, Parts], ...]
    group_of: tuple[int, ...]


def find_heads(run: Run, again: Callable[[int], Run | None]) -> Heads | None:
    """The heads of a mixer, or None where it has none that its output tells apart.

    A clamp or a decay may saturate in one draw and hide what a head needs, or that heads share it. So a second draw, with
    other vectors, completes and confirms what the first found; more draws do where heads then differ in size.
    """
    split = _finest(run)
    for draw in range(1, DRAWS):
        other = again(draw)
        if split is None:  # perhaps all is saturated by the module's own vectors
            split, other = _finest(other) if other is not None else None, run
        if split is None:
            return None
        if other is not None:
            split.complete(other)
        if split.even():
            break
    return split.heads() if split is not None and split.confirmed() else None


def _finest(run: Run) -> "Split | None":
    for first, output in _outputs(run):
        supports = Supports(run, skip={output.parameter})
        for count in range(len(output.last) // 2, 1, -1):
            if len(output.last) % count == 0:
                split = Split(supports, output, count)
                if split.plausible() and split.valid():
                    return split
        if first and (single := Split(supports, output, 1)).single():
            return single
    return None


def _outputs(run: Run) -> Iterator[tuple[bool, Output]]:
    """Candidates in order of execution: matrix modules whose input is token-mixed, then bare parameters."""
    seen: set[str] = set()
    for record in run.records:
        if record.path not in seen and run.mixes(record.input):
            seen.add(record.path)
            yield len(seen) == 1, _of_record(run, record)
    for name, leaf in run.raw.items():
        found = bare_output(run, name, leaf)
        if found is not None:
            yield not seen, found


def _of_record(run: Run, record: Record) -> Output:
    last = run.at_tokens(record.input, last=True)
    every = functools.reduce(torch.add, (run.at_tokens(r.input, last=False) for r in run.records if r.path == record.path))
    shape = tuple(run.leaves[record.weight].shape)
    return Output(record.path, record.weight, record.bias, shape, record.axis, record.groups, last, every)


def bare_output(run: Run, name: str, leaf: Tensor, sparse: bool = False) -> Output | None:
    """A parameter used as the last matrix: output = features x parameter, so its gradient is the features themselves.

    `sparse`: some features may be zero, as rectified ones are.
    """
    if leaf.dim() < 2 or run.output.shape[-1] not in leaf.shape:
        return None
    feature = 1
    found = []
    for last in (True, False):
        seed = run.at_tokens(run.output, last)[feature]
        (grad,) = torch.autograd.grad(seed, [leaf], create_graph=True, allow_unused=True)
        if grad is None or not grad.requires_grad:
            return None
        found.append(grad)
    for axis in (i for i, size in enumerate(leaf.shape) if size == run.output.shape[-1]):
        one = found[0].select(axis, feature)
        count = int((one != 0).sum())
        if int((found[0] != 0).sum()) == count and (count > 0 if sparse else one.numel() == count):
            lines = [grad.select(axis, feature).flatten() for grad in found]
            depends = torch.autograd.grad(lines[0].sum(), [run.x], retain_graph=True, allow_unused=True)[0]
            if depends is not None or run.y is not None:
                return Output(None, name, None, tuple(leaf.shape), axis, 1, *lines)
    return None


class Split:
    """The features of the output projection in `count` slices."""

    def __init__(self, supports: Supports, output: Output, count: int):
        self.supports, self.output, self.count = supports, output, count
        self.width = len(output.last) // count
        self.sources = [(supports, output)]
        self.asked: dict[tuple[int, str], tuple[Tensor, Tensor, dict[str, Tensor]]] = {}

    def complete(self, run: Run) -> None:
        """Add what the slices need in another run of the same module."""
        parameter = self.output.parameter
        output = next((output for _, output in _outputs(run) if output.parameter == parameter), None)
        supports = Supports(run, skip={parameter})
        if output is not None and supports.keys == self.supports.keys and len(output.last) == len(self.output.last):
            self.sources.append((supports, output))
            self.asked = {}
            self._measure()

    def confirmed(self) -> bool:
        """What told the slices apart still does, in all runs together."""
        return self.single() if self.count == 1 else self.valid()

    def plausible(self) -> bool:
        """What the first two slices show in three backward passes."""
        common = self._needs(0, "first") & self._needs(0, "last")
        return bool(common.any()) and bool((common & ~self._needs(1, "whole")).any())

    def valid(self) -> bool:
        """Every slice has something that both its ends and no other slice need."""
        self._measure()
        alone = self.whole.sum(0) == 1
        return bool((self.both & self.whole & alone).any(1).all())

    def even(self) -> bool:
        """Every slice needs as many indices of its own as the others."""
        own = self.whole & (self.whole.sum(0) < self.count)
        return len(set(own.sum(1).tolist())) == 1

    def single(self) -> bool:
        """One head: some matrix rows serve both ends (q, k), others one feature each, at other tokens (v)."""
        self._measure()
        matrix = self._is_matrix()
        needed, far, first = self._of(0, "first")
        _, _, last = self._of(0, "last")
        bare = [name for name in first if name in last and sum(size > 1 for size in first[name].shape) > 1]
        common = {name for name in bare if (first[name] & last[name]).any()}
        apart = {name for name in bare if name not in common and far[self.supports.keys[name, 0]].any()}
        one = needed & far & ~self._needs(0, "last") & matrix
        return (bool((self.both & matrix).any()) or bool(common)) and (bool(one.any()) or bool(apart))

    def _measure(self) -> None:
        self.whole = self._all("every") | self._all("whole")
        self.both = self._all("first") & self._all("last")

    def _of(self, head: int, which: str) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """One backward pass per head, seed and run, which is what the whole search costs."""
        if (head, which) not in self.asked:
            found = [supports.of(self._seed(output, head, which)) for supports, output in self.sources]
            elements: dict[str, Tensor] = {}
            for _, _, some in found:
                elements |= {name: touched | elements[name] if name in elements else touched for name, touched in some.items()}
            needed, far = (torch.stack([one[i] for one in found]).any(0) for i in (0, 1))  # type: ignore[misc]
            self.asked[head, which] = needed, far, elements
        return self.asked[head, which]

    def _seed(self, output: Output, head: int, which: str) -> Tensor:
        start, stop = head * self.width, (head + 1) * self.width
        if which == "first":
            return output.last[start]
        if which == "last":
            return output.last[stop - 1]
        line = (output.last if which == "whole" else output.every)[start:stop]
        return line @ noise(line.shape, line.device)

    def _needs(self, head: int, which: str) -> Tensor:
        return self._of(head, which)[0]

    def _all(self, which: str) -> Tensor:
        return torch.stack([self._needs(head, which) for head in range(self.count)])

    def _is_matrix(self) -> Tensor:
        names = {name for record in self.supports.records for name in (record.weight, record.bias)}
        line = torch.zeros(self.supports.size, dtype=torch.bool)
        for (name, _), where in self.supports.keys.items():
            line[where] = name in names
        return line

    def heads(self) -> Heads:
        """Indices used by some heads only; with one set of keys and values for all (multi-query) those too."""
        far = torch.stack([self._of(head, "whole")[1] for head in range(self.count)])
        common = self.whole.sum(0) == self.count
        mine = self.whole & ~common if self.count > 1 else self.whole.clone()
        several = mine & (mine.sum(0) > 1)
        group_of = _groups(several)
        projections = self._projections()
        if self.count > 1 and not (far & mine & projections).any():  # no keys or values of their own: multi-query
            shared = common & far.all(0) & projections
            mine |= shared
            group_of = (0,) * self.count if shared.any() else group_of
        roles = tuple(self._roles(head, mine[head], far[head]) for head in range(self.count))
        heads = tuple(union(parts.values()) for parts in roles)
        upstream = {name for (name, _), where in self.supports.keys.items() if self.whole[:, where].any()}
        out = self.output
        return Heads(out.path, out.parameter, out.bias, frozenset(upstream), heads, roles, group_of)

    def _projections(self) -> Tensor:
        """Indices of matrices: of modules, or bare parameters beside a bare matrix."""
        line = self._is_matrix()
        owners = {name.rpartition(".")[0] for name, leaf in self.supports.raw.items() if sum(n > 1 for n in leaf.shape) > 1}
        for (name, _), where in self.supports.keys.items():
            if name in self.supports.raw and name.rpartition(".")[0] in owners:
                line[where] = True
        return line

    def _roles(self, head: int, mine: Tensor, far: Tensor) -> dict[str, Parts]:
        """q: both ends of the head need it, at their own token; k: at others. v: one feature each, at others; gate: own."""
        elements = [self._of(head, which)[2] for which in ("first", "last")]
        roles: dict[str, Parts] = {role: {} for role in ("q", "k", "v", "gate")}
        for name in dict.fromkeys(name for name, _ in self.supports.keys):
            axes = {axis: where for (other, axis), where in self.supports.keys.items() if other == name and mine[where].any()}
            if not axes:
                continue
            shape = tuple(self.supports.run.leaves[name].shape)
            term = {axis: mine[where].nonzero().flatten().tolist() for axis, where in axes.items()}
            axis, where = next(iter(axes.items()))
            dense = self.both[head, where].clone()
            if name in elements[0] and name in elements[1] and len(shape) > 1:
                dense = (elements[0][name] & elements[1][name]).movedim(axis, 0).reshape(shape[axis], -1).any(1)
            elsewhere = far[where]
            alone = name in self.supports.raw and Mask.of(shape, term).numel == 1  # sinks, decays
            for role, chosen in (
                ("q", dense & ~elsewhere & (not alone)),
                ("k", dense & elsewhere & (not alone)),
                ("v", ~dense & elsewhere & (not alone)),
                ("gate", ~dense & ~elsewhere | torch.tensor(alone)),
            ):
                indices = [i for i in term[axis] if chosen[i]]
                if indices:
                    roles[role][name] = Mask.of(shape, {**term, axis: indices})
        roles["o"] = {self.output.parameter: self.output.columns(head * self.width, (head + 1) * self.width)}
        return roles


def _groups(several: Tensor) -> tuple[int, ...]:
    """Heads that share an index are one group (of keys and values)."""
    group_of = list(range(len(several)))
    shares = several.int() @ several.int().T
    for head in range(len(several)):
        for other in range(head):
            if shares[head, other]:
                group_of = [group_of[other] if g == group_of[head] else g for g in group_of]
    numbers = {group: i for i, group in enumerate(dict.fromkeys(group_of))}
    return tuple(numbers[group] for group in group_of)
