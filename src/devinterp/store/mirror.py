"""A run in an object store, and the folder of this machine in which it is worked on.

All of a run happens in the working folder, under the protocol of local runs. What it commits is copied to the object store in
the same order: what a record speaks of, then the record; `completed` last. So whatever ends the process, what the records
there list is there. The working folder goes when all of the run is there.
"""

import errno
import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from devinterp.errors import DevinterpError, RunLocked, StorageError, StoreError, shown
from devinterp.store.durable import digest, write_durably
from devinterp.store.folder import Part, RunFolder, damaged_files
from devinterp.store.guard import attributes_of
from devinterp.store.lock import HEARTBEAT
from devinterp.store.marker import Marker
from devinterp.store.objects import REQUESTS_AT_ONCE, RUN, Changed, Objects
from devinterp.store.regularly import Regularly
from devinterp.store.remote import digests_in, fetch_contents, fetch_records, looked_at
from devinterp.store.runs import only_writer_of

logger = logging.getLogger("devinterp")

CACHE_VARIABLE = "DEVINTERP_CACHE"
LOOK_SECONDS = 1.0
"""Between looks for new commits"""
COPIES = Regularly(LOOK_SECONDS, "devinterp-copies")


def working_path(objects: Objects) -> Path:
    """Where the run at a URL is worked on."""
    given = os.environ.get(CACHE_VARIABLE)
    above = Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "devinterp"
    return above.expanduser() / f"{objects.name[:64]}-{digest(objects.url.encode())[:16]}" / objects.name


def discard(working: Path) -> None:
    """What a process that was killed at its very end has left of a run that is there, unless another uses it."""
    if working.parent.exists():
        with suppress(RunLocked), only_writer_of(working):
            shutil.rmtree(working.parent, ignore_errors=True)


@contextmanager
def only_writer_at(path: Path | None, objects: Objects | None) -> Iterator[tuple[RunFolder | None, "Mirror | None"]]:
    """The folder beside a store, held against other processes, of this machine and, with `objects`, of all others.

    Raises:
        RunLocked: another process that is alive holds it.
        StorageError: what was done is here, and not yet in the object store.
    """
    with ExitStack() as stack:
        mirror = None
        if objects is not None and path is not None:
            mirror = stack.enter_context(_held(Mirror(objects, path)))
            mirror.bring()
        yield stack.enter_context(only_writer_of(path)), mirror


@contextmanager
def _held(mirror: "Mirror") -> Iterator["Mirror"]:
    try:
        yield mirror
    except BaseException:
        with suppress(DevinterpError):  # the first error is the one to be told of
            mirror.close()
        if mirror.error is not None:
            logger.warning("%s", mirror.error)
        raise
    mirror.close()


