"""The step size of stored samples, with what is known of the curvature."""

import math
from typing import Any

import xarray as xr

from devinterp.analysis.step_size import StepSize
from devinterp.store.reader import metadata_of


def step_size_of(ds: xr.Dataset) -> StepSize:
    """NaN for what the samples do not tell; those of devinterp 2.0 tell lr alone."""
    metadata: dict[str, Any] = metadata_of(ds) if "metadata" in ds.attrs else {"config": {"sampler": {}}}
    settings, measured = metadata["config"]["sampler"], metadata.get("step_size", {})

    def known(*names: str) -> list[float]:
        return [float(measured[name]) for name in names if measured.get(name) is not None]

    lr = measured.get("lr", settings.get("lr"))
    traces = known("trace_pilot") or known("trace_checkpoint")
    return StepSize(
        method=str(settings.get("sampling_method", "")),
        lr=float(lr) if isinstance(lr, int | float) else math.nan,
        n_beta=float(settings.get("n_beta", math.nan)),
        prior=float(settings.get("localization", 0.0) + settings.get("llc_weight_decay", 0.0)),
        h_max=max(known("h_max_checkpoint", "h_max_pilot"), default=math.nan),
        trace=traces[0] if traces else math.nan,
        stiffest=max(known("stiffest"), default=math.nan),
    )
