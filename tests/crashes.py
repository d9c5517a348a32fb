"""A small run whose process ends at any operation on files, and what a disk may hold after a power failure.

`Worlds` is a process that has imported everything and forks one child per run, so that hundreds of runs take minutes.
"""

import hashlib
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

WRITES = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.link", "os.symlink", "os.chmod")
KILLED = -signal.SIGKILL


def tree(folder: Path) -> dict[str, str]:
    """Digests of all files of a store."""
    return {
        file.relative_to(folder).as_posix(): hashlib.md5(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


class Worlds:
    """`run(path, ...)` in a process of its own; returns how it ended, and the number of operations on files under `path`."""

    def __enter__(self) -> "Worlds":
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate(timeout=60)

    def run(self, path: Path, **how: Any) -> tuple[int, int]:
        """`how`: kill_at (number of the operation before which it is killed), torn, log (of a power failure), seconds,
        settings of sample()."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"path": str(path), **how}, default=str) + "\n")
        self._process.stdin.flush()
        code, count = json.loads(self._process.stdout.readline())
        return code, count


# -- in the process of a world --


def serve() -> None:
    sys.stdout, replies = sys.stderr, sys.stdout
    import datasets  # noqa: F401  what a run imports is imported once, here
    import loky  # noqa: F401
    import torch
    import transformers  # noqa: F401
    from cases import TinyLM, random_tokens

    import devinterp
    from devinterp.store import schema

    devinterp.sample  # noqa: B018

    torch.set_num_threads(1)
    schema.MOST_DRAWS_PER_CHUNK, schema.STEPS_PER_CHUNK = 3, 4
    data, code = random_tokens(32), random_tokens(8, seed=1)
    os.environ["TQDM_DISABLE"] = "1"
    for line in sys.stdin:
        asked = json.loads(line)
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(read)
            operations = Operations(Path(asked.pop("path")), write, **{k: asked.pop(k) for k in OWN if k in asked})
            settings = {"lr": 1e-3, "n_beta": 10.0, "localization": 5.0, "num_draws": 7, "num_chains": 2, "batch_size": 4,
                        "num_burnin_steps": 3, "num_init_loss_batches": 2, "batches_per_draw": 1, "checkpoint_every": 0,
                        "sampling_method": "leimkuhler_matthews", "progress": False} | asked  # fmt: skip
            try:
                operations.watch()
                devinterp.sample(TinyLM(), data, {"code": code}, output_path=operations.root / "run", **settings)
                operations.finished()
                os._exit(0)
            except BaseException as error:
                operations.finished()
                traceback.print_exception(error)
                os._exit(3)
        os.close(write)
        _, status = os.waitpid(child, 0)
        with os.fdopen(read) as pipe:
            counted = pipe.read().strip()
        replies.write(json.dumps([os.waitstatus_to_exitcode(status), int(counted or -1)]) + "\n")
        replies.flush()


OWN = ("kill_at", "torn", "log", "seconds")


class Operations:
    """Counts operations on files under a folder, and ends the process before one of them."""

    def __init__(self, root: Path, pipe: int, kill_at: int = -1, torn: bool = False, log: str = "", seconds: float = 0.0):
        self.root, self.pipe, self.kill_at, self.torn, self.log, self.seconds = root, pipe, kill_at, torn, log, seconds
        self.count, self.disk, self.on = 0, Disk(root), False

    def watch(self) -> None:
        self.on = True
        sys.addaudithook(self.see)
        synced = os.fsync

        def fsync(descriptor: int) -> None:
            self.step()
            synced(descriptor)
            if self.log:
                self.disk.synced(descriptor)

        os.fsync = fsync
        if self.seconds:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process, as SIGKILL would
            signal.setitimer(signal.ITIMER_REAL, self.seconds)

    def finished(self) -> None:
        self.on = False
        os.write(self.pipe, f"{self.count}\n".encode())

    def see(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on or (event not in WRITES and event != "open"):
            return
        path = arguments[0]
        if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
            return
        if not isinstance(path, str | os.PathLike) or not os.fspath(path).startswith(str(self.root)):
            return
        if event == "os.rename" and self.torn and self.count == self.kill_at and os.path.isfile(path):
            self.on = False
            os.truncate(path, os.path.getsize(path) // 2)  # it was in the midst of writing this
        self.step()
        if event == "os.rename" and self.log and os.path.isdir(path):
            self.disk.moved(os.fspath(path), os.fspath(arguments[1]))

    def step(self) -> None:
        if not self.on and not self.torn:
            return
        if self.count == self.kill_at:
            self.on = False
            if self.log:
                Path(self.log).write_bytes(pickle.dumps((self.disk.files, self.disk.folders)))
            os.kill(os.getpid(), signal.SIGKILL)
        self.count += 1


class Disk:
    """What is certain to be there after a power failure: contents that were synced, under names whose folder was synced."""

    def __init__(self, root: Path):
        self.root = root
        self.contents: dict[int, bytes] = {}
        self.files: dict[str, bytes | None] = {}
        """None: the name is certain, what the file holds is not"""
        self.folders: set[str] = set()

    def moved(self, old: str, new: str) -> None:
        """A folder under another name holds what it held. (That it goes back to the old name is a death before the move.)"""
        self.files = {new + name[len(old) :] if name.startswith(f"{old}/") else name: held for name, held in self.files.items()}
        self.folders = {new + name[len(old) :] if f"{name}/".startswith(f"{old}/") else name for name in self.folders}

    def synced(self, descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if not path.startswith(str(self.root)):
            return
        if os.path.isfile(path):
            content = Path(path).read_bytes()
            self.contents[os.fstat(descriptor).st_ino] = content
            if path in self.files:
                self.files[path] = content
            return
        self.folders.add(path)
        for name in [name for name in self.files if os.path.dirname(name) == path]:
            del self.files[name]
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.is_file():
                    self.files[entry.path] = self.contents.get(entry.inode())


def power_failure(root: Path, log: Path, seed: int) -> None:
    """Make of the files at the moment of death a state that a disk may be left in."""
    certain, folders = pickle.loads(log.read_bytes())
    rng = random.Random(seed)
    for folder in sorted((f for f in root.rglob("*") if f.is_dir()), key=lambda f: len(f.parts)):
        if folder.exists() and str(folder) not in folders and str(folder.parent) not in folders and rng.random() < 0.5:
            subprocess.run(["rm", "-r", str(folder)], check=True)  # the name of a new folder was never synced
    for file in sorted(f for f in root.rglob("*") if f.is_file()):
        name, now = str(file), file.read_bytes()
        if certain.get(name) == now:
            continue
        possible = [now, b"", now[: len(now) // 2]] if name not in certain or certain[name] is None else [now, certain[name]]
        if name not in certain and str(file.parent) not in folders:
            possible.append(None)
        if name not in certain:
            possible.append(None)
        chosen = rng.choice(possible)
        if chosen is None:
            file.unlink()
        else:
            file.write_bytes(chosen)
    for name, content in certain.items():  # removed or renamed, but not for certain
        if not os.path.exists(name) and os.path.isdir(os.path.dirname(name)) and rng.random() < 0.5:
            Path(name).write_bytes(content or b"")


if __name__ == "__main__":
    serve()