class Mirror:
    """Copies one run to its object store, as the only process that may."""

    def __init__(self, objects: Objects, working: Path) -> None:
        self.objects, self.folder = objects, RunFolder(working)
        self.error: DevinterpError | None = None
        self._owners = working.parent / "owners.json"
        self._there: dict[str, str] = {}
        """digests of what the objects hold, by their names"""
        self._copied: dict[Path, bytes] = {}
        """records as they are there"""
        self._begun = False
        self._marker = Marker(objects)
        before = self._marker.before
        self._is_newest = before is not None and before.token in self._tokens()
        """the working folder, left by the last writer of all"""
        if self._is_newest and before is not None:
            self._sign([before.token, self._marker.owner.token])
        self._marker.take()
        HEARTBEAT.add(self, self._renew)

    def bring(self) -> None:
        """Make the working folder what the object store holds, where it is not newer."""
        with looked_at(self.objects) as (store, found):
            for part in digests_in(store).values():
                self._there |= {f"{self.objects.name}/{name}": value for name, value in part.items()}
            self._there = {name: value for name, value in self._there.items() if name in found}
        working = self.folder.store
        if not self._is_newest:
            shutil.rmtree(working.parent, ignore_errors=True)
            working.parent.mkdir(parents=True, exist_ok=True)
            fetch_records(self.objects, found, working)
            fetch_contents(self.objects, found, working)
            for digests in digests_in(working).values():
                for name in damaged_files(working, digests):
                    self._there.pop(f"{self.objects.name}/{name}", None)
        self._sign([self._marker.owner.token])

    def begin(self) -> None:
        """The run is laid out in its working folder: copy it, and from now on every commit.

        Raises:
            StorageError: something else has appeared at the URL, or the network fails.
        """
        self._begun = True
        try:
            parts = self.folder.parts()
            # first the records of what is to run again or longer: an old one must not speak of the new run
            known = {part.folder.name for part in parts.values() if part.progress() is not None}
            self._delete(name for name in self._names("/progress.json") if name.split("/")[-2] not in known)
            for part in parts.values():
                self._copy_part(part, settled=True)
            if self._is_known("zarr.json"):
                self._put_root()
            self._put(f"{self.objects.name}{RUN}/run.json", (self.folder.path / "run.json").read_bytes())
            record = self.folder.record()
            self._put_files(record["digests"] if record is not None else {})
            self._put_root()
        except (Changed, OSError) as error:
            self._fail(error)
            raise self.error from None  # type: ignore[misc]
        COPIES.add(self, self._copy)

    def raise_if_lost(self) -> None:
        """Between two steps: what was done is committed here, and cannot be copied.

        Raises:
            StorageError: the network fails, or another process writes there.
        """
        if self.error is not None:
            raise self.error

    def close(self) -> None:
        """Copy what is left, and give the run free."""
        HEARTBEAT.remove(self)
        COPIES.remove(self)
        if self.error is None and self._begun:
            try:
                self._copy_rest()
            except (Changed, OSError) as error:
                self._fail(error)
        if self.error is not None:
            self._marker.forget()
            raise self.error
        self._marker.release()
        if self._completed or self.folder.record() is None:
            shutil.rmtree(self.folder.store.parent, ignore_errors=True)

    def _renew(self) -> None:
        if self.error is not None:
            return
        try:
            self._marker.renew()
        except RunLocked as error:
            self.error = self.error or error
        except StorageError as error:
            logger.info("%s", error)

    def _copy(self) -> None:
        if self.error is not None:
            return
        try:
            for part in self.folder.parts().values():
                self._copy_part(part)
        except (Changed, OSError) as error:
            self._fail(error)

    def _copy_part(self, part: Part, settled: bool = False) -> None:
        """What its record speaks of, then the record; the state before is removed there.

        Nothing is copied where it is just changing; where it is settled, a state that is missing here stays missing there.
        """
        path = part.folder / "progress.json"
        prefix = f"{self.objects.name}{RUN}/{part.folder.name}/"
        if not path.exists():
            return
        try:
            content = path.read_bytes()
            if self._copied.get(path) == content:
                return
            progress = part.progress()
            if progress is None or path.read_bytes() != content:
                return
            self._put_files(progress.digests)
            state = None if progress.state is None else part.folder / progress.state
            if state is not None and (state.exists() or not settled):
                self._upload(prefix + state.name, state, progress.state_digest)
        except FileNotFoundError:  # a newer one takes its place
            if settled:
                raise
            return
        self._put(prefix + "progress.json", content)
        self._copied[path] = content
        self._delete([name for name in self._names("", prefix + "state-") if name != prefix + str(progress.state)])

    def _copy_rest(self) -> None:
        """After the last step: all commits, what became of chains that failed, and at the very end that nothing is missing."""
        for part in self.folder.parts().values():
            self._copy_part(part, settled=True)
        store = self.folder.store
        files = [file for file in store.rglob("*") if file.is_file() and file != store / "zarr.json"]
        self._put_files({file.relative_to(store).as_posix(): "" for file in files if file.suffix != ".partial"})
        self._put_root()

    def _put_files(self, digests: Mapping[str, str]) -> None:
        """Of the store, with the digests that they have; empty for those of which none is kept."""
        wanted = [name for name, value in digests.items() if not value or self._there.get(self._name(name)) != value]
        with ThreadPoolExecutor(REQUESTS_AT_ONCE) as threads:
            list(threads.map(lambda name: self._put_file(name, digests[name]), wanted))

    def _put_file(self, file: str, expected: str) -> None:
        content = (self.folder.store / file).read_bytes()
        found, name = digest(content), self._name(file)
        if expected and found != expected:
            raise StorageError(errno.EIO, "it is not what was written: the same call computes it again", str(file))
        if self._there.get(name) != found:
            self.objects.put(name, content)
            self._there[name] = found

    def _upload(self, name: str, file: Path, expected: str) -> None:
        if self._there.get(name) != expected:
            self.objects.upload(name, file)
            self._there[name] = expected

    def _delete(self, names: Iterable[str]) -> None:
        for name in names:
            self._there.pop(name, None)  # one of the same name and content may come again
            self.objects.delete([name])

    def _put_root(self) -> None:
        self._put(self._name("zarr.json"), (self.folder.store / "zarr.json").read_bytes())

    def _put(self, name: str, content: bytes) -> None:
        if self._there.get(name) != digest(content):
            self.objects.put(name, content)
            self._there[name] = digest(content)

    def _name(self, file: str) -> str:
        return f"{self.objects.name}/{file}"

    def _is_known(self, file: str) -> bool:
        return self._name(file) in self.objects.tags

    def _names(self, end: str, start: str = "") -> list[str]:
        """Objects beside the store."""
        start = start or f"{self.objects.name}{RUN}/"
        return [name for name in list(self.objects.tags) if name.startswith(start) and name.endswith(end)]

    @property
    def _completed(self) -> bool:
        try:
            return attributes_of(self.folder.store).get("completed") == 1
        except StoreError:
            return False

    def _fail(self, error: Changed | OSError) -> None:
        reason = (
            f"{error} failed: another process has written there. Nothing of its was overwritten"
            if isinstance(error, Changed)
            else f"{error.strerror or error}"
        )
        kept = f"What was committed is kept in {shown(str(self.folder.store.parent), 300)}: the same call goes on from there"
        self.error = StorageError(errno.EIO, f"{reason}. {kept}", self.objects.url)

    def _tokens(self) -> list[str]:
        """Of the writers whose work the working folder holds."""
        with suppress(OSError, ValueError):
            found: Iterable[object] = json.loads(self._owners.read_bytes())
            return [token for token in found if isinstance(token, str)]
        return []

    def _sign(self, tokens: list[str]) -> None:
        self._owners.parent.mkdir(parents=True, exist_ok=True)
        write_durably(self._owners, json.dumps(tokens).encode())
