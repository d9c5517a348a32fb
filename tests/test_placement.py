"""Chains in worker processes and in one vmap, against one after another; and what becomes of a worker that dies."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import loky
import numpy as np
import pytest
import torch
from cases import TinyLM, Weights, linear, plan_of, random_tokens, rows
from zoo import tiny_model

import devinterp
from devinterp.engine import placement
from devinterp.engine.chain import Diverged, Walk, run_chains
from devinterp.engine.placement import Placement, decide
from devinterp.engine.walker import Walker
from devinterp.errors import ChainFailed, DevinterpInputError
from devinterp.samplers import SAMPLERS
from devinterp.store.reader import open_store

SHORT = {"lr": 1e-3, "n_beta": 10.0, "localization": 5.0, "batch_size": 4, "num_draws": 5, "num_chains": 3,
         "num_init_loss_batches": 1, "progress": False}  # fmt: skip


def files(store: Path) -> dict[str, bytes]:
    """Everything but the metadata, which tell where the chains ran."""
    return {
        str(p.relative_to(store)): p.read_bytes() for p in sorted(store.rglob("*")) if p.is_file() and p != store / "zarr.json"
    }


@pytest.mark.parametrize("masks", [None, "l1h0"])
def test_processes_write_the_bytes_of_one_after_another(masks, tmp_path, monkeypatch):
    model, data = tiny_model("gpt_neox", "mha"), random_tokens(16, 11, 40)
    masks = None if masks is None else devinterp.create_param_masks(model, masks)
    monkeypatch.setattr("loky.cpu_count", lambda: 2)
    for way in ("sequential", "processes"):
        with placement.threads(1):
            devinterp.sample(model, data, {"x": data}, param_masks=masks, output_path=tmp_path / way, chains_together=way,
                             batches_per_draw=2, **SHORT)  # fmt: skip
    computed = open_store(tmp_path / "processes").attrs["metadata"]["computed"]
    assert (computed["way"], computed["threads"], computed["prefix"] is not None) == ("processes", 1, masks is not None)
    assert files(tmp_path / "sequential") == files(tmp_path / "processes")


def test_a_suite_in_processes_is_that_of_one_after_another(tmp_path, monkeypatch):
    monkeypatch.setattr("loky.cpu_count", lambda: 2)
    model, data = tiny_model("gpt_neox", "mha"), random_tokens(16, 11, 40)
    names = {"full": None, "l0h1": "l0h1", "l1h0": "l1h0", "l1 mlp": "l1 mlp"}
    for way in ("sequential", "processes"):
        with placement.threads(1):
            devinterp.susceptibilities(model, data, {"pile": data, "x": data}, names, sampling_task="pile", batches_per_draw=1,
                                       output_path=tmp_path / way, chains_together=way, **SHORT)  # fmt: skip
    for name in names:
        assert files(tmp_path / f"sequential_{name}") == files(tmp_path / f"processes_{name}")


def _sampled(way: str, path: Path) -> None:
    torch.set_num_threads(1)
    loky.cpu_count = lambda: 2
    devinterp.sample(TinyLM(), random_tokens(), {}, output_path=path, chains_together=way, **SHORT)


def test_in_a_pool_whose_workers_may_have_no_children(tmp_path):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        for way in ("sequential", "processes"):
            pool.apply(_sampled, (way, tmp_path / way))
    assert files(tmp_path / "sequential") == files(tmp_path / "processes")
    assert open_store(tmp_path / "processes").attrs["metadata"]["computed"]["way"] == "processes"


class Deadly(TinyLM):
    """Kills the worker process in which the biases get to these values, until a file is there."""

    def __init__(self, values: torch.Tensor, file: Path):
        super().__init__()
        self.values, self.file, self.home = values, file, os.getpid()

    def forward(self, ids):
        if os.getpid() != self.home and not self.file.exists():
            time.sleep(0.2)  # so that the others are under way when it dies
            if torch.allclose(self.out.bias, self.values, rtol=0, atol=1e-6):
                os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(ids)


def test_a_dead_worker_costs_its_chain_alone_and_the_same_call_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr("loky.cpu_count", lambda: 4)
    data, masks = random_tokens(), {"out.bias": None}
    of_plan = {name: SHORT[name] for name in ("lr", "n_beta", "localization", "batch_size")}
    walker = Walker(plan_of(TinyLM(), data, masks=masks, **of_plan), 1)
    walker.differentiate(0)
    walker.step()
    arguments = {"param_masks": masks, "chains_together": "processes", **SHORT}

    def model():
        return Deadly(walker.weights[0], tmp_path / "harmless")

    with pytest.raises(ChainFailed, match="worker process died"):
        devinterp.sample(model(), data, {}, output_path=tmp_path / "run", **arguments)
    stored = open_store(tmp_path / "run")
    assert stored.attrs["completed"] == 0
    assert stored.chain_status.values.tolist() == [1, 3, 1]
    (tmp_path / "harmless").touch()
    again = devinterp.sample(model(), data, {}, output_path=tmp_path / "run", **arguments)
    with placement.threads(1):
        whole = devinterp.sample(TinyLM(), data, {}, **(arguments | {"chains_together": "sequential"}))
    assert again.attrs["completed"] == 1
    np.testing.assert_array_equal(again.sampling_loss, whole.sampling_loss)
    np.testing.assert_array_equal(again.baseline_loss, whole.baseline_loss)


def test_an_error_in_a_chain_leaves_the_others(tmp_path):
    class Fails:
        """Fails in a forward pass of its model."""

        def __init__(self, at):
            self.at, self.steps, self.model = at, 0, TinyLM()
            self.model.register_forward_pre_hook(self.fail)

        def fail(self, *_):
            self.steps += 1
            if self.steps == self.at:
                raise RuntimeError("out of memory, say")

    counting = Fails(-1)
    data = random_tokens()
    whole = devinterp.sample(counting.model, data, {}, **SHORT)
    failing = Fails(counting.steps - 8)  # in the middle one of three chains of 6 forwards
    with pytest.raises(ChainFailed, match="out of memory, say") as caught:
        devinterp.sample(failing.model, data, {}, output_path=tmp_path / "run", **SHORT)
    assert "fail" in caught.value.__notes__[0], "where it happened"
    stored = open_store(tmp_path / "run")
    assert stored.chain_status.values.tolist() == [1, 3, 1]
    np.testing.assert_array_equal(stored.sampling_loss[[0, 2]], whole.sampling_loss[[0, 2]])
    again = devinterp.sample(TinyLM(), data, {}, output_path=tmp_path / "run", **SHORT)
    np.testing.assert_array_equal(again.sampling_loss, whole.sampling_loss)
    assert again.attrs["completed"] == 1


def test_a_baseline_that_was_interrupted_is_made_though_all_chains_are_done(tmp_path):
    import zarr

    data = random_tokens()
    whole = devinterp.sample(TinyLM(), data, {"x": data}, output_path=tmp_path / "run", **SHORT).load()
    root = zarr.open_group(tmp_path / "run", mode="r+")
    root.attrs["completed"] = 0
    root["baseline_loss"][...] = np.nan
    again = devinterp.sample(TinyLM(), data, {"x": data}, output_path=tmp_path / "run", **SHORT)
    np.testing.assert_array_equal(again.baseline_loss, whole.baseline_loss)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("method", list(SAMPLERS))
def test_one_vmap_is_one_after_another_to_float_tolerance(shared, method):
    data = random_tokens()
    runs = {
        way: devinterp.sample(
            TinyLM(),
            data,
            {"x": (data, 2)},
            chains_together=way,
            sampling_method=method,
            save_metrics=True,
            match_sampling_input_ids_across_chains=shared,
            gradient_accumulation_steps=2,
            **(SHORT | {"lr": 1e-4}),
        )
        for way in ("sequential", "vmap")
    }
    assert runs["vmap"].attrs["metadata"]["computed"]["way"] == "vmap"
    for name in runs["vmap"].data_vars:
        np.testing.assert_allclose(runs["vmap"][name], runs["sequential"][name], rtol=1e-4, atol=1e-5, err_msg=name)
    assert not np.array_equal(runs["vmap"].sampling_loss[0], runs["vmap"].sampling_loss[1])


def test_chains_of_a_transformer_with_frozen_layers_in_one_vmap():
    model, data = tiny_model("gpt_neox", "mha"), random_tokens(16, 11, 40)
    masks = devinterp.create_param_masks(model, "l1h0")
    runs = {
        way: devinterp.sample(model, data, {"x": data}, param_masks=masks, chains_together=way, batches_per_draw=1, **SHORT)
        for way in ("sequential", "vmap")
    }
    computed = runs["vmap"].attrs["metadata"]["computed"]
    assert computed["way"] == "vmap"
    assert computed["prefix"]
    np.testing.assert_allclose(runs["vmap"].loss_x, runs["sequential"].loss_x, rtol=1e-5, atol=1e-5)


def test_a_diverged_chain_in_a_vmap_leaves_the_others_bit_by_bit():
    plan = plan_of(TinyLM(), random_tokens(), lr=1e-3, n_beta=10.0, batch_size=4, num_draws=6)

    def walk(poisoned: bool):
        walker = Walker(plan, 0, 1, 2)
        losses = []
        for t in range(6):
            losses.append(walker.differentiate(t))
            if poisoned and t == 2:
                walker.gradient[1] = float("nan")
            walker.step()
        return torch.stack(losses)

    clean, poisoned = walk(False), walk(True)
    assert torch.equal(clean[:, [0, 2]], poisoned[:, [0, 2]])
    assert torch.isnan(poisoned[3:, 1]).all()


def test_a_diverged_chain_ends_and_the_others_of_its_group_go_on(monkeypatch):
    plan = plan_of(TinyLM(), random_tokens(), lr=1e-3, n_beta=10.0, batch_size=4, num_draws=6)
    step = Walker.step

    def poisoning(walker):
        if walker.chains == (0, 1) and not hasattr(walker, "poisoned"):
            walker.poisoned = True
            walker.gradient[1] = float("nan")
        return step(walker)

    monkeypatch.setattr(Walker, "step", poisoning)
    seen = [item for seen in run_chains(Walk(plan, [0, 1])) for item in seen]
    assert [item for item in seen if isinstance(item, Diverged)] == [Diverged(1, 1)]
    assert [item.steps_taken for item in seen if not isinstance(item, Diverged) and item.chain == 0] == list(range(7))
    assert [item.steps_taken for item in seen if not isinstance(item, Diverged) and item.chain == 1] == [0]


def test_a_model_that_no_vmap_carries_runs_one_after_another(caplog):
    class Branches(TinyLM):
        def forward(self, ids):
            logits = super().forward(ids)
            return logits if logits.sum() > -1e9 else -logits

    with caplog.at_level("INFO", "devinterp"):
        samples = devinterp.sample(Branches(), random_tokens(), {}, chains_together="vmap", **SHORT)
    assert samples.attrs["metadata"]["computed"]["way"] == "sequential"
    assert "chains in one vmap: not used" in caplog.text


def test_the_rule_is_of_sizes_alone(monkeypatch):
    monkeypatch.setattr("loky.cpu_count", lambda: 2)
    data = random_tokens()

    def way(model=None, **settings):
        return decide("auto", plan_of(model or TinyLM(), data, batch_size=4, **settings))

    assert way(num_chains=4).way == "sequential"
    assert way(num_chains=32).way == "vmap"
    assert way(num_chains=32, train_mode=True).way == "sequential"
    assert way(num_chains=4, num_draws=10**9) == Placement("processes", 1)
    assert way(num_chains=1, num_draws=10**9).way == "sequential"
    wide = Weights(torch.zeros(10**6))
    assert decide("auto", plan_of(wide, rows(16), linear(1.0), num_chains=32, batch_size=8)).way != "vmap"
    monkeypatch.setattr(placement.os, "sysconf", lambda name: 1)
    assert way(num_chains=4, num_draws=10**9).way == "sequential", "no memory for copies"


def test_a_store_is_gone_on_with_as_it_began(tmp_path, monkeypatch):
    data = random_tokens()
    import zarr

    first = devinterp.sample(TinyLM(), data, {}, output_path=tmp_path / "run", chains_together="vmap", **SHORT).load()
    root = zarr.open_group(tmp_path / "run", mode="r+")
    root.attrs["completed"] = 0
    root["chain_status"][...] = 0
    from devinterp.slt import running

    placed = []
    monkeypatch.setattr(
        running, "do", lambda work, tasks, where, site, do=running.do: placed.append(where) or do(work, tasks, where, site)
    )
    again = devinterp.sample(TinyLM(), data, {}, output_path=tmp_path / "run", chains_together="sequential", **SHORT)
    assert [where.way for where in placed] == ["vmap"]
    np.testing.assert_array_equal(first.sampling_loss, again.sampling_loss)
    assert again.attrs["metadata"]["computed"]["way"] == "vmap"


@pytest.mark.parametrize(
    ("name", "value"), [("chains_together", "threads"), ("reuse_prefix", 1), ("compile", "yes"), ("precision", "fp8")]
)
def test_wrong_options_are_refused(name, value):
    with pytest.raises(DevinterpInputError, match=name):
        devinterp.sample(TinyLM(), random_tokens(), {}, **{name: value}, **SHORT)
