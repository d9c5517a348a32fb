"""Objects of one run in an object store: read, and written only over what this process has seen there itself.

An object store has no rename, no lock and no sync; a put is whole or not there. Every put here is a conditional one, except of
large files: it fails where the object is not the one that was read or written last. So nothing of anybody else is ever
written over, whatever became of this process in the meantime.
"""

import errno
import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeGuard
from uuid import uuid4

from devinterp.errors import InputValueError, StorageError, got

SCHEMES = ("s3", "gs", "az")
MOST_RETRIES = 10
FIRST_PAUSE = 0.5
RETRY_SECONDS = 120.0
"""A request that fails is tried again for about a minute, with growing pauses"""
REQUEST_SECONDS = 120.0
REQUESTS_AT_ONCE = 8
IN_PARTS_FROM = 32 * 2**20
"""Larger files are uploaded in parts, which no store does under a condition; only states of chains are that large"""
RUN = ".run"


@dataclass(frozen=True)
class Entry:
    """An object, as a listing tells of it."""

    size: int
    modified: datetime
    tag: str | None
    """another one whenever the content is"""


class Changed(Exception):
    """An object is not the one that was seen last."""


def is_url(value: Any) -> TypeGuard[str]:
    """Whether it is meant as one; no path of a run has `://` in it."""
    return isinstance(value, str) and re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", value) is not None


@dataclass
class Objects:
    """Those of the run at `url`: `name/...`, its store, and `name.run/...`, what going on needs."""

    url: str
    parent: str
    name: str
    tags: dict[str, str | None] = field(default_factory=dict)
    """of the objects as they were seen last"""

    @classmethod
    def of(cls, url: str) -> "Objects":
        """Checked, before anything is asked of the network.

        Raises:
            InputValueError: no object store, or no name in one; or the library for them is not installed.
        """
        allowed = f"a local path, or a URL of {', '.join(f'{scheme}://' for scheme in SCHEMES)}"
        scheme, _, rest = url.partition("://")
        if scheme == "file":
            raise InputValueError(got("output_path", url, allowed, "Give the path itself, without file://."))
        if scheme not in SCHEMES:
            raise InputValueError(got("output_path", url, allowed, "Try 's3://bucket/runs/first'."))
        bucket, _, key = rest.rstrip("/").partition("/")
        if "@" in bucket or re.search(r"[?#%\\\s*]", rest):  # the value may hold a password, so it is not shown
            fix = "Credentials are taken from the environment, for example AWS_ACCESS_KEY_ID; they are never part of a path."
            raise InputValueError(f"output_path: a URL with '@', '?', '#', '%' or spaces is not taken. {fix}")
        if not bucket or not key or any(part in ("", ".", "..") for part in key.split("/")):
            fix = f"Try '{scheme}://{bucket or 'bucket'}/runs/first'."
            raise InputValueError(got("output_path", url, "a URL with a bucket and a name in it", fix))
        above, _, name = f"{bucket}/{key}".rpartition("/")
        found = cls(f"{scheme}://{bucket}/{key}", f"{scheme}://{above}", name)
        _ = found._store
        return found

    @property
    def _store(self) -> Any:
        return connected(self.parent)

    def list(self, prefix: str) -> dict[str, Entry]:
        """All objects under a folder, by their names; remembered as seen."""
        import obstore

        with self.told(f"listing {prefix!r}"):
            found = {
                meta["path"]: Entry(meta["size"], meta["last_modified"], meta["e_tag"])
                for page in obstore.list(self._store, prefix)
                for meta in page
            }
        self.tags |= {name: entry.tag for name, entry in found.items()}
        return found

    def everything(self) -> dict[str, Entry]:
        """All objects of the run. One at the very path of the store, where a folder should be, is among them."""
        import obstore

        found = self.list(self.name) | self.list(self.name + RUN)
        with self.told("looking"), suppress(FileNotFoundError):
            meta = obstore.head(self._store, self.name)
            found[self.name] = Entry(meta["size"], meta["last_modified"], meta["e_tag"])
        return found

    def read(self, name: str) -> tuple[bytes, Entry] | None:
        """An object, remembered as seen: it may be written over."""
        found = self.look(name)
        if found is not None:
            self.tags[name] = found[1].tag
        return found

    def look(self, name: str) -> tuple[bytes, Entry] | None:
        """An object, not remembered."""
        import obstore

        try:
            with self.told(f"reading {name!r}"):
                found = obstore.get(self._store, name)
                meta, content = found.meta, bytes(found.bytes())
        except FileNotFoundError:
            return None
        return content, Entry(meta["size"], meta["last_modified"], meta["e_tag"])

    def read_all(self, names: Iterable[str]) -> dict[str, bytes]:
        """Those of them that are there."""
        names = list(names)
        with ThreadPoolExecutor(REQUESTS_AT_ONCE) as threads:
            return {name: found[0] for name, found in zip(names, threads.map(self.read, names), strict=True) if found}

    def download(self, name: str, to: Path) -> None:
        """A file, in parts; one that is not there is left out."""
        import obstore

        to.parent.mkdir(parents=True, exist_ok=True)
        with self.told(f"reading {name!r}"), suppress(FileNotFoundError):
            found = obstore.get(self._store, name)
            self.tags[name] = found.meta["e_tag"]
            with open(to, "wb") as file:
                for part in found.stream(min_chunk_size=2**22):
                    file.write(part)

    def put(self, name: str, content: bytes) -> None:
        """Written where nothing is, or over the very object that was seen last.

        Raises:
            Changed: another one is there. Nothing was written.
        """
        import obstore

        seen = self.tags.get(name)
        mode: Any = "create" if seen is None else {"e_tag": seen}
        try:
            with self.told(f"writing {name!r}"):
                self.tags[name] = obstore.put(self._store, name, content, mode=mode)["e_tag"]
        except Changed:
            there = self.look(name)
            if there is None or there[0] != content:
                raise
            self.tags[name] = there[1].tag  # it was written, and the answer was lost; or another computed the very same

    def upload(self, name: str, file: Path) -> None:
        """A file of any size.

        Raises:
            Changed: as `put` does; not of one that is uploaded in parts.
        """
        import obstore

        if file.stat().st_size < IN_PARTS_FROM:
            self.put(name, file.read_bytes())
            return
        with self.told(f"writing {name!r}"):
            self.tags[name] = obstore.put(self._store, name, file, use_multipart=True)["e_tag"]

    def delete(self, names: Iterable[str]) -> None:
        import obstore

        for name in names:
            with self.told(f"deleting {name!r}"), suppress(FileNotFoundError):
                obstore.delete(self._store, name)
            self.tags.pop(name, None)

    def now(self) -> datetime:
        """By the clock of the store, which all machines share."""
        probe = f"{self.name}{RUN}/clock-{uuid4().hex}"
        self.put(probe, b"")
        found = self.read(probe)
        self.delete([probe])
        if found is None:
            raise StorageError(errno.EIO, "an object that was just written is not there", self.url)
        return found[1].modified

    def told(self, doing: str) -> "_Told":
        return _Told(self.url, doing)


