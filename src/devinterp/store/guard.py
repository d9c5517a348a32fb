"""A store is looked at before it is opened: it may come from a stranger.

Nothing here decodes a chunk. What passes can only be numbers, stored in files of this folder, of a size that was declared.
What lies beside the store, changes while it is read, or is read by other programs is not covered.
"""

import json
import math
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from devinterp.errors import InputValueError, StoreError, got, shown
from devinterp.store.frames import decoded_size

NUMBERS = ("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "float32", "float64",
           "complex64", "complex128")  # fmt: skip
"""Data types that DevInterp and devinterp 2.0 write; strings are not among them"""

CODECS = (["bytes"], ["bytes", "zstd"])
"""Chains of codecs that they write"""

MOST_METADATA_BYTES = 16 * 2**20
MOST_DEPTH = 32
MOST_NODES = 10_000
MOST_CHUNK_BYTES = 2 * 2**30
MOST_COORDINATE_BYTES = 256 * 2**20
"""Of an array with the name of its dim: it is read whole as soon as the store is opened"""

ALWAYS_STORE_BYTES = 64 * 10**9
MOST_GROWTH = 10
"""Decoded bytes of a whole store per byte on disk; losses compress by a tenth"""

ALWAYS_CHUNKS = 100_000
MOST_CHUNK_GROWTH = 1000
GROWTH_COUNTS_FROM = 64 * 2**20
"""A small chunk of one repeated value rightly compresses by more"""

LIMIT_VARIABLE = "DEVINTERP_MAX_STORE_BYTES"
ELSEWHERE = "If you trust it, open it with xarray and pass the dataset."
HARMLESS_FILE_BYTES = GROWTH_COUNTS_FROM // 2**15
"""Zstandard makes at most 128 KiB of 4 bytes"""


@dataclass(frozen=True)
class Array:
    """What an array's metadata declare."""

    chunk_bytes: int
    compressed: bool


@dataclass
class Totals:
    nodes: int = 0
    bytes_declared: int = 0
    bytes_on_disk: int = 0
    chunks_declared: int = 0
    files: int = 0
    arrays: dict[str, Array] = field(default_factory=dict)
    """by their names"""


def check_store(root: Path, *, ours: bool = False) -> Totals:
    """Refuse what no store of ours holds, by names, kinds and sizes of files and by the declarations in their metadata.

    `ours`: of the size that was asked for, however little of it is computed yet. Returns what is declared and there.

    Raises:
        StoreError: something that runs code, lies outside, or takes more memory or time than its files can justify.
    """
    totals = Totals()
    try:
        folders: list[tuple[str, Array | None]] = [(os.fspath(root), None)]
        while folders:
            folder, above = folders.pop()
            array = _node(root, folder, above, totals)
            folders += [(path, array) for path in _look_through(root, folder, array, totals)]
    except OSError as error:
        raise _refused(root, root, f"cannot be read: {error}", "Check its files and your permissions.") from error
    if not ours:
        check_growth(root, totals)
    return totals


def check_growth(root: str | Path, totals: Totals) -> None:
    """Refuse more bytes or chunks declared than the files can justify."""
    allowed = max(_limit(), MOST_GROWTH * totals.bytes_on_disk)
    if totals.bytes_declared > allowed:
        fix = f"If you trust it, set {LIMIT_VARIABLE}={totals.bytes_declared} in the environment."
        raise _refused(root, root, f"declares {totals.bytes_declared:,} bytes, {allowed:,} are allowed", fix)
    if totals.chunks_declared > max(ALWAYS_CHUNKS, MOST_GROWTH * totals.files):
        raise _refused(root, root, f"declares {totals.chunks_declared:,} chunks and has {totals.files:,} files", ELSEWHERE)


def check_kinds(root: Path) -> None:
    """Refuse links and pipes in a store that is to be written to, however damaged its files are.

    Raises:
        StoreError: something that is neither a file nor a folder.
    """
    folders = [os.fspath(root)]
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                if entry.is_symlink():
                    raise _refused(root, entry.path, "a symbolic link", "Ask for a copy without links (cp -L, tar -h).")
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                elif not entry.is_file(follow_symlinks=False):
                    raise _refused(root, entry.path, "neither a file nor a folder", ELSEWHERE)


