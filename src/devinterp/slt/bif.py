"""Bayesian influence functions: which sequences and tokens move together under the local posterior."""

import inspect
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import xarray as xr
from torch import nn

from devinterp.engine.progress import Progress
from devinterp.errors import InputValueError, got
from devinterp.slt.bif_blocks import Options, Sides
from devinterp.slt.bif_results import check_memory, of_queries, strongest, whole, write_whole
from devinterp.slt.control import CONTROL, check_control, control_of, run_with_control
from devinterp.slt.requests import Request, check_stored, path_of_run, request_of
from devinterp.slt.running import run
from devinterp.slt.sweep_results import of_each_run
from devinterp.store.matrices import MatrixWriter, check_new_path
from devinterp.store.reader import metadata_of
from devinterp.store.runs import unsampled
from devinterp.store.samples import Samples, of_chains, root_of, usable_chains
from devinterp.store.sweeps import is_sweep
from devinterp.store.traces import Traces, chosen_observables


def bif(
    model: nn.Module,
    dataset: Any,
    observables: Mapping[str, Any],
    *,
    lr: float | str,
    n_beta: float,
    bif_batch_size: int = 32,
    bif_device: str | torch.device | None = None,
    bif_output_path: str | os.PathLike[str] | None = None,
    control: bool = False,
    **settings: Any,
) -> xr.Dataset:
    """Sample around a checkpoint and compute influences in one call: `compute_bif(sample(...))`.

    Args:
        model, dataset, observables, lr, n_beta: as in `sample`; influences are those between the observables' sequences.
        bif_batch_size, bif_device, bif_output_path: `batch_size`, `device` and `output_path` of `compute_bif`.
        control: sample once more with n_beta=0, at the same step size: only the localization acts. Influences that the control
            has too come from weights and embeddings, not from the loss. Its run is stored at `<stem>_control<suffix>`.
        **settings: settings of `sample` and options of `compute_bif`.

    Returns:
        As `compute_bif`; with `control`, also `influences_control` (and `influences_control_sem`).

    Raises:
        DevinterpInputError: an argument cannot be used; before any chain starts and before any file is made.
        ChainFailed: a chain, or one of the control, ended in an error; what ended well is stored.
    """
    own = set(inspect.signature(compute_bif).parameters) - {"samples", "batch_size", "device", "output_path", "progress"}
    options = {name: settings.pop(name) for name in own & set(settings)}
    options |= {"batch_size": bif_batch_size, "device": bif_device, "output_path": bif_output_path}
    progress = settings.pop("progress", True)
    request = _request_for(Options(**options), model, dataset, observables, lr=lr, n_beta=n_beta, **settings)
    if not check_control(control, request.inputs.settings):
        return compute_bif(_sampled(request, progress), progress=progress, **options)
    without_loss, beside = _control_for(request, Options(**options))
    with Progress(2 * request.inputs.num_rows, "sampling", progress) as bar:
        samples, of_prior = run_with_control(request, without_loss, bar)
    result = compute_bif(samples, progress=progress, **options)
    return _joined(result, compute_bif(of_prior, progress=progress, **(options | {"output_path": beside})))


def sample_for(
    options: Options, model: nn.Module, dataset: Any, observables: Any, *, progress: bool = True, **arguments: Any
) -> xr.DataTree:
    """`sample()`, after a check that its samples will be such that these options can be used on them."""
    return _sampled(_request_for(options, model, dataset, observables, **arguments), progress)


def _sampled(request: Request, progress: bool) -> xr.DataTree:
    with Progress(request.inputs.num_rows, "sampling", progress) as bar:
        return run(request, bar)


def _request_for(options: Options, model: nn.Module, dataset: Any, observables: Any, **arguments: Any) -> Request:
    if isinstance(observables, Mapping) and not observables:
        raise InputValueError(got("observables", observables, "at least one", "Try {'code': dataset}."))
    request = request_of(model, dataset, observables, **arguments)
    if request.path is not None and request.path.absolute() == _absolute(options.output_path):
        fix = "The samples and the influences are two stores."
        raise InputValueError(got("output_path", str(request.path), "another path than that of the influences", fix))
    ahead = unsampled(request.inputs.settings, request.inputs.batches.tokens.length, request.inputs.observables)
    sides = Sides(_traces(ahead, options), options)
    if options.output_path is None and options.queries is None and options.top_k is None:
        check_memory(sides)
    return request


