"""Where a parameter enters the autograd graph as a bare tensor: at which tokens, and with which indices.

The gradient of a parameter is summed over tokens. The gradient of the first result computed from it that has an axis of tokens
is not: it tells queries (own token) from keys (others), and shows a key's bias although softmax makes its sum vanish.
"""

from collections import defaultdict
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from torch import Tensor
from torch.autograd.graph import Node

LEVELS = 8


class consumers:
    """Within the context every backward pass notes the gradients at the parameters' first results with tokens."""

    def __init__(self, output: Tensor, leaves: Mapping[str, Tensor], lengths: set[int]):
        self.lengths, self.handles = lengths, []  # type: ignore[var-annotated]
        self.chains = {name: chain for name, leaf in leaves.items() if (chain := _chain(output, leaf))}
        self.seen: dict[Node, list[Tensor]] = {}

    def __enter__(self) -> "Seen":
        self.seen = {}
        for node in {node for chain in self.chains.values() for level in chain for node in level}:
            self.handles.append(node.register_prehook(self._note(node)))
        return Seen(self)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def _note(self, node: Node) -> Any:
        def note(grads: tuple[Tensor | None, ...]) -> None:
            self.seen[node] = [(grad != 0).cpu() for grad in grads if grad is not None and self.lengths & {*grad.shape}]

        return note


class Seen:
    """What was noted, by parameter."""

    def __init__(self, owner: consumers):
        self.owner = owner

    def get(self, name: str, default: list[Tensor]) -> list[Tensor]:
        for level in self.owner.chains.get(name, []):
            found = [grad for node in level for grad in self.owner.seen.get(node, [])]
            if found:
                return found
        return default


def _chain(output: Tensor, leaf: Tensor) -> list[list[Node]]:
    """The nodes that use the leaf, those that use them, and so on."""
    users: dict[Node, list[Node]] = defaultdict(list)
    start, known, waiting = None, {output.grad_fn}, [output.grad_fn]
    while waiting:
        node = waiting.pop()
        for child, _ in node.next_functions if node is not None else ():
            if child is None:
                continue
            users[child].append(node)  # type: ignore[arg-type]
            if getattr(child, "variable", None) is leaf:
                start = child
            if child not in known:
                known.add(child)
                waiting.append(child)
    levels: list[list[Node]] = []
    level = [start] if start is not None else []
    while level and len(levels) < LEVELS:
        level = list({user for node in level for user in users[node]})
        levels.append(level)
    return levels
