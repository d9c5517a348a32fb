"""What lies outside the blocks: token tables, learned positions, the unembedding, and the rest."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from devinterp.engine.discovery.probe import Record, as_matrix, first_tensor, is_norm, noise, token_axis
from devinterp.engine.discovery.stacks import Blocks
from devinterp.engine.discovery.trace import Trace


def find_tables(model: nn.Module, trace: Trace, stacks: dict[str, Blocks], inside: set[str]) -> dict[str, set[str]]:
    """Names of the parameters that embed tokens and positions, and of those that give the logits."""
    found: dict[str, set[str]] = {"embed": set(), "pos": set(), "unembed": set()}
    named = {id(p): name for name, p in model.named_parameters()}
    looked_up: set[str] = set()
    for path, module in model.named_modules():
        given = _integers(trace, path)
        table = module._parameters.get("weight")
        if not isinstance(module, nn.Embedding) or given is None or table is None or named[id(table)] in inside:
            continue
        if not _looks_up(module, trace, path, given):
            continue
        looked_up.add(named[id(table)])
        kind = _kind_of_rows(given, trace.ids)
        if kind:
            found[kind].add(named[id(table)])
    outside = Outside(model, trace, stacks, inside, looked_up)
    outside.run()
    for name, kind in outside.rows().items():
        found[kind].add(name)
    found["unembed"] |= outside.unembed(found["embed"])
    if not found["unembed"] and looked_up and outside.logits is not None:
        # a table may be multiplied by directly, without a module of its own
        outside = Outside(model, trace, stacks, inside, set())
        outside.run()
        found["unembed"] |= outside.unembed(found["embed"])
    return found


def _integers(trace: Trace, path: str) -> Tensor | None:
    call = trace.calls.get(path)
    values = [] if call is None else [*call.args, *call.kwargs.values()]
    return next((v.flatten() for v in values if isinstance(v, Tensor) and not v.is_floating_point()), None)


def _looks_up(module: nn.Embedding, trace: Trace, path: str, given: Tensor) -> bool:
    """A table with a forward of its own may scale its rows, or read others than those asked for."""
    if type(module).forward is nn.Embedding.forward:
        return True
    with torch.no_grad():
        output = first_tensor(module(*trace.calls[path].args, **trace.calls[path].kwargs))
        rows = module.weight[given].float().flatten() if int(given.max()) < len(module.weight) else None
    if output is None or rows is None or output.numel() != rows.numel():
        return False
    return bool(torch.cosine_similarity(output.float().flatten(), rows, dim=0) > 0.999)


def _kind_of_rows(rows: Tensor, ids: Iterable[Tensor]) -> str:
    """Rows in the order of the tokens embed them; consecutive rows are positions."""
    if any(torch.equal(part, given.to(part.device)) for given in ids for part in (rows[: len(given)], rows[-len(given) :])):
        return "embed"
    return "pos" if rows.numel() > 1 and bool((rows.diff() == 1).all()) else ""


class Outside:
    """The model with gradients only outside its blocks: every block is cut from what it reads."""

    def __init__(self, model: nn.Module, trace: Trace, stacks: dict[str, Blocks], inside: set[str], looked_up: set[str]):
        self.model, self.trace, self.stacks = model, trace, stacks
        self.blocks = {path for blocks in stacks.values() for block in blocks for path in block}
        own = {name: p for name, p in model.named_parameters() if name not in inside}
        matrices = {name for name in own if not _is_bare(model, name) or is_norm(model.get_submodule(name.rpartition(".")[0]))}
        self.leaves = {name: p.detach().clone().requires_grad_() for name, p in own.items() if name not in looked_up | matrices}
        self.records: list[Record] = []
        self.entries: list[Tensor] = []
        self.logits: Tensor | None = None

    def run(self) -> None:
        state: dict[str, Tensor] = {name: p.detach() for name, p in self.model.named_parameters()}
        state |= {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        with self._hooks():
            output = functional_call(self.model, state | self.leaves, self.trace.feed.args, self.trace.feed.kwargs)
        logits = getattr(output, "logits", output)
        hidden = getattr(output, "last_hidden_state", None)
        self.logits = first_tensor(logits) if hidden is None or logits is not output else None

    @contextmanager
    def _hooks(self) -> Iterator[None]:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> Any:
            values = [*args, *kwargs.values()]
            self.entries.extend(v for v in values if isinstance(v, Tensor) and v.requires_grad and v.is_floating_point())
            cut = {id(v): v.detach() for v in values if isinstance(v, Tensor)}
            return tuple(cut.get(id(v), v) for v in args), {k: cut.get(id(v), v) for k, v in kwargs.items()}

        def matrix(path: str) -> Any:
            def after(module: nn.Module, args: Any, output: Any) -> Any:
                record = as_matrix(path, module, args[0] if args else None, output)
                if record is None:
                    return None
                leaf = output.detach().requires_grad_() if not output.requires_grad else output
                self.records.append(Record(path, record.weight, record.bias, record.input, leaf, record.axis))
                return leaf.clone()  # later operations in place are legal on a copy

            return after

        handles = []
        try:
            for path, module in self.model.named_modules():
                if path in self.blocks:
                    handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
                elif not any(path.startswith(f"{block}.") for block in self.blocks):
                    handles.append(module.register_forward_hook(matrix(path)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def rows(self) -> dict[str, str]:
        """Bare tables by the rows that reach the first block: those of the tokens, or as many as there are tokens."""
        seeds = self.entries or ([self.logits] if self.logits is not None and self.logits.requires_grad else [])
        tables = {name: leaf for name, leaf in self.leaves.items() if leaf.dim() > 1}
        found: dict[str, str] = {}
        if not seeds or not tables:
            return found
        total = torch.stack([(seed.float() * noise(seed.shape, seed.device)).sum() for seed in seeds]).sum()
        grads = torch.autograd.grad(total, list(tables.values()), retain_graph=True, allow_unused=True)
        for (name, leaf), grad in zip(tables.items(), grads, strict=True):
            for axis in range(leaf.dim() - 1) if grad is not None else ():
                touched = (grad != 0).movedim(axis, 0).flatten(1).any(1).nonzero().flatten()
                sets = [torch.unique(given).to(touched.device) for given in self.trace.ids]
                lengths = {given.numel() for given in self.trace.ids}
                if any(torch.equal(touched, rows) for rows in sets):
                    found[name] = "embed"
                elif len(touched) in lengths and len(touched) < leaf.shape[axis] and bool((touched.diff() == 1).all()):
                    found[name] = "pos"
        return found

    def unembed(self, embed: set[str]) -> set[str]:
        """The matrix, and the bias, of which a logit needs one index alone."""
        logits = self.logits
        if logits is None or not logits.requires_grad or logits.dim() < 2:
            return set()
        choice = logits.movedim(token_axis(logits), 0)[-1].flatten()
        vocabulary = logits.shape[-1]
        column = vocabulary // 2
        targets: list[Tensor] = [r.output for r in self.records] + list(self.leaves.values())
        grads = torch.autograd.grad(choice[-vocabulary:][column], targets, retain_graph=True, allow_unused=True)
        names = dict(self.model.named_parameters())
        canonical = {id(p): name for name, p in names.items()}
        every = dict(self.model.named_parameters(remove_duplicate=False))
        found: set[str] = set()
        for record, grad in zip(self.records, grads[: len(self.records)], strict=True):
            if grad is not None and _only(grad, column, vocabulary):
                parts = [record.weight] + ([record.bias] if record.bias else [])
                found |= {canonical[id(every[name])] for name in parts}
        for (name, leaf), grad in zip(self.leaves.items(), grads[len(self.records) :], strict=True):
            if grad is not None and any(size == vocabulary and _only(grad.movedim(axis, -1), column, vocabulary)
                                        for axis, size in enumerate(leaf.shape)):  # fmt: skip
                found.add(name)
        rows = {names[name].shape[0] for name in embed}
        matrices = {name for name in found if names[name].dim() > 1}
        return found if matrices and (not rows or vocabulary in {s for n in matrices for s in names[n].shape}) else set()


def _only(grad: Tensor, column: int, width: int) -> bool:
    """Of the last axis one index alone."""
    if grad.shape[-1] != width:
        return False
    touched = (grad != 0).reshape(-1, width).any(0)
    return bool(touched[column]) and int(touched.sum()) == 1


def _is_bare(model: nn.Module, name: str) -> bool:
    """Not the weight or bias of a module that multiplies by a matrix when it runs."""
    module = model.get_submodule(name.rpartition(".")[0])
    own = dict(module.named_parameters(recurse=False))
    weight = own.get("weight")
    is_matrix = (
        weight is not None and weight.dim() == 2 and set(own) <= {"weight", "bias"} and not isinstance(module, nn.Embedding)
    )
    return not is_matrix
