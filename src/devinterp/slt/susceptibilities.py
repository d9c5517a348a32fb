"""Susceptibilities: how a component of a network responds to each token."""

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from functools import partial
from typing import Any

import torch
import xarray as xr
from torch import Tensor, nn

from devinterp.engine.progress import Progress
from devinterp.engine.settings import choice, settings_and_paths, switch
from devinterp.engine.tokens import stored_name
from devinterp.errors import ChainsUnusable, InputTypeError, InputValueError, got
from devinterp.slt.control import CONTROL, check_control, control_of
from devinterp.slt.requests import Inputs, Request, at_step_size, check_stored, path_of_run
from devinterp.slt.running import run_suite, run_to_store
from devinterp.slt.suite_errors import errors_of, errors_of_full
from devinterp.slt.suites import Suite, moments_of, table
from devinterp.slt.sweep_results import of_each_checkpoint
from devinterp.slt.weight_restrictions import check_restrictions, masks_of
from devinterp.store.reader import metadata_of, open_store
from devinterp.store.runs import layout
from devinterp.store.samples import Samples, root_of, usable_chains
from devinterp.store.sweeps import FULL, is_sweep, tree_of
from devinterp.store.writer import check_space


def susceptibilities(
    model: nn.Module,
    dataset: Any,
    observables: Mapping[str, Any],
    weight_restrictions: Mapping[str, Any],
    *,
    sampling_task: str,
    lr: float | str,
    n_beta: float,
    loss_fn: Callable[[nn.Module, Tensor], Tensor] | None = None,
    loss_fn_id: str | None = None,
    include_sampling_task: bool = False,
    estimator: str = "two_chain",
    standardize: bool = False,
    mean_over: str | None = None,
    errors: bool = True,
    control: bool = False,
    on_diverged: str = "raise",
    output_path: str | os.PathLike[str] | None = None,
    device: str | torch.device | None = None,
    executor: Executor | None = None,
    devices: Sequence[str] | None = None,
    progress: bool = True,
    **settings: Any,
) -> xr.DataTree:
    """Sample once for the whole model and once for every restriction, and compute the susceptibilities.

    Asked for again with the same `output_path`, what is stored is not sampled again: an interrupted suite goes on where it
    stopped. A restriction that fails is warned about and listed in `attrs["failed"]`; the others go on. With `lr="auto"` the
    step size is chosen on the whole model, where curvature is largest, and taken for every restriction.

    Args:
        model, dataset, observables, lr, n_beta, loss_fn, loss_fn_id, device, executor, devices: as in `sample`.
        weight_restrictions: name -> masks as `create_param_masks` returns them, None for the whole model, or a restriction
            such as "l0h1" or ["l0h1", "l0 mlp"]. Must hold "full".
        sampling_task: the observable whose mean loss is L: more sequences of the sampling data.
        include_sampling_task: also the susceptibilities to the tokens of the sampling task itself.
        estimator, standardize, mean_over, errors: as in `compute_susceptibilities`.
        control: sample everything once more with n_beta=0, at the same step size: only the localization acts. Structure that
            is in the control too comes from weights and embeddings, not from the loss. Stored at `<stem>_control_R<suffix>`.
        on_diverged: "raise" counts a restriction with a diverged chain as failed; "drop" goes on without the chain.
        output_path: the run of restriction R is stored at `<stem>_R<suffix>`; None = temporary.
        progress: one bar over all runs.
        **settings: settings of `sample`.

    Returns:
        As `compute_susceptibilities`, with `attrs["failed"]`: restriction -> reason; and with `control`, `/control`, of the
        form of `/susceptibilities`.

    Raises:
        DevinterpInputError: an argument cannot be used; before any chain starts and before any file is made.
        RunMismatchError: one of the paths holds another run.
        DevinterpError: the run of the whole model failed, or every restriction did.
    """
    check_options(estimator, standardize, mean_over, errors, on_diverged)
    if "param_masks" in settings:
        fix = "Restrictions come from weight_restrictions."
        raise InputTypeError(got("param_masks", settings["param_masks"], "absent", fix))
    names = check_restrictions(weight_restrictions, control)
    check_task(observables, sampling_task, switch("include_sampling_task", include_sampling_task))
    chosen, paths = settings_and_paths(lr=lr, n_beta=n_beta, **settings)
    check_control(control, chosen)
    if chosen.num_chains * chosen.num_draws < 2:
        raise InputValueError(got("num_draws", chosen.num_draws, "at least 2 with one chain", "A covariance needs more."))
    inputs = Inputs.of(
        model, dataset, observables, chosen, device=device, loss_fn=loss_fn, loss_fn_id=loss_fn_id, paths=paths,
        executor=executor, devices=devices,
    )  # fmt: skip
    requests = {
        name: Request.of(inputs, masks_of(model, name, weight_restrictions[name]), path_of_run(output_path, name))
        for name in names
    }
    without_loss = control_of(inputs) if control else inputs
    controls = {
        name: Request.of(without_loss, requests[name].masks, path_of_run(output_path, f"{CONTROL}_{name}"))
        for name in (names if estimator == "two_chain" else names[1:])
        if control
    }
    count = len(requests) + len(controls)
    check_space(requests[FULL].path, *layout(chosen, inputs.batches.tokens.length, inputs.observables), count=count)
    check_stored(requests[FULL], [*list(requests.values())[1:], *controls.values()])
    with Progress(count * inputs.num_rows, FULL, progress) as bar:
        runs, of_prior, failed = run_all(requests, controls, on_diverged, bar)
    if failed:
        listed = "; ".join(f"{name}: {reason}" for name, reason in failed.items())
        warnings.warn(f"{len(failed)} of {count} restrictions failed and are left out. {listed}", stacklevel=2)
    compute = partial(
        compute_susceptibilities, sampling_task=sampling_task, include_sampling_task=include_sampling_task,
        estimator=estimator, standardize=standardize, mean_over=mean_over, errors=errors, on_diverged=on_diverged,
    )  # fmt: skip
    result = compute(runs)
    if set(of_prior) - {FULL} and (FULL in of_prior or estimator == "one_chain"):
        result[CONTROL] = xr.DataTree(compute(of_prior)["susceptibilities"].to_dataset())
    result.attrs["failed"] = failed
    return result