def _control_for(request: Request, options: Options) -> tuple[Request, Any]:
    """The control's run, and where its influences are written."""
    if options.top_k is not None:
        fix = "The strongest pairs of the control are others. Leave top_k out, or ask for queries."
        raise InputValueError(got("control", True, "False with top_k", fix))
    beside = path_of_run(options.output_path, CONTROL)
    control = Request.of(control_of(request.inputs), request.masks, path_of_run(request.path, CONTROL))
    paths = [_absolute(path) for path in (request.path, control.path, options.output_path, beside) if path is not None]
    if len(set(paths)) < len(paths):
        fix = (
            f"The runs, the influences and both of their controls are stores of their own, those with '_{CONTROL}' at the end."
        )
        raise InputValueError(got("output_path", str(request.path), "such that all of them differ", fix))
    if beside is not None:
        check_new_path(beside)
    check_stored(request, [control])
    return control, beside


def _joined(result: xr.Dataset, control: xr.Dataset) -> xr.Dataset:
    named = {name: name.replace("influences", f"influences_{CONTROL}") for name in ("influences", "influences_sem")}
    arrays = {new: control[old] for old, new in named.items() if old in control}
    told = {f"{name}_{CONTROL}": control.attrs[name] for name in ("constant_traces", "dropped_chains")}
    return result.assign(arrays).assign_attrs(told)


def _absolute(path: Any) -> Path | None:
    return None if path is None else Path(path).expanduser().absolute()


def compute_bif(
    samples: Samples,
    *,
    correlation_method: str = "token",
    reduce_chain_dimension_method: str = "stack",
    loss_keys: str | Sequence[str] = "all",
    batch_index_range_1: str | Sequence[int] = "all",
    batch_index_range_2: str | Sequence[int] = "all",
    average_tokenwise_bif: bool = False,
    compute_covariance: bool = False,
    batch_size: int = 32,
    device: str | torch.device | None = None,
    center: str = "all",
    sign: str = "correlation",
    queries: Sequence[Any] | None = None,
    top_k: int | None = None,
    output_path: str | os.PathLike[str] | None = None,
    on_diverged: str = "raise",
    errors: bool = False,
    progress: bool = True,
) -> xr.Dataset:
    """Influences between the observables' sequences or tokens, from what `sample()` returned or stored.

        BIF(i, j) = -Cov[l_i(w), l_j(w)]          (Kreer et al. 2025, arXiv 2509.26544, eq. 5)

    over the draws of all chains. As in devinterp 2.0 the default is **plus** the Pearson correlation; `compute_covariance`
    and `sign="bif"` give the formula above. Observables are put one after another, in sorted order of their names or in the
    order of `loss_keys`: `attrs["observables"]` has each one's first sequence.

    `influences_sem` counts the effective number of draws of each pair (Bartlett): with y_t the trace of which the influence is
    the mean to first order, by its own fourth moments,

        error^2 = Var[y] (1 + 2 sum_k rho_i(k) rho_j(k)) / draws,   for Gaussian losses Var[y] = (1 - r^2)^2 of a correlation r

    each autocorrelation rho cut where Geyer's initial positive sequence ends, and correlations between chains that share
    batches counted. Of an averaged correlation it takes the standard deviations as known, which overstates the error of
    large ones. Below about 50 effective draws intervals are too narrow.

    Args:
        samples: a DataTree (or its root dataset, or the path of a store); or a sweep (or its path), which gives everything
            along `checkpoint`, and `restriction` where it has some.
        correlation_method: "token" compares single losses, "sequence" the mean losses of sequences.
        reduce_chain_dimension_method: "stack" takes every draw of every chain, "mean" the mean over chains at each draw.
        loss_keys: observables to take, in this order; "all" = all, sorted.
        batch_index_range_1, batch_index_range_2: numbers of the sequences of either side.
        average_tokenwise_bif: mean of the token correlations of each pair of sequences; the mean of correlations, not the
            correlation of means that "sequence" gives.
        compute_covariance: covariances (N - 1), in nats squared.
        batch_size: sequences per block, fewer where a block would pass 32 MiB. The result does not depend on it.
        device: where to multiply; None = a GPU where there is one.
        center: "all" takes each trace's mean over everything; "chain" over each chain, which leaves out differences of level
            between chains.
        sign: "correlation" (plus) or "bif" (minus).
        queries: only the influence of everything in batch_index_range_1 on these: sequence numbers for "sequence",
            pairs (sequence, target_position) for "token".
        top_k: only the strongest entries by size, with their tokens, a token or sequence with itself left out and each pair
            once; with `queries`, for every query.
        output_path: write the result to this new Zarr store block by block, for results larger than memory.
        on_diverged: "raise", or "drop" to leave out chains that diverged or failed.
        errors: also `influences_sem`, the Monte Carlo standard error of every influence; the result is twice as large.
        progress: show a bar.

    Returns:
        Dataset with `influences` (batch_1, batch_2, target_position, target_position_T) for tokens, (batch_1, batch_2) for
        sequences or averages; (query, batch_1[, target_position]) with `queries`; (pair) or (query, rank) with `top_k`, then
        with the sequences, positions and tokens of each; with `errors`, `influences_sem` of the same dims.
        `target_position` counts from 1: the loss there is that of predicting `input_ids` at that position. `input_ids`
        (batch, position). Correlations of constant traces are NaN (covariances 0, their errors NaN); such traces are
        counted in `attrs["constant_traces"]`.

    Raises:
        DevinterpInputError: an option cannot be used.
        ChainsUnusable: chains that diverged or failed (unless dropped) or are not finished.
        StoreError: the samples lack what is needed.
    """
    options = Options(
        correlation_method, reduce_chain_dimension_method, loss_keys, batch_index_range_1, batch_index_range_2,
        average_tokenwise_bif, compute_covariance, batch_size, device, center, sign, queries, top_k, output_path, on_diverged,
        errors,
    )  # fmt: skip
    if is_sweep(samples):
        if output_path is not None:
            fix = "Compute each checkpoint's: compute_bif(samples['step512'], output_path=...)."
            raise InputValueError(got("output_path", os.fspath(output_path), "None with a sweep", fix))
        return of_each_run(samples, lambda run: _influences(run, options, progress))
    return _influences(root_of(samples), options, progress)


