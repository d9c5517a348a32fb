"""Pictures of results: each function takes a result, draws on `ax` (a new figure where none is given), and returns the Axes.

They need matplotlib (`pip install 'devinterp[plots]'`), which is imported when the first one is drawn.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from devinterp.pictures.calibration import plot_calibration, plot_calibration_plane
    from devinterp.pictures.influence import influence_clusters, plot_influences
    from devinterp.pictures.projection import plot_projection
    from devinterp.pictures.susceptibility import plot_responses, plot_susceptibilities
    from devinterp.pictures.tokens import plot_tokens, token_kinds
    from devinterp.pictures.traces import plot_traces
    from devinterp.pictures.training import plot_llc_over_checkpoints, plot_loss_over_checkpoints

_HOMES = {
    "plot_traces": "traces",
    "plot_llc_over_checkpoints": "training",
    "plot_loss_over_checkpoints": "training",
    "plot_calibration": "calibration",
    "plot_calibration_plane": "calibration",
    "plot_tokens": "tokens",
    "token_kinds": "tokens",
    "plot_influences": "influence",
    "influence_clusters": "influence",
    "plot_susceptibilities": "susceptibility",
    "plot_responses": "susceptibility",
    "plot_projection": "projection",
}

__all__ = [
    "influence_clusters",
    "plot_calibration",
    "plot_calibration_plane",
    "plot_influences",
    "plot_llc_over_checkpoints",
    "plot_loss_over_checkpoints",
    "plot_projection",
    "plot_responses",
    "plot_susceptibilities",
    "plot_tokens",
    "plot_traces",
    "token_kinds",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'devinterp.pictures' has no attribute {name!r}")
    return getattr(importlib.import_module(f"devinterp.pictures.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
