"""Every stored variable: its name, dims, dtype, unit and meaning. Written once, here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

RUNNING, COMPLETE, DIVERGED, FAILED = range(4)
STATUS_MEANINGS = ("running", "complete", "diverged", "failed")

CHUNK_BYTES = 4 * 2**20
MOST_DRAWS_PER_CHUNK = 50
STEPS_PER_CHUNK = 10_000


@dataclass(frozen=True)
class Variable:
    """One stored array. Losses are float32 nats; floats start as NaN."""

    dims: tuple[str, ...]
    dtype: str
    meaning: str
    unit: str = ""
    attributes: Mapping[str, Any] | None = None
    chunks: tuple[int, ...] | None = None
    """None = by the sizes of the dims, as `chunks` says"""

    @property
    def along(self) -> str | None:
        """The dim that grows while a chain runs: its rows arrive one by one and are written a whole chunk at a time."""
        return next((dim for dim in ("draw", "step") if dim in self.dims), None)


@dataclass(frozen=True)
class StoredColumn:
    """A column of the data as it is stored for every observable; token ids are the case that needs no other."""

    column: str
    """as the caller named it"""
    name: str
    dims: tuple[str, ...]
    dtype: str
    meaning: str


TOKEN_IDS = StoredColumn("input_ids", "input_ids", ("token",), "int64", "token ids")


def variables(
    observables: Sequence[str],
    metrics: Sequence[str],
    shared_batches: bool,
    columns: Sequence[StoredColumn] = (TOKEN_IDS,),
    numbered: bool = False,
    masked: bool = False,
) -> dict[str, Variable]:
    """All variables of a run, by stored name, the coordinates included.

    `numbered`: with the numbers of the observables' rows in the data that was given; `masked`: some losses do not count.
    """
    baseline_dims = ("draw", "batch", "token_pos") if shared_batches else ("chain", "draw", "batch", "token_pos")
    status = {"flag_values": list(range(4)), "flag_meanings": " ".join(STATUS_MEANINGS)}
    found = {
        "chain": Variable(("chain",), "int64", "number of the chain"),
        "draw": Variable(("draw",), "int64", "number of the draw, from 0"),
        "step": Variable(("step",), "int64", "number of the step, from 1"),
        "token_pos": Variable(("token_pos",), "int64", "position of the last token seen by the prediction"),
        "n_beta": Variable((), "float64", "inverse temperature times n"),
        "init_loss": Variable(("chain", "token_pos"), "float32", "mean loss at the checkpoint", "nats"),
        "sampling_loss": Variable(
            ("chain", "draw", "batch", "token_pos"), "float32", "loss on the next step's batch at each draw", "nats"
        ),
        "baseline_loss": Variable(
            baseline_dims, "float32", "loss at the checkpoint on the same batch as sampling_loss", "nats"
        ),
        "step_loss": Variable(("chain", "step"), "float32", "mean loss of each step's batch before its update", "nats"),
        "chain_status": Variable(("chain",), "int8", "what became of the chain", attributes=status),
        "diverged_at": Variable(("chain",), "int64", "steps taken when the loss stopped being finite; -1 = never"),
    }
    for name in observables:
        batch = f"batch_{name}"
        found[f"loss_{name}"] = Variable(
            ("chain", "draw", batch, "token_pos"), "float32", f"loss on observable {name} at each draw", "nats"
        )
        found[f"init_loss_{name}"] = Variable(
            (batch, "token_pos"), "float32", f"loss at the checkpoint on observable {name}", "nats"
        )
        for column in columns:
            meaning = f"{column.meaning} of observable {name}"
            found[f"{column.name}_{name}"] = Variable((batch, *column.dims), column.dtype, meaning)
        if numbered:
            found[f"row_{name}"] = Variable((batch,), "int64", f"numbers of the rows of observable {name} in its data")
    if masked:
        found["init_loss_count"] = Variable(("chain", "token_pos"), "int64", "losses that init_loss is the mean of")
    for name in metrics:
        found[f"metrics_{name}"] = Variable(("chain", "step"), "float32", f"{name} of the parts of each update")
    return found


def chunks(name: str, variable: Variable, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Chunk lengths: one chain to a chunk, and along draws and steps a length that does not depend on how many there are."""
    if variable.chunks is not None:
        return variable.chunks
    if variable.dims == (name,):  # a coordinate
        return (sizes[name],)
    row = 4
    for dim in variable.dims:
        row *= 1 if dim in ("chain", "draw", "step") else sizes[dim]
    draws = max(1, min(MOST_DRAWS_PER_CHUNK, CHUNK_BYTES // row))
    lengths = {"chain": 1, "draw": draws, "step": STEPS_PER_CHUNK}
    return tuple(lengths.get(dim, sizes[dim]) for dim in variable.dims)
