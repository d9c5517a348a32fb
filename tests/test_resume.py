"""A run that was interrupted, damaged or is asked for more goes on, and gives the bytes of one that never stopped."""

import json
import os
import platform
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from cases import TinyLM, random_tokens
from crashes import tree
from safetensors.torch import load_file, save_file
from torch import nn

import devinterp
from devinterp.engine.stopping import stop_signals
from devinterp.engine.walker import Walker
from devinterp.errors import ChainFailed, DevinterpInputError, RunLocked, RunMismatchError
from devinterp.store import schema
from devinterp.store.durable import digest_of, read_record, write_record
from devinterp.store.folder import RunFolder
from devinterp.store.lock import STALE_SECONDS, only_writer

DATA = random_tokens(32)
SHORT = {"lr": 1e-3, "n_beta": 10.0, "localization": 5.0, "batch_size": 4, "num_draws": 7, "num_chains": 3,
         "num_burnin_steps": 2, "num_init_loss_batches": 2, "batches_per_draw": 1, "progress": False}  # fmt: skip


class WithBuffers(TinyLM):
    """Dropout, and statistics that move with every pass."""

    def __init__(self):
        super().__init__()
        self.norm, self.dropout = nn.BatchNorm1d(8), nn.Dropout(0.3)

    def forward(self, ids):
        hidden = torch.tanh(self.mix(self.embed(ids)))
        return self.out(self.dropout(self.norm(hidden.transpose(1, 2)).transpose(1, 2)))


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(schema, "MOST_DRAWS_PER_CHUNK", 3)
    monkeypatch.setattr(schema, "STEPS_PER_CHUNK", 4)


def run(path, model=None, **settings):
    return devinterp.sample(model or TinyLM(), DATA, {"code": DATA}, output_path=path, **(SHORT | settings))


@pytest.fixture
def stops(monkeypatch):
    """Ends the run in the midst of its n-th step, counted over all chains, and counts the steps that were taken."""

    class Stops:
        at, taken, chains = -1, 0, set()

    original = Walker.differentiate

    def differentiate(walker, t):
        Stops.taken += 1
        Stops.chains = Stops.chains | set(walker.chains)
        if Stops.taken == Stops.at:
            raise KeyboardInterrupt
        return original(walker, t)

    monkeypatch.setattr(Walker, "differentiate", differentiate)
    return Stops


def interrupted(stops, path, at, **how) -> None:
    stops.at, stops.taken = at, 0
    with pytest.raises(KeyboardInterrupt):
        run(path, **how)
    stops.at, stops.taken, stops.chains = -1, 0, set()


