"""Standard errors of susceptibilities: the traces of a few sequences at a time, so that memory does not grow with the data."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from devinterp.analysis.moments import spans
from devinterp.analysis.susceptibility import Doubles, one_chain_errors, two_chain_errors
from devinterp.analysis.uncertainty import standard_errors
from devinterp.slt.suites import Suite, at_checkpoint
from devinterp.store.samples import mean_per_draw
from devinterp.store.sweeps import FULL

READ_BYTES = 2**25
"""Losses read at once; at least one sequence"""

MeansAndErrors = dict[str, list[tuple[Doubles, Doubles]]]
"""Of each observable, E_full[d] and its error: a pair for every sequence, or one for all"""


def errors_of_full(suite: Suite, mean_over: str | None) -> MeansAndErrors:
    """What the two-chain estimator takes from the run of the whole model."""
    task = _task_losses(suite, FULL)
    return {
        observable: [(d.mean(axis=(0, 1)), standard_errors(d)) for d in _differences(suite, FULL, observable, task, mean_over)]
        for observable in suite.names
    }


def errors_of(suite: Suite, name: str, mean_over: str | None, full: MeansAndErrors | None) -> dict[str, Doubles]:
    """Errors of one restriction's susceptibilities, flat, in the order of the table; of the one-chain estimator without `full`.

    A mean over tokens has the error of the mean trace: all tokens are measured in the same draws, so their errors do not
    average out.
    """
    task = _task_losses(suite, name)
    g, found = task - at_checkpoint(suite)[0], {}
    for observable in suite.names:
        traces = _differences(suite, name, observable, task, mean_over)
        if full is None:
            errors = [one_chain_errors(g, d) for d in traces]
        else:
            errors = [two_chain_errors(g, d, *known) for d, known in zip(traces, full[observable], strict=True)]
        found[observable] = np.stack(errors).ravel()
    return found


def _task_losses(suite: Suite, name: str) -> Doubles:
    """L at every draw, shape (chain, draw)."""
    losses = suite.runs[name][f"loss_{suite.task}"]
    return np.stack([mean_per_draw(losses.isel(chain=chain)).values for chain in range(losses.sizes["chain"])])


def _differences(suite: Suite, name: str, observable: str, task: Doubles, mean_over: str | None) -> Iterator[Doubles]:
    """d = (L - l) - (L - l)(w0), sequence by sequence: (chain, draw, token_pos), (chain, draw) of means over sequences, or
    once (chain, draw) of the mean over all."""
    batch = f"batch_{observable}"
    losses = suite.runs[name][f"loss_{observable}"].transpose("chain", "draw", batch, "token_pos")
    start: Any = at_checkpoint(suite)[1][observable]
    total, count = np.zeros_like(task), losses.sizes[batch]
    for span in spans(count, max(1, READ_BYTES * count // (4 * losses.size))):
        read = losses.isel({batch: span}).values
        for number in range(span.start, span.stop):
            d = task[..., None] - read[:, :, number - span.start].astype(np.float64) - start[number]
            if mean_over is None:
                yield d
            elif mean_over == "sequence":
                yield d.mean(axis=2)
            else:
                total += d.mean(axis=2) / count
    if mean_over == "dataset":
        yield total
