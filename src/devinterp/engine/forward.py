"""Per-token losses by the fastest path that is known to equal the plain one.

Three things can be left out of a plain forward pass: the logits of a whole batch (`vocabulary.py`), what lies before the
moving weights (`prefix.py`), and, with `compile`, Python between the operators. Each is proven first (`proof.py`).
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from devinterp.engine.batch import Batch
from devinterp.engine.checkpoint import Checkpoint
from devinterp.engine.prefix import Outputs, Prefix
from devinterp.engine.stand_ins import Cut, stand_ins
from devinterp.engine.vocabulary import Head

TOKENS_AT_ONCE = {"cpu": 2**11}
TOKENS_AT_ONCE_ELSEWHERE = 2**14
"""Batches of an observable are joined up to this many tokens a forward pass"""


@dataclass(frozen=True)
class Forward:
    """How a run computes losses. Plain unless something faster was found and proven."""

    checkpoint: Checkpoint
    head: Head | None = None
    prefix: Prefix | None = None
    compiled: bool = False
    precision: str | None = None
    """"bf16": observables' forward passes run under autocast; their losses are still reduced in float32"""
    rows_joined: bool = False
    """rows of a batch do not depend on one another, so batches of observables can be joined"""

    def losses(
        self,
        moved: Mapping[str, Tensor],
        batch: Batch,
        buffers: Mapping[str, Tensor],
        seed: int | str = 0,
        recorded: Outputs | None = None,
    ) -> Tensor:
        """Losses, float32, shape (batch, token_pos), 0 where they do not count; `recorded` is what the prefix returns here."""
        if self.compiled:
            return self._compiled(moved, *batch.tensors, batch.form, buffers)
        replaced: dict[Any, Callable[..., Any]] = {}
        if self.prefix is not None and recorded is not None:
            replaced = self.prefix.replay(recorded)
        if self.head is None:
            with stand_ins(replaced):
                return self.checkpoint.losses(moved, batch, buffers, seed)
        with stand_ins(replaced | {self.head.module: self.head.stop}):
            try:
                self.checkpoint.losses(moved, batch, buffers, seed)
                raise RuntimeError("the output embedding was not reached")
            except Cut as reached:
                hidden, weight, bias = reached.args
        return self.head.losses(hidden, weight, bias, batch)

    def observing(self) -> Any:
        """The context of observables' forward passes."""
        return torch.autocast(self.checkpoint.device.type, torch.bfloat16) if self.precision == "bf16" else nullcontext()

    def rows_at_once(self, batch_size: int, elements: int, chains: int) -> int:
        """Rows of an observable in one forward pass, of so many numbers each."""
        if not self.rows_joined:
            return batch_size
        tokens = TOKENS_AT_ONCE.get(self.checkpoint.device.type, TOKENS_AT_ONCE_ELSEWHERE)
        return max(1, tokens // (elements * chains * batch_size)) * batch_size

    @cached_property
    def _compiled(self) -> Callable[..., Tensor]:
        return torch.compile(
            lambda moved, columns, derived, form, buffers: self.checkpoint.losses(moved, Batch(columns, form, derived), buffers)
        )

    def described(self) -> dict[str, Any]:
        """For the store's record."""
        names = {module: name for name, module in self.checkpoint.model.named_modules()}
        return {
            "compile": self.compiled,
            "head": None if self.head is None else names[self.head.module],
            "prefix": None if self.prefix is None else [names[module] for module in self.prefix.modules],
            "batches_of_observables_joined": self.rows_joined,
        }
