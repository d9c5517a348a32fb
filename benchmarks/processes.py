"""Measuring processes: the lines they print, and the peak memory of one with its workers."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time

LIMIT = 600
"""Seconds allowed for one call"""
MEMORY_EVERY = 0.02


def run(command: list[str], memory: bool = False) -> tuple[list[dict], float, str]:
    """The JSON lines that a process prints, the peak memory of its tree in MB, and why it did not end well."""
    alone = environment(ours=command[0] == sys.executable)
    words, peak, printed = "", 0.0, -1
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, env=alone, start_new_session=True)
        try:
            while process.poll() is None:
                if os.fstat(out.fileno()).st_size != printed:
                    printed, since = os.fstat(out.fileno()).st_size, time.monotonic()
                if time.monotonic() - since > LIMIT:
                    words = f"more than {LIMIT // 60} min"
                    break
                if memory:
                    peak = max(peak, tree_megabytes(process.pid))
                time.sleep(MEMORY_EVERY if memory else 0.2)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        out.seek(0)
        err.seek(0)
        lines, errors = out.read().splitlines(), err.read()
    if process.returncode and not words:
        told = ("MemoryError", "not enough memory", "allocate memory", "out of memory")
        short = process.returncode == -signal.SIGKILL or any(text in errors for text in told)
        words = "out of memory" if short else "failed"
        print(errors[-2000:])
    return [json.loads(line) for line in lines if line.startswith("{")], peak, words


def tree_megabytes(pid: int) -> float:
    """Of a process and its descendants, shared pages counted once; 0 without psutil."""
    try:
        import psutil
    except ImportError:
        return 0.0
    total = 0.0
    try:
        parent = psutil.Process(pid)
        for process in (parent, *parent.children(recursive=True)):
            total += getattr(process.memory_full_info(), "pss", 0) / 2**20
    except psutil.Error:  # it has just ended: this sum is not a peak
        return 0.0
    return total


def environment(ours: bool) -> dict[str, str]:
    """The peer must not find us on its path."""
    return {name: value for name, value in os.environ.items() if ours or name != "PYTHONPATH"}


def num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