def compute_susceptibilities(
    wr_map: Mapping[str, Samples] | Samples,
    sampling_task: str | None = None,
    observable_names: Sequence[str] | None = None,
    include_sampling_task: bool = False,
    *,
    estimator: str = "two_chain",
    standardize: bool = False,
    mean_over: str | None = None,
    errors: bool = True,
    on_diverged: str = "raise",
) -> xr.DataTree:
    """Susceptibilities of components to tokens, from one run of the whole model and one per component.

    With g = L - L(w0), L the mean loss on the sampling task, l the loss of one token, C the chains restricted to a component:

        two_chain:  E_C[g L] - E_C[g l] - E_C[g] (E_full[L] - E_full[l])     (Baker et al. 2025, arXiv 2504.18274, app. C.4)
        one_chain:  -Cov_C[g, l - L]                                         (the definition's own covariance, no second run)

    Negative values are expression, positive ones suppression. **Raw two-chain values are not comparable across components**:
    they carry a factor that depends on the component alone. `standardize=True` removes it. They also contain a term that is a
    product of a number per component and a number per token, which can dominate principal components; one-chain values do not.

    `sus_sem` is the Monte Carlo standard error of each value, from the effective sample size (autocorrelation, chains that
    differ, chains that share batches: see `compute_llc`), to first order in the errors of the means inside:

        one_chain:  that of the mean of (g_t - E_C[g]) (d_t - E_C[d]),  d = L - l
        two_chain:  sqrt(a^2 + (E_C[g] b)^2),  a that of the mean of g_t (d_t - E_full[d]), b that of E_full[d]

    The two runs are taken as independent: their noise is, the batches that they share are not, and what those add to both is
    not counted. Standardised, the means and deviations taken out count as fixed.

    Args:
        wr_map: restriction -> samples (a DataTree, its root dataset, or the path of a store); "full" for the whole model (may
            be absent with estimator="one_chain"). Or a sweep over restrictions (or its path), which gives `sus` and what goes
            with it along `checkpoint`.
        sampling_task: the observable whose mean loss is L; None = that of the sweep.
        observable_names: observables whose tokens are asked about; None = all but the sampling task.
        include_sampling_task: with observable_names=None, the sampling task too.
        estimator: "two_chain" or "one_chain".
        standardize: z-score of each component over all tokens; `sus_mean` and `sus_std` (wr) hold what was taken out.
        mean_over: None keeps single tokens; "sequence" and "dataset" give means over the tokens of each sequence or
            observable (taken after standardising): the response to a change of that data. Their errors are those of the mean
            trace: errors of tokens measured in the same draws do not average out.
        errors: compute `sus_sem`, which takes most of the time.
        on_diverged: "raise", or "drop" to leave out chains that diverged or failed.

    Returns:
        DataTree with `/susceptibilities`: `sus` and `sus_sem` (sus_flat, wr) with coordinates `wr` (without "full"),
        `dataset_id`, `batch`, `target_position` (from 1; those that remain with `mean_over`), in nats squared unless
        standardised; and `/context`: `input_ids` (ctx_flat) with `dataset_id`, `batch`, `position`.
        `attrs["dataset_id_to_name"]` has the observables.

    Raises:
        DevinterpInputError: an argument cannot be used, or the runs differ in more than their masks.
        ChainsUnusable: chains that diverged or failed (unless dropped) or are not finished.
        StoreError: the samples lack what is needed.
    """
    check_options(estimator, standardize, mean_over, errors, on_diverged)
    switch("include_sampling_task", include_sampling_task)
    if is_sweep(wr_map):
        tree = _of_restrictions(wr_map)
        compute = partial(
            compute_susceptibilities, sampling_task=sampling_task or tree.attrs["sampling_task"],
            observable_names=observable_names, include_sampling_task=include_sampling_task, estimator=estimator,
            standardize=standardize, mean_over=mean_over, errors=errors, on_diverged=on_diverged,
        )  # fmt: skip
        return of_each_checkpoint(tree, compute)
    suite = Suite.of(
        wr_map, sampling_task, observable_names, include_sampling_task, on_diverged, needs_full=estimator == "two_chain"
    )
    restricted = suite.restricted
    if estimator == "one_chain":
        found = [{name: m.one_chain() for name, m in moments_of(suite, wr).items()} for wr in restricted]
    else:
        full = moments_of(suite, FULL)
        found = [{name: m.two_chain(full[name]) for name, m in moments_of(suite, wr).items()} for wr in restricted]
    of_full = errors_of_full(suite, mean_over) if errors and estimator == "two_chain" else None
    found_errors = [errors_of(suite, wr, mean_over, of_full) for wr in restricted] if errors else []
    result = table(suite, found, found_errors, standardize, mean_over)
    result.attrs = {"estimator": estimator, "sampling_task": suite.task, "standardize": standardize, **suite.told()}
    return result


