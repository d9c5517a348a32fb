"""Files that are whole after a power failure: written beside their place, synced, renamed, the folder synced."""

import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import torch
import xxhash
from torch import Tensor

from devinterp.errors import StorageError

DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG}
"""What goes wrong with a disk as a whole, so that every other chain would meet it too"""
SYNCS_AT_ONCE = 8
"""File systems join syncs that wait together: a hundred cost little more than ten"""
LEAST_BYTES = 2**20
"""Records, states and half-filled blocks need about this much, however little a run has left to store"""
RECORD_BYTES = 64 * 2**20
"""A larger record is not one of ours"""


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's entries, are on the disk."""
    if os.name != "posix" and path.is_dir():
        return  # folders cannot be synced there
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_all(files: Iterable[Path], root: Path) -> None:
    """Sync files, then every folder between them and `root`, it included."""
    files = list(files)
    folders = {folder for file in files for folder in file.parents if folder == root or root in folder.parents}
    with ThreadPoolExecutor(SYNCS_AT_ONCE) as threads:
        list(threads.map(sync, files))
        list(threads.map(sync, folders))


def sync_tree(root: Path) -> None:
    """Sync all that lies under a folder, and the entry of the folder itself."""
    sync_all([file for file in root.rglob("*") if file.is_file()], root)
    sync(root.parent)


def write_durably(path: Path, content: bytes, durable: bool = True) -> None:
    """Replace a file in one piece. Not `durable`: after a power failure the old file may be there, or a part of the new one."""
    partial = path.with_name(path.name + ".partial")
    with _new_file(partial) as file:
        file.write(content)
        file.flush()
        if durable:
            os.fsync(file.fileno())
    os.replace(partial, path)
    if durable:
        sync(path.parent)


def _new_file(path: Path) -> BinaryIO:
    """Never through a link."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_NOFOLLOW", 0)
    return os.fdopen(os.open(path, flags, 0o666), "wb")


def digest(content: bytes) -> str:
    """Against accident, not attack."""
    return xxhash.xxh3_128_hexdigest(content)


def digest_of(path: Path) -> str:
    total = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while part := file.read(2**22):
            total.update(part)
    return total.hexdigest()


def write_record(path: Path, content: Mapping[str, Any], durable: bool = True) -> None:
    """JSON with its own digest."""
    text = json.dumps(content, sort_keys=True)
    write_durably(path, json.dumps({"xxh3": digest(text.encode()), "content": content}).encode(), durable)


def read_record(path: Path) -> dict[str, Any] | None:
    """What `write_record` wrote; None where there is nothing, or what is there is damaged."""
    try:
        if path.is_symlink() or path.stat().st_size > RECORD_BYTES:
            return None
        found = json.loads(path.read_bytes())
        content = found["content"]
        whole = isinstance(content, dict) and digest(json.dumps(content, sort_keys=True).encode()) == found["xxh3"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return content if whole else None


DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
          torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL"}  # fmt: skip


def write_tensors(path: Path, tensors: Mapping[str, Tensor], durable: bool = True) -> str:
    """A safetensors file, straight from the tensors' memory, and its digest; the library's own writer copies all of them."""
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    total = xxhash.xxh3_128()
    with _new_file(path) as file:
        parts: Iterator[bytes | memoryview] = chain([len(text).to_bytes(8, "little"), text], map(_bytes_of, tensors.values()))
        for part in parts:
            total.update(part)
            file.write(part)
        file.flush()
        if durable:
            os.fsync(file.fileno())
    return total.hexdigest()


def _bytes_of(tensor: Tensor) -> memoryview:
    content: memoryview = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return content


@contextmanager
def told_of_the_disk(path: Path, num_bytes: int) -> Iterator[None]:
    """Says of a full or failing disk where, how much is wanted there, and what is kept.

    Args:
        path: the store.
        num_bytes: of the whole store, about.

    Raises:
        StorageError: the disk did not take what was to be written.
    """
    try:
        yield
    except OSError as error:
        if isinstance(error, StorageError) or error.errno not in DISK_ERRORS:
            raise
        wanted, free = max(LEAST_BYTES, num_bytes - size_of(path)), free_bytes(path)
        raise StorageError(
            error.errno,
            f"{error.strerror}. The rest of the run needs about {wanted:,} bytes, {free:,} are free "
            f"({max(0, wanted - free):,} short). What was committed is kept: the same call goes on from there",
            str(error.filename or path),
        ) from error


def size_of(folder: Path) -> int:
    """Bytes of the files under a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) if folder.exists() else 0


def free_bytes(path: Path) -> int:
    return shutil.disk_usage(next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())).free
