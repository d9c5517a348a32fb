"""Stores as a stranger could send them: finished ones, changed by hand."""

import hashlib
import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from cases import TinyLM, random_tokens

import devinterp

DATA = random_tokens()
SHORT = {"lr": 1e-3, "n_beta": 10.0, "localization": 5.0, "batch_size": 2, "num_draws": 3, "num_chains": 2,
         "num_init_loss_batches": 1, "chains_together": "sequential", "progress": False}  # fmt: skip
OBSERVABLES = {"code": DATA, "text": DATA}
HOSTILE = "a'; rm -rf ~;'\x1b[2J"


def run(path: Path | None, **changes: Any) -> Any:
    return devinterp.sample(TinyLM(), DATA, OBSERVABLES, output_path=path, **(SHORT | changes))


@cache
def _finished() -> TemporaryDirectory[str]:
    folder = TemporaryDirectory(prefix="forged-")
    run(Path(folder.name) / "run")
    return folder


def finished(folder: Path) -> Path:
    """A copy of one finished store, to be changed."""
    return shutil.copytree(Path(_finished().name) / "run", folder / "run")


def edit(node: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the metadata of a group or array."""
    declared = json.loads((node / "zarr.json").read_text())
    change(declared)
    (node / "zarr.json").write_text(json.dumps(declared))


def added_array(store: Path, name: str = "extra", **changes: Any) -> Path:
    """One more array without chunks, like those that we write."""
    node = store / name
    node.mkdir()
    declared = json.loads((store / "n_beta" / "zarr.json").read_text())
    declared |= {"shape": [8], "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [8]}}}
    declared |= {"dimension_names": ["somewhere"], "fill_value": 0}
    (node / "zarr.json").write_text(json.dumps(declared | changes))
    return node


def rle_frame(size: int, declared: bool = True) -> bytes:
    """A Zstandard frame of `size` zeros, by hand: 4 bytes for every 128 KiB."""
    head = b"\x28\xb5\x2f\xfd" + (b"\xe0" + size.to_bytes(8, "little") if declared else b"\x00\x58")
    blocks = []
    while size > 0:
        step = min(size, 2**17)
        size -= step
        blocks.append((step << 3 | 1 << 1 | (size == 0)).to_bytes(3, "little") + b"\0")
    return head + b"".join(blocks)


def contents(path: Path) -> dict[str, str]:
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(path.rglob("*")) if p.is_file()}
