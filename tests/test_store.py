"""What is stored: schema, chunks, identity, and stores of devinterp 2.0."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
import zarr
from cases import TinyLM, random_tokens

import devinterp
from devinterp.errors import ChainDiverged, DevinterpInputError, RunMismatchError, StoreError
from devinterp.store.reader import open_store
from devinterp.store.schema import MOST_DRAWS_PER_CHUNK, Variable, chunks, variables

DATA = random_tokens()
SHORT = {"lr": 1e-3, "n_beta": 10.0, "localization": 5.0, "batch_size": 4, "num_draws": 3, "num_chains": 2,
         "num_init_loss_batches": 1, "progress": False}  # fmt: skip
OLD_STORE = Path(__file__).parent / "data" / "store_2_0_1"


def run(path, model=None, dataset=DATA, observables=None, **settings):
    observables = {"code": DATA} if observables is None else observables
    return devinterp.sample(model or TinyLM(), dataset, observables, output_path=path, **(SHORT | settings))


def contents(path: Path) -> dict[str, str]:
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(path.rglob("*")) if p.is_file()}


def test_every_variable_of_the_contract_is_there(tmp_path):
    samples = run(tmp_path / "run")
    expected = {
        "init_loss": ("chain", "token_pos"),
        "sampling_loss": ("chain", "draw", "batch", "token_pos"),
        "baseline_loss": ("draw", "batch", "token_pos"),
        "loss_code": ("chain", "draw", "batch_code", "token_pos"),
        "init_loss_code": ("batch_code", "token_pos"),
        "input_ids_code": ("batch_code", "token"),
        "n_beta": (),
        "step_loss": ("chain", "step"),
        "chain_status": ("chain",),
        "diverged_at": ("chain",),
    }
    assert {name: samples[name].dims for name in samples.data_vars} == expected
    assert {name: samples.sizes[name] for name in ("chain", "draw", "step", "token_pos")} == {
        "chain": 2, "draw": 3, "step": 3, "token_pos": 5}  # fmt: skip
    for name in ("chain", "draw", "step", "token_pos"):
        assert samples[name].dtype == np.int64
    assert samples.sampling_loss.dtype == np.float32
    assert samples.sampling_loss.attrs["units"] == "nats"
    assert samples.chain_status.values.tolist() == [1, 1]
    assert samples.chain_status.attrs["flag_meanings"].split()[1] == "complete"
    assert samples.attrs["completed"] == 1
    assert all(np.isfinite(samples[name]).all() for name in expected)


def test_metadata_is_enough_to_repeat_the_run(tmp_path):
    first = run(tmp_path / "first", observables={"code": (DATA, 2)}, lr="auto", sampling_method="leimkuhler_matthews")
    sampler = dict(first.attrs["metadata"]["config"]["sampler"])
    again = devinterp.sample(TinyLM(), DATA, {"code": (DATA, 2)}, progress=False, **sampler)
    np.testing.assert_array_equal(first.sampling_loss, again.sampling_loss)
    assert first.attrs["metadata"]["config"]["observables"] == [{"obs_id": "code", "batches_per_draw": 2}]
    assert first.attrs["metadata"]["versions"]["torch"] == torch.__version__
    step_size = first.attrs["metadata"]["step_size"]
    measured = {"h_max_checkpoint", "h_max_pilot", "trace_checkpoint", "trace_pilot", "pilot_steps", "stiffest"}
    assert measured | {"lr"} == set(step_size)
    json.dumps(first.attrs["metadata"])


def test_xarray_opens_it_without_devinterp(tmp_path):
    samples = run(tmp_path / "run")
    plain = xr.open_datatree(tmp_path / "run", engine="zarr", consolidated=False)
    xr.testing.assert_identical(plain.to_dataset().load(), samples.to_dataset().load())


def test_it_can_be_read_while_the_run_is_going_on(tmp_path):
    seen = []

    def watch(model, ids):
        if (tmp_path / "run").exists():
            seen.append(xr.open_datatree(tmp_path / "run", engine="zarr", consolidated=False).load())
        return torch.nn.functional.cross_entropy(model(ids)[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")

    run(tmp_path / "run", loss_fn=watch, observables={}, num_draws=MOST_DRAWS_PER_CHUNK + 2, num_chains=1)
    assert all(tree.attrs["completed"] == 0 for tree in seen)
    written = [int(tree.sampling_loss.notnull().all(["batch", "token_pos"]).sum()) for tree in seen]
    assert set(written) == {0, MOST_DRAWS_PER_CHUNK}
    assert written == sorted(written)


def test_chunks_are_written_whole_and_once(tmp_path, monkeypatch):
    written = []
    store_type = zarr.storage.LocalStore
    original = store_type.set

    async def noted(self, key, value):
        written.append(key)
        await original(self, key, value)

    monkeypatch.setattr(store_type, "set", noted)
    run(tmp_path / "run", num_draws=MOST_DRAWS_PER_CHUNK + 7)
    draws = [key for key in written if key.split("/")[0] in ("sampling_loss", "loss_code", "baseline_loss") and "/c/" in key]
    assert len(draws) == len(set(draws)) == 2 * 2 * 2 + 2


def test_chunk_lengths_do_not_depend_on_how_many_draws_there_are():
    sizes = {"chain": 4, "draw": 7, "step": 9, "batch": 8, "token_pos": 127, "token": 128}
    described = variables([], [], True)
    more = sizes | {"draw": 10_000, "step": 90_000, "chain": 40}
    for name in ("sampling_loss", "step_loss", "baseline_loss", "chain_status"):
        assert chunks(name, described[name], sizes) == chunks(name, described[name], more)
    large = Variable(("chain", "draw", "batch", "token_pos"), "float32", "")
    assert chunks("x", large, sizes | {"batch": 512, "token_pos": 1023}) == (1, 2, 512, 1023)


def test_the_same_call_again_returns_what_is_stored(tmp_path, caplog):
    first = run(tmp_path / "run").load()
    before = contents(tmp_path)
    calls = []
    model = TinyLM()
    model.register_forward_hook(lambda *_: calls.append(1))
    with caplog.at_level("INFO"):
        again = run(tmp_path / "run", model=model)
    xr.testing.assert_identical(first.to_dataset(), again.load().to_dataset())
    assert not calls
    assert contents(tmp_path) == before
    assert "nothing to compute" in caplog.text


def nudged() -> TinyLM:
    model = TinyLM()
    with torch.no_grad():
        model.out.bias[3] += 1e-7
    return model


def shifted_tokens():
    ids = [list(row) for row in DATA["input_ids"]]
    ids[17][2] = (ids[17][2] + 1) % 11
    return type(DATA).from_dict({"input_ids": ids})


CHANGES = [
    ({"n_beta": 11.0}, "n_beta: stored 10.0, asked 11.0"),
    ({"localization": 6.0}, "localization"),
    ({"num_draws": 2}, "num_draws: .* is not shortened"),
    ({"num_chains": 1}, "num_chains: .* is not shortened"),
    ({"init_seed": 101}, "init_seed"),
    ({"lr": 2e-3}, "lr"),
    ({"sampling_method": "leimkuhler_matthews"}, "sampling_method"),
    ({"save_metrics": True}, "save_metrics"),
    ({"model": nudged()}, "weights and buffers of the model: other values"),
    ({"dataset": shifted_tokens()}, "dataset: other values"),
    ({"dataset": DATA.shuffle(seed=0)}, "dataset: other values"),
    ({"observables": {"code": shifted_tokens().select(range(12))}}, "observable code: other values"),
    ({"observables": {}}, "observable code: only in the stored run"),
    ({"observables": {"code": DATA, "more": DATA}}, "observable more: not in the stored run"),
    ({"param_masks": {"mix.weight": None}}, "param_masks: other parameters or elements"),
    ({"loss_fn": lambda model, ids: model(ids)[:, :-1].square().mean(-1)}, "loss_fn"),
]


@pytest.mark.parametrize(("change", "message"), CHANGES, ids=[c[1][:30] for c in CHANGES])
def test_another_run_at_the_same_path_is_refused_and_says_what_differs(tmp_path, change, message):
    run(tmp_path / "run")
    before = contents(tmp_path)
    with pytest.raises(RunMismatchError, match=message) as caught:
        run(tmp_path / "run", **change)
    assert len(caught.value.differences) == 1, caught.value.differences
    assert contents(tmp_path) == before


def test_equal_inputs_in_another_form_are_the_same_run(tmp_path):
    run(tmp_path / "run")
    run(
        tmp_path / "run", dataset=DATA.with_format("torch"), param_masks={name: None for name, _ in TinyLM().named_parameters()}
    )
    run(tmp_path / "run", model=TinyLM().train(), num_chains=np.int64(2), localization=5)


@pytest.mark.parametrize("kind", ["files", "empty", "zarr", "old"])
def test_what_is_not_this_run_is_never_touched(tmp_path, kind):
    path = tmp_path / "run"
    if kind == "old":
        path = OLD_STORE
    elif kind == "zarr":
        zarr.create_group(path).create_array("mine", shape=3, dtype="f4")
    else:
        path.mkdir()
        if kind == "files":
            (path / "thesis.tex").write_text("years of work")
    before = contents(path)
    with pytest.raises(DevinterpInputError, match="Nothing was changed"):
        run(path)
    assert contents(path) == before


def test_a_run_that_broke_off_is_finished_by_the_same_call(tmp_path, monkeypatch):
    whole = run(tmp_path / "whole").load()
    from devinterp.slt import running

    class Stops:
        """Stops a model in a forward pass."""

        on_trial = False

        def __init__(self, left=10**9):
            self.left, self.model = left, TinyLM()
            self.model.register_forward_pre_hook(self.count)

        def count(self, *_):
            self.left -= Stops.on_trial  # the probes before the run are not
            if not self.left:
                raise KeyboardInterrupt

    def tried(*arguments, do=running.do):
        Stops.on_trial = True
        try:
            return (yield from do(*arguments))
        finally:
            Stops.on_trial = False

    monkeypatch.setattr(running, "do", tried)
    counting = Stops()
    run(tmp_path / "counted", model=counting.model)
    # in the baseline, early in chain 0, late in it, and in chain 1
    for share in (0.1, 0.35, 0.55, 0.8):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / f"run{share}", model=Stops(round(share * (10**9 - counting.left))).model)
        stopped = open_store(tmp_path / f"run{share}")
        assert stopped.attrs["completed"] == 0
        statuses = stopped.chain_status.values.tolist()
        again = run(tmp_path / f"run{share}").load()
        xr.testing.assert_equal(whole.to_dataset(), again.to_dataset())
        assert again.attrs["completed"] == 1
    assert statuses == [1, 0]


@pytest.mark.filterwarnings("ignore:lr=")
def test_a_diverged_chain_raises_again_when_asked_again(tmp_path):
    wild = {"lr": 1e6, "n_beta": 1e38, "localization": 0.0}
    for _ in range(3):
        with pytest.raises(ChainDiverged, match="chain 0 left the finite range"):
            run(tmp_path / "run", **wild, on_diverged="raise")
    assert (run(tmp_path / "run", **wild).chain_status == 2).all()
    with pytest.raises(ChainDiverged, match="chain 0"):
        run(tmp_path / "run", **wild, on_diverged="raise")


def test_without_a_path_the_store_is_temporary(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    samples = run(None)
    assert np.isfinite(samples.sampling_loss).all()
    assert len(list(tmp_path.iterdir())) == 1


def test_the_store_tells_no_names_of_this_machine(tmp_path):
    import getpass
    import socket

    run(tmp_path / "run")
    everything = b"".join(p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file())
    for secret in (str(tmp_path), socket.gethostname(), str(Path.home()) + "/", f"/{getpass.getuser()}/"):
        assert secret.encode() not in everything


def test_runs_that_do_not_fit_the_disk_are_refused_before_compute(tmp_path):
    with pytest.raises(OSError, match="short"):
        run(tmp_path / "run", num_draws=10**12)
    assert not list(tmp_path.iterdir())


def test_stores_of_devinterp_2_0_are_read():
    """The values are those of the stored losses, computed here by hand; 2.0.1 itself averaged in the burn-in."""
    result = devinterp.compute_llc(OLD_STORE)
    raw = xr.open_datatree(OLD_STORE, engine="zarr", consolidated=False)
    expected = 10.0 * (raw.sampling_loss.values.astype(float).mean((1, 2, 3)) - raw.init_loss.values.astype(float).mean(1))
    np.testing.assert_allclose(result.llc_per_chain, expected, rtol=1e-12)
    np.testing.assert_allclose(result.llc_per_chain, [1.432698, 1.244444], atol=1e-6)
    assert result.attrs["baseline"] == "init_loss"
    assert result.attrs["n_beta"] == 10.0


def test_what_is_no_store_is_said_so(tmp_path):
    with pytest.raises(StoreError, match=r"no zarr\.json"):
        open_store(tmp_path)
    (tmp_path / "zarr.json").write_text("{")
    with pytest.raises(StoreError, match="cannot be read"):
        open_store(tmp_path)
