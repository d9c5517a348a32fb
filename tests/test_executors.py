"""Runs handed to the workers of an executor, or to one process per device: the bytes are those of a run here; workers may die."""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import TinyLM, random_tokens
from torch import nn
from zoo import tiny_model

import devinterp
from devinterp.engine.board import Board, Place
from devinterp.engine.cargo import ALIGNMENT, Sender
from devinterp.engine.checkpoint import Checkpoint
from devinterp.engine.placement import threads
from devinterp.errors import ChainFailed, DevinterpInputError, StorageError
from devinterp.store.folder import RunFolder
from devinterp.store.reader import open_store

SHORT = {"lr": "auto", "n_beta": 10.0, "localization": 5.0, "batch_size": 4, "num_draws": 5, "num_chains": 3, "num_init_loss_batches": 1,
         "sampling_method": "leimkuhler_matthews", "batches_per_draw": 2, "progress": False}  # fmt: skip
RESTRICTIONS = {"full": None} | {
    name: name for name in ("l0h0", "l0h1", "l1h0", "l1h1", "l0 mlp", "l1 mlp", "l0 attn", "embed")
}
CPU = torch.device("cpu")
SUITE = SHORT | {"lr": 1e-3, "num_draws": 3, "num_chains": 2, "batches_per_draw": 1}


def files(store: Path) -> dict[str, bytes]:
    """Everything but the metadata, which tell where the chains ran."""
    return {
        str(p.relative_to(store)): p.read_bytes() for p in sorted(store.rglob("*")) if p.is_file() and p != store / "zarr.json"
    }


def other_files(one: Path, other: Path) -> list[str]:
    a, b = files(one), files(other)
    return sorted(name for name in {*a, *b} if a.get(name) != b.get(name))