WAYS = {
    "sgld": {},
    "rmsprop": {"sampling_method": "rmsprop_sgld", "sampling_method_kwargs": {"bias_correction": True}},
    "Leimkuhler-Matthews": {"sampling_method": "leimkuhler_matthews", "init_noise": 0.01},
    "metric": {"sampling_method": "preconditioned_leimkuhler_matthews", "lr": 0.5},
    "thermostats": {"sampling_method": "sgnht"},
    "Adam": {"sampling_method": "adam_sgld"},
    "metrics": {"save_metrics": True, "bounding_box_size": 0.1},
    "accumulated": {"gradient_accumulation_steps": 2, "num_steps_bw_draws": 2},
    "batches of its own": {"match_sampling_input_ids_across_chains": False},
    "one matrix": {"param_masks": {"mix.weight": None}},
    "auto": {"lr": "auto", "sampling_method": "leimkuhler_matthews"},
    "vmap": {"chains_together": "vmap"},
    "one draw": {"num_draws": 1},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("share", [0.15, 0.5, 0.95])
def test_interrupted_in_the_midst_of_a_step(tmp_path, stops, way, share):
    how = WAYS[way] | {"checkpoint_every": 1e-9}
    run(tmp_path / "whole", **how)
    steps = stops.taken
    pilot = steps - 3 * 10 if way == "auto" else 0  # the step size that it found is stored before the chains start
    interrupted(stops, tmp_path / "run", pilot + max(1, round(share * (steps - pilot))), **how)
    run(tmp_path / "run", **how)
    assert tree(tmp_path / "run") == tree(tmp_path / "whole")
    left = steps - pilot - max(1, round(share * (steps - pilot))) + 1
    assert stops.taken <= left + 1, "steps that were committed were taken again"


@pytest.mark.filterwarnings("ignore:train_mode")
def test_dropout_and_moving_statistics(tmp_path, stops):
    how = {"train_mode": True, "checkpoint_every": 0}
    run(tmp_path / "whole", WithBuffers(), **how)
    interrupted(stops, tmp_path / "run", 14, model=WithBuffers(), **how)
    run(tmp_path / "run", WithBuffers(), **how)
    assert tree(tmp_path / "run") == tree(tmp_path / "whole")


def test_half_precision(tmp_path, stops):
    run(tmp_path / "whole", TinyLM().bfloat16())
    interrupted(stops, tmp_path / "run", 14, model=TinyLM().bfloat16(), checkpoint_every=0)
    run(tmp_path / "run", TinyLM().bfloat16())
    assert tree(tmp_path / "run") == tree(tmp_path / "whole")


def test_the_dead_stay_dead(tmp_path, stops, monkeypatch):
    """One of three chains in one vmap diverges, and the others are interrupted and go on."""
    step = Walker.step

    def poisoned(walker):
        if not torch.equal(walker.gradient[0], walker.gradient[-1]) and stops.taken == poisoned.at:
            walker.gradient[1] = float("nan")
        return step(walker)

    monkeypatch.setattr(Walker, "step", poisoned)
    trees = []
    for at in (-1, 8):
        path, how = tmp_path / str(at), {"chains_together": "vmap", "checkpoint_every": 1e-9}
        stops.taken, poisoned.at = 0, -1
        run(tmp_path / f"trial {at}", **how, num_draws=1)  # its steps before the chains start are those of every run
        before = stops.taken - 4
        poisoned.at, stops.at, stops.taken = before + 3, -1 if at < 0 else before + at, 0
        if at > 0:
            with pytest.raises(KeyboardInterrupt):
                run(path, **how)
            stops.at, stops.taken = -1, -100
        samples = run(path, **how)
        assert samples.chain_status.values.tolist() == [1, 2, 1]
        trees.append(tree(path))
    assert trees[0] == trees[1]


def test_names_in_a_record_stay_in_the_store(tmp_path):
    run(tmp_path / "run")
    (tmp_path / "theirs").write_text("years of work")
    part = RunFolder(tmp_path / "run").part(1)
    record = read_record(part.folder / "progress.json")
    write_record(part.folder / "progress.json", record | {"digests": record["digests"] | {"loss_code/../../theirs": "0"}})
    assert part.progress() is None
    run(tmp_path / "run")
    assert (tmp_path / "theirs").read_text() == "years of work"


def test_a_suite(tmp_path, stops):
    masks = {"full": None, "mix": {"mix.weight": None}, "out": {"out.weight": None, "out.bias": None}}

    def suite(name):
        devinterp.susceptibilities(TinyLM(), DATA, {"pile": DATA, "code": DATA}, masks, sampling_task="pile",
                                   output_path=tmp_path / name, checkpoint_every=1e-9, **SHORT)  # fmt: skip

    suite("whole")
    steps, stops.taken = stops.taken, 0
    for share in (0.2, 0.5, 0.8):
        stops.at, stops.taken, name = round(share * steps), 0, f"run{10 * share:.0f}"
        with pytest.raises(KeyboardInterrupt):
            suite(name)
        stops.at, stops.taken = -1, 0
        suite(name)
        assert stops.taken <= (1 - share) * steps + 3
        for restriction in masks:
            assert tree(tmp_path / f"{name}_{restriction}") == tree(tmp_path / f"whole_{restriction}")


def test_no_more_is_lost_than_since_the_last_commit(tmp_path, stops):
    """Nothing is committed before it is due; resume=False starts again."""
    interrupted(stops, tmp_path / "run", 28, checkpoint_every=1e6)
    run(tmp_path / "run")
    assert stops.taken == 3 * 10 - 2 * 10, "two chains had ended"
    interrupted(stops, tmp_path / "again", 28, checkpoint_every=0)
    run(tmp_path / "again", resume=False)
    assert stops.taken == 10
    interrupted(stops, tmp_path / "third", 28, checkpoint_every=0)
    run(tmp_path / "third")
    assert stops.taken < 10
    assert tree(tmp_path / "run") == tree(tmp_path / "again") == tree(tmp_path / "third")


@pytest.mark.parametrize("way", ["sequential", "vmap"])
@pytest.mark.parametrize("more", [{"num_draws": 12}, {"num_draws": 11}, {"num_chains": 5}, {"num_draws": 8, "num_chains": 4}])
def test_a_finished_run_is_extended(tmp_path, stops, way, more):
    if way == "vmap" and "num_chains" in more:
        pytest.skip("chains that were not there step together by themselves: equal to float tolerance only")
    run(tmp_path / "run", chains_together=way)
    first, before = tree(tmp_path / "run"), stops.taken
    run(tmp_path / "fresh", chains_together=way, **more)
    fresh, stops.taken = stops.taken - before, 0
    run(tmp_path / "run", chains_together=way, **more)
    assert stops.taken <= fresh - before + (1 if way == "vmap" else 3)
    longer = tree(tmp_path / "run")
    assert longer == tree(tmp_path / "fresh")
    assert devinterp.verify(tmp_path / "run").checked == len(longer), "every file has a digest"
    whole = [name for name in first if name.startswith(("loss_code/c", "sampling_loss/c")) and name.split("/")[3] in "01"]
    assert len(whole) == 2 * 2 * 3
    assert all(longer[name] == first[name] for name in whole)
    with pytest.raises(RunMismatchError, match="is not shortened"):
        run(tmp_path / "run", chains_together=way)


def test_an_interrupted_extension_goes_on(tmp_path, stops):
    run(tmp_path / "fresh", num_draws=12)
    for at in range(1, 16, 3):
        path = tmp_path / str(at)
        run(path)
        interrupted(stops, path, at, num_draws=12, checkpoint_every=0)
        with pytest.raises(RunMismatchError, match="is not shortened"):
            run(path)
        run(path, num_draws=12)
        assert tree(path) == tree(tmp_path / "fresh")


def test_without_its_last_state_a_run_is_extended_from_its_beginning(tmp_path, stops, monkeypatch):
    monkeypatch.setattr("devinterp.store.commits.FINAL_STATE_BYTES", 0)
    run(tmp_path / "run")
    assert not list((tmp_path / "run.run").rglob("state-*"))
    run(tmp_path / "fresh", num_draws=12)
    run(tmp_path / "run", num_draws=12)
    assert tree(tmp_path / "run") == tree(tmp_path / "fresh")


@pytest.mark.parametrize("file", ["loss_code/c/1/0/0/0", "chain_status/c/1", "step_loss/c/1/2"])
@pytest.mark.parametrize("how", ["flipped", "cut", "missing"])
def test_a_damaged_chunk_is_named_and_its_chain_computed_again(tmp_path, stops, file, how, caplog):
    run(tmp_path / "run")
    expected, stops.chains = tree(tmp_path / "run"), set()
    assert not devinterp.verify(tmp_path / "run").damaged
    damaged = tmp_path / "run" / file
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-3] if how == "cut" else content[:9] + bytes([content[9] ^ 4]) + content[10:])
    if how == "missing":
        damaged.unlink()
    assert devinterp.verify(tmp_path / "run").damaged == {file: "chains [1]"}
    run(tmp_path / "run")
    assert file in caplog.text
    assert stops.chains == {1}
    assert tree(tmp_path / "run") == expected
    assert not devinterp.verify(tmp_path / "run").damaged


