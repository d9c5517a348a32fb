"""One writer of a run in an object store: an object that says who, renewed while it writes.

It stays when a run is over, as released, since its token also tells whose working folder is the newest.
"""

import json
import logging
import os
import platform
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from uuid import uuid4

from devinterp.errors import InputValueError, RunLocked, StorageError, got
from devinterp.store.lock import LEASE_BYTES, STALE_SECONDS, started
from devinterp.store.objects import RUN, Changed, Objects

logger = logging.getLogger("devinterp")

HELD: set[str] = set()
"""Tokens under which this process writes at the moment"""


@dataclass(frozen=True)
class Owner:
    """Who writes, or was the last to."""

    token: str
    host: str
    pid: int
    machine: str
    """its start and its process numbers' namespace; empty where the system does not tell"""
    process: str
    since: float
    held: bool = True
    beats: int = 0

    @classmethod
    def this_process(cls) -> "Owner":
        pid = os.getpid()
        return cls(uuid4().hex, platform.node(), pid, this_machine(), started(pid), time.time())

    @classmethod
    def of(cls, content: bytes) -> "Owner | None":
        try:
            found = json.loads(content[:LEASE_BYTES])
            texts = {name: str(found[name]) for name in ("token", "host", "machine", "process")}
            return cls(
                **texts, pid=int(found["pid"]), since=float(found["since"]), held=bool(found["held"]), beats=int(found["beats"])
            )
        except (ValueError, KeyError, TypeError, RecursionError):
            return None

    @property
    def is_dead(self) -> bool | None:
        """Of a process of this machine, as its processes say; None of another's."""
        if not self.machine or (self.host, self.machine) != (platform.node(), this_machine()):
            return None
        if self.pid == os.getpid():
            return self.token not in HELD  # left by an earlier run of this process, which lost the network
        return self.process != started(self.pid)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host!r}, for {max(0.0, time.time() - self.since):.0f} s"


def this_machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


class Marker:
    """Held by this process, once `take` has returned."""

    def __init__(self, objects: Objects) -> None:
        self.objects, self.name = objects, f"{objects.name}{RUN}/writer.json"
        self.owner = Owner.this_process()
        self.before = self._look()

    def _look(self) -> Owner | None:
        """Who has it, refused if that is another process that is alive."""
        found = self.objects.read(self.name)
        if found is None:
            return None
        owner = Owner.of(found[0])
        if owner is None:
            fix = f"Its {self.name!r} was not written by devinterp. Nothing was changed; choose another."
            raise InputValueError(got("output_path", self.objects.url, "new, or a run of devinterp", fix))
        if not owner.held:
            return owner
        dead = owner.is_dead
        silent = (self.objects.now() - found[1].modified).total_seconds() if dead is None else 0.0
        if not dead and silent < STALE_SECONDS:
            wait = (
                "" if dead is False else f", last heard of {silent:.0f} s ago (after {STALE_SECONDS:.0f} s it may be replaced)"
            )
            raise RunLocked(self.objects.url, f"{owner}{wait}")
        what = "which is dead" if dead else f"not heard of for {silent:.0f} s"
        logger.warning("%r: taken over from %s, %s", self.objects.url, owner, what)
        return owner

    def take(self) -> None:
        """
        Raises:
            RunLocked: another process was faster.
        """
        try:
            self._put(self.owner)
        except Changed:
            found = self.objects.look(self.name)
            owner = None if found is None else Owner.of(found[0])
            raise RunLocked(self.objects.url, str(owner or "another process")) from None
        HELD.add(self.owner.token)

    def renew(self) -> None:
        """
        Raises:
            RunLocked: another process has taken it, after this one was not heard of for long.
        """
        self.owner = replace(self.owner, beats=self.owner.beats + 1)
        try:
            self._put(self.owner)
        except Changed:
            found = self.objects.look(self.name)
            owner = None if found is None else Owner.of(found[0])
            raise RunLocked(self.objects.url, f"{owner or 'another process'}, which has taken it over") from None

    def release(self) -> None:
        """As the last writer; where there was none and nothing was written, without a trace."""
        try:
            if self.before is None and not any(name != self.name for name in self.objects.everything()):
                self.objects.delete([self.name])
            else:
                self._put(Owner(self.owner.token, "", 0, "", "", 0.0, held=False))  # what stays tells of no host
        except (Changed, StorageError) as error:
            logger.warning("%r: the marker of its writer stays (%s)", self.objects.url, error)
        HELD.discard(self.owner.token)

    def forget(self) -> None:
        """It is no longer this process's."""
        HELD.discard(self.owner.token)

    def _put(self, owner: Owner) -> None:
        self.objects.put(self.name, json.dumps(asdict(owner)).encode())
