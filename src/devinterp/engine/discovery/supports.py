"""What a number in the graph of a probe needs: which indices of which parameters, and at which tokens.

For a matrix module the needed rows are read off the gradient of its output, not of its weight: no tensor as large as the weight
is made, and a key's bias is seen although softmax makes its gradient vanish.
"""

from collections.abc import Set

import torch
from torch import Tensor

from devinterp.engine.discovery.nodes import consumers
from devinterp.engine.discovery.probe import Record, Run, token_axis


def _touched(grad: Tensor) -> Tensor:
    """Where a gradient is a number other than zero."""
    return grad != 0 if grad.sum().isfinite() else (grad != 0) & grad.isfinite()


class Supports:
    """What each of several seeds needs: one long line of indices over the axes of all parameters."""

    def __init__(self, run: Run, only: Set[str] | None = None, skip: Set[str] = frozenset()):
        wanted = (set(run.leaves) if only is None else only) - skip
        self.run = run
        self.records = [r for r in run.records if r.weight in wanted and r.output.requires_grad]
        raw = {name: leaf for name, leaf in run.raw.items() if name in wanted}
        self.raw = dict(sorted(raw.items(), key=lambda item: -item[1].dim()))  # biases after their weights
        self.keys: dict[tuple[str, int], slice] = {}
        self.size = 0
        for record in self.records:
            self._key(record.weight, record.axis)
            if record.bias is not None:
                self._key(record.bias, 0)
        for name, leaf in self.raw.items():
            for axis in range(leaf.dim()):
                self._key(name, axis)
        other = set() if run.y is None else {run.y.shape[token_axis(run.y)]}
        self.consumers = consumers(run.output, self.raw, {run.length, *other})

    def _key(self, name: str, axis: int) -> None:
        if (name, axis) not in self.keys:
            self.keys[name, axis] = slice(self.size, self.size + self.run.leaves[name].shape[axis])
            self.size += self.run.leaves[name].shape[axis]

    def of(self, seed: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Needed indices, those needed at other tokens, and the needed elements of raw parameters."""
        needed, far = torch.zeros(2, self.size, dtype=torch.bool)
        elements: dict[str, Tensor] = {}
        targets = [record.output for record in self.records] + list(self.raw.values())
        if not targets or not seed.requires_grad:
            return needed, far, elements
        with self.consumers as seen:
            grads = torch.autograd.grad(seed, targets, retain_graph=True, allow_unused=True)
        for record, grad in zip(self.records, grads[: len(self.records)], strict=True):
            if grad is not None:
                touched, elsewhere = self._rows(record, _touched(grad))
                for key in ((record.weight, record.axis), (record.bias, 0)):
                    if key in self.keys:
                        needed[self.keys[key]] |= touched
                        far[self.keys[key]] |= elsewhere
        for name, grad in zip(self.raw, grads[len(self.records) :], strict=True):
            if grad is not None:
                elements[name] = _touched(grad).cpu()
                self._raw(name, grad, seen.get(name, []), needed, far)
        return needed, far, elements

    def _rows(self, record: Record, touched: Tensor) -> tuple[Tensor, Tensor]:
        width = self.run.leaves[record.weight].shape[record.axis]
        lines = self.run.lines(touched)
        own = lines[:-1] if self.run.length in touched.shape[:-1] else lines  # of another sequence: all are other tokens
        return lines.reshape(-1, width).any(0).cpu(), own.reshape(-1, width).any(0).cpu()

    def _raw(self, name: str, gradient: Tensor, seen: list[Tensor], needed: Tensor, far: Tensor) -> None:
        for axis, size in enumerate(gradient.shape):
            lines = (gradient != 0).movedim(axis, 0).reshape(size, -1).any(1).cpu()
            elsewhere = torch.zeros(size, dtype=torch.bool)
            unclear = False
            for grad in seen:
                if self.run.length not in grad.shape:  # of the other sequence
                    unclear = True
                    continue
                at = token_axis(grad[..., None], self.run.length)
                others = [i for i, n in enumerate(grad.shape) if n == size and i != at]
                if len(others) == 1:
                    along = grad.movedim((others[0], at), (0, 1))
                    lines = lines | along.reshape(size, -1).any(1)
                    elsewhere |= along[:, :-1].reshape(size, -1).any(1)
                else:
                    unclear |= bool(grad.movedim(at, 0)[:-1].any())
            needed[self.keys[name, axis]] |= lines
            far[self.keys[name, axis]] |= elsewhere | (
                self._elsewhere(name, axis, gradient, far) & lines if unclear else elsewhere
            )

    def _elsewhere(self, name: str, axis: int, gradient: Tensor, far: Tensor) -> Tensor:
        """Of a matrix cut into pieces (queries, keys, values): the rows whose gradient is no multiple of the own token."""
        own = self.run.lines(self.run.x.detach())[-1]
        if gradient.dim() == 2 and axis == 0 and gradient.shape[1] == len(own):
            other = gradient - torch.outer(gradient @ own, own) / (own @ own)
            apart: Tensor = other.norm(dim=1) > 1e-3 * gradient.norm(dim=1)
            return apart.cpu()
        weights = [key for key in self.keys if key[1] == 0 and key[0] in self.raw and self.raw[key[0]].dim() == 2]
        beside = [key for key in weights if key[0].rpartition(".")[0] == name.rpartition(".")[0]]
        alike = [self.keys[key] for key in beside if len(self.raw[key[0]]) == gradient.shape[axis]]
        if gradient.dim() == 1 and alike:  # the bias of such a matrix
            return far[alike[0]]
        return torch.ones(gradient.shape[axis], dtype=torch.bool)