@pytest.mark.parametrize(
    "file", ["zarr.json", "loss_code/zarr.json", "input_ids_code/c/0/0", "draw/c/0", "baseline_loss/c/1/0/0"]
)
def test_what_chains_share_is_mended_without_them(tmp_path, stops, file):
    run(tmp_path / "run")
    expected, stops.taken = tree(tmp_path / "run"), 0
    (tmp_path / "run" / file).write_bytes(b"{")
    assert file in devinterp.verify(tmp_path / "run").damaged
    run(tmp_path / "run")
    assert not stops.taken
    assert tree(tmp_path / "run") == expected


def test_verify_without_the_folder_of_the_run(tmp_path):
    run(tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "moved")
    assert not devinterp.verify(tmp_path / "moved").damaged
    chunk = tmp_path / "moved" / "loss_code/c/2/1/0/0"
    chunk.write_bytes(chunk.read_bytes()[:-1] + b"?")
    (tmp_path / "moved" / "sampling_loss/c/0/0/0/0").unlink()
    found = devinterp.verify(tmp_path / "moved")
    assert found.damaged == {"loss_code/c/2/1/0/0": "chains [2]", "sampling_loss/c/0/0/0/0": "chains [0]"}
    old = devinterp.verify(Path(__file__).parent / "data" / "store_2_0_1")
    assert old.without_digests
    assert not old.damaged
    assert old.checked > 5


