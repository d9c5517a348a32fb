"""Which losses the rows of a run have, what each is of, and which of them count."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from devinterp.engine.batch import IGNORED, Batch
from devinterp.engine.observables import Observable
from devinterp.engine.rows import Rows
from devinterp.errors import InputValueError


@dataclass(frozen=True)
class Objective:
    """Loss t of a row is of its position t + `shift`.

    Positions are those of `labels`, or without labels of `input_ids`. One counts where its label is not `IGNORED` and, by the
    `attention_mask`, it is a token and so is the one that the model predicts it from.
    """

    positions: int
    """losses of a row"""
    shift: int | None
    """1 predicts the next token, 0 the token itself; None: losses of no known positions, all of which count"""
    default: bool = True
    """cross-entropy of the labels or tokens, by the model's logits"""
    of_decoder: bool = False
    """positions are those of an encoder-decoder's labels, which the attention_mask of its input says nothing about"""
    takes_positions: bool = False
    """position_ids are made from the attention_mask, so that padding on the left does not move the tokens"""

    def of(self, batch: Batch, masked: bool = True) -> Batch:
        """The batch with what its losses are of; `masked` = False where every loss is known to count."""
        columns, derived = batch.columns, {}
        counted = self.counted(batch) if masked else None
        if counted is not None:
            derived["counted"] = counted
        if self.default:
            targets = self._shifted(columns.get("labels", columns["input_ids"]))
            derived["targets"] = targets if counted is None else targets.masked_fill(~counted, IGNORED)
        attended = columns.get("attention_mask")
        if self.takes_positions and attended is not None and "position_ids" not in columns:
            derived["position_ids"] = (attended.cumsum(1) - 1).clamp(min=0)
        return replace(batch, derived=derived)

    def counted(self, batch: Batch) -> Tensor | None:
        """Which losses count, shape (batch, position); None where no column says so."""
        if self.shift is None:
            return None
        found: list[Tensor] = []
        labels, attended = batch.columns.get("labels"), batch.columns.get("attention_mask")
        whole = (self.positions + self.shift,)
        if labels is not None and labels.shape[1:] == whole and not labels.is_floating_point():
            found.append(self._shifted(labels) != IGNORED)
        if attended is not None and attended.shape[1:] == whole and not self.of_decoder:
            found += [self._shifted(attended).bool(), attended[:, : self.positions].bool()]
        return torch.stack(found).all(0) if found else None

    def _shifted(self, column: Tensor) -> Tensor:
        return column[:, self.shift or 0 :]

    def check(self, argument: str, rows: Rows) -> bool:
        """Whether some losses of these rows do not count; refuses rows of which none does."""
        if self.shift is None or not {"labels", "attention_mask"} & set(rows.columns):
            return False
        masked = False
        for numbers in rows.spans():
            counted = self.counted(rows.batch(numbers))
            if counted is None:
                return False
            if (empty := ~counted.any(1)).any():
                row = int(numbers[int(empty.nonzero()[0])])
                raise InputValueError(
                    f"{argument}: row {row} has no position with a loss: all of its labels are {IGNORED}, or padding by the "
                    f"attention_mask, or it is a single token. Drop such rows: {argument}.filter(...)."
                )
            masked |= not bool(counted.all())
        return masked

    def observed(self, observable: Observable) -> Observable:
        """The observable with what its losses are of."""
        batch = self.of(observable.batch)
        counted = batch.counted
        if counted is not None and not counted.any(1).all():
            row = int(observable.numbers[int((~counted.any(1)).nonzero()[0])])
            argument = f"observables[{observable.name!r}]"
            raise InputValueError(f"{argument}: row {row} has no position with a loss. Drop such rows with filter(...).")
        return replace(observable, batch=self.of(observable.batch, masked=counted is not None and not bool(counted.all())))
