"""What chain c sees at step t: a pure function of (seed, chain, step)."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from devinterp.engine.batch import Batch
from devinterp.engine.objective import Objective
from devinterp.engine.rows import Rows
from devinterp.engine.seeds import order_generator
from devinterp.engine.settings import Settings


@dataclass(frozen=True)
class Batches:
    """The stream of sampling batches. Step t of a chain takes `accumulation` micro-batches of `batch_size` rows.

    An epoch visits the dataset once, in an order hashed from (seed, epoch[, chain]), and drops its last incomplete batch.
    """

    rows: Rows
    objective: Objective
    masked: bool
    """some losses do not count"""
    batch_size: int
    accumulation: int
    seed: int
    shuffle: bool
    shared: bool
    """all chains see the same batches in the same order"""

    @classmethod
    def of(cls, rows: Rows, objective: Objective, settings: Settings) -> "Batches":
        """Refuses rows of which no loss counts."""
        return cls(
            rows,
            objective,
            objective.check("dataset", rows),
            settings.batch_size,
            settings.gradient_accumulation_steps,
            settings.init_seed,
            settings.shuffle,
            settings.match_sampling_input_ids_across_chains,
        )

    def stream(self, chain: int) -> int | None:
        """The chain as far as its batches depend on it: None when all chains share them."""
        return None if self.shared else chain

    def step(self, chain: int, t: int) -> list[Batch]:
        """The micro-batches of step t (from 0), each of `batch_size` rows."""
        return [self.micro(chain, t * self.accumulation + j) for j in range(self.accumulation)]

    def micro(self, chain: int, number: int) -> Batch:
        """Micro-batch `number` (from 0) of the chain's stream."""
        per_epoch = self.rows.num_rows // self.batch_size
        epoch, position = divmod(number, per_epoch)
        start = position * self.batch_size
        if self.shuffle:
            order = epoch_order(self.rows.num_rows, self.seed, epoch, self.stream(chain))
        else:
            order = np.arange(self.rows.num_rows)
        return self.objective.of(self.rows.batch(order[start : start + self.batch_size]), self.masked)


@lru_cache(maxsize=4)
def epoch_order(num_rows: int, seed: int, epoch: int, stream: int | None) -> npt.NDArray[np.int64]:
    """The order in which an epoch visits the rows."""
    return order_generator(seed, "batches", epoch, stream).permutation(num_rows)
