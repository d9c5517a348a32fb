"""Which runs a report is about: one, several by name, or all stores of a folder."""

import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xarray as xr

from devinterp.errors import DevinterpError, InputTypeError, InputValueError, StoreError, got, shown
from devinterp.store.reader import metadata_of, n_beta_of, open_store
from devinterp.store.samples import root_of, status_of_chains
from devinterp.store.sweeps import FULL, is_sweep, tree_of
from devinterp.store.sweeps import runs_of as sweep_runs

LONGEST_NAME = 100


@dataclass(frozen=True)
class Run:
    """One run, with what it is called in the report."""

    checkpoint: str
    restriction: str
    """"full" for the whole model"""
    ds: xr.Dataset

    @property
    def name(self) -> str:
        return self.checkpoint if self.restriction == FULL else f"{self.checkpoint}, {self.restriction}"

    @property
    def settings(self) -> dict[str, Any]:
        metadata = metadata_of(self.ds) if "metadata" in self.ds.attrs else {}
        found: dict[str, Any] = metadata.get("config", {}).get("sampler", {})
        return found


@dataclass(frozen=True)
class Runs:
    """All runs of a report, and why others are not in it."""

    runs: tuple[Run, ...]
    left_out: dict[str, str] = field(default_factory=dict)
    sampling_task: str | None = None

    @property
    def checkpoints(self) -> list[str]:
        return list(dict.fromkeys(run.checkpoint for run in self.runs))

    @property
    def restrictions(self) -> list[str]:
        return list(dict.fromkeys(run.restriction for run in self.runs))

    def of(self, checkpoint: str) -> dict[str, Run]:
        return {run.restriction: run for run in self.runs if run.checkpoint == checkpoint}

    def whole(self, checkpoint: str) -> Run:
        """The run of the whole model, or the first there is."""
        found = self.of(checkpoint)
        return found.get(FULL) or next(iter(found.values()))


def runs_of(given: Any) -> Runs:
    """The runs that are meant.

    Args:
        given: one run (a DataTree, its root dataset, the path of a store); a sweep, or its folder; a folder of stores, or a
            list of their paths; or a dict: name of a checkpoint, or (checkpoint, restriction), -> run.

    Raises:
        DevinterpInputError: the runs have different settings, so that their LLCs cannot be compared; a name cannot be used.
        StoreError: there is no run that can be used.
    """
    if is_sweep(given):
        found = _of_sweep(tree_of(given))
    elif isinstance(given, Mapping) and not isinstance(given, xr.Dataset | xr.DataTree):
        found = _named(given)
    elif isinstance(given, list | tuple):
        found = _of_paths(given)
    elif isinstance(given, str | os.PathLike) and _is_folder_of_stores(Path(given)):
        found = _of_paths(sorted(path for path in Path(given).iterdir() if (path / "zarr.json").is_file()), skip=True)
    else:
        name = Path(given).stem if isinstance(given, str | os.PathLike) else "run"
        found = Runs((Run(name, FULL, _usable(given)),))
    if not found.runs:
        listed = "; ".join(f"{shown(name)}: {reason}" for name, reason in list(found.left_out.items())[:5])
        raise StoreError(f"no run can be reported. {listed or 'The folder holds no store.'}")
    _check_settings(found.runs)
    return found


def _usable(samples: Any) -> xr.Dataset:
    ds = root_of(samples)
    status_of_chains(ds)  # refuses what is not finished
    n_beta_of(ds)
    return ds


def _of_sweep(tree: xr.DataTree) -> Runs:
    runs = tuple(
        Run(checkpoint, restriction or FULL, _usable(ds))
        for checkpoint, found in sweep_runs(tree).items()
        for restriction, ds in found.items()
    )
    return Runs(runs, dict(tree.attrs["failed"]), tree.attrs["sampling_task"])


