"""A sweep on the disk: ordinary stores in one folder, and a record of which they are. Opened as one tree."""

import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from devinterp.errors import DevinterpInputError, InputTypeError, InputValueError, StoreError, got, shown
from devinterp.store.durable import read_record, write_record
from devinterp.store.reader import metadata_of, open_store
from devinterp.store.schema import COMPLETE

RECORD = "sweep.json"
FORMAT = 1
LONGEST_NAME = 100
FULL = "full"
"""The name of the run of the whole model, in a suite of restrictions"""
FREE = {"lr", "num_chains", "num_draws"}
"""Settings that may differ between runs: chosen by each, or larger since it was extended"""
TAKEN = {"checkpoint", "restriction", "step", "lr"}
"""Names of the tree's own coordinates"""


@dataclass(frozen=True)
class Sweep:
    """What the stores of a folder are."""

    checkpoints: tuple[str, ...]
    restrictions: tuple[str, ...] = ()
    """() = one run of the whole model for each checkpoint"""
    sampling_task: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    """what is equal in all runs, to be compared with what is asked for"""
    failed: dict[str, str] = field(default_factory=dict)
    """checkpoint, or checkpoint/restriction -> why it has no run that can be used"""

    @property
    def of_each(self) -> tuple[str | None, ...]:
        """What is sampled at each checkpoint, the whole model first."""
        return self.restrictions or (None,)

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        failed = {name: _inert(reason) for name, reason in self.failed.items()}
        write_record(folder / RECORD, {"format": FORMAT, **asdict(self), "failed": failed})

    @classmethod
    def read(cls, folder: Path) -> "Sweep":
        """The record of a folder, checked: it may come from a stranger.

        Raises:
            StoreError: there is none, or it cannot be used.
        """
        where = shown(os.fspath(folder), 300)
        found = read_record(folder / RECORD)
        if found is None:
            raise StoreError(f"{where} is not a sweep: it has no {RECORD} that can be read. Give the output_path of a sweep.")
        fields = ("checkpoints", "restrictions", "sampling_task", "settings", "failed")
        values: list[Any] = [found.get(name) for name in fields]
        checkpoints, restrictions, task, settings, failed = values
        usable = (
            found.get("format") == FORMAT
            and all(isinstance(names, list) and all(map(is_name, names)) for names in (checkpoints, restrictions))
            and not any("/" in name or "\\" in name for name in restrictions)
            and (not restrictions or restrictions[0] == FULL)
            and (task is None or is_name(task))
            and isinstance(settings, dict)
            and isinstance(failed, dict)
            and all(isinstance(reason, str) and reason == _inert(reason) for reason in failed.values())
        )
        if not usable:
            raise StoreError(f"{where} is not a sweep that this version reads: its {RECORD} was changed. Ask for another copy.")
        try:
            check_names(RECORD, checkpoints, restrictions)
        except DevinterpInputError as error:
            raise StoreError(f"{where} is not a sweep that this version reads: {error}") from error
        return cls(tuple(checkpoints), tuple(restrictions), task, settings, failed)


def is_sweep(samples: Any) -> bool:
    """Whether these are the runs of a sweep: its tree, or the path of its folder."""
    if isinstance(samples, xr.DataTree):
        return "sweep" in samples.attrs
    try:
        return isinstance(samples, str | os.PathLike) and (Path(samples).expanduser() / RECORD).is_file()
    except (OSError, ValueError, RuntimeError):  # too long, a null byte, nobody's home: told when it is opened
        return False


def tree_of(samples: Any) -> xr.DataTree:
    return samples if isinstance(samples, xr.DataTree) else open_sweep(samples)


def open_sweep(path: str | os.PathLike[str]) -> xr.DataTree:
    """The runs of a sweep as one tree, lazily: arrays are read when used. Also of a sweep that is going on or was interrupted.

    Args:
        path: the `output_path` of a sweep.

    Returns:
        DataTree of the form that `sweep` returns, which `compute_llc`, `diagnose`, `compute_bif` and
        `compute_susceptibilities` take. Runs that are not finished or failed are left out, and listed with the reason in
        `attrs["failed"]`.

    Raises:
        StoreError: the folder holds no sweep, or no run of it can be used, or a store is damaged.
    """
    if not isinstance(path, str | os.PathLike):
        raise InputTypeError(got("path", path, "the path of a sweep", "Give the output_path of a sweep."))
    folder = Path(path).expanduser()
    return opened(folder, Sweep.read(folder))


def opened(folder: Path, sweep: Sweep, *, ours: bool = False) -> xr.DataTree:
    """All runs of a sweep that can be used, and why the others cannot."""
    nodes: dict[str, xr.Dataset] = {}
    failed: dict[str, str] = {}
    lr: dict[str, float] = {}
    for checkpoint in sweep.checkpoints:
        runs, reasons = _runs_of(folder, checkpoint, sweep, ours)
        first = sweep.of_each[0]
        if first in reasons:  # the others have nothing to be compared with
            failed[checkpoint] = reasons[first]
            continue
        failed |= {label(checkpoint, restriction): reason for restriction, reason in reasons.items()}
        nodes |= {"/".join(filter(None, (safe_name(checkpoint), restriction))): run for restriction, run in runs.items()}
        lr[checkpoint] = float(metadata_of(runs[first]).get("step_size", {}).get("lr", np.nan))
    if not nodes:
        raise StoreError(f"no run of the sweep in {shown(os.fspath(folder), 300)} can be used. {listed(failed)}")
    coords: dict[str, Any] = {"checkpoint": np.asarray(list(lr), dtype=object), "lr": ("checkpoint", list(lr.values()))}
    if None not in (steps := [step_of(name) for name in lr]):
        coords["step"] = ("checkpoint", steps)
    told = {"sweep": FORMAT, "restrictions": list(sweep.restrictions), "sampling_task": sweep.sampling_task, "failed": failed}
    return xr.DataTree.from_dict({"/": xr.Dataset(coords=coords, attrs=told), **nodes})


