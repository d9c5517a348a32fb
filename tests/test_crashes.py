"""The same call after any end of its process gives the very bytes of a run that was never interrupted."""

import os
import random
import shutil
import sys
from pathlib import Path

import pytest
from crashes import KILLED, Worlds, power_failure, tree

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, and reads /proc")
SAMPLED = 12
"""Points in a short test; all of them with -m slow"""


@pytest.fixture(scope="module")
def worlds():
    with Worlds() as started:
        yield started


@pytest.fixture(scope="module")
def whole(worlds, tmp_path_factory) -> tuple[dict[str, str], int]:
    """An uninterrupted run, and its number of operations."""
    folder = tmp_path_factory.mktemp("whole")
    code, operations = worlds.run(folder)
    assert code == 0
    return tree(folder / "run"), operations


def chosen(count: int, every: bool, seed: int = 0) -> list[int]:
    return list(range(count)) if every else sorted(random.Random(seed).sample(range(count), SAMPLED))


EVERY = [pytest.param(False, id="some"), pytest.param(True, id="every", marks=pytest.mark.slow)]


@pytest.mark.parametrize("torn", [False, True])
@pytest.mark.parametrize("every", EVERY)
def test_killed_before_an_operation_on_files(worlds, whole, tmp_path, every, torn):
    expected, operations = whole
    assert operations > 100
    killed = 0
    for point in chosen(operations, every, seed=torn):
        folder = tmp_path / str(point)
        folder.mkdir()
        code, _ = worlds.run(folder, kill_at=point, torn=torn)
        killed += code == KILLED
        code, _ = worlds.run(folder)
        assert code == 0, point
        assert tree(folder / "run") == expected, point
        assert not list(folder.rglob("*.partial")), point
        shutil.rmtree(folder)
    print(f"\nkilled before an operation{', its file half written' if torn else ''}: {killed} of {operations}, all equal")
    assert killed >= SAMPLED - 2


@pytest.mark.parametrize("every", EVERY)
def test_power_failures(worlds, whole, tmp_path, every):
    expected, operations = whole
    failures = 0
    for seed in range(3):
        for point in chosen(operations, every, seed):
            folder, log = tmp_path / f"{seed} {point}", tmp_path / "log"
            folder.mkdir()
            log.unlink(missing_ok=True)
            worlds.run(folder, kill_at=point, log=str(log))
            if log.exists():
                power_failure(folder, log, seed)
                failures += 1
            code, _ = worlds.run(folder)
            assert code == 0, (seed, point)
            assert tree(folder / "run") == expected, (seed, point)
            shutil.rmtree(folder)
    print(f"\npower failures: {failures}, all equal")
    assert failures >= 3 * (SAMPLED - 2)


def test_nothing_that_is_finished_is_ever_wrong_after_a_power_failure(worlds, whole, tmp_path):
    """`completed` is the last thing to be on the disk."""
    expected, operations = whole
    for point in range(operations - 15, operations):
        folder, log = tmp_path / str(point), tmp_path / f"{point}.log"
        folder.mkdir()
        worlds.run(folder, kill_at=point, log=str(log))
        for seed in range(5):
            if log.exists():
                copy = tmp_path / f"{point} {seed}"
                shutil.copytree(folder, copy)
                rename(log, folder, copy)
                power_failure(copy, tmp_path / "moved", seed)
                root = copy / "run" / "zarr.json"
                if root.exists() and b'"completed": 1' in root.read_bytes():
                    assert tree(copy / "run") == expected, (point, seed)


def rename(log: Path, before: Path, after: Path) -> None:
    import pickle

    files, folders = pickle.loads(log.read_bytes())
    moved = {name.replace(str(before), str(after)): content for name, content in files.items()}
    (log.parent / "moved").write_bytes(pickle.dumps((moved, {name.replace(str(before), str(after)) for name in folders})))


@pytest.mark.parametrize("kills", [pytest.param(8, id="some"), pytest.param(200, id="200", marks=pytest.mark.slow)])
def test_killed_at_random_moments(worlds, tmp_path, kills):
    longer = {"num_draws": 150, "num_chains": 3, "num_steps_bw_draws": 2}
    (tmp_path / "whole").mkdir()
    assert worlds.run(tmp_path / "whole", **longer)[0] == 0
    expected, rng, killed, runs = tree(tmp_path / "whole" / "run"), random.Random(0), 0, 0
    while killed < kills:
        folder = tmp_path / str(runs)
        folder.mkdir()
        runs += 1
        while worlds.run(folder, seconds=rng.uniform(0.05, 0.6), **longer)[0] != 0:
            killed += 1
        assert tree(folder / "run") == expected
        shutil.rmtree(folder)
    print(f"\nkilled {killed} times at random in {runs} runs, all equal")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounts a small file system")
@pytest.mark.parametrize("step", [pytest.param(64, id="some"), pytest.param(8, id="every", marks=pytest.mark.slow)])
def test_full_disks(worlds, whole, tmp_path, step):
    """From a disk that is full to one with room, in steps: a clear error, then success once there is space."""
    import subprocess

    expected, outcomes = whole[0], {"refused": 0, "finished": 0}
    mount = tmp_path / "disk"
    mount.mkdir()
    for kilobytes in range(64, 640, step):
        if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", mount], check=False).returncode:
            pytest.skip("no file system can be mounted here")
        try:
            code, _ = worlds.run(mount)
            outcomes["finished" if code == 0 else "refused"] += 1
            subprocess.run(["mount", "-o", "remount,size=64m", mount], check=True)
            code, _ = worlds.run(mount)
            assert code == 0, kilobytes
            assert tree(mount / "run") == expected, kilobytes
        finally:
            subprocess.run(["umount", mount], check=True)
    print(f"\ndisks: {outcomes}, all finished with equal bytes once there was space")
    assert min(outcomes.values()) > 0
