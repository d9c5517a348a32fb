"""A suite of runs that differ in their masks alone: checked, read a few draws at a time, and laid out as one table."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray as xr

from devinterp.analysis.susceptibility import Doubles, Moments, standardised
from devinterp.engine.tokens import stored_name
from devinterp.errors import DevinterpError, InputTypeError, InputValueError, StoreError, got
from devinterp.store.reader import metadata_of, observable_names
from devinterp.store.samples import draws_in_parts, of_chains, root_of, usable_chains
from devinterp.store.sweeps import FULL
from devinterp.store.traces import chosen_observables

FREE = {"param_masks", "lr"}
"""What may differ between the identities of a suite's runs; the step sizes themselves are compared"""


@dataclass(frozen=True)
class Suite:
    """Runs by restriction, with their usable chains only."""

    runs: dict[str, xr.Dataset]
    task: str
    names: tuple[str, ...]
    """stored names of the observables asked about, sorted"""
    dropped: dict[str, list[int]]

    @classmethod
    def of(
        cls,
        wr_map: Any,
        sampling_task: str | None,
        observable_names: Sequence[str] | None,
        include_sampling_task: bool,
        on_diverged: str,
        needs_full: bool,
    ) -> "Suite":
        if not isinstance(wr_map, Mapping) or not set(wr_map) - {FULL}:
            fix = "Try {'full': samples, 'l0h0': other_samples}."
            raise InputTypeError(got("wr_map", wr_map, "a dict: restriction -> samples, at least one besides 'full'", fix))
        if needs_full and FULL not in wr_map:
            fix = "Add the run of the whole model, or take estimator='one_chain'."
            raise InputValueError(got("wr_map", list(wr_map), "a dict that holds 'full'", fix))
        roots = {name: root_of(samples) for name, samples in wr_map.items()}
        first = FULL if FULL in roots else next(iter(roots))
        task = _check_task(roots[first], sampling_task)
        names = _check_names(roots[first], task, observable_names, include_sampling_task)
        for name, ds in roots.items():
            _check_same(first, roots[first], name, ds, {task, *names})
        runs, dropped = {}, {}
        for name, ds in roots.items():
            try:
                kept, dropped[name] = usable_chains(ds, on_diverged)
            except DevinterpError as error:
                raise type(error)(f"restriction {name!r}: {error}") from error
            runs[name] = of_chains(ds, kept)
            if len(kept) * ds.sizes["draw"] < 2:
                raise StoreError(f"restriction {name!r} has one draw in all: a covariance needs more.")
        return cls(runs, task, tuple(sorted(names)), dropped)

    @property
    def restricted(self) -> list[str]:
        return [name for name in self.runs if name != FULL]

    @property
    def first(self) -> xr.Dataset:
        """Where everything that the runs share is read from."""
        return self.runs[FULL] if FULL in self.runs else next(iter(self.runs.values()))

    def told(self) -> dict[str, Any]:
        ds = self.first
        told = metadata_of(ds)["config"]["sampler"] if "metadata" in ds.attrs else {}
        wanted = ("n_beta", "localization", "sampling_method", "num_chains", "num_draws")
        return {name: told[name] for name in wanted if name in told} | {"dropped_chains": self.dropped}


def at_checkpoint(suite: Suite) -> tuple[float, dict[str, Doubles]]:
    """L(w0), and (L - l)(w0) for every token of each observable (0 where it is not known: it cancels)."""
    shared = suite.first
    # devinterp 2.0 has no loss at the checkpoint on the observables' own tokens
    known = f"init_loss_{suite.task}" in shared
    of_task = float(shared[f"init_loss_{suite.task}" if known else "init_loss"].mean(dtype=np.float64))
    shapes = {o: (shared.sizes[f"batch_{o}"], shared.sizes["token_pos"]) for o in suite.names}
    return of_task, {
        o: of_task - shared[f"init_loss_{o}"].values.astype(np.float64) if known else np.zeros(shape)
        for o, shape in shapes.items()
    }


def moments_of(suite: Suite, name: str) -> dict[str, Moments]:
    """Moments of one run for every observable, reading a bounded number of draws of one chain at a time.

    The memory does not depend on the number of draws, chains or runs.
    """
    ds, (task_start, starts) = suite.runs[name], at_checkpoint(suite)
    found = {o: Moments((ds.sizes[f"batch_{o}"], ds.sizes["token_pos"])) for o in suite.names}
    for chain in range(ds.sizes["chain"]):
        one = ds.isel(chain=chain)
        task = one[f"loss_{suite.task}"].transpose("draw", ...)
        means = [part.mean(part.dims[1:], dtype=np.float64).values for part in draws_in_parts(task)]
        for observable, moments in found.items():
            losses = one[f"loss_{observable}"].transpose("draw", f"batch_{observable}", "token_pos")
            for mean, part in zip(means, draws_in_parts(losses), strict=True):
                moments.add(mean - task_start, mean[:, None, None] - part.values.astype(np.float64) - starts[observable])
    if not all(np.isfinite(moments.d).all() and np.isfinite(moments.gd).all() for moments in found.values()):
        raise StoreError("the samples hold losses that are not finite. Look at them; drop those chains.")
    return found