def runs_of(tree: xr.DataTree) -> dict[str, dict[str | None, xr.Dataset]]:
    """Checkpoint -> restriction (None where there are none) -> its run."""
    found: dict[str, dict[str | None, xr.Dataset]] = {}
    restrictions = tree.attrs.get("restrictions", [])
    for checkpoint in map(str, tree.coords["checkpoint"].values):
        node = tree.children[safe_name(checkpoint)]
        if restrictions:
            found[checkpoint] = {
                name: node.children[name].to_dataset(inherit=False) for name in restrictions if name in node.children
            }
        else:
            found[checkpoint] = {None: node.to_dataset(inherit=False)}
    return found


def _runs_of(
    folder: Path, checkpoint: str, sweep: Sweep, ours: bool
) -> tuple[dict[str | None, xr.Dataset], dict[str | None, str]]:
    """Of one checkpoint, by restriction: the runs that can be used, and why the others cannot."""
    runs: dict[str | None, xr.Dataset] = {}
    reasons: dict[str | None, str] = {}
    for restriction in sweep.of_each:
        known = sweep.failed.get(checkpoint) or sweep.failed.get(label(checkpoint, restriction))
        run = known or _opened(folder / file_name(checkpoint, restriction), sweep.settings, ours)
        if isinstance(run, str):
            reasons[restriction] = run
        else:
            runs[restriction] = run
    return runs, reasons


def _opened(path: Path, settings: Mapping[str, Any], ours: bool) -> xr.Dataset | str:
    """A run, or why it cannot be used."""
    if not path.exists():
        return "it has not begun"
    if path.is_symlink():
        raise StoreError(f"{shown(str(path), 300)} is refused: a symbolic link. Ask for a copy without links (cp -L, tar -h).")
    run = open_store(path, ours=ours).to_dataset()
    if run.attrs.get("completed") != 1:
        return "it is not finished: the same call again goes on with it"
    made_with = metadata_of(run).get("identity", {})
    if other := [name for name in settings if name not in FREE and made_with.get(name) != settings[name]]:
        return f"it was not made with the settings and data of the sweep, but with another {', '.join(other)}"
    if "chain_status" in run and not (run["chain_status"].values == COMPLETE).any():
        return "every chain of it diverged. Try a smaller lr (or lr='auto'), or a larger localization"
    return run


def label(checkpoint: str, restriction: str | None) -> str:
    """What a run is called in messages and among what failed."""
    return checkpoint if restriction is None else f"{checkpoint}/{restriction}"


def listed(failed: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in failed.items())


def step_of(name: str) -> int | None:
    """The training step that a name says: "checkpoint-500", "step512", "1000"."""
    match = re.fullmatch(r"(?:(?:step|checkpoint|ckpt|iteration|iter)[-_ ]?)?([0-9]{1,18})", name, re.IGNORECASE)
    return None if match is None else int(match[1])


def safe_name(name: str) -> str:
    """A name as a part of a file's name: what is no letter, digit or one of .-+= and the space becomes "_"."""
    return re.sub(r"[^\w.+= -]", "_", unicodedata.normalize("NFC", name)).lstrip(".")


def file_name(checkpoint: str, restriction: str | None) -> str:
    return f"{'_'.join(filter(None, (safe_name(checkpoint), restriction)))}.zarr"


def check_names(argument: str, checkpoints: Sequence[Any], restrictions: Sequence[str]) -> None:
    """Refuse names that cannot be told apart as files, before anything is made.

    Raises:
        DevinterpInputError: a name is no name, or two runs would share a file.
    """
    allowed = f"printable text of up to {LONGEST_NAME} characters"
    for name in checkpoints:
        if not isinstance(name, str):
            raise InputTypeError(got(argument, name, f"names: {allowed}", "Try 'step512'."))
        if not is_name(name) or not safe_name(name).strip(" "):
            raise InputValueError(got(argument, name, allowed, "It becomes part of a file's name. Try 'step512'."))
        if safe_name(name) in TAKEN:
            raise InputValueError(got(argument, name, f"none of {sorted(TAKEN)}", "The result has coordinates of these names."))
    seen: dict[str, str] = {}
    of_each: Sequence[str | None] = restrictions or (None,)
    for checkpoint in checkpoints:
        for restriction in of_each:
            file, mine = file_name(checkpoint, restriction).casefold(), label(checkpoint, restriction)
            if file in seen:
                raise InputValueError(f"{argument}: {mine!r} and {seen[file]!r} would share the file {file!r}. Rename one.")
            if restriction is not None and mine in checkpoints:
                raise InputValueError(f"{argument}: {mine!r} is both a checkpoint and a restriction of one. Rename one.")
            seen[file] = mine


def is_name(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= LONGEST_NAME and value.isprintable()


def _inert(text: str) -> str:
    """Nothing that a terminal would act on."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