def _named(given: Mapping[Any, Any]) -> Runs:
    runs = []
    for key, samples in given.items():
        names = key if isinstance(key, tuple) else (key, FULL)
        if len(names) != 2 or not all(isinstance(name, str | int) and 0 < len(str(name)) <= LONGEST_NAME for name in names):
            allowed = "a checkpoint, or (checkpoint, restriction), by names of up to 100 characters"
            raise InputTypeError(got("samples", key, f"named by {allowed}", "Try {'step-1000': samples}."))
        runs.append(Run(str(names[0]), str(names[1]), _usable(samples)))
    if len({(run.checkpoint, run.restriction) for run in runs}) < len(runs):
        raise InputValueError(got("samples", list(given), "runs of different names", "Rename one of them."))
    return Runs(tuple(runs))


def _is_folder_of_stores(path: Path) -> bool:
    return path.is_dir() and not (path / "zarr.json").is_file()


def _of_paths(paths: Sequence[Any], skip: bool = False) -> Runs:
    """Stores by the names that `susceptibilities` and `sweep` give them: CHECKPOINT and CHECKPOINT_RESTRICTION.

    With `skip`, what is no run that can be used is left out, and told of.
    """
    found: dict[str, xr.Dataset] = {}
    left_out: dict[str, str] = {}
    for given in paths:
        if not isinstance(given, str | os.PathLike):
            raise InputTypeError(got("samples", given, "the path of a store", "Give the output_path of a run."))
        path = Path(given)
        if path.suffix == ".run" and any(Path(other) == path.with_suffix("") for other in paths):
            continue  # what a run needs beside its store, as `runs/*` names it too
        name = path.stem if path.suffix == ".zarr" else path.name
        if name in found:
            raise InputValueError(got("samples", str(path), "a store of another name", "Name the runs in a dict."))
        try:
            found[name] = _usable(open_store(path))
        except DevinterpError as error:
            if not skip:
                raise
            left_out[path.name] = str(error)
    runs = tuple(Run(*_split(name, found), ds) for name, ds in found.items())
    return Runs(tuple(sorted(runs, key=lambda run: (_natural(run.checkpoint), run.restriction != FULL))), left_out)


def _split(name: str, known: Mapping[str, xr.Dataset]) -> tuple[str, str]:
    """Checkpoint and restriction: of those ways to cut the name, the shortest checkpoint whose whole model is there too."""
    for checkpoint, restriction in _cuts(name):
        if restriction == FULL:
            return checkpoint, FULL
        whole = known.get(f"{checkpoint}_{FULL}", known.get(checkpoint))
        if whole is not None and _weights(whole) == _weights(known[name]):
            return checkpoint, restriction
    return name, FULL


def _cuts(name: str) -> Iterator[tuple[str, str]]:
    parts = name.split("_")
    yield from (("_".join(parts[:at]), "_".join(parts[at:])) for at in range(1, len(parts)))


def _weights(ds: xr.Dataset) -> Any:
    return (ds.attrs.get("metadata") or {}).get("identity", {}).get("weights and buffers of the model")


def _natural(name: str) -> tuple[Any, ...]:
    """Numbers in a name count as numbers."""
    return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.findall(r"\d{1,18}|\D+", name))


def _check_settings(runs: tuple[Run, ...]) -> None:
    groups: dict[tuple[float, ...], list[str]] = {}
    for run in runs:
        names = ("localization", "llc_weight_decay")
        setting = (n_beta_of(run.ds), *(float(run.settings.get(name, math.nan)) for name in names))
        groups.setdefault(tuple(-1.0 if math.isnan(value) else value for value in setting), []).append(run.name)
    if len(groups) > 1:
        listed = "\n".join(f"  - {_named_setting(setting)}: {_some(names)}" for setting, names in groups.items())
        raise InputValueError(
            f"samples: runs of {len(groups)} settings, whose LLCs cannot be compared:\n{listed}\n"
            "Report each setting by itself: name its runs one by one, or put them into folders of their own."
        )


def _named_setting(setting: tuple[float, ...]) -> str:
    return "n_beta {:g}, localization {:g}, llc_weight_decay {:g}".format(*setting)


def _some(names: list[str]) -> str:
    return ", ".join(map(shown, names[:4])) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