def table(
    suite: Suite,
    found: Sequence[Mapping[str, Doubles]],
    errors: Sequence[Mapping[str, Doubles]],
    standardize: bool,
    mean_over: str | None,
) -> xr.DataTree:
    """One column per restriction, one row per token (or sequence, or observable), and the tokens' contexts.

    `found` is of single tokens; `errors` of the rows of the result, none where they are not wanted.
    """
    values = _columns(suite, found)
    extra: dict[str, Any] = {}
    scale: Any = 1.0
    if standardize:
        values, mean, deviation = standardised(values)
        extra = {"sus_mean": ("wr", mean), "sus_std": ("wr", deviation)}
        scale = np.where(np.isnan(values[0]), np.nan, deviation)
    if errors:
        extra["sus_sem"] = (("sus_flat", "wr"), _columns(suite, errors) / scale)
    shapes = [found[0][o].shape for o in suite.names]
    grid = _grid(shapes, ("batch", "target_position"), start=1)
    if mean_over is not None:
        values, grid = averaged(values, grid, by_sequence=mean_over == "sequence")
    sus = xr.Dataset(
        {"sus": (("sus_flat", "wr"), values), **extra}, coords={"wr": np.asarray(suite.restricted, dtype=object)}
    )  # Zarr has no fixed-length strings
    ids = [suite.first[f"input_ids_{o}"].values for o in suite.names]
    ids = [part[(0,) * (part.ndim - 2)] for part in ids]  # devinterp 2.0 repeats them for every chain and draw
    context = xr.Dataset({"input_ids": ("ctx_flat", np.concatenate([part.ravel() for part in ids]))})
    named = {"dataset_id_to_name": list(suite.names)}
    return xr.DataTree.from_dict(
        {
            "/susceptibilities": sus.assign_coords({k: ("sus_flat", v) for k, v in grid.items()}).assign_attrs(named),
            "/context": context.assign_coords(
                {k: ("ctx_flat", v) for k, v in _grid([p.shape for p in ids], ("batch", "position"), 0).items()}
            ).assign_attrs(named),
        }
    )


def _columns(suite: Suite, found: Sequence[Mapping[str, Doubles]]) -> Doubles:
    return np.stack([np.concatenate([one[o].ravel() for o in suite.names]) for one in found], axis=1)


Grid = dict[str, npt.NDArray[np.int64]]
"""Coordinates of the rows of a table"""


def _grid(shapes: Sequence[tuple[int, ...]], names: tuple[str, str], start: int) -> Grid:
    """Observable, sequence and position of every row; positions count from `start`."""
    parts = [np.stack([np.full(shape, number), *np.indices(shape)]).reshape(3, -1) for number, shape in enumerate(shapes)]
    dataset_id, batch, position = np.concatenate(parts, axis=1)
    return {"dataset_id": dataset_id, names[0]: batch, names[1]: position + start}


def averaged(values: Doubles, grid: Grid, by_sequence: bool) -> tuple[Doubles, Grid]:
    """Means over the rows of each sequence, or of each observable."""
    keys = ["dataset_id", "batch"] if by_sequence else ["dataset_id"]
    groups, members = np.unique(np.stack([grid[key] for key in keys]), axis=1, return_inverse=True)
    sums = np.zeros((groups.shape[1], values.shape[1]))
    np.add.at(sums, members.ravel(), values)
    means = sums / np.bincount(members.ravel())[:, None]
    return means, dict(zip(keys, groups, strict=True))


def _check_task(ds: xr.Dataset, sampling_task: Any) -> str:
    metadata_of(ds)  # without it there is no list of observables
    known = observable_names(ds)
    task = stored_name(sampling_task, "sampling_task")
    if task not in known:
        fix = "Sample with more sequences of the sampling data as an observable of this name."
        raise InputValueError(got("sampling_task", sampling_task, f"one of the observables {known}", fix))
    return task


def _check_names(ds: xr.Dataset, task: str, asked: Sequence[str] | None, include_sampling_task: bool) -> list[str]:
    names = chosen_observables(ds, "observable_names", asked)
    if asked is None and not include_sampling_task:
        names = [name for name in names if name != task]
    if not names:
        fix = "Sample with another observable, or pass include_sampling_task=True."
        raise InputValueError(got("observable_names", asked, "at least one besides the sampling task", fix))
    return names


def _check_same(first: str, reference: xr.Dataset, name: str, ds: xr.Dataset, observables: set[str]) -> None:
    """A suite's runs differ in their masks alone."""
    one, other = _settings_of(reference), _settings_of(ds)
    different = [key for key in one | other if key not in FREE and one.get(key) != other.get(key)]
    if not _same_step_size(reference, ds):
        different.append("lr")
    for observable in sorted(observables):
        ids = f"input_ids_{observable}"
        if ids not in ds or not np.array_equal(reference[ids].values, ds[ids].values):
            different.append(f"tokens of observable {observable}")
    masks = [ds_settings.get("param_masks") for ds_settings in (one, other)]
    if first == FULL and name != FULL and masks[0] is not None and masks[0] == masks[1]:
        fix = "Is one of them at the wrong name?"
        raise InputValueError(got("wr_map", [first, name], "runs with different masks", f"These move the same weights. {fix}"))
    if different:
        raise InputValueError(
            f"wr_map: the runs {first!r} and {name!r} differ in more than their masks: {', '.join(different)}. Sample both "
            "with the same data and settings."
        )


def _settings_of(ds: xr.Dataset) -> dict[str, Any]:
    metadata = metadata_of(ds)
    identity: dict[str, Any] = metadata.get("identity") or metadata["config"].get("sampler", {})  # 2.0 has no identity
    return identity


def _same_step_size(one: xr.Dataset, other: xr.Dataset) -> bool:
    """Of equal size, or chosen for each run by itself."""
    asked = [_settings_of(ds).get("lr") for ds in (one, other)]
    taken = [metadata_of(ds).get("step_size", {}).get("lr", lr) for ds, lr in zip((one, other), asked, strict=True)]
    return asked == ["auto", "auto"] or taken[0] == taken[1]
