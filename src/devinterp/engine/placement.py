"""Where chains run: here, one after another. Each is a task `(plan, chain) -> status` that writes its own region."""

from typing import Protocol

from torch import Tensor

from devinterp.engine.chain import Plan, run_chain
from devinterp.engine.progress import Progress
from devinterp.errors import ChainDiverged


class RowSink(Protocol):
    """Takes the rows of one chain, in order."""

    def append(self, name: str, row: Tensor | float) -> None: ...


def record_chain(plan: Plan, chain: int, rows: RowSink, progress: Progress) -> int | None:
    """Run one chain into its rows; the step at which it diverged, or None."""
    try:
        for snapshot in run_chain(plan, chain):
            if snapshot.steps_taken < plan.settings.num_steps:
                rows.append("step_loss", snapshot.losses.mean().item())
                for name, value in (snapshot.metrics or {}).items():
                    rows.append(f"metrics_{name}", value)
            if snapshot.draw is not None:
                rows.append("sampling_loss", snapshot.losses)
                for name, losses in snapshot.observables.items():
                    rows.append(f"loss_{name}", losses)
            progress.update(f"loss {snapshot.losses.mean().item():.3f}")
    except ChainDiverged as diverged:
        return diverged.step
    return None
