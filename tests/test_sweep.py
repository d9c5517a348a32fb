"""Sweeps: each run is what `sample` alone makes of its checkpoint, whatever becomes of the others."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from cases import GOOD, TinyLM, random_tokens, rows
from crashes import tree as files_of
from test_origin import neox
from torch import nn

import devinterp
from devinterp.engine.origin import Pretrained
from devinterp.engine.placement import threads
from devinterp.engine.progress import Part, Progress
from devinterp.errors import (
    ChainsUnusable,
    DevinterpInputError,
    InputTypeError,
    InputValueError,
    RunMismatchError,
    StoreError,
)
from devinterp.slt.sweep_forecast import forecast
from devinterp.slt.sweep_study import Study
from devinterp.slt.sweeps import carry_out
from devinterp.store.durable import write_record
from devinterp.store.samples import root_of
from devinterp.store.sweeps import RECORD, Sweep, check_names, safe_name, step_of

DATA = random_tokens()
OBSERVABLES = {"pile": (random_tokens(seed=1), 1), "code": (random_tokens(seed=2), 1)}
SETTINGS = GOOD | {"num_draws": 6, "lr": "auto", "sampling_method": "leimkuhler_matthews"}
RESTRICTIONS = {"full": None, "mix": "mix.weight", "out": "out.weight"}
CHECKPOINTS = {f"step{seed}": partial(TinyLM, seed=seed) for seed in (1, 2, 10)}
SUITE = SETTINGS | {"weight_restrictions": RESTRICTIONS, "sampling_task": "pile"}


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("sweep") / "plain"
    devinterp.sweep(CHECKPOINTS, DATA, OBSERVABLES, output_path=path, **SETTINGS)
    return path


@pytest.fixture(scope="module")
def suite(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("sweep") / "suite"
    devinterp.sweep(CHECKPOINTS, DATA, OBSERVABLES, output_path=path, **SUITE)
    return path


def test_each_run_is_what_sample_alone_makes(plain):
    tree = devinterp.open_sweep(plain)
    assert tree.checkpoint.values.tolist() == list(CHECKPOINTS)
    assert tree.step.values.tolist() == [1, 2, 10]
    llc, verdicts = devinterp.compute_llc(tree, per="sequence"), devinterp.diagnose(tree)
    bif = devinterp.compute_bif(tree, correlation_method="sequence", progress=False)
    for name, make in CHECKPOINTS.items():
        alone = devinterp.sample(make(), DATA, OBSERVABLES, **SETTINGS)
        xr.testing.assert_equal(tree[name].to_dataset(inherit=False), alone.to_dataset())
        xr.testing.assert_equal(xr.open_dataset(plain / f"{name}.zarr", engine="zarr", consolidated=False), alone.to_dataset())
        one = llc.sel(checkpoint=name).drop_vars(["checkpoint", "step", "lr"])
        xr.testing.assert_allclose(one, devinterp.compute_llc(alone, per="sequence"))
        assert float(llc.lr.sel(checkpoint=name)) == alone.attrs["metadata"]["step_size"]["lr"]
        of_alone = devinterp.diagnose(alone)
        assert verdicts.sel(checkpoint=name).verdict.values.tolist() == of_alone.verdict.values.tolist()
        assert verdicts.attrs["sentences"][name] == of_alone.attrs["sentences"]
        influences = devinterp.compute_bif(alone, correlation_method="sequence", progress=False)
        np.testing.assert_array_equal(bif.influences.sel(checkpoint=name), influences.influences)
        np.testing.assert_array_equal(bif.input_ids, influences.input_ids)
    assert len({float(lr) for lr in llc.lr}) == 3, "each checkpoint has chosen its own step"
    xr.testing.assert_identical(llc, devinterp.compute_llc(plain, per="sequence"))
    text = devinterp.describe(verdicts)
    assert [line for line in text.split("\n") if not line.startswith(" ")] == list(CHECKPOINTS)


def test_restrictions_are_suites_of_each_checkpoint(suite, tmp_path):
    tree = devinterp.open_sweep(suite)
    assert sorted(tree["step2"].children) == ["full", "mix", "out"]
    found = devinterp.compute_susceptibilities(tree)
    llc = devinterp.compute_llc(tree)
    assert llc.llc_mean.dims == ("checkpoint", "restriction")
    assert llc.restriction.values.tolist() == ["full", "mix", "out"]
    for name, make in CHECKPOINTS.items():
        alone = devinterp.susceptibilities(
            make(), DATA, OBSERVABLES, RESTRICTIONS, sampling_task="pile", output_path=tmp_path / name, **SETTINGS
        )
        for part in ("sus", "sus_sem"):
            theirs = alone["susceptibilities"][part]
            np.testing.assert_array_equal(found["susceptibilities"][part].sel(checkpoint=name), theirs)
        for restriction in RESTRICTIONS:
            one = devinterp.compute_llc(tmp_path / f"{name}_{restriction}")
            assert float(llc.llc_mean.sel(checkpoint=name, restriction=restriction)) == float(one.llc_mean)
    np.testing.assert_array_equal(found["context"].input_ids, alone["context"].input_ids)
    assert found["susceptibilities"].sus.dims == ("checkpoint", "sus_flat", "wr")
    assert len(devinterp.describe(devinterp.diagnose(tree)).split("step10/out")) == 2


def test_what_is_stored_is_not_computed_again_and_new_checkpoints_are_added(tmp_path, caplog):
    first = {name: CHECKPOINTS[name] for name in ("step1", "step10")}
    devinterp.sweep(first, DATA, {}, output_path=tmp_path / "s", **SETTINGS)
    before = files_of(tmp_path / "s" / "step10.zarr")
    caplog.set_level("INFO")
    tree = devinterp.sweep(CHECKPOINTS, DATA, {}, output_path=tmp_path / "s", **SETTINGS)
    assert caplog.text.count("nothing to compute") == 2
    assert files_of(tmp_path / "s" / "step10.zarr") == before
    assert tree.checkpoint.values.tolist() == list(CHECKPOINTS)
    # a sweep over some of them gives those, and the folder keeps all
    some = devinterp.sweep({"step2": CHECKPOINTS["step2"]}, DATA, {}, output_path=tmp_path / "s", **SETTINGS)
    assert some.checkpoint.values.tolist() == ["step2"]
    assert set(devinterp.open_sweep(tmp_path / "s").checkpoint.values) == set(CHECKPOINTS)
    more = devinterp.sweep(CHECKPOINTS, DATA, {}, output_path=tmp_path / "s", **SETTINGS | {"num_draws": 8})
    assert more["step1"].sizes["draw"] == 8
    with pytest.raises(RunMismatchError, match="localization: stored 1.0, asked 2.0"):
        devinterp.sweep(CHECKPOINTS, DATA, {}, output_path=tmp_path / "s", **SETTINGS | {"localization": 2.0})
    with pytest.raises(RunMismatchError, match="dataset: other values"):
        devinterp.sweep(CHECKPOINTS, random_tokens(seed=9), {}, output_path=tmp_path / "s", **SETTINGS)
    with pytest.raises(RunMismatchError, match="weight_restrictions: stored"):
        devinterp.sweep(CHECKPOINTS, DATA, {}, output_path=tmp_path / "s", weight_restrictions=RESTRICTIONS, **SETTINGS)


def explode() -> nn.Module:
    raise RuntimeError("no such model")


def test_a_checkpoint_that_fails_does_not_lose_the_others(tmp_path):
    checkpoints = {"gone": str(tmp_path), "step1": CHECKPOINTS["step1"], "bad": explode, "step2": CHECKPOINTS["step2"]}
    with pytest.warns(UserWarning, match="2 of the sweep's checkpoints or runs failed"):
        tree = devinterp.sweep(checkpoints, DATA, {}, output_path=tmp_path / "s", **SETTINGS)
    assert tree.checkpoint.values.tolist() == ["step1", "step2"]
    assert tree.attrs["failed"]["bad"] == "RuntimeError: no such model"
    assert "InputValueError" in tree.attrs["failed"]["gone"]
    assert devinterp.open_sweep(tmp_path / "s").attrs["failed"] == tree.attrs["failed"]
    assert devinterp.compute_llc(tree).attrs["failed"] == tree.attrs["failed"]
    mended = checkpoints | {"bad": CHECKPOINTS["step10"]}
    del mended["gone"]
    assert devinterp.sweep(mended, DATA, {}, output_path=tmp_path / "s", **SETTINGS).attrs["failed"] == {}
    with pytest.raises(ChainsUnusable, match="every checkpoint failed. bad: RuntimeError: no such model"):
        devinterp.sweep({"bad": explode}, DATA, {}, output_path=tmp_path / "t", **SETTINGS)
    assert not (tmp_path / "t").exists()


def test_other_weights_under_a_known_name_are_not_taken_for_them(tmp_path):
    devinterp.sweep({"a": CHECKPOINTS["step1"], "b": CHECKPOINTS["step2"]}, DATA, {}, output_path=tmp_path / "s", **SETTINGS)
    with pytest.warns(UserWarning, match="weights and buffers of the model: other values"):
        tree = devinterp.sweep({"a": CHECKPOINTS["step2"], "b": CHECKPOINTS["step2"]}, DATA, {}, output_path=tmp_path / "s", **SETTINGS)  # fmt: skip
    assert tree.checkpoint.values.tolist() == ["b"]
    assert "RunMismatchError" in devinterp.open_sweep(tmp_path / "s").attrs["failed"]["a"]


class Curved(nn.Module):
    """Loss h/2 |w|^2, h of the checkpoint."""

    def __init__(self, h: float):
        super().__init__()
        self.w = nn.Parameter(torch.ones(3))
        self.v = nn.Parameter(torch.ones(3))
        self.register_buffer("h", torch.tensor(h))


def by_curvature(model, ids):
    return (0.5 * model.h * (model.w.square().sum() + model.v.square().sum())).expand(len(ids), 1)


@pytest.mark.filterwarnings("ignore:lr=")
@pytest.mark.parametrize("restrictions", [None, {"full": None, "w": "w"}])
@pytest.mark.parametrize("on_diverged", ["record", "raise"])
def test_a_checkpoint_that_diverges(restrictions, on_diverged, tmp_path):
    settings = GOOD | {"lr": 0.1, "num_draws": 40, "batch_size": 2, "loss_fn": by_curvature, "on_diverged": on_diverged}
    checkpoints = {"calm": partial(Curved, 1.0), "wild": partial(Curved, 1e6)}
    with pytest.warns(UserWarning, match="wild: .*diverged|wild: .*left the finite range"):
        tree = devinterp.sweep(
            checkpoints, rows(20), {}, output_path=tmp_path / "s", weight_restrictions=restrictions, **settings
        )
    assert tree.checkpoint.values.tolist() == ["calm"]
    assert list(tree.attrs["failed"]) == ["wild"]
    assert np.isfinite(devinterp.compute_llc(tree).llc_mean).all()


@pytest.mark.filterwarnings("ignore:lr=")
def test_a_restriction_that_diverges_leaves_a_gap(tmp_path):
    def loss_fn(model, ids):  # steep at one checkpoint, along v: only where the restriction moves it alone
        alone = torch.equal(model.w.detach(), torch.ones(3)) and not torch.equal(model.v.detach(), torch.ones(3))
        return by_curvature(model, ids) * (float("nan") if alone and model.h > 1.5 else 1.0)

    settings = GOOD | {"lr": 0.01, "num_draws": 20, "batch_size": 2, "loss_fn": loss_fn}
    observables = {"task": (rows(20), 1), "other": (rows(20), 1)}
    with pytest.warns(UserWarning, match="two/v: .*diverged"):
        tree = devinterp.sweep(
            {"one": partial(Curved, 1.0), "two": partial(Curved, 2.0)}, rows(20), observables, output_path=tmp_path / "s",
            weight_restrictions={"full": None, "v": "v", "w": "w"}, sampling_task="task", **settings,
        )  # fmt: skip
    llc = devinterp.compute_llc(tree).llc_mean
    assert llc.restriction.values.tolist() == ["full", "v", "w"]
    assert llc.isnull().sel(checkpoint="two").values.tolist() == [False, True, False]
    assert not llc.isnull().sel(checkpoint="one").any()
    sus = devinterp.compute_susceptibilities(tree, errors=False)["susceptibilities"].sus
    assert sus.wr.values.tolist() == ["v", "w"]
    assert sus.sel(checkpoint="two", wr="v").isnull().all()
    assert sus.isnull().sum() == sus.sizes["sus_flat"]


REFUSED = {
    "no checkpoint": ({"checkpoints": {}}, "at least one"),
    "a list": ({"checkpoints": ["a"]}, "a dict: name"),
    "an empty folder": ({"checkpoints": "."}, "each with a config.json"),
    "a model in memory": ({"checkpoints": {"a": TinyLM()}}, r"checkpoints\['a'\].*function that returns the model"),
    "a number as name": ({"checkpoints": {1: explode}}, "checkpoints=1"),
    "no name": ({"checkpoints": {" ": explode}}, "becomes part of a file's name"),
    "a coordinate's name": ({"checkpoints": {"step": explode}}, "coordinates"),
    "one file for two": ({"checkpoints": {"a/b": explode, "a_b": explode}}, "would share the file"),
    "letters of another size": ({"checkpoints": {"A": explode, "a": explode}}, "would share the file"),
    "one file for two restrictions": (
        {"checkpoints": {"a": explode, "a_mix": explode}, "weight_restrictions": {"full": None, "mix_full": "mix", "full_b": 1}},
        "would share the file 'a_mix_full.zarr'",
    ),
    "no full": ({"weight_restrictions": {"mix": "mix.weight"}}, "holds 'full'"),
    "masks and restrictions": ({"weight_restrictions": RESTRICTIONS, "param_masks": {}}, "absent with weight_restrictions"),
    "a task that is no observable": ({"weight_restrictions": RESTRICTIONS, "sampling_task": "x"}, "one of the observables"),
    "a task without restrictions": ({"sampling_task": "pile"}, "None without weight_restrictions"),
    "an unknown component": ({"weight_restrictions": {"full": None, "l9h9": "l9h9"}}, "l9h9"),
    "an unknown setting": ({"num_drawz": 3}, "Did you mean num_draws"),
    "a bad setting": ({"n_beta": -1.0}, "n_beta=-1.0"),
    "other tokens": ({"dataset": random_tokens(vocabulary=50)}, "11"),
    "a bad observable": ({"observables": {"a": 3}}, "observables"),
    "no folder": ({"output_path": None}, "output_path=None"),
    "an address": ({"output_path": "s3://bucket/sweep"}, "local path"),
    "on_diverged": ({"on_diverged": "drop"}, "on_diverged"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_used_is_refused_before_anything_is_made(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    changed, message = REFUSED[case]
    given = {"checkpoints": {"step1": CHECKPOINTS["step1"]}, "dataset": DATA, "observables": OBSERVABLES,
             "output_path": tmp_path / "s", **SETTINGS} | changed  # fmt: skip
    with pytest.raises(DevinterpInputError, match=message):
        devinterp.sweep(**given)
    assert not list(tmp_path.iterdir())


def test_estimates_refuse_what_a_sweep_cannot_give(plain, suite, tmp_path):
    tree = devinterp.open_sweep(plain)
    with pytest.raises(InputValueError, match="a sweep over restrictions"):
        devinterp.compute_susceptibilities(tree, "pile")
    with pytest.raises(InputValueError, match="None with a sweep"):
        devinterp.compute_bif(tree, output_path=tmp_path / "b")
    with pytest.raises(InputTypeError, match=r"samples\['step512'\]"):
        root_of(tree)
    damaged = tree.copy()
    damaged["step2"] = damaged["step2"].to_dataset(inherit=False).assign(chain_status=("chain", [1, 2]))
    with pytest.raises(ChainsUnusable, match=r"step2: chains 1 \(diverged\)"):
        devinterp.compute_llc(damaged)
    dropped = devinterp.compute_llc(damaged, on_diverged="drop")
    assert dropped.attrs["dropped_chains"] == {"step1": [], "step2": [1], "step10": []}
    assert dropped.llc_per_chain.isnull().sel(checkpoint="step2").values.tolist() == [False, True]
    assert devinterp.diagnose(damaged).verdict.sel(checkpoint="step2").values[1] == "diverged"


def test_an_unfinished_run_and_one_of_other_settings_are_told_of(plain, tmp_path):
    shutil.copytree(plain, tmp_path / "s")
    record = tmp_path / "s" / "step2.zarr" / "zarr.json"
    text = json.loads(record.read_text())
    text["attributes"]["completed"] = 0
    record.write_text(json.dumps(text))
    shutil.rmtree(tmp_path / "s" / "step1.zarr")
    tree = devinterp.open_sweep(tmp_path / "s")
    assert tree.checkpoint.values.tolist() == ["step10"]
    assert tree.attrs["failed"]["step1"] == "it has not begun"
    assert "not finished" in tree.attrs["failed"]["step2"]
    shutil.rmtree(tmp_path / "s" / "step1.zarr.run")
    devinterp.sample(
        TinyLM(seed=1), DATA, OBSERVABLES, output_path=tmp_path / "s" / "step1.zarr", **SETTINGS | {"n_beta": 11.0}
    )
    assert "another n_beta" in devinterp.open_sweep(tmp_path / "s").attrs["failed"]["step1"]


FORGED = {
    "a path out of the folder": {"restrictions": ["full", "../../x"]},
    "restrictions without full": {"restrictions": ["mix"]},
    "control characters": {"checkpoints": ["a\x1b[2J"]},
    "a reason for a terminal": {"failed": {"step1": "\x1b[2J"}},
    "no names": {"checkpoints": [1]},
    "no list": {"checkpoints": "step1"},
    "another format": {"format": 9},
    "settings": {"settings": []},
    "a task": {"sampling_task": 3},
    "two with one file": {"checkpoints": ["a/b", "a_b"]},
}


@pytest.mark.parametrize("case", FORGED)
def test_a_strangers_record_is_checked(case, plain, tmp_path):
    shutil.copytree(plain, tmp_path / "s")
    given = json.loads((tmp_path / "s" / RECORD).read_text())["content"]
    write_record(tmp_path / "s" / RECORD, given | FORGED[case])
    with pytest.raises(StoreError, match="is not a sweep that this version reads"):
        devinterp.open_sweep(tmp_path / "s")
    with pytest.raises(InputValueError, match=RECORD):
        devinterp.sweep(CHECKPOINTS, DATA, OBSERVABLES, output_path=tmp_path / "s", **SETTINGS)


def test_links_and_what_is_no_sweep_are_refused(plain, tmp_path):
    shutil.copytree(plain, tmp_path / "s")
    (tmp_path / "s" / "step2.zarr").rename(tmp_path / "elsewhere")
    (tmp_path / "s" / "step2.zarr").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match="symbolic link"):
        devinterp.open_sweep(tmp_path / "s")
    (tmp_path / "s" / RECORD).write_text("{}")
    with pytest.raises(StoreError, match="is not a sweep"):
        devinterp.open_sweep(tmp_path / "s")
    with pytest.raises(InputTypeError, match="path=3"):
        devinterp.open_sweep(3)


def test_names():
    assert safe_name("EleutherAI/pythia-14m@step512") == "EleutherAI_pythia-14m_step512"
    assert safe_name("../x") == "_x"
    assert [step_of(name) for name in ("checkpoint-500", "step000512", "1000", "seed1", "v2", "")] == [500, 512, 1000, None, None, None]  # fmt: skip
    with pytest.raises(InputValueError, match="both a checkpoint and a restriction"):
        check_names("checkpoints", ["a", "a/b"], ["full", "b"])


# -- interrupted, and side by side --

SCRIPT = """
import sys, time; sys.path[:0] = {path!r}
import torch; torch.set_num_threads(1)
from test_sweep import *
devinterp.sweep(CHECKPOINTS, DATA, OBSERVABLES, output_path=sys.argv[1], **SUITE | dict(num_draws=60, checkpoint_every=0))
"""


def test_killed_anywhere_and_asked_again_it_has_the_bytes_of_an_uninterrupted_one(tmp_path):
    whole = SUITE | {"num_draws": 60, "checkpoint_every": 0}
    with threads(1):
        devinterp.sweep(CHECKPOINTS, DATA, OBSERVABLES, output_path=tmp_path / "whole", **whole)
    killed = subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(path=[str(Path(__file__).parent), *sys.path]), tmp_path / "s"]
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "s" / "step2_mix.zarr.run").exists():
        assert killed.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert devinterp.open_sweep(tmp_path / "s").attrs["failed"]["step10"] == "it has not begun"
    with threads(1):
        tree = devinterp.sweep(CHECKPOINTS, DATA, OBSERVABLES, output_path=tmp_path / "s", **whole)
    assert tree.attrs["failed"] == {}
    for name in CHECKPOINTS:
        for restriction in RESTRICTIONS:
            store = f"{name}_{restriction}.zarr"
            assert files_of(tmp_path / "s" / store) == files_of(tmp_path / "whole" / store), store


def test_checkpoints_side_by_side_give_the_same_bytes(suite, tmp_path):
    before = torch.get_num_threads()
    study = study_of(tmp_path / "s", **SUITE)
    made = carry_out(study, 3, False)
    assert sorted(made.done) == sorted(CHECKPOINTS)
    assert torch.get_num_threads() == before
    for store in suite.glob("*.zarr"):
        assert files_of(tmp_path / "s" / store.name) == files_of(store), store.name


def test_every_store_of_a_sweep_is_verified(suite, tmp_path):
    shutil.copytree(suite, tmp_path / "s")
    found = devinterp.verify(tmp_path / "s")
    runs = [devinterp.verify(store) for store in suite.glob("*.zarr")]
    assert len(runs) == 9
    assert found.checked == sum(run.checked for run in runs)
    assert not found.damaged
    chunk = next((tmp_path / "s" / "step2_mix.zarr" / "step_loss" / "c").rglob("0"))
    file = next(path for path in (chunk, *chunk.rglob("*")) if path.is_file())
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    assert list(devinterp.verify(tmp_path / "s").damaged) == [str(file.relative_to(tmp_path / "s"))]
    shutil.rmtree(tmp_path / "s" / "step10_out.zarr")  # has not begun
    assert devinterp.verify(tmp_path / "s").checked < found.checked


def test_with_an_executor_workers_load_what_has_a_name(tmp_path, monkeypatch):
    neox(1).save_pretrained(tmp_path / "named")
    loaded, load = [], Pretrained.load

    def told(origin, *arguments):
        loaded.append(threading.current_thread().name.partition("_")[0])
        return load(origin, *arguments)

    monkeypatch.setattr(Pretrained, "load", told)
    checkpoints = {"named": tmp_path / "named", "made": partial(neox, 3)}
    settings = SETTINGS | {"lr": 1e-3, "num_draws": 3, "num_chains": 1, "chains_together": "processes"}
    tokens = random_tokens(vocabulary=50)
    here = devinterp.sweep(checkpoints, tokens, {}, output_path=tmp_path / "here", **settings)
    assert loaded == ["MainThread"]
    with ThreadPoolExecutor(2, thread_name_prefix="worker") as pool:
        there = devinterp.sweep(checkpoints, tokens, {}, output_path=tmp_path / "there", executor=pool, **settings)
    assert loaded[1:].count("worker") >= 2, "the plan and the chains of what has a name"
    for name in checkpoints:
        one, other = (tree[name].to_dataset(inherit=False) for tree in (here, there))
        xr.testing.assert_equal(one, other)


def test_ctrl_c_stops_all_that_are_under_way_and_keeps_what_was_done(tmp_path):
    begun = threading.Barrier(3)  # two chains, and who interrupts them

    def loss_fn(model, ids):
        if not model.w.detach().equal(torch.ones(3)) and threading.current_thread() is not threading.main_thread():
            if not getattr(model, "has_begun", False):
                model.has_begun = True
                begun.wait(60)
            time.sleep(0.001)
        return by_curvature(model, ids)

    def interrupt():
        begun.wait(60)
        os.kill(os.getpid(), signal.SIGINT)

    settings = GOOD | {"num_draws": 100_000, "num_chains": 1, "batch_size": 2, "loss_fn": loss_fn, "loss_fn_id": "slow"}
    del settings["progress"]
    checkpoints = {f"step{n}": partial(Curved, float(n)) for n in (1, 2, 3)}
    study = Study.of(checkpoints, rows(20), {}, output_path=tmp_path / "s", **settings)
    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt, match="the same call goes on"):
        carry_out(study, 2, False)
    thread.join()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    for name, begins in {"step1": True, "step2": True, "step3": False}.items():
        assert (tmp_path / "s" / f"{name}.zarr.run").exists() is begins, name
    reasons = Sweep.read(tmp_path / "s").failed
    assert reasons == {}, "an interrupted run has not failed"


def test_one_display_counts_all_runs():
    whole = Progress(30, "sweep", enabled=False)
    with Part(whole, 10, "a") as first:
        first.update(4)
        first.skip(6)
    with Part(whole, 10, "b") as second:
        second.update(3)  # and fails
    with Part(whole, 10, "c") as third:
        third.update(10)
    assert (whole.done, whole.total) == (17, 17)
    assert (first.done, second.done) == (4, 3)


def test_a_model_is_let_go_when_its_runs_are_made(tmp_path):
    import gc
    import weakref

    alive: list[weakref.ref] = []

    def made(seed):
        gc.collect()
        assert sum(ref() is not None for ref in alive) <= 1, "the models of earlier checkpoints are still there"
        model = TinyLM(seed=seed)
        alive.append(weakref.ref(model))
        return model

    checkpoints = {f"step{n}": partial(made, n) for n in range(4)}
    devinterp.sweep(checkpoints, DATA, {}, output_path=tmp_path / "s", **SETTINGS)
    assert len(alive) == 4


def test_the_forecast_tries_a_few_steps_and_makes_nothing(tmp_path, plain, suite, monkeypatch):
    monkeypatch.setattr("devinterp.slt.sweep_forecast.ENOUGH_SECONDS", 0.0)
    plan = forecast(study_of(tmp_path / "s", **SUITE))
    assert not list(tmp_path.iterdir())
    assert (plan.num_runs, plan.num_stored, plan.num_tasks) == (9, 0, 18)
    assert plan.seconds > 9 * plan.of_model.step
    run = devinterp.open_sweep(suite)["step1/mix"].to_dataset(inherit=False)
    assert plan.num_bytes == 9 * sum(array.nbytes for array in run.variables.values())
    there = forecast(study_of(plain, **SETTINGS))
    assert (there.num_stored, there.num_tasks) == (3, 0)
    assert there.seconds < plan.seconds
    with pytest.raises(ChainsUnusable, match="no such model"):
        forecast(study_of(tmp_path / "s", checkpoints={"bad": explode}, **SETTINGS))
    with pytest.raises(InputValueError, match="l9h9"):
        forecast(study_of(tmp_path / "s", weight_restrictions={"full": None, "l9h9": "l9h9"}, **SETTINGS))


def study_of(path, checkpoints=CHECKPOINTS, **settings):
    settings = {name: value for name, value in settings.items() if name != "progress"}
    return Study.of(checkpoints, DATA, OBSERVABLES, output_path=path, **settings)
