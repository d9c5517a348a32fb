"""What a run needs beside its store, in `<output_path>.run/`: who writes it, what it is, and how far each part has come.

    lock, lease.json        one writer
    run.json                identity and metadata of the run, digests of what is written once
    making/                 a store that is being laid out
    away/                   what workers of an executor are sent
    baseline/, chain-0000/  progress.json, and the state from which a chain goes on

A record is written after what it speaks of, so whatever it lists is there, unless the disk or a person has changed it.
"""

import os
import re
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from devinterp.errors import InputValueError, StoreError, got
from devinterp.store.durable import digest_of, read_record, sync, sync_all, sync_tree, write_record, write_tensors
from devinterp.store.guard import attributes_of

FINAL_STATE_BYTES = 64 * 2**20
"""A finished chain's state up to this size is kept, so that more draws can be taken from where it ended"""

Digests = dict[str, str]
"""Of files, by their paths in the store"""


@dataclass(frozen=True)
class Progress:
    """How far a part has come: what is on the disk, and what is needed to go on."""

    chains: tuple[int, ...]
    """that step together; none for the baseline"""
    steps_taken: int = 0
    finished: bool = False
    digests: Digests = field(default_factory=dict)
    numbers: Mapping[str, Any] = field(default_factory=dict)
    """of the state, what is no tensor"""
    state: str | None = None
    """file of the state, and its digest"""
    state_digest: str = ""

    def record(self) -> dict[str, Any]:
        return {**self.__dict__, "chains": list(self.chains)}

    @classmethod
    def of(cls, record: Mapping[str, Any] | None) -> "Progress | None":
        if record is None or set(record) != set(cls.__dataclass_fields__) or not all(map(is_inside, record["digests"])):
            return None
        return cls(**{**record, "chains": tuple(record["chains"])})


@dataclass(frozen=True)
class Part:
    """A piece of a run with a progress of its own: the baseline, or the chains that step together."""

    folder: Path
    store: Path

    def progress(self) -> Progress | None:
        return Progress.of(read_record(self.folder / "progress.json"))

    def state(self, progress: Progress) -> dict[str, Tensor] | None:
        """The tensors to go on from; None where there are none, or they are not what was written."""
        if progress.state is None or Path(progress.state).name != progress.state:
            return None
        path = self.folder / progress.state
        try:
            if path.is_symlink() or digest_of(path) != progress.state_digest:
                return None
            return load_file(path)
        except (OSError, SafetensorError):
            return None

    def commit(
        self, progress: Progress, tensors: Mapping[str, Tensor], files: Iterable[Path], durable: bool = True
    ) -> Progress:
        """What was written to the store, then the state, then the record that speaks of both; the last state is removed."""
        if durable:
            sync_all(files, self.store)
        self.folder.mkdir(parents=True, exist_ok=True)
        if tensors:
            name = f"state-{progress.steps_taken:012d}.safetensors"
            path, partial = self.folder / name, self.folder / f"{name}.partial"
            progress = replace(progress, state=name, state_digest=write_tensors(partial, tensors, durable))
            os.replace(partial, path)
        write_record(self.folder / "progress.json", progress.record(), durable)
        if durable:
            sync(self.folder.parent)
        for other in self.folder.glob("state-*"):
            if other.name != progress.state:
                other.unlink()
        return progress

    def reopen(self, progress: Progress, before: Mapping[str, Any]) -> None:
        """Chains that are to take more draws go on from before the last look of the shorter run; those that diverged do not.

        Where no state was kept, or the one that there is lies after that look, they start again, with equal numbers.
        """
        if progress.finished and len(progress.numbers["diverged"]) == len(progress.chains):
            return
        num_steps = before["num_burnin_steps"] + before["num_draws"] * before["num_steps_bw_draws"]
        if progress.state is None or progress.steps_taken > num_steps:
            self.forget()
        elif progress.finished:
            digests = {name: progress.digests[name] for name in progress.numbers["whole"]}
            write_record(self.folder / "progress.json", replace(progress, finished=False, digests=digests).record())

    def forget(self) -> None:
        """The part is to be run from its beginning."""
        (self.folder / "progress.json").unlink(missing_ok=True)
        if self.folder.exists():
            sync(self.folder)

    def damaged(self, progress: Progress) -> list[str]:
        """Files of the store that are not what was written."""
        return damaged_files(self.store, progress.digests)


def is_inside(name: str) -> bool:
    """Of a file in a store, whoever has written the name."""
    return re.fullmatch(r"[A-Za-z0-9_]+(/[A-Za-z0-9_.]+)*", name) is not None and ".." not in name


def damaged_files(store: Path, digests: Digests) -> list[str]:
    found = []
    for name, expected in digests.items():
        path = store / name
        try:
            whole = not path.is_symlink() and digest_of(path) == expected
        except OSError:
            whole = False
        if not whole:
            found.append(name)
    return found


