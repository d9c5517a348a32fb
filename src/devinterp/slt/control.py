"""The control of a run: the same with n_beta=0, so that no loss acts and the prior alone is sampled."""

from dataclasses import replace
from typing import Any

import xarray as xr

from devinterp.engine.progress import Progress
from devinterp.engine.settings import Settings, switch
from devinterp.errors import ChainFailed, InputValueError, got
from devinterp.slt.requests import Inputs, Request, at_step_size
from devinterp.slt.running import run_suite, run_to_store
from devinterp.store.reader import metadata_of, open_store

CONTROL = "control"
"""What its name and its files are called after"""


def check_control(control: Any, settings: Settings) -> bool:
    """Whether a control is asked for; refuses one that could not be sampled."""
    if not switch("control", control):
        return False
    if settings.localization + settings.llc_weight_decay == 0:
        fix = "The control samples the prior alone. Try localization=300."
        raise InputValueError(got("control", True, "False with localization=0 and llc_weight_decay=0", fix))
    if settings.n_beta == 0:
        raise InputValueError(got("control", True, "False with n_beta=0", "Such a run is its own control."))
    return True


def control_of(inputs: Inputs) -> Inputs:
    """The same inputs with n_beta=0; "auto" still stands for the step size that the run itself chooses."""
    return replace(inputs, settings=replace(inputs.settings, n_beta=0.0))


def run_with_control(request: Request, control: Request, bar: Progress) -> tuple[xr.DataTree, xr.DataTree]:
    """The run asked for, then its control at the same step size.

    Raises:
        ChainFailed: a chain of either ended in an error; the others are stored.
        ChainDiverged: with on_diverged="raise", of the run itself.
    """
    source = run_to_store(request, bar)
    samples = open_store(source, ours=True)
    bar.describe(CONTROL)
    made, failed = run_suite({CONTROL: at_step_size(control, metadata_of(samples)["step_size"]["lr"])}, source, bar)
    if failed:
        raise ChainFailed(f"control: {failed[CONTROL]}. What ended well is stored; the same call again runs the rest.")
    return samples, made[CONTROL]