@contextmanager
def dask_workers(count=2, **settings):
    distributed = pytest.importorskip("distributed", reason="pip install devinterp[dask]")
    import dask

    with (
        dask.config.set(settings),
        distributed.LocalCluster(n_workers=count, threads_per_worker=1, dashboard_address=None, silence_logs=50) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield client


@contextmanager
def executor_of(kind):
    if kind == "dask":
        with dask_workers() as client:
            yield client.get_executor()
    elif kind == "spawn":
        with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
            yield pool
    else:
        with ThreadPoolExecutor(2) as pool:
            yield pool


@pytest.fixture(scope="module")
def model():
    return tiny_model("gpt_neox", "mha")


@pytest.fixture(scope="module")
def data():
    return random_tokens(16, 11, 40)


@pytest.fixture(scope="module")
def here(model, data, tmp_path_factory):
    """A run and a suite of nine, one chain after another in this process."""
    path = tmp_path_factory.mktemp("here")
    with threads(1):
        devinterp.sample(model, data, {"x": data}, output_path=path / "run", chains_together="sequential", **SHORT)
        suite = devinterp.susceptibilities(model, data, {"pile": data, "x": data}, RESTRICTIONS, sampling_task="pile",
                                           output_path=path / "suite", chains_together="sequential", **SUITE)  # fmt: skip
    return path, suite


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("kind", ["dask", "spawn", "threads"])
def test_a_run_and_a_suite_on_an_executor_are_those_of_this_process(kind, model, data, here, tmp_path):
    path, suite = here
    with executor_of(kind) as executor, threads(1):
        devinterp.sample(model, data, {"x": data}, output_path=tmp_path / "run", executor=executor, **SHORT)
        away = devinterp.susceptibilities(model, data, {"pile": data, "x": data}, RESTRICTIONS, sampling_task="pile",
                                          output_path=tmp_path / "suite", executor=executor, **SUITE)  # fmt: skip
        again = devinterp.sample(model, data, {"x": data}, output_path=tmp_path / "run", executor=executor, **SHORT)
    assert other_files(path / "run", tmp_path / "run") == []
    for name in RESTRICTIONS:
        assert other_files(path / f"suite_{name}", tmp_path / f"suite_{name}") == [], name
    assert not away.attrs["failed"]
    np.testing.assert_array_equal(away["susceptibilities"].sus, suite["susceptibilities"].sus)
    assert again.attrs["metadata"]["computed"]["threads"] == 1
    left = {p.name for run in tmp_path.glob("*.run") for p in run.iterdir()}
    assert left <= {"baseline", "lock", "run.json"} | {f"chain-{i:04d}" for i in range(3)}, "nothing of what was sent is left"


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_sweep_on_dask_is_that_of_this_process(data, tmp_path):
    checkpoints = {}
    for seed in (1, 2):
        tiny_model("gpt_neox", "mha", seed=seed).save_pretrained(tmp_path / str(seed))
        checkpoints[f"step{seed}"] = tmp_path / str(seed)
    checkpoints["step3"] = partial(tiny_model, "gpt_neox", "mha", seed=3)
    arguments = SUITE | {"weight_restrictions": {name: RESTRICTIONS[name] for name in ("full", "l0h0", "l1 mlp")}}
    arguments |= {"lr": "auto", "sampling_task": "x"}
    with threads(1):
        devinterp.sweep(
            checkpoints, data, {"x": data}, output_path=tmp_path / "here", chains_together="sequential", **arguments
        )
        with dask_workers() as client:
            executor = client.get_executor()
            there = devinterp.sweep(
                checkpoints, data, {"x": data}, output_path=tmp_path / "there", executor=executor, **arguments
            )
    assert not there.attrs["failed"]
    stores = sorted(path.name for path in (tmp_path / "here").glob("*.zarr"))
    assert len(stores) == 9
    for store in stores:
        assert other_files(tmp_path / "here" / store, tmp_path / "there" / store) == [], store


def test_one_process_per_device(model, data, here, tmp_path):
    with threads(1):
        devinterp.sample(model, data, {"x": data}, output_path=tmp_path / "run", devices=["cpu", "cpu"],
                         chains_together="sequential", **SHORT)  # fmt: skip
    assert other_files(here[0] / "run", tmp_path / "run") == []


def test_a_run_of_here_goes_on_there_and_the_other_way_round(model, data, here, tmp_path):
    with ThreadPoolExecutor(1) as pool, threads(1):
        for name, (first, second) in {"there": ({}, {"executor": pool}), "here": ({"executor": pool}, {})}.items():
            for draws, where in ((2, first), (5, second)):
                devinterp.sample(model, data, {"x": data}, output_path=tmp_path / name, chains_together="sequential",
                                 **(SHORT | {"num_draws": draws}), **where)  # fmt: skip
            assert other_files(here[0] / "run", tmp_path / name) == []


# -- what travels --


class Odd(nn.Module):
    """Tied weights, a shared module, buffers of both kinds, a tensor of its own, half precision."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.out = nn.Linear(4, 7, bias=False)
        self.out.weight = self.embed.weight
        self.again = self.embed
        self.low = nn.Linear(3, 3).half().requires_grad_(False)
        self.register_buffer("kept", torch.arange(5))
        self.register_buffer("passing", torch.tensor(2.5), persistent=False)
        self.own = torch.arange(3.0)
        self.train()


def test_a_model_is_put_together_again_as_it_was(tmp_path):
    model = Odd()
    checkpoint = Checkpoint(model, None, CPU)
    large, small = np.arange(4000), np.arange(3)
    content = {"model": (checkpoint, model.low), "arrays": [large, small, large], "tensor": model.own, "text": "as it is"}
    with Sender(tmp_path, checkpoint) as sender:
        message = sender.message(content)
    assert all(p.is_meta for p in message.model.model.parameters()), "weights travel in the file alone"
    assert sum(1 for p in model.parameters() if p.is_meta) == 0, "the caller's model is left alone"
    found, there = message.opened("cpu")
    other = there.model
    assert other is not model
    assert other.out.weight is other.embed.weight
    assert other.again is other.embed
    assert (other.low.weight.dtype, other.low.weight.requires_grad, other.training) == (torch.float16, False, True)
    for name, tensor in [*model.named_parameters(), *model.named_buffers(), ("own", model.own)]:
        there_too = other.get_parameter(name) if name in dict(model.named_parameters()) else getattr(other, name)
        assert torch.equal(tensor, there_too), name
    assert "passing" not in other.state_dict()
    assert found["model"] == (there, other.low)
    np.testing.assert_array_equal(found["arrays"][0], large)
    assert found["text"] == "as it is"
    assert torch.equal(found["tensor"], model.own)
    assert all(p.data_ptr() % ALIGNMENT == 0 for p in other.parameters()), "as torch's own memory is"
    assert (tmp_path / "tensors").stat().st_size < large.nbytes + 3000, "what is held twice is sent once"


def test_weights_are_mapped_into_memory(tmp_path):
    model = nn.Linear(2000, 2000)
    with Sender(tmp_path, Checkpoint(model, None, CPU)) as sender:
        message = sender.message(None)
    _, there = message.opened("cpu")
    mapped = [line for line in Path("/proc/self/maps").read_text().split("\n") if str(tmp_path / "tensors") in line]
    assert mapped
    with torch.no_grad():
        there.model.weight += 1  # private: neither the file nor others see it
    assert torch.equal(message.opened("cpu")[1].model.weight, model.weight)


def test_another_checkpoint_than_the_callers_is_refused(tmp_path):
    class There:
        def load(self):
            return TinyLM(seed=1)

    with Sender(tmp_path, Checkpoint(TinyLM(), None, CPU), There()) as sender:
        message = sender.message(None)
    assert (tmp_path / "tensors").stat().st_size == 0, "loaded there, not sent"
    with pytest.raises(devinterp.errors.DevinterpError, match="other weights than those of the run"):
        message.opened("cpu")


def test_a_worker_with_another_kind_of_device_is_refused(tmp_path):
    with Sender(tmp_path, Checkpoint(TinyLM(), None, CPU), device_type="cuda") as sender:
        message = sender.message(None)
    with pytest.raises(devinterp.errors.DevinterpError, match="would compute on cpu, the run is one of 'cuda' devices"):
        message.opened("cpu")


def test_a_worker_that_does_not_see_the_files_says_so(tmp_path):
    with Sender(tmp_path, Checkpoint(TinyLM(), None, CPU)) as sender:
        message = sender.message(None)
    (tmp_path / "tensors").unlink()
    with pytest.raises(StorageError, match="need the file system of output_path"):
        message.opened("cpu")


def test_a_dataset_in_memory_is_sent_once_and_without_a_bar_of_its_own(tmp_path, capsys):
    rows = random_tokens(400, 11, 40)
    with Sender(tmp_path, Checkpoint(TinyLM(), None, CPU)) as sender:
        messages = [sender.message({"rows": rows}) for _ in range(3)]
    assert len(list(tmp_path.glob("dataset-*"))) == 1
    assert capsys.readouterr().err == ""
    found, _ = messages[2].opened("cpu")
    assert found["rows"][:]["input_ids"] == rows[:]["input_ids"]


def test_the_last_who_takes_a_task_has_it(tmp_path):
    board = Board(tmp_path, 2)
    first = Place(tmp_path, 0)
    assert first.add(3)
    assert first.look()
    assert (board.total(), board.has_begun(0), board.has_begun(1)) == (3, True, False)
    second = Place(tmp_path, 0)
    assert not first.look(), "given up too early"
    second.add(2)
    assert second.look()
    assert board.total() == 5
    board.stop()
    assert not second.look()


# -- workers that die --


def _killed_run(client, path: Path, kills: int, seed: int, arguments) -> int:
    """Kills workers at random moments while chains are under way; returns how many."""
    rng, done, killed, log = np.random.default_rng(seed), threading.Event(), [], arguments["model"].log

    def kill():
        seen = log.stat().st_size
        while not done.wait(rng.uniform(0.1, 1.0)):
            client.cluster.scale(2)  # a local cluster gives up workers that die while they start
            if len(killed) == kills or log.stat().st_size < seen + 400:  # the last has only just been replaced
                continue
            try:
                os.kill(int(rng.choice(list(client.run(os.getpid).values()))), signal.SIGKILL)
                killed.append(time.monotonic())
            except Exception:  # between a death and the next worker there may be none
                continue
            seen = log.stat().st_size

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        devinterp.sample(**arguments, output_path=path, executor=client.get_executor())
    finally:
        done.set()
        killer.join()
    return len(killed)


LONG = {"lr": 1e-3, "n_beta": 10.0, "localization": 5.0, "batch_size": 4, "num_chains": 4, "num_init_loss_batches": 1, "checkpoint_every": 0.0}  # fmt: skip


class Slow(TinyLM):
    """Two milliseconds a pass, each of which leaves a byte in a file."""

    def __init__(self, log: Path):
        super().__init__()
        self.log = log

    def forward(self, ids):
        time.sleep(0.002)
        descriptor = os.open(self.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(descriptor, b".")
        os.close(descriptor)
        return super().forward(ids)


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize(
    ("runs", "kills", "draws"), [(1, 2, 600), pytest.param(4, 8, 1500, marks=pytest.mark.slow)], ids=["short", "long"]
)
def test_workers_killed_at_random_moments_change_no_byte(runs, kills, draws, tmp_path):
    data, log = random_tokens(), tmp_path / "passes"
    arguments = {"model": Slow(log), "dataset": data, "observables": {"x": data}, "num_draws": draws, "batches_per_draw": 1,
                 "progress": False, **LONG}  # fmt: skip
    with threads(1):
        devinterp.sample(**arguments, output_path=tmp_path / "whole", chains_together="sequential")
    needed, chunk = log.stat().st_size, open_store(tmp_path / "whole").sampling_loss.encoding["chunks"][1]
    total = 0
    with dask_workers(2, **{"distributed.scheduler.allowed-failures": 1000}) as client:
        for number in range(runs):
            before, path = log.stat().st_size, tmp_path / f"run{number}"
            killed = _killed_run(client, path, kills, number, arguments)
            again = log.stat().st_size - before - needed
            print(f"run {number}: {killed} workers killed, {again} of {needed} passes made twice, chunks of {chunk} draws")
            assert other_files(path, tmp_path / "whole") == []
            # two passes a step; of the chain under way, what was not in a whole chunk; a plan that was begun is made again
            assert again <= killed * (2 * (chunk + 2) + 50)
            total += killed
    assert total >= (30 if runs > 1 else 1)


class Deadly(TinyLM):
    """Kills the worker in which a chain's noise has brought the biases to these values."""

    def __init__(self, values: torch.Tensor):
        super().__init__()
        self.values, self.home = values, os.getpid()

    def forward(self, ids):
        if os.getpid() != self.home and torch.allclose(self.out.bias, self.values, rtol=0, atol=1e-6):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(ids)


def _biases_of_chain_1(data, masks) -> torch.Tensor:
    from cases import plan_of

    from devinterp.engine.walker import Walker

    walker = Walker(
        plan_of(TinyLM(), data, masks=masks, **{name: LONG[name] for name in ("lr", "n_beta", "localization", "batch_size")}), 1
    )
    walker.differentiate(0)
    walker.step()
    return walker.weights[0]


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_chain_that_kills_every_worker_ends_as_failed_and_the_others_finish(tmp_path):
    data, masks = random_tokens(), {"out.bias": None}
    arguments = {"param_masks": masks, "num_draws": 5, "progress": False, **LONG}
    deadly = Deadly(_biases_of_chain_1(data, masks))
    few = {"distributed.scheduler.allowed-failures": 1}
    with dask_workers(2, **few) as client, pytest.raises(ChainFailed, match="its worker process died.*KilledWorker"):
        devinterp.sample(deadly, data, {}, output_path=tmp_path / "run", executor=client.get_executor(), **arguments)
    assert open_store(tmp_path / "run").chain_status.values.tolist() == [1, 3, 1, 1]


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_broken_pool_costs_nothing_that_was_committed(tmp_path):
    data, masks = random_tokens(), {"out.bias": None}
    arguments = {"param_masks": masks, "num_draws": 5, "progress": False, **LONG}
    with (
        ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool,
        pytest.raises(ChainFailed, match="worker process died"),
    ):
        devinterp.sample(
            Deadly(_biases_of_chain_1(data, masks)), data, {}, output_path=tmp_path / "run", executor=pool, **arguments
        )
    assert open_store(tmp_path / "run").chain_status.values.tolist() == [1, 3, 3, 3], "that pool is broken for good"
    # a model that kills nobody, with the same architecture and weights: another process is its home
    harmless = Deadly(torch.full((11,), 1e9))
    with pytest.raises(devinterp.errors.RunMismatchError, match="architecture"):
        devinterp.sample(harmless, data, {}, output_path=tmp_path / "run", **arguments)


SCRIPT = """
import os, sys, torch, numpy as np
from datasets import Dataset
from torch import nn
import devinterp

print("script", flush=True)

class Mine(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Embedding(11, 4), nn.Linear(4, 11)
    def forward(self, ids):
        return self.out(self.embed(ids))

def my_loss(model, ids):
    return nn.functional.cross_entropy(model(ids)[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")

data = Dataset.from_dict({"input_ids": np.random.default_rng(0).integers(0, 11, (32, 6)).tolist()})
arguments = dict(lr=1e-3, n_beta=5.0, num_chains=2, num_draws=3, batch_size=4, localization=1.0, loss_fn=my_loss,
                 num_init_loss_batches=1, progress=False)
"""
HERE = 'samples = devinterp.sample(Mine(), data, {}, chains_together="processes", **arguments)\n'
DEVICES = 'samples = devinterp.sample(Mine(), data, {}, devices=["cpu", "cpu"], **arguments)\n'
ELSEWHERE = """
import subprocess, time
from distributed import Client
scheduler = subprocess.Popen([sys.executable, "-m", "distributed.cli.dask_scheduler", "--port", "0", "--no-dashboard", "--scheduler-file", "s.json"])
worker = subprocess.Popen([sys.executable, "-m", "distributed.cli.dask_worker", "--scheduler-file", "s.json", "--nthreads", "1", "--no-dashboard"])
try:
    with Client(scheduler_file="s.json") as client:
        samples = devinterp.sample(Mine(), data, {}, executor=client.get_executor(), **arguments)
finally:
    worker.terminate(); scheduler.terminate()
"""
END = "print(samples.chain_status.values.tolist(), bool(np.isfinite(samples.sampling_loss).all()), flush=True)\n"


@pytest.mark.parametrize("how", [HERE, DEVICES, ELSEWHERE], ids=["processes", "devices", "workers started elsewhere"])
def test_a_script_is_not_run_again_and_its_classes_are_known(how, tmp_path):
    """A script without a main guard."""
    if "distributed" in how:
        pytest.importorskip("distributed", reason="pip install devinterp[dask]")
    (tmp_path / "script.py").write_text(SCRIPT + how + END)
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=180)
    lines = done.stdout.strip().split("\n")
    assert lines == ["script", "[1, 1] True"], done.stderr


