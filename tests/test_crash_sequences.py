"""Any sequence of kills, damage, litter and other requests ends in the bytes of a run that was never interrupted."""

import random
import shutil
import tempfile
from pathlib import Path

import hypothesis.strategies as st
import pytest
from crashes import KILLED, Worlds, tree
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

COUNTS = {"sequences": 0, "kills": 0, "damages": 0, "refused": 0}


class Sequences(RuleBasedStateMachine):
    worlds: Worlds
    expected: dict[str, str]
    operations: int

    @initialize()
    def begin(self) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.lost = False
        COUNTS["sequences"] += 1

    @rule(share=st.floats(0, 1), torn=st.booleans())
    def run_and_kill(self, share: float, torn: bool) -> None:
        code, _ = self.worlds.run(self.folder, kill_at=int(share * self.operations), torn=torn)
        assert code in (KILLED, 0)
        COUNTS["kills"] += code == KILLED

    @rule(seed=st.integers(0, 10**6), how=st.sampled_from(["flip", "cut", "zero", "delete"]))
    def damage(self, seed: int, how: str) -> None:
        rng = random.Random(seed)
        files = sorted(file for file in self.folder.rglob("*") if file.is_file() and file.stat().st_size)
        if not files:
            return
        file = rng.choice(files)
        content = bytearray(file.read_bytes())
        if how == "flip":
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        file.write_bytes(b"" if how == "zero" else content[: len(content) // 2] if how == "cut" else content)
        if how == "delete":
            file.unlink()
        # with neither of them nobody can tell whose store it is
        known = [self.folder / "run" / "zarr.json", self.folder / "run.run" / "run.json"]
        self.lost |= file in known
        COUNTS["damages"] += 1

    @rule(seed=st.integers(0, 10**6))
    def litter(self, seed: int) -> None:
        """As a killed run leaves it. In a complete store there is none of ours, and what others put there is not touched."""
        root = self.folder / "run" / "zarr.json"
        if root.exists() and b'"completed": 1' in root.read_bytes():
            return
        folders = sorted(folder for folder in self.folder.rglob("*") if folder.is_dir())
        if folders:
            (random.Random(seed).choice(folders) / "7.0123.partial").write_bytes(b"half")

    @precondition(lambda self: (self.folder / "run" / "zarr.json").exists() and not self.lost)
    @rule()
    def another_request(self) -> None:
        before = tree(self.folder)
        code, _ = self.worlds.run(self.folder, n_beta=11.0)
        assert code == 3
        assert tree(self.folder) == before
        COUNTS["refused"] += 1

    def teardown(self) -> None:
        code, _ = self.worlds.run(self.folder)
        if code != 0:
            assert self.lost
            assert (self.folder / "run").exists()
        else:
            assert tree(self.folder / "run") == self.expected
        shutil.rmtree(self.folder)


@pytest.mark.parametrize("sequences", [pytest.param(20, id="some"), pytest.param(300, id="300", marks=pytest.mark.slow)])
def test_sequences(sequences, tmp_path):
    with Worlds() as worlds:
        code, operations = worlds.run(tmp_path)
        assert code == 0

        class Machine(Sequences):
            pass

        Machine.worlds, Machine.expected, Machine.operations = worlds, tree(tmp_path / "run"), operations
        case = Machine.TestCase
        case.settings = settings(
            max_examples=sequences, stateful_step_count=6, deadline=None, derandomize=True, database=None,
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        case().runTest()
    print(f"\n{COUNTS}, all equal in the end")
    assert min(COUNTS.values()) > 0, "a kind of event did not happen"
