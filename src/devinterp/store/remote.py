"""Looking at a run in an object store: its records, without its losses."""

import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from devinterp.errors import InputValueError, got, shown
from devinterp.store.durable import RECORD_BYTES, digest
from devinterp.store.folder import Digests, RunFolder, is_inside
from devinterp.store.objects import RUN, Entry, Objects
from devinterp.store.runs import Stored, recognised

OWN = r"run\.json|writer\.json|clock-[0-9a-f]+|(baseline|chain-\d{4,9})/(progress\.json|state-\d+\.safetensors)"
"""Names beside a store"""


@contextmanager
def looked_at(objects: Objects) -> Iterator[tuple[Path, dict[str, Entry]]]:
    """The records of a run and what was written before it started, in a temporary folder; and a listing of everything.

    Raises:
        InputValueError: something else is at the URL.
    """
    found = objects.everything()
    _check_names(objects, found)
    with tempfile.TemporaryDirectory(prefix="devinterp-") as folder:
        store = Path(folder) / objects.name
        fetch_records(objects, found, store)
        if any(name.startswith(f"{objects.name}/") for name in found):
            store.mkdir(exist_ok=True)
        yield store, found


def fetch_records(objects: Objects, found: Mapping[str, Entry], store: Path) -> None:
    """Records of the run and of its parts, and the files of its layout."""
    ends = ("/run.json", "/progress.json")
    wanted = [name for name in found if name.startswith(objects.name + RUN) and name.endswith(ends)]
    wanted += [f"{objects.name}/zarr.json"]
    _write(objects, [name for name in wanted if name in found and found[name].size <= RECORD_BYTES], store)
    record = RunFolder(store).record()
    layout = [f"{objects.name}/{name}" for name in (record or {"digests": {}})["digests"]]
    _write(objects, [name for name in layout if name in found], store)


def fetch_contents(objects: Objects, found: Mapping[str, Entry], store: Path) -> None:
    """What the records in a folder speak of: chunks, and states to go on from."""
    folder = RunFolder(store)
    chunks, states = [], []
    for name, part in folder.parts().items():
        progress = part.progress()
        if progress is not None:
            chunks += [f"{objects.name}/{file}" for file in progress.digests]
            states += [f"{objects.name}{RUN}/{name}/{progress.state}"] if progress.state else []
    _write(objects, [name for name in chunks if name in found], store)
    for name in states:
        if name in found and re.fullmatch(OWN, name.removeprefix(f"{objects.name}{RUN}/")):
            objects.download(name, store.parent / name)


def _write(objects: Objects, names: list[str], store: Path) -> None:
    at_once = 64
    for start in range(0, len(names), at_once):
        for name, content in objects.read_all(names[start : start + at_once]).items():
            file = store.parent / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)


def digests_in(store: Path) -> dict[str, Digests]:
    """Of all files that the records in a folder speak of, by the part that wrote them; `""` = the run's layout."""
    folder = RunFolder(store)
    record = folder.record()
    found = {"": dict(record["digests"]) if record else {}}
    for name, part in folder.parts().items():
        progress = part.progress()
        if progress is not None:
            found[name] = progress.digests
    return found


def stored_there(objects: Objects, fingerprint: dict[str, Any], sizes: Mapping[str, int]) -> Stored | None:
    """The run at a URL, when it is the one asked for; refuses any other thing that is there.

    Complete is one of which every object is there. What they hold is not read: `verify` does that.
    """
    with looked_at(objects) as (store, found):
        known = recognised(store, fingerprint, sizes, objects.url)
        if known is None or not known.completed:
            return known
        folder = RunFolder(store)
        if not folder.path.exists():
            return known
        files = {name for part in digests_in(store).values() for name in part}
        missing = [name for name in files if f"{objects.name}/{name}" not in found]
        whole = not folder.damaged_layout() and folder.finished_chains() >= set(range(known.metadata["identity"]["num_chains"]))
        return replace(known, completed=whole and folder.has_baseline() and not missing)


def damaged_objects(objects: Objects, digests: Digests) -> list[str]:
    """Files of the store that are not what was written."""
    names, damaged, at_once = list(digests), [], 64
    for start in range(0, len(names), at_once):
        part = names[start : start + at_once]
        there = objects.read_all(f"{objects.name}/{name}" for name in part)
        damaged += [name for name in part if digest(there.get(f"{objects.name}/{name}", b"?")) != digests[name]]
    return damaged


def _check_names(objects: Objects, found: Mapping[str, Entry]) -> None:
    fix = "Nothing was changed; choose another output_path."
    if objects.name in found:
        raise InputValueError(got("output_path", objects.url, "new, or a run of devinterp", f"It is an object. {fix}"))
    others = [name for name in found if not _is_own(name, objects.name)]
    if others:
        what = f"It holds {shown(sorted(others)[:3])}, which devinterp did not make."
        raise InputValueError(got("output_path", objects.url, "new, or a run of devinterp", f"{what} {fix}"))


def _is_own(name: str, of: str) -> bool:
    if name.startswith(f"{of}{RUN}/"):
        return re.fullmatch(OWN, name.removeprefix(f"{of}{RUN}/")) is not None
    inside = name.removeprefix(f"{of}/")
    return inside == "zarr.json" or is_inside(inside)
