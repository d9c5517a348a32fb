"""Trials of a model on a few rows before a run: what its losses are of, and whether they can be used. No names of models."""

import difflib
import inspect
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from devinterp.engine.batch import IDS, Batch
from devinterp.engine.checkpoint import Checkpoint, call, encodes, explained
from devinterp.engine.objective import Objective
from devinterp.engine.observables import Observable
from devinterp.engine.rows import Rows
from devinterp.errors import InputValueError, got

LOOKS_AHEAD, LOOKS_AHEAD_HALF = 1e-4, 1e-2
"""A change of earlier logits, as a share of the largest, above which they depend on later tokens"""
ROWS = 4
"""on which that is tried"""
OWN_LOSS, OWN_LOSS_HALF = 1e-3, 3e-2
"""Relative difference from the model's own loss that is taken for rounding"""


def find_objective(checkpoint: Checkpoint, rows: Rows, count: int, observables: Sequence[Observable] = ()) -> Objective:
    """What the losses of this model, or of its loss function, are of; the first `count` rows are tried where that is needed."""
    if rows.form == IDS and checkpoint.loss_fn is not None:
        return Objective(rows.length - 1, 1, default=False)
    if rows.form == IDS:
        takes = _inputs_of(checkpoint.model)
        for observable in observables:  # padded ones beside sampling data that is not
            _check_names(f"observables[{observable.name!r}]", observable.batch.columns, takes)
        return Objective(rows.length - 1, 1, takes_positions=_takes_positions(takes))
    tried = checkpoint.placed(rows.batch(np.arange(count)))
    with checkpoint.ready():
        if checkpoint.loss_fn is not None:
            return _of_loss_fn(checkpoint, rows, tried)
        return _of_model(checkpoint, rows, tried)


def _of_loss_fn(checkpoint: Checkpoint, rows: Rows, tried: Batch) -> Objective:
    """One loss for each row, or one for each position; of tokens or labels where there are as many, or one fewer."""
    fix = f"A batch is {described(tried)}. Run it once by hand on the first rows of the dataset."
    if "input_ids" in rows.columns:
        fix += " To get input_ids alone, leave the other columns out: dataset.select_columns(['input_ids'])."
    with explained("loss_fn", fix):
        losses = checkpoint.raw_losses(tried)
    if not isinstance(losses, Tensor) or losses.dim() not in (1, 2) or len(losses) != len(tried) or not losses.numel():
        shown = f"losses of shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
        allowed = f"a tensor of shape ({len(tried)},), one loss per row, or ({len(tried)}, positions)"
        raise InputValueError(got("loss_fn", shown, allowed, "Return losses of single rows (reduction='none')."))
    if losses.dim() == 1:
        return Objective(1, None, default=False)
    positions, of_decoder = losses.shape[1], encodes(checkpoint.model)
    marked = ("labels",) if of_decoder else ("labels", "attention_mask", "input_ids")
    lengths = [rows.columns[name].shape[0] for name in marked if name in rows.columns and len(rows.columns[name].shape) == 1]
    shift = next((length - positions for length in lengths if length - positions in (0, 1)), None)
    return Objective(positions, shift, default=False, of_decoder=of_decoder)


def _of_model(checkpoint: Checkpoint, rows: Rows, tried: Batch) -> Objective:
    model, takes = checkpoint.model, _inputs_of(checkpoint.model)
    _check_names("dataset", rows.columns, takes)
    labels = rows.columns.get("labels")
    if encodes(model):
        if labels is None or len(labels.shape) != 1:
            fix = "Add a column 'labels', what the decoder is to say; or pass a loss_fn."
            raise InputValueError(got("dataset", f"columns {list(rows.columns)}", "with labels (rows, tokens)", fix))
        found = Objective(labels.shape[0], 0, of_decoder=True)
    else:
        if labels is not None and labels.shape != (rows.length,):
            fix = "Its labels are those of its tokens. Or pass a loss_fn(model, batch)."
            raise InputValueError(got("dataset['labels']", f"rows of {labels.shape}", f"rows of ({rows.length},)", fix))
        found = Objective(rows.length - 1, 1)
    check_vocabulary(checkpoint, found.of(tried), rows.largest_id)
    if not found.of_decoder:
        if looks_ahead(checkpoint, tried):
            if labels is None:
                raise InputValueError(_not_causal("labels (-100 where no token is hidden)"))
            found = Objective(rows.length, 0)
        else:
            found = replace(found, takes_positions=_takes_positions(takes))
    if labels is not None and (takes is None or "labels" in takes):
        _check_own_loss(checkpoint, found, tried)
    _check_padding(checkpoint, found, rows)
    return found