class _Told:
    """Errors of an object store as ours: what was done and where. `FileNotFoundError` is left to the caller."""

    def __init__(self, url: str, doing: str):
        self.url, self.doing = url, doing

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError

        if isinstance(error, AlreadyExistsError | PreconditionError):
            raise Changed(self.doing) from None
        missing = isinstance(error, FileNotFoundError) and "NoSuchBucket" not in str(error) and "writing" not in self.doing
        if isinstance(error, BaseError | PermissionError | FileNotFoundError) and not missing:
            raise StorageError(errno.EIO, f"{self.doing} failed: {without_secrets(str(error))}", self.url) from None


def without_secrets(message: str) -> str:
    """The first lines of an error, without what stands in headers and queries: some stores sign requests there."""
    message = re.sub(r"\s+", " ", message.partition("Debug source")[0].partition("<?xml")[0])
    message = re.sub(r"\?[^\s>)]*", "?...", message)
    return re.sub(r"://[^/\s@]*@", "://...@", message).strip(" :-")[:300]


@lru_cache(maxsize=64)
def connected(parent: str) -> Any:
    """A store of obstore; where it is and who may use it, it takes from the environment."""
    try:
        from obstore.store import from_url
    except ImportError as error:
        fix = "Object stores need obstore: pip install 'devinterp[remote]'. Or write locally, then copy both folders."
        raise InputValueError(got("output_path", parent, "a local path", fix)) from error
    insecure = os.environ.get("AWS_ALLOW_HTTP", "").lower() in ("1", "true")
    client: Any = {"timeout": timedelta(seconds=REQUEST_SECONDS), "allow_http": insecure}
    backoff = {"init_backoff": timedelta(seconds=FIRST_PAUSE), "max_backoff": timedelta(seconds=15), "base": 3}
    retries: Any = {"max_retries": MOST_RETRIES, "retry_timeout": timedelta(seconds=RETRY_SECONDS), "backoff": backoff}
    try:
        return from_url(parent, retry_config=retries, client_options=client)
    except Exception as error:  # whatever a wrong name or environment makes of it
        fix = "Check the bucket's name and the environment (docs/store.md)."
        raise InputValueError(f"output_path: {parent!r} cannot be reached: {without_secrets(str(error))}. {fix}") from None