def _influences(ds: xr.Dataset, options: Options, progress: bool) -> xr.Dataset:
    kept, dropped = usable_chains(ds, options.on_diverged)
    ds = of_chains(ds, kept)
    traces = _traces(ds, options)
    sides = Sides(traces, options)
    if options.output_path is not None:
        with MatrixWriter(options.output_path) as writer:
            write_whole(sides, writer, progress)
            writer.finish(_attributes(ds, sides, dropped), {"input_ids": traces.input_ids()})
        return writer.open()
    if options.top_k is not None:
        result = strongest(sides, options.top_k, progress)
    elif options.queries is not None:
        result = of_queries(sides, progress)
    else:
        result = whole(sides, progress)
    return result.assign(input_ids=traces.input_ids()).assign_attrs(_attributes(ds, sides, dropped))


def _traces(ds: xr.Dataset, options: Options) -> Traces:
    names = chosen_observables(ds, "loss_keys", options.loss_keys)
    return Traces.of(ds, names, options.correlation_method == "sequence", options.reduce_chain_dimension_method == "mean")


def _attributes(ds: xr.Dataset, sides: Sides, dropped: list[int]) -> dict[str, Any]:
    told = metadata_of(ds)["config"]["sampler"] if "metadata" in ds.attrs else {}
    measure = "covariance" if sides.options.compute_covariance else "correlation"
    return {
        "observables": dict(zip(sides.traces.names, sides.traces.starts, strict=False)),
        "constant_traces": sides.num_constant,
        "measure": measure + (", sign reversed" if sides.options.sign == "bif" else ""),
        "num_chains_used": ds.sizes["chain"],
        "dropped_chains": dropped,
        **{name: told[name] for name in ("n_beta", "localization", "sampling_method") if name in told},
    }