@dataclass(frozen=True)
class RunFolder:
    """The folder beside a store."""

    store: Path

    @property
    def path(self) -> Path:
        return self.store.with_name(self.store.name + ".run")

    @property
    def making(self) -> Path:
        return self.path / "making"

    @property
    def away(self) -> Path:
        return self.path / "away"

    def part(self, name: str | int) -> Part:
        return Part(self.path / (name if isinstance(name, str) else f"chain-{name:04d}"), self.store)

    def parts(self) -> dict[str, Part]:
        """Those that have begun: the baseline, and the chains by the first of each group."""
        found = sorted(folder.name for folder in self.path.glob("chain-*"))
        return {name: Part(self.path / name, self.store) for name in ("baseline", *found)}

    def begun(self) -> list[tuple[int, ...]]:
        """Chains that step together and are not finished."""
        return [progress.chains for progress in self._of_chains() if not progress.finished]

    def finished_chains(self) -> set[int]:
        return {chain for progress in self._of_chains() if progress.finished for chain in progress.chains}

    def has_baseline(self) -> bool:
        progress = self.part("baseline").progress()
        return progress is not None and progress.finished

    def _of_chains(self) -> list[Progress]:
        found = [part.progress() for name, part in self.parts().items() if name != "baseline"]
        return [progress for progress in found if progress is not None]

    def record(self) -> dict[str, Any] | None:
        """Identity and metadata, as they were written before the store was made."""
        found = read_record(self.path / "run.json")
        usable = found is not None and set(found) == {"metadata", "digests"} and all(map(is_inside, found["digests"]))
        return found if usable else None

    def write(self, record: Mapping[str, Any]) -> None:
        write_record(self.path / "run.json", record)

    def damaged_layout(self) -> list[str]:
        """Files of the store, written before the run starts, that are not what was written."""
        record = self.record()
        if record is None:
            return ["zarr.json"]
        try:
            attributes = attributes_of(self.store)
            whole = attributes.get("metadata") == record["metadata"] and attributes.get("completed") in (0, 1)
        except StoreError:
            whole = False
        return damaged_files(self.store, record["digests"] or {"zarr.json": ""}) + ([] if whole else ["zarr.json"])

    def damage(self, num_chains: int) -> list[str]:
        """Files of a finished store that are not what was written; empty for one that has come without its folder."""
        if not self.path.exists():
            return []
        found = self.damaged_layout()
        for name, part in self.parts().items():
            progress = part.progress()
            found += [f"{name} (its record)"] if progress is None else part.damaged(progress)
        missing = set(range(num_chains)) - self.finished_chains()
        return found + [f"chain {chain} (its record)" for chain in sorted(missing)]

    def holds(self, record: Mapping[str, Any], attributes: Mapping[str, Any]) -> bool:
        """Whether what is at the store's path is the store, damaged perhaps, and nothing else that was put there."""
        if attributes.get("metadata") == record["metadata"]:
            return True
        return len(damaged_files(self.store, record["digests"])) < len(record["digests"])

    def put_in_place(self, digests: Digests, metadata: Mapping[str, Any], is_new: bool) -> None:
        """What was laid out becomes the store, or mends it. Of an extended one, all files that tell its size are new.

        Raises:
            OSError: it is new, and something has appeared at its path in the meantime.
        """
        if is_new or not self.store.exists():
            sync_tree(self.making)
            self.making.rename(self.store)
            sync(self.store.parent)
        else:
            self.write({"metadata": metadata, "digests": digests})  # before: what is not so yet is damaged
            other = self.damaged_layout()
            for name in sorted(other):
                place = self.store / name
                place.parent.mkdir(parents=True, exist_ok=True)
                sync(self.making / name)
                os.replace(self.making / name, place)
            shutil.rmtree(self.making)
            if other:
                sync_tree(self.store)
        self.write({"metadata": metadata, "digests": digests})

    def check_ours(self) -> None:
        """That a folder without a record is one that an interrupted call has begun."""
        if not self.path.exists() and not self.path.is_symlink():
            return
        if os.name == "posix" and self.path.lstat().st_uid != os.geteuid():
            fix = f"{self.path.name!r} beside it is somebody else's. Nothing was changed; choose another output_path."
            raise InputValueError(got("output_path", str(self.store), "one whose own folder is yours", fix))
        own = {"lock", "lease.json", "lease.json.partial", "run.json", "run.json.partial", "making", "away", "baseline"}
        names = [entry.name for entry in self.path.iterdir()] if self.path.is_dir() and not self.path.is_symlink() else ["?"]
        if others := sorted(name for name in names if name not in own and not name.startswith("chain-")):
            fix = f"It holds {others[:3]}, which devinterp did not make. Nothing was changed; choose another output_path."
            raise InputValueError(got("output_path", str(self.store), f"one whose folder {self.path.name!r} is free", fix))

    def clear_litter(self) -> None:
        """Files that were begun and never put in their place. Only what this package names so, and only in its own folders."""
        shutil.rmtree(self.making, ignore_errors=True)
        shutil.rmtree(self.away, ignore_errors=True)  # and with it, workers of a killed call end
        for litter in self.path.rglob("*.partial"):
            litter.unlink(missing_ok=True)
        if self.store.is_dir() and not self.store.is_symlink():
            for litter in self.store.rglob("*.partial"):
                litter.unlink(missing_ok=True)

    def clear_unmade(self) -> None:
        """After an error before anything was put in its place; for the one writer alone."""
        record = self.record()
        if record is not None and not record["digests"] and not any(self.path.glob("*/progress.json")):
            with suppress(OSError):
                shutil.rmtree(self.making, ignore_errors=True)
                (self.path / "run.json").unlink()

    def remove_if_empty(self) -> None:
        """A folder that holds nothing but an unused lock."""
        with suppress(OSError):
            if [entry.name for entry in self.path.iterdir()] == ["lock"]:
                (self.path / "lock").unlink()
                self.path.rmdir()