def _inputs_of(model: nn.Module) -> set[str] | None:
    """What the forward takes by name; None where it takes anything."""
    parameters = list(inspect.signature(model.forward).parameters.values())
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return named if named or not any(p.kind is p.VAR_KEYWORD for p in parameters) else None


def _takes_positions(takes: set[str] | None) -> bool:
    return takes is not None and "position_ids" in takes


def _check_names(argument: str, columns: Iterable[str], takes: set[str] | None) -> None:
    """Refuse columns that the default loss has no use for: one that is misspelt would be left out without a word."""
    taken = (takes or set()) | {"input_ids", "labels"}
    for name in columns if takes is not None else ():
        if name not in taken:
            close = difflib.get_close_matches(name, sorted(taken), n=1)
            fix = f"Did you mean {close[0]!r}? " if close else ""
            fix += f"Leave it out: {argument}.remove_columns([{name!r}]); or pass a loss_fn(model, batch) that uses it."
            allowed = f"one of {sorted(taken)}, which the model's forward and its loss take"
            raise InputValueError(got(f"{argument} column", name, allowed, fix))


@torch.no_grad()
def looks_ahead(checkpoint: Checkpoint, batch: Batch) -> bool:
    """Whether logits depend on tokens that come later, by a trial: the second half of each row's tokens is changed."""
    plain, batch = Checkpoint(checkpoint.model, None, checkpoint.device), batch[:ROWS]
    ids = batch.columns["input_ids"]
    attended = batch.columns.get("attention_mask", torch.ones_like(ids)).bool()
    number = attended.long().cumsum(1)
    late = number > (number[:, -1:] + 1) // 2
    with plain.ready():  # not in train_mode: batch statistics mix positions
        first = plain.logits(batch)
        others = torch.where(late, (ids + 1) % first.shape[-1], ids)
        second = plain.logits(replace(batch, columns={**batch.columns, "input_ids": others}))
    change = (second - first).abs().amax(2)[attended & ~late]
    return bool((change > (LOOKS_AHEAD_HALF if is_half(plain) else LOOKS_AHEAD) * first.abs().max()).any())


def is_half(checkpoint: Checkpoint) -> bool:
    """Whether some weights are in half precision."""
    return any(p.element_size() < 4 for p in checkpoint.parameters.values() if p.is_floating_point())


def _not_causal(what: str) -> str:
    allowed = "a causal one: its logits depend on tokens that come later, so it does not predict the next token"
    return got("model", "a model that looks ahead", allowed, f"Add a column with {what}, or pass a loss_fn(model, batch).")


def _check_own_loss(checkpoint: Checkpoint, objective: Objective, tried: Batch) -> None:
    """Models that take labels have a loss of their own: it must be the mean of those that are recorded."""
    plain = Checkpoint(checkpoint.model, None, checkpoint.device)
    by_labels = replace(objective, of_decoder=True).of(tried)  # alone, as such models do
    batch = replace(tried, derived={**objective.of(tried).derived, **by_labels.derived})
    if batch.counted is not None and not batch.counted.any():
        return
    with plain.ready(), torch.no_grad(), explained("model", "Run it once by hand on the first rows, with their labels."):
        own = getattr(call(plain.model, batch, {"labels"}), "loss", None)
        losses = plain.losses({}, batch, plain.buffers())
    if not isinstance(own, Tensor) or own.numel() != 1:
        return
    ours = float(losses.sum() / (losses.numel() if batch.counted is None else batch.counted.sum()))
    if not abs(float(own) - ours) <= (OWN_LOSS_HALF if is_half(plain) else OWN_LOSS) * max(1.0, abs(ours)):
        raise InputValueError(
            f"model: its own loss on the labels of the first rows is {float(own):.6g}, the mean cross-entropy of the labels "
            f"{'at' if objective.shift == 0 else 'after'} each position is {ours:.6g}: it means another loss. Pass a "
            "loss_fn(model, batch) -> loss per row or per position."
        )


