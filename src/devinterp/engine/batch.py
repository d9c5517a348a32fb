"""What goes through the model at once: rows of named columns, and which of their losses count.

A batch of token sequences is the case of one column, all of whose losses count.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

IDS, DICT, TUPLE = "ids", "dict", "tuple"
"""How a loss function takes a batch: the tensor of token ids alone, a dict of columns, a tuple of them"""

IGNORED = -100
"""The label of a position that has no loss, as Hugging Face and torch's cross-entropy have it"""


@dataclass(frozen=True)
class Batch:
    """Rows of a dataset. While losses are computed those that do not count are 0; where they are stored, NaN."""

    columns: Mapping[str, Tensor]
    """by name; rows come first"""
    form: str = IDS
    derived: Mapping[str, Tensor] = field(default_factory=dict)
    """`targets` (row, position), the class that each loss is of, `IGNORED` for none; `counted` (row, position), bool;
    `position_ids` (row, token), an input of the model that the caller did not give"""

    @property
    def given(self) -> Any:
        """As a loss function of the caller's takes it."""
        if self.form == IDS:
            return self.columns["input_ids"]
        return dict(self.columns) if self.form == DICT else tuple(self.columns.values())

    @property
    def targets(self) -> Tensor:
        return self.derived["targets"]

    @property
    def counted(self) -> Tensor | None:
        """Which losses count; None = all."""
        return self.derived.get("counted")

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, rows: slice) -> "Batch":
        return self.each(lambda tensor: tensor[rows])

    def each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """The batch with every tensor changed."""
        columns, derived = ({name: change(t) for name, t in held.items()} for held in (self.columns, self.derived))
        return replace(self, columns=columns, derived=derived)

    @staticmethod
    def join(batches: Sequence["Batch"], how: Callable[[list[Tensor]], Tensor]) -> "Batch":
        """Batches as one, by `torch.cat` or `torch.stack`."""
        first = batches[0]
        columns = {name: how([batch.columns[name] for batch in batches]) for name in first.columns}
        derived = {name: how([batch.derived[name] for batch in batches]) for name in first.derived}
        return replace(first, columns=columns, derived=derived)

    @property
    def tensors(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """All that it holds, in a form that torch's transforms take apart; `holding` puts it together again."""
        return dict(self.columns), dict(self.derived)

    def holding(self, tensors: tuple[dict[str, Tensor], dict[str, Tensor]]) -> "Batch":
        return replace(self, columns=tensors[0], derived=tensors[1])


def only_counted(losses: Tensor, counted: Tensor | None) -> Tensor:
    """Losses with 0 where none counts: sums, gradients and looks for what is not finite then leave those out."""
    return losses if counted is None else torch.where(counted.to(losses.device), losses, 0.0)


def marked(losses: Tensor, counted: Tensor | None) -> Tensor:
    """Losses as they are stored: NaN where none counts."""
    return losses if counted is None else losses.masked_fill(~counted, float("nan"))


def mean_loss(losses: Tensor, counted: Tensor | None) -> Tensor:
    """Mean of the losses that count, of losses that are 0 elsewhere."""
    return losses.mean() if counted is None else losses.sum() / counted.sum()


def joined_counted(batches: Sequence[Batch]) -> Tensor | None:
    """Which losses of these micro-batches count, joined along the rows; None = all."""
    parts = [batch.counted for batch in batches if batch.counted is not None]
    return torch.cat(parts, -2) if parts else None