DRIVER = """
import sys
sys.path[:0] = sys.argv[2:]
from test_executors import *
from cases import random_tokens

if __name__ == "__main__":
    data = random_tokens()
    with dask_workers() as client:
        devinterp.sample(Slow(Path(sys.argv[1]).parent / "passes"), data, {"x": data}, num_draws=400, batches_per_draw=1,
                         progress=False, output_path=sys.argv[1],
                         executor=client.get_executor(), **LONG)
"""


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_caller_that_dies_or_is_stopped_loses_nothing_that_was_committed(how, tmp_path):
    pytest.importorskip("distributed", reason="pip install devinterp[dask]")
    data, out = random_tokens(), tmp_path / "run"
    arguments = {"num_draws": 400, "batches_per_draw": 1, "progress": False, **LONG}
    with threads(1):
        devinterp.sample(
            Slow(tmp_path / "passes"),
            data,
            {"x": data},
            output_path=tmp_path / "whole",
            chains_together="sequential",
            **arguments,
        )
    (tmp_path / "driver.py").write_text(DRIVER)
    driver = subprocess.Popen([sys.executable, tmp_path / "driver.py", out, *sys.path], stderr=subprocess.PIPE, text=True)
    part = RunFolder(out).part(0)
    until = time.monotonic() + 120
    while (
        time.monotonic() < until and driver.poll() is None and ((part.progress() is None) or part.progress().steps_taken < 100)
    ):
        time.sleep(0.05)
    driver.send_signal(how)
    _, said = driver.communicate(timeout=60)
    assert part.progress() is not None, said
    taken = part.progress().steps_taken
    assert taken > 0, said
    if how == signal.SIGTERM:
        assert "stopped by SIGTERM" in said
    with threads(1):
        devinterp.sample(Slow(tmp_path / "passes"), data, {"x": data}, output_path=out, **arguments)
    assert other_files(out, tmp_path / "whole") == []
    assert not RunFolder(out).away.exists(), "what a dead caller had sent is cleared"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"executor": "dask"}, "executor.*concurrent.futures.Executor or None"),
        ({"devices": []}, "devices.*a list of devices"),
        ({"devices": "cpu"}, "devices.*a list of devices"),
        ({"devices": ["cpu", "nowhere"]}, "devices.*nowhere"),
        ({"devices": ["cpu"], "device": "cpu"}, "device.*None with devices"),
    ],
)
def test_wrong_places_are_refused(settings, message, refused):
    refused(message, **settings)


def test_devices_and_an_executor_are_refused(refused):
    with ThreadPoolExecutor(1) as pool:
        refused("devices.*None with an executor", executor=pool, devices=["cpu"])


def test_what_a_worker_finds_wrong_is_said_before_a_file_is_made(tmp_path):
    with ThreadPoolExecutor(1) as pool, pytest.raises(DevinterpInputError, match="losses of shape"):
        devinterp.sample(TinyLM(), random_tokens(), {}, loss_fn=lambda model, ids: model(ids).sum(), output_path=tmp_path / "run",
                         executor=pool, **SHORT)  # fmt: skip
    assert not list(tmp_path.iterdir())
    with ThreadPoolExecutor(1) as pool, pytest.raises(DevinterpInputError, match="nowhere"):
        devinterp.sample(TinyLM(), random_tokens(), {}, device="nowhere", output_path=tmp_path / "run", executor=pool, **SHORT)
    assert not list(tmp_path.iterdir())
