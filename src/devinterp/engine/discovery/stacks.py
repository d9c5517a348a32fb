"""Stacks of blocks: the executed lists of parameterised modules."""

from torch import nn

from devinterp.engine.discovery.trace import Trace

Blocks = tuple[tuple[str, ...], ...]
"""for each block the paths of the modules that make it up"""


def find_stacks(model: nn.Module, trace: Trace) -> dict[str, Blocks]:
    """Path of the list -> its blocks. Lists beside each other that run in turns are one stack."""
    lists: dict[str, list[str]] = {}
    for path, module in model.named_modules():
        if any(path.startswith(f"{block}.") for blocks in lists.values() for block in blocks):
            continue
        blocks = [
            f"{path}.{name}" if path else name
            for name, child in module.named_children()
            if any(True for _ in child.parameters()) and not isinstance(child, nn.Embedding)  # a list of tables is no stack
        ]
        if _is_stack(module) and blocks and any(block in trace.calls for block in blocks):
            lists[path] = blocks
    stacks: dict[str, Blocks] = {}
    members: dict[str, list[str]] = {}
    for path in sorted(lists, key=lambda path: _start(lists[path], trace)):
        home = next((first for first, parts in members.items() if _alternate(first, path, lists, parts, trace)), None)
        members.setdefault(home or path, []).append(path)
    for first, parts in members.items():
        stacks[first] = tuple(zip(*(lists[part] for part in parts), strict=True))
    return stacks


def _is_stack(module: nn.Module) -> bool:
    if isinstance(module, nn.ModuleList):
        return True
    children = list(module.children())
    alike = len({type(child) for child in children}) == 1 and all(any(True for _ in child.children()) for child in children)
    return isinstance(module, nn.Sequential) and alike


def _start(blocks: list[str], trace: Trace) -> int:
    return min(trace.order[block] for block in blocks if block in trace.order)


def _alternate(first: str, path: str, lists: dict[str, list[str]], parts: list[str], trace: Trace) -> bool:
    """Siblings of one length, of which the second's i-th module runs between the first's i-th and the next."""
    ours, theirs, order = lists[first], lists[path], trace.order
    if first.rpartition(".")[0] != path.rpartition(".")[0] or len(ours) != len(theirs):
        return False
    if not all(block in order for block in (*ours, *theirs)):
        return False
    after = [order[block] for block in ours[1:]] + [len(order)]
    return all(order[a] < order[b] < end for a, b, end in zip(ours, theirs, after, strict=True))
