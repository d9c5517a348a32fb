"""Which elements of a parameter, as products of index sets: never as large as the parameter.

A head is a few rows of one matrix and a few columns of another. Kept as indices it costs kilobytes where a bool tensor costs
megabytes, and `boxes` reaches its elements as views.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Term = Mapping[int, tuple[int, ...]]
"""axis -> sorted indices; axes left out are whole"""
Box = tuple[slice, ...]


@dataclass(frozen=True)
class Mask:
    """Union of disjoint products of index sets of a parameter of this shape."""

    shape: tuple[int, ...]
    terms: tuple[Term, ...]

    @classmethod
    def of(cls, shape: Sequence[int], term: Mapping[int, Iterable[int]]) -> "Mask":
        """One product of index sets; an axis with all its indices is left out."""
        kept = {axis: tuple(sorted({int(i) for i in indices})) for axis, indices in term.items()}
        return cls(tuple(shape), (({axis: i for axis, i in sorted(kept.items()) if len(i) < shape[axis]}),))

    def __or__(self, other: "Mask") -> "Mask":
        terms = list(self.terms)
        for term in other.terms:
            for piece in _outside(term, terms, self.shape):
                terms = _joined(terms, piece, self.shape)
        return Mask(self.shape, tuple(terms))

    @property
    def numel(self) -> int:
        """How many elements are selected."""
        return sum(_size(term, self.shape) for term in self.terms)

    @property
    def whole(self) -> bool:
        """Every element is selected."""
        return self.numel == math.prod(self.shape)

    def boxes(self) -> tuple[Box, ...]:
        """Disjoint tuples of slices whose union is the mask: `parameter[box]` are views."""
        return tuple(box for term in self.terms for box in self._boxes_of(term))

    def _boxes_of(self, term: Term) -> Iterator[Box]:
        per_axis = [runs(term[axis]) if axis in term else [slice(None)] for axis in range(len(self.shape))]
        return itertools.product(*per_axis)

    def dense(self, device: torch.device | None = None) -> Tensor:
        """Bool tensor of the parameter's shape; where one axis decides, a view that stores that axis alone."""
        if len(self.terms) == 1 and len(self.terms[0]) == 1:
            ((axis, indices),) = self.terms[0].items()
            line = torch.zeros(self.shape[axis], dtype=torch.bool, device=device)
            line[list(indices)] = True
            return line.view([-1 if i == axis else 1 for i in range(len(self.shape))]).expand(self.shape)
        full = torch.zeros(self.shape, dtype=torch.bool, device=device)
        for box in self.boxes():
            full[box] = True
        return full


Parts = dict[str, Mask | None]
"""parameter name -> selected elements; None = the whole parameter"""


def union(selections: Iterable[Mapping[str, Mask | None]]) -> Parts:
    """Everything that any of them selects; what adds up to a whole parameter becomes None."""
    result: Parts = {}
    for selection in selections:
        for name, mask in selection.items():
            known = result.get(name, mask)
            result[name] = None if mask is None or known is None else known if known is mask else known | mask
    return {name: None if mask is None or mask.whole else mask for name, mask in result.items()}


def runs(indices: Sequence[int]) -> list[slice]:
    """Sorted indices as slices of constant stride."""
    found, at = [], 0
    while at < len(indices):
        end = at + 1
        step = indices[end] - indices[at] if end < len(indices) else 1
        while end < len(indices) and indices[end] - indices[end - 1] == step:
            end += 1
        if end - at == 2 and step > 1:  # two indices far apart are two runs: the second may begin a longer one
            end, step = at + 1, 1
        found.append(slice(indices[at], indices[end - 1] + 1, step if step > 1 else None))
        at = end
    return found


def _size(term: Term, shape: tuple[int, ...]) -> int:
    return math.prod(len(term[axis]) if axis in term else size for axis, size in enumerate(shape))


def _outside(term: Term, others: Sequence[Term], shape: tuple[int, ...]) -> list[Term]:
    """The term without the others, in disjoint pieces."""
    pieces = [term]
    for other in others:
        pieces = [left for piece in pieces for left in _minus(piece, other, shape)]
    return pieces


def _minus(term: Term, other: Term, shape: tuple[int, ...]) -> list[Term]:
    left: list[Term] = []
    inside = dict(term)
    for axis, taken in other.items():
        mine = inside.get(axis, tuple(range(shape[axis])))
        both = set(mine) & set(taken)
        if not both:
            return [term]
        if len(both) < len(mine):
            left.append({**inside, axis: tuple(i for i in mine if i not in both)})
        inside[axis] = tuple(sorted(both))
    return left


def _joined(terms: Sequence[Term], piece: Term, shape: tuple[int, ...]) -> list[Term]:
    """The terms and a disjoint piece; two that differ along one axis become one."""
    for at, term in enumerate(terms):
        differ = [axis for axis in {*term, *piece} if term.get(axis) != piece.get(axis)]
        if len(differ) == 1 and differ[0] in term and differ[0] in piece:
            both = tuple(sorted({*term[differ[0]], *piece[differ[0]]}))
            merged = {**term, differ[0]: both}
            if len(both) == shape[differ[0]]:
                del merged[differ[0]]
            return _joined([*terms[:at], *terms[at + 1 :]], merged, shape)
    return [*terms, piece]
