"""One writer of a run: a lock that dies with its process, and a lease that other machines can read.

The operating system's lock ends with its owner, however it ends, but network file systems may keep it to one machine or not
at all. Hence the lease: a small file with host, process and time, renewed while the run goes on.
"""

import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from filelock import FileLock, Timeout

from devinterp.errors import RunLocked
from devinterp.store.durable import write_durably
from devinterp.store.regularly import Regularly

HEARTBEAT_SECONDS = 30.0
STALE_SECONDS = 600.0
LEASE_BYTES = 4096


@dataclass(frozen=True)
class Lease:
    """Who writes, since when, and when it was last known to be alive."""

    host: str
    pid: int
    boot: str
    """the machine's last start, and the process's: process numbers are used again"""
    since: float
    seen: float

    @classmethod
    def of(cls, path: Path) -> "Lease | None":
        try:
            if path.is_symlink() or path.stat().st_size > LEASE_BYTES:
                return None
            found = json.loads(path.read_bytes())
            return cls(str(found["host"]), int(found["pid"]), str(found["boot"]), float(found["since"]), float(found["seen"]))
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None

    @property
    def is_alive(self) -> bool:
        """On this machine as its processes say; on another one, while its last sign of life is recent."""
        if self.host == platform.node():
            return self.boot == started(self.pid)
        return time.time() - self.seen < STALE_SECONDS

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host!r}, for {max(0.0, time.time() - self.since):.0f} s"


def started(pid: int) -> str:
    """Names a process across the restarts of its machine; where the system does not tell, by its number alone."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[19]}"
    except FileNotFoundError:
        if Path("/proc/self").exists():
            return "dead"
    except (OSError, IndexError):
        pass
    return f"{pid}"


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Hold a run's folder for the length of the block.

    Raises:
        RunLocked: another process that is alive holds it.
    """
    lease_at = folder / "lease.json"
    lock = FileLock(folder / "lock", timeout=0, thread_local=False)
    try:
        lock.acquire()
    except Timeout:
        raise RunLocked(str(folder), str(Lease.of(lease_at) or "a process that has left no name")) from None
    try:
        other = Lease.of(lease_at)
        if other is not None and other.is_alive and other.pid != os.getpid():
            raise RunLocked(str(folder), str(other))
        now = time.time()
        lease = Lease(platform.node(), os.getpid(), started(os.getpid()), now, now)
        write_durably(lease_at, json.dumps(asdict(lease)).encode(), durable=False)
        HEARTBEAT.add(lease_at, partial(_renew, lease_at, lease))
        try:
            yield
        finally:
            HEARTBEAT.remove(lease_at)
            lease_at.unlink(missing_ok=True)
    finally:
        lock.release()


def _renew(path: Path, lease: Lease) -> None:
    with suppress(OSError):  # a full disk ends the run where it loses something
        write_durably(path, json.dumps({**asdict(lease), "seen": time.time()}).encode(), durable=False)


HEARTBEAT = Regularly(HEARTBEAT_SECONDS, "devinterp-lease")
