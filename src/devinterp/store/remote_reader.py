"""Stores in an object store, opened lazily: looked at as those of this machine are, their chunks when they are read."""

import io
import re
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from zarr.abc.store import ByteRequest
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import ObjectStore, WrapperStore

from devinterp.errors import StoreError, shown
from devinterp.store.guard import (
    HARMLESS_FILE_BYTES,
    MOST_METADATA_BYTES,
    MOST_NODES,
    Array,
    check_chunk,
    check_growth,
    check_store,
)
from devinterp.store.objects import Objects, connected

METADATA = "zarr.json"


class CheckedStore(WrapperStore["ObjectStore[Any]"]):
    """Serves the metadata that were looked at, and no chunk that decodes to more than they declare."""

    def __init__(self, store: "ObjectStore[Any]", url: str, metadata: Mapping[str, bytes], arrays: Mapping[str, Array]):
        super().__init__(store)
        self.url, self.metadata, self.arrays = url, metadata, arrays

    def _with_store(self, store: "ObjectStore[Any]") -> "CheckedStore":
        return type(self)(store, self.url, self.metadata, self.arrays)

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        if key.rpartition("/")[2] == METADATA:
            found = self.metadata.get(key)
            return None if found is None else prototype.buffer.from_bytes(found)
        array = self.arrays.get(key.partition("/c")[0])
        if array is None or byte_range is not None:
            return None
        chunk = await super().get(key, prototype)
        if chunk is not None:
            content = chunk.to_bytes()
            file = io.BytesIO(content) if array.compressed and len(content) > HARMLESS_FILE_BYTES else None
            if file is not None or not array.compressed:
                check_chunk(self.url, f"{self.url}/{key}", file, len(content), array)
        return chunk

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        return [await self.get(key, prototype, byte_range) for key, byte_range in key_ranges]


def checked_store(url: str, *, ours: bool = False) -> CheckedStore:
    """The store at a URL, when nothing in its metadata and its listing speaks against it.

    Raises:
        StoreError: there is none, or it is refused as `check_store` refuses.
        StorageError: the object store cannot be reached.
    """
    objects = Objects.of(url)
    found = {name.removeprefix(f"{objects.name}/"): entry for name, entry in objects.list(objects.name).items()}
    nodes = [name for name, entry in found.items() if name.rpartition("/")[2] == METADATA and entry.size <= MOST_METADATA_BYTES]
    if METADATA not in nodes or len(nodes) > MOST_NODES:
        raise StoreError(f"{shown(url, 300)} is not a store: it has no usable zarr.json. Give the output_path of a run.")
    if strange := [name for name in found if re.search(r"(^|/)\.{1,2}(/|$)|(^|/)\.z\w+$|[^\w./-]", name)]:
        raise StoreError(f"the store {shown(url, 300)} is refused at {shown(strange[0])}: no name of a file of DevInterp.")
    metadata = _read(objects, nodes)
    with tempfile.TemporaryDirectory(prefix="devinterp-") as folder:
        for name, content in metadata.items():
            file = Path(folder, name)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        try:
            totals = check_store(Path(folder), ours=True)
        except StoreError as error:
            raise StoreError(str(error).replace(shown(folder), shown(url, 300))) from None
    totals.bytes_on_disk, totals.files = sum(entry.size for entry in found.values()), len(found)
    if not ours:
        check_growth(url, totals)
    inside = connected(url)
    return CheckedStore(ObjectStore(inside, read_only=True), url, metadata, totals.arrays)


def _read(objects: Objects, nodes: Iterable[str]) -> dict[str, bytes]:
    read = objects.read_all(f"{objects.name}/{name}" for name in nodes)
    return {name.removeprefix(f"{objects.name}/"): content for name, content in read.items()}