def test_a_state_that_is_not_one_of_these_chains_is_not_used(tmp_path, stops):
    interrupted(stops, tmp_path / "run", 28, checkpoint_every=0)
    part = RunFolder(tmp_path / "run").part(2)
    record = read_record(part.folder / "progress.json")
    state = load_file(part.folder / record["state"])
    save_file(state | {"weights": state["weights"][:, :5].contiguous()}, part.folder / record["state"])
    write_record(part.folder / "progress.json", record | {"state_digest": digest_of(part.folder / record["state"])})
    with pytest.raises(ChainFailed, match="not that of such chains"):
        run(tmp_path / "run")
    run(tmp_path / "run")
    run(tmp_path / "whole")
    assert tree(tmp_path / "run") == tree(tmp_path / "whole")


def test_a_folder_of_somebody_else_is_left_alone(tmp_path):
    (tmp_path / "run.run").mkdir()
    (tmp_path / "run.run" / "mine.txt").write_text("mine")
    with pytest.raises(DevinterpInputError, match=r"mine\.txt"):
        run(tmp_path / "run")
    assert [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")] == ["run.run", "run.run/mine.txt"]


def test_a_temporary_run_commits_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    run(None, checkpoint_every=0)
    assert not [p for p in tmp_path.rglob("*") if p.suffix == ".run" or p.name == "progress.json"]


# -- one writer --


def lease(folder: Path, **changed: object) -> None:
    now = time.time()
    known = {"host": "elsewhere", "pid": 4711, "boot": "x", "since": now - 60, "seen": now} | changed
    folder.mkdir(exist_ok=True)
    (folder / "lease.json").write_text(json.dumps(known))


def test_a_second_writer_is_refused_and_told_who_the_first_is(tmp_path):
    run(tmp_path / "run")
    with only_writer(tmp_path / "run.run"):
        began = time.monotonic()
        with pytest.raises(RunLocked, match=f"process {os.getpid()} on '{platform.node()}', for 0 s"):
            run(tmp_path / "run", num_draws=9)
        assert time.monotonic() - began < 1
        run(tmp_path / "run")  # to read a finished run nobody is asked
    run(tmp_path / "run", num_draws=9)


def test_another_machines_lease_holds_while_it_is_renewed(tmp_path):
    lease(tmp_path / "run.run")
    with pytest.raises(RunLocked, match="process 4711 on 'elsewhere', for 60 s"):
        run(tmp_path / "run")
    lease(tmp_path / "run.run", seen=time.time() - STALE_SECONDS - 1)
    run(tmp_path / "run")


@pytest.mark.parametrize("content", [b"", b"[" * 100_000, b"x" * 5000, b'{"host": 3}', b'{"pid": "a"}'])
def test_a_dead_owner_or_a_lease_that_is_none_is_taken_over(tmp_path, content):
    lease(tmp_path / "run.run", host=platform.node())
    run(tmp_path / "run")
    lease(tmp_path / "other.run")
    (tmp_path / "other.run" / "lease.json").write_bytes(content)
    run(tmp_path / "other")


SCRIPT = """
    import sys, torch
    sys.path[:0] = {tests!r}
    import devinterp
    from test_resume import *
    schema.MOST_DRAWS_PER_CHUNK, schema.STEPS_PER_CHUNK = 3, 4
    torch.set_num_threads(1)
    if __name__ == "__main__":
        how = {{"num_draws": {draws}, "chains_together": {way!r}}}
        print("starting", flush=True)
        run({path!r}, **how)
        print("finished", flush=True)
"""


def script(tmp_path: Path, way: str, path: Path, draws: int = 4000) -> Path:
    name = tmp_path / f"{path.name}.py"
    tests = [str(Path(__file__).parent), *(p for p in sys.path if p.endswith("src"))]
    name.write_text(textwrap.dedent(SCRIPT).format(tests=tests, draws=draws, way=way, path=str(path)))
    return name


def started(name: Path) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, name], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def begun(folder: Path) -> bool:
    return any(p.is_dir() for p in folder.glob("loss_code/c/*"))