@torch.no_grad()
def _check_padding(checkpoint: Checkpoint, objective: Objective, rows: Rows) -> None:
    """A sequence with its padding must have the losses that it has alone; that of one row, padded on the left if one is."""
    number = _padded_row(rows)
    if number is None:
        return
    plain = Checkpoint(checkpoint.model, None, checkpoint.device)
    whole = checkpoint.placed(rows.batch(np.array([number])))
    tokens = whole.columns["attention_mask"][0].bool()
    alone = {n: c[:, tokens] if rows.columns[n].shape == (rows.length,) else c for n, c in whole.columns.items()}
    if objective.of_decoder:
        alone["labels"] = whole.columns["labels"]
    shorter = objective if objective.of_decoder else replace(objective, positions=int(tokens.sum()) - (objective.shift or 0))
    found = []
    with plain.ready(), explained("model", f"It fails on row {number} of the dataset, without or with its padding."):
        for part, of in ((whole, objective), (replace(whole, columns=alone), shorter)):
            batch = of.of(part)
            losses = plain.losses({}, batch, plain.buffers())
            found.append(losses.flatten() if batch.counted is None else losses[batch.counted])
    if len(found[0]) != len(found[1]) or not len(found[0]):
        return  # its labels say that padding counts; or it has no loss, which is refused
    limit = OWN_LOSS_HALF if is_half(plain) else OWN_LOSS
    worst = ((found[0] - found[1]).abs() / found[1].abs().clamp(min=1)).max().item()
    if not worst <= limit:
        raise InputValueError(
            f"model: row {number} of the dataset has other losses with its padding than alone (by {worst:.2g}): it does not "
            "leave padding out by its attention_mask. Pad on the right, or take sequences of equal length."
        )


def _padded_row(rows: Rows) -> int | None:
    """The first row padded on the left, or else anywhere."""
    if "attention_mask" not in rows.columns:
        return None
    first = None
    for numbers in rows.spans():
        mask = rows.batch(numbers).columns["attention_mask"].bool()
        left, anywhere = (~mask[:, 0]).nonzero(), (~mask.all(1)).nonzero()
        if len(left):
            return int(numbers[int(left[0])])
        if first is None and len(anywhere):
            first = int(numbers[int(anywhere[0])])
    return first


def described(batch: Batch) -> str:
    """What a loss function is given, in words."""
    columns = ", ".join(f"{name} {tuple(column.shape)}" for name, column in batch.columns.items())
    return f"a {batch.form} of {columns}" if batch.form != IDS else f"a tensor {tuple(batch.given.shape)}"


def check_vocabulary(checkpoint: Checkpoint, batch: Batch, largest_id: int) -> None:
    """Ids beyond the vocabulary must not reach a GPU (the assert kills the process), so this forward takes zeros."""
    length = batch.columns["input_ids"].shape[1]
    zeros = {name: torch.zeros_like(t) if name in ("input_ids", "labels") else t for name, t in batch[:1].columns.items()}
    with explained("model", f"Is it made for sequences of {length} tokens? Try a smaller max_length, or a loss_fn."):
        vocabulary = checkpoint.logits(replace(batch[:1], columns=zeros)).shape[-1]
    if largest_id >= vocabulary:
        fix = "The dataset was made with another tokenizer than the model's."
        allowed = f"made of token ids below the model's vocabulary of {vocabulary}"
        raise InputValueError(got("dataset", f"token id {largest_id}", allowed, fix))


def check_loss(checkpoint: Checkpoint, objective: Objective, batch: Batch, largest_id: int) -> None:
    """One batch through the model before the run: shape, dtype, gradient, determinism, and a model left alone."""
    argument = "model" if checkpoint.loss_fn is None else "loss_fn"
    if checkpoint.loss_fn is None:
        check_vocabulary(checkpoint, batch, largest_id)
    before = checkpoint.digest() if checkpoint.loss_fn else ""
    with explained(argument, f"A batch is {described(batch)}. Run it once by hand on the first rows of the dataset."):
        leaves = {name: p.requires_grad_() for name, p in checkpoint.detached().items() if p.is_floating_point()}
        probe = checkpoint.losses(leaves, batch, checkpoint.buffers(), seed=0)
        differentiable = probe.requires_grad
        probe = probe.detach()
        again = checkpoint.losses(leaves, batch, checkpoint.buffers(), seed=0).detach()
    wanted = len(batch), objective.positions
    if tuple(probe.shape) != wanted:
        fix = "Return one loss per predicted token (reduction='none')."
        raise InputValueError(got(argument, f"losses of shape {tuple(probe.shape)}", f"of shape {wanted}", fix))
    if not differentiable:
        fix = "Remove detach() or torch.no_grad() from it, and return floating-point losses."
        raise InputValueError(got(argument, "losses without a gradient", "differentiable in the weights", fix))
    if not torch.isfinite(probe).all():
        fix = "Look at the loss of the first sequences of the dataset at this checkpoint."
        raise InputValueError(got(argument, "NaN or infinite losses at the checkpoint", "finite", fix))
    if checkpoint.loss_fn and checkpoint.digest() != before:
        raise InputValueError(got("loss_fn", "changes the weights of the model", "free of side effects", "Use a copy."))
    if checkpoint.loss_fn is None and batch.form == IDS and looks_ahead(checkpoint, batch):
        raise InputValueError(_not_causal("labels"))
    if not torch.equal(probe, again):
        warnings.warn(
            f"{argument}: two calls on the same batch and weights differ, so this run cannot be repeated bit by bit.",
            UserWarning,
            stacklevel=2,
        )
