"""What a number in the graph of a probe needs: which indices of which parameters, and at which tokens.

For a matrix module the needed rows are read off the gradient of its output, not of its weight: they are found without a tensor as
large as the weight, and a key's bias is seen although softmax makes its gradient vanish.
"""

from collections.abc import Set

import torch
from torch import Tensor

from devinterp.engine.discovery.nodes import consumers
from devinterp.engine.discovery.probe import Record, Run, token_axis


class Supports:
    """What each of several seeds needs: one long line of indices over the axes of all parameters."""

    def __init__(self, run: Run, only: Set[str] | None = None, skip: Set[str] = frozenset()):
        wanted = (set(run.leaves) if only is None else only) - skip
        self.run = run
        self.records = [r for r in run.records if r.weight in wanted and r.output.requires_grad]
        self.raw = {name: leaf for name, leaf in run.raw.items() if name in wanted}
        self.keys: dict[tuple[str, int], slice] = {}
        self.size = 0
        for record in self.records:
            self._key(record.weight, record.axis)
            if record.bias is not None:
                self._key(record.bias, 0)
        for name, leaf in self.raw.items():
            for axis in range(leaf.dim()):
                self._key(name, axis)
        self.consumers = consumers(run.output, self.raw, run.length)

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
                touched, elsewhere = self._rows(record, grad != 0)
                for key in ((record.weight, record.axis), (record.bias, 0)):
                    if key in self.keys:
                        needed[self.keys[key]] |= touched
                        far[self.keys[key]] |= elsewhere
        for name, grad in zip(self.raw, grads[len(self.records) :], strict=True):
            if grad is not None:
                elements[name] = (grad != 0).cpu()
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
                at = token_axis(grad[..., None], self.run.length)
                others = [i for i, n in enumerate(grad.shape) if n == size and i != at]
                if len(others) == 1:
                    along = grad.movedim((others[0], at), (0, 1))
                    lines = lines | along.reshape(size, -1).any(1)
                    elsewhere |= along[:, :-1].reshape(size, -1).any(1)
                else:
                    unclear |= bool(grad.movedim(at, 0)[:-1].any())
            needed[self.keys[name, axis]] |= lines
            far[self.keys[name, axis]] |= elsewhere | (self._elsewhere(name, axis, gradient, lines) if unclear else elsewhere)

    def _elsewhere(self, name: str, axis: int, gradient: Tensor, lines: Tensor) -> Tensor:
        """Of a matrix cut into pieces (queries, keys, values): the rows whose gradient is no multiple of the own token."""
        own = self.run.lines(self.run.x.detach())[-1]
        if axis or gradient.dim() != 2 or gradient.shape[1] != len(own):
            return lines
        other = gradient - torch.outer(gradient @ own, own) / (own @ own)
        return (other.norm(dim=1) > 1e-3 * gradient.norm(dim=1)).cpu() & lines