@pytest.mark.parametrize(("way", "number"), [("sequential", signal.SIGINT), ("processes", signal.SIGTERM)])
def test_signals_commit_and_end_with_the_usual_codes(tmp_path, way, number):
    path = tmp_path / "run"
    process = started(script(tmp_path, way, path, draws=20000))
    while not begun(path) and process.poll() is None:
        time.sleep(0.05)
    time.sleep(0.3)
    began = time.monotonic()
    process.send_signal(number)
    try:
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert time.monotonic() - began < 30
    # a KeyboardInterrupt that nobody catches ends Python by the signal itself, which a shell shows as 130
    assert process.returncode == (-signal.SIGINT if number == signal.SIGINT else 143)
    assert "the same call goes on from there" in errors
    records = [read_record(p) for p in (tmp_path / "run.run").glob("chain-*/progress.json")]
    assert any(record["steps_taken"] > 0 and record["state"] for record in records)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_that_are_ignored_stay_ignored(number):
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with stop_signals() as stop:
            os.kill(os.getpid(), number)
            time.sleep(0.01)
        assert stop.signal is None
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize(
    ("times", "count"), [pytest.param(1, 3, id="once"), pytest.param(10, 6, id="ten times", marks=pytest.mark.slow)]
)
def test_of_processes_that_start_at_once_one_writes(tmp_path, times, count):
    refused = []
    for number in range(times):
        path = tmp_path / f"run{number}"
        processes = [started(script(tmp_path, "sequential", path, draws=1500)) for _ in range(count)]
        ended = [(*process.communicate(timeout=240), process.returncode) for process in processes]
        errors = [errors for _, errors, code in ended if code]
        assert len(errors) < count
        assert all("is being written by process" in told for told in errors), errors
        assert not devinterp.verify(path).damaged
        refused += errors
    print(f"\n{times} times {count} processes at once: {len(refused)} refused, each store whole")


def test_workers_of_a_killed_process_do_not_write_into_the_next_ones_run(tmp_path):
    path = tmp_path / "run"
    process = started(script(tmp_path, "processes", path, draws=600))
    while not begun(path) and process.poll() is None:
        time.sleep(0.02)
    process.kill()
    process.communicate()
    for name in ("again", "whole"):
        target = path if name == "again" else tmp_path / "whole"
        process = started(script(tmp_path, "processes", target, draws=600))
        _, errors = process.communicate(timeout=120)
        assert not process.returncode, errors
    assert tree(path) == tree(tmp_path / "whole")