def attributes_of(root: Path) -> dict[str, Any]:
    """The attributes of a store's root, from its own file alone.

    Raises:
        StoreError: there are none that can be read.
    """
    path = root / "zarr.json"
    try:
        if path.stat().st_size > MOST_METADATA_BYTES:
            raise ValueError("too large")
        attributes = json.loads(path.read_bytes())["attributes"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise _refused(root, path, f"its attributes cannot be read ({type(error).__name__})", ELSEWHERE) from error
    if not isinstance(attributes, dict):
        raise _refused(root, path, "its attributes are not an object", ELSEWHERE)
    return attributes


def _limit() -> int:
    given = os.environ.get(LIMIT_VARIABLE)
    if given is None:
        return ALWAYS_STORE_BYTES
    if not (given.isascii() and given.isdecimal() and len(given) < 20):
        raise InputValueError(got(LIMIT_VARIABLE, given, "a number of bytes", f"Try {2 * ALWAYS_STORE_BYTES}."))
    return max(int(given), ALWAYS_STORE_BYTES)


def _refused(root: str | Path, path: str | Path, problem: str, fix: str) -> StoreError:
    """Names come from the store: as reprs, they cannot write to a terminal."""
    inside = os.path.relpath(path, root)
    where = "" if inside == "." else f" at {shown(inside)}"
    return StoreError(f"the store {shown(os.fspath(root))} is refused{where}: {problem}. {fix}")


def _look_through(root: Path, folder: str, array: Array | None, totals: Totals) -> Iterator[str]:
    """Check every entry of a folder; yields its folders. Other threads may be writing: files come and go."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_symlink():
                raise _refused(root, entry.path, "a symbolic link", "Ask for a copy without links (cp -L, tar -h).")
            if entry.is_dir(follow_symlinks=False):
                yield entry.path
                continue
            if entry.name in (".zgroup", ".zarray", ".zattrs", ".zmetadata"):
                raise _refused(root, entry.path, "metadata of Zarr format 2, which may name code to run", ELSEWHERE)
            try:
                size = entry.stat(follow_symlinks=False).st_size
                if not entry.is_file(follow_symlinks=False):
                    raise _refused(root, entry.path, "neither a file nor a folder", "Remove it.")
                if array is not None and (entry.name == "c" or entry.name.isdecimal()):
                    _check_chunk(root, entry.path, size, array)
            except FileNotFoundError:
                continue
            totals.files += 1
            totals.bytes_on_disk += size


def _node(root: Path, folder: str, above: Array | None, totals: Totals) -> Array | None:
    """The array that files of this folder belong to."""
    path = os.path.join(folder, "zarr.json")
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return above
    if not stat.S_ISREG(found.st_mode):
        raise _refused(root, path, "not a regular file", "Ask for a copy without links.")
    if found.st_size > MOST_METADATA_BYTES:
        problem = f"metadata of {found.st_size:,} bytes, {MOST_METADATA_BYTES:,} are allowed"
        raise _refused(root, path, problem, ELSEWHERE)
    with open(path, "rb") as file:
        text = file.read(MOST_METADATA_BYTES + 1)
    try:
        declared = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else "not JSON"
        raise _refused(root, path, f"cannot be read: {reason}", "Ask for another copy.") from error
    totals.nodes += 1
    problem = _problem(declared, is_root=Path(folder) == root)
    if above is not None:
        problem = "inside an array"
    if totals.nodes > MOST_NODES:
        problem = f"more than {MOST_NODES:,} groups and arrays"
    if problem:
        raise _refused(root, path, problem, ELSEWHERE)
    return _declared_array(declared, os.path.basename(folder), totals, path, root) if "shape" in declared else None


def _problem(declared: Any, is_root: bool) -> str:
    """What is wrong with a node's metadata, apart from sizes."""
    if not isinstance(declared, dict):
        return "not a JSON object"
    if _too_deep(declared):
        return f"nested more than {MOST_DEPTH} deep"
    if declared.get("zarr_format") != 3:
        return f"zarr_format {shown(declared.get('zarr_format'))}, only 3 is read"
    kind = declared.get("node_type")
    if kind not in ("group", "array") or (kind == "array") != ("shape" in declared):
        return f"node_type {shown(kind)} is neither a group nor an array with a shape"
    if declared.get("consolidated_metadata") is not None and not is_root:  # that of the root is not looked at
        return "consolidated metadata inside the store"
    if not isinstance(declared.get("attributes", {}), dict):
        return "attributes that are no JSON object"
    return "" if kind == "group" else _problem_of_array(declared)


def _problem_of_array(declared: dict[str, Any]) -> str:
    if declared.get("data_type") not in NUMBERS:
        return f"data type {shown(declared.get('data_type'))}, only {', '.join(NUMBERS)} are read"
    codecs = declared.get("codecs")
    names = [_name(codec) for codec in codecs] if isinstance(codecs, list) else None
    if names not in CODECS:
        return f"codecs {shown(names)}, only those of DevInterp are read: {' or '.join(map(str, CODECS))}"
    if declared.get("storage_transformers"):
        return "storage transformers, which no store of DevInterp has"
    grid, keys = declared.get("chunk_grid"), declared.get("chunk_key_encoding")
    if _name(grid) != "regular" or _name(keys) != "default" or _configuration(keys).get("separator", "/") != "/":
        return f"chunk grid {shown(grid)} with keys {shown(keys)}, only regular ones with default keys are read"
    shape, chunks = declared["shape"], _configuration(grid).get("chunk_shape")
    if not _lengths(shape, 0) or not _lengths(chunks, 1) or len(shape) != len(chunks or []):
        return f"shape {shown(shape)} with chunks {shown(chunks)}: must be lists of whole numbers, equally long"
    dims = declared.get("dimension_names")
    if dims is not None and not (isinstance(dims, list) and all(isinstance(dim, str | None) for dim in dims)):
        return f"dimension names {shown(dims)}: must be a list of strings"
    return ""


def _declared_array(declared: dict[str, Any], name: str, totals: Totals, path: str, root: Path) -> Array:
    """Sizes as declared, added to the totals."""
    shape, chunks = declared["shape"], declared["chunk_grid"]["configuration"]["chunk_shape"]
    itemsize = np.dtype(declared["data_type"]).itemsize
    whole, chunk = itemsize * math.prod(shape), itemsize * math.prod(chunks)
    if chunk > MOST_CHUNK_BYTES:
        raise _refused(root, path, f"chunks of {chunk:,} bytes, {MOST_CHUNK_BYTES:,} are allowed", ELSEWHERE)
    if declared.get("dimension_names") == [name] and whole > MOST_COORDINATE_BYTES:
        problem = f"a coordinate of {whole:,} bytes, {MOST_COORDINATE_BYTES:,} are allowed"
        raise _refused(root, path, problem, ELSEWHERE)
    totals.bytes_declared += whole
    totals.chunks_declared += math.prod(-(-length // step) for length, step in zip(shape, chunks, strict=True))
    array = Array(chunk, compressed=len(declared["codecs"]) > 1)
    totals.arrays[Path(path).parent.relative_to(root).as_posix()] = array
    return array


def _check_chunk(root: Path, path: str, size: int, array: Array) -> None:
    """A chunk's file decodes to what is declared, or less."""
    if not array.compressed:
        check_chunk(root, path, None, size, array)
    elif size > HARMLESS_FILE_BYTES:
        with open(path, "rb", buffering=0) as file:  # it may have been written anew since
            check_chunk(root, path, file, os.fstat(file.fileno()).st_size, array)


def check_chunk(root: str | Path, path: str, file: BinaryIO | None, size: int, array: Array) -> None:
    """The same of a chunk that is open; None where it is not compressed."""
    decoded = size if file is None else decoded_size(file, size)
    if decoded is None:
        raise _refused(root, path, "a chunk that is damaged, or not compressed by DevInterp", ELSEWHERE)
    if decoded > array.chunk_bytes:
        problem = f"a chunk that decodes to {decoded:,} bytes, {array.chunk_bytes:,} are declared"
        raise _refused(root, path, problem, "Ask for another copy.")
    if decoded > GROWTH_COUNTS_FROM and decoded > MOST_CHUNK_GROWTH * size:
        raise _refused(root, path, f"a chunk of {size:,} bytes that decodes to {decoded:,}", ELSEWHERE)


def _too_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MOST_DEPTH):
        level = [inner for outer in level if isinstance(outer, dict | list)
                 for inner in (outer.values() if isinstance(outer, dict) else outer)]  # fmt: skip
    return bool(level)


def _name(part: Any) -> Any:
    """Of a codec, grid or encoding: these stand as objects, or as bare names."""
    return part.get("name") if isinstance(part, dict) else part


def _configuration(part: Any) -> dict[str, Any]:
    found = part.get("configuration") if isinstance(part, dict) else None
    return found if isinstance(found, dict) else {}


def _lengths(value: Any, least: int) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= 32
        and all(type(length) is int and least <= length < 2**63 for length in value)
    )