def _of_restrictions(sweep: Any) -> xr.DataTree:
    tree = tree_of(sweep)
    if not tree.attrs["restrictions"]:
        fix = "Sweep with weight_restrictions={'full': None, 'l0h0': 'l0h0'}."
        raise InputValueError(got("wr_map", "a sweep", "a sweep over restrictions", fix))
    return tree


def check_options(estimator: str, standardize: bool, mean_over: str | None, errors: bool, on_diverged: str) -> None:
    choice("two_chain", "one_chain")("estimator", estimator)
    choice("raise", "drop")("on_diverged", on_diverged)
    switch("standardize", standardize)
    switch("errors", errors)
    if mean_over is not None:
        choice("sequence", "dataset")("mean_over", mean_over)


def run_all(
    requests: Mapping[str, Request], controls: Mapping[str, Request], on_diverged: str, bar: Progress
) -> tuple[dict[str, Samples], dict[str, Samples], dict[str, str]]:
    """The run of the whole model, then every restriction's at its step size, then the controls; what failed, and why."""
    source = run_to_store(requests[FULL], bar)
    full = root_of(open_store(source, ours=True))
    usable_chains(full, on_diverged)
    lr = metadata_of(full)["step_size"]["lr"]
    bar.describe(f"{len(requests) - 1} restrictions")
    restricted = {name: at_step_size(request, lr) for name, request in requests.items() if name != FULL}
    runs, failed = _usable(*run_suite(restricted, source, bar), on_diverged)
    if not runs:
        raise ChainsUnusable("every restriction failed. " + "; ".join(f"{n}: {reason}" for n, reason in failed.items()))
    if controls:
        bar.describe(f"{len(controls)} controls")
    named = {name: at_step_size(request, lr) for name, request in controls.items()}
    of_prior, failed_controls = _usable(*run_suite(named, source, bar), on_diverged)
    failed |= {f"{CONTROL}_{name}": reason for name, reason in failed_controls.items()}
    return {FULL: full} | runs, of_prior, failed


def _usable(
    made: Mapping[str, xr.DataTree], failed: dict[str, str], on_diverged: str
) -> tuple[dict[str, Samples], dict[str, str]]:
    """Those whose chains can be used; the others are among what failed."""
    runs: dict[str, Samples] = dict(made)
    for name, samples in made.items():
        try:
            usable_chains(root_of(samples), on_diverged)
        except ChainsUnusable as error:
            failed[name] = f"{type(error).__name__}: {error}"
            del runs[name]
    return runs, failed


def check_task(observables: Any, task: Any, include_sampling_task: bool) -> None:
    if not isinstance(observables, Mapping):
        fix = "Try {'pile': tokens, 'code': others}."
        raise InputTypeError(got("observables", observables, "a dict: name -> dataset or (dataset, batches)", fix))
    known, stored = list(observables), {stored_name(name) for name in observables}
    if not isinstance(task, str) or stored_name(task, "sampling_task") not in stored:
        fix = "Add the sampling data under this name, for example {'pile': (tokens, 10), ...}."
        raise InputValueError(got("sampling_task", task, f"one of the observables {known}", fix))
    if len(stored) == 1 and not include_sampling_task:
        fix = "Add an observable, or pass include_sampling_task=True."
        raise InputValueError(got("observables", known, "at least one besides the sampling task", fix))
