"""The control: the same sampled with n_beta=0, at the step size of the run, stored beside it."""

import warnings

import numpy as np
import pytest
import torch
import xarray as xr
from cases import TinyLM, Weights, random_tokens, rows
from checks import LIMIT
from targets import quadratic_covariance

import devinterp
from devinterp.errors import DevinterpInputError, RunMismatchError
from devinterp.store.reader import open_store

SHORT = {"lr": 1e-3, "n_beta": 20.0, "localization": 5.0, "batch_size": 3, "num_draws": 12, "num_chains": 2,
         "num_init_loss_batches": 1, "progress": False}  # fmt: skip
DATA, OTHER = random_tokens(), random_tokens(40, seed=9)
OBSERVABLES = {"pile": (DATA, 2), "b": (OTHER, 1)}
MASKS = {"full": None, "mix": {"mix.weight": None, "mix.bias": None}, "out": {"out.weight": None}}
SUITE = {"observables": OBSERVABLES, "weight_restrictions": MASKS, "sampling_task": "pile"}


def prior_alone(**settings):
    with pytest.warns(UserWarning, match="n_beta=0"):
        return devinterp.sample(TinyLM(), DATA, OBSERVABLES, **(SHORT | settings | {"n_beta": 0.0}))


@pytest.mark.parametrize("estimator", ["two_chain", "one_chain"])
def test_the_control_of_a_suite_is_the_suite_without_a_loss(estimator, tmp_path):
    options = SUITE | {"estimator": estimator, "output_path": tmp_path / "s.zarr"}
    tree = devinterp.susceptibilities(TinyLM(), DATA, control=True, **options, **SHORT)
    runs = {name: prior_alone(param_masks=masks) for name, masks in MASKS.items()}
    expected = devinterp.compute_susceptibilities(runs, "pile", estimator=estimator)["susceptibilities"].to_dataset()
    control = tree["control"].to_dataset()
    xr.testing.assert_equal(control, expected)
    assert {"sus", "sus_sem"} <= set(control)
    plain = devinterp.susceptibilities(TinyLM(), DATA, **SUITE, estimator=estimator, **SHORT)
    xr.testing.assert_equal(tree["susceptibilities"].to_dataset(), plain["susceptibilities"].to_dataset())
    assert "control" not in plain
    names = MASKS if estimator == "two_chain" else ("mix", "out")
    stored = {f"s_{name}.zarr" for name in MASKS} | {f"s_control_{name}.zarr" for name in names}
    assert {path.name for path in tmp_path.iterdir() if path.suffix == ".zarr"} == stored
    tree.to_zarr(tmp_path / "saved", consolidated=False)


def test_a_control_goes_on_where_it_stopped(tmp_path):
    model, calls = TinyLM(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    options = SUITE | {"output_path": tmp_path / "s"} | SHORT
    devinterp.susceptibilities(TinyLM(), DATA, **options)
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*") if file.is_file()}
    first = devinterp.susceptibilities(model, DATA, control=True, **options)
    assert calls
    after = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*") if file.is_file()}
    assert {file: after[file] for file in before} == before, "only the control was sampled"
    calls.clear()
    again = devinterp.susceptibilities(model, DATA, control=True, **options)
    assert not calls, "everything was stored"
    xr.testing.assert_equal(first["control"].to_dataset(), again["control"].to_dataset())


def test_the_step_size_is_that_of_the_run(tmp_path):
    auto = SHORT | {"lr": "auto", "sampling_method": "leimkuhler_matthews", "output_path": tmp_path / "s"}
    devinterp.susceptibilities(TinyLM(), DATA, control=True, **SUITE, **auto)
    devinterp.bif(TinyLM(), DATA, OBSERVABLES, control=True, **(auto | {"output_path": tmp_path / "b"}))
    stores = {path.name: open_store(path) for path in tmp_path.iterdir() if not path.name.endswith(".run")}
    told = {name: store.attrs["metadata"] for name, store in stores.items()}
    assert len({metadata["step_size"]["lr"] for metadata in told.values()}) == 1
    assert {name for name, metadata in told.items() if metadata["config"]["sampler"]["n_beta"] == 0} == {
        "s_control_full", "s_control_mix", "s_control_out", "b_control"}  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"errors": True}, {"queries": [(0, 2)]}, {"correlation_method": "sequence"}])
def test_influences_of_the_control_stand_beside_them(options, tmp_path):
    result = devinterp.bif(TinyLM(), DATA, OBSERVABLES, control=True, output_path=tmp_path / "b.zarr", **options, **SHORT)
    expected = devinterp.compute_bif(prior_alone(), progress=False, **options)
    np.testing.assert_array_equal(result.influences_control, expected.influences)
    assert result.influences_control.dims == result.influences.dims
    if "errors" in options:
        np.testing.assert_array_equal(result.influences_control_sem, expected.influences_sem)
    plain = devinterp.bif(TinyLM(), DATA, OBSERVABLES, **options, **SHORT)
    xr.testing.assert_equal(result.drop_vars([n for n in result if "_control" in n]), plain)
    assert {p.name for p in tmp_path.iterdir() if p.suffix == ".zarr"} == {"b.zarr", "b_control.zarr"}
    model, calls = TinyLM(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    devinterp.bif(model, DATA, OBSERVABLES, control=True, output_path=tmp_path / "b.zarr", **options, **SHORT)
    assert not calls


def test_a_large_control_is_written_beside_the_large_result(tmp_path):
    options = {"bif_output_path": tmp_path / "large", "output_path": tmp_path / "runs"}
    result = devinterp.bif(TinyLM(), DATA, OBSERVABLES, control=True, **options, **SHORT)
    stored = open_store(tmp_path / "large_control").to_dataset()
    np.testing.assert_array_equal(result.influences_control, stored.influences)


def test_the_control_holds_what_the_prior_gives_and_no_more():
    """Losses +-w_i + w'Hw/2 under S = (n_beta H + gamma)^-1, and under 1/gamma: H ties w_0 to w_1, the prior does not."""
    H, n_beta, gamma = torch.tensor([[1.0, 0.8], [0.8, 1.0]]), 30.0, 10.0
    slopes = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])

    def loss_fn(model, ids):
        return (slopes[ids[:, 0]] @ model.w + 0.5 * model.w @ H @ model.w)[:, None]

    result = devinterp.bif(
        Weights(torch.zeros(2)), rows(4), {"x": (rows(4), 1)}, control=True, errors=True, compute_covariance=True,
        loss_fn=loss_fn, lr=0.015, n_beta=n_beta, localization=gamma, sampling_method="leimkuhler_matthews", batch_size=4,
        num_chains=4, num_draws=2000, num_burnin_steps=200, num_init_loss_batches=1, progress=False,
    )  # fmt: skip
    a = slopes[result.input_ids[:, 0].values].double().numpy()
    H = H.double().numpy()
    for name, S in (("influences", np.linalg.inv(n_beta * H + gamma * np.eye(2))), ("influences_control", np.eye(2) / gamma)):
        exact = np.array([[quadratic_covariance(H, one, H, other, S) for other in a] for one in a])
        found, error = result[name].values[:, :, 0, 0], result[f"{name}_sem"].values[:, :, 0, 0]
        assert (np.abs(found - exact) < LIMIT * error).all(), name
        assert error.max() < 0.15 * np.abs(exact).max()


BAD = [
    ({"localization": 0.0}, "control=True: must be False with localization=0 and llc_weight_decay=0"),
    ({"control": "yes"}, "control='yes'"),
    ({"n_beta": 0.0}, "control=True: must be False with n_beta=0"),
]
IN_SUITES = [({"weight_restrictions": MASKS | {"control_mix": MASKS["mix"]}}, "names without 'control_'")]
IN_BIF = [
    ({"top_k": 3}, "control=True: must be False with top_k"),
    ({"output_path": "a", "bif_output_path": "a_control"}, "such that all of them differ"),
]


@pytest.mark.filterwarnings("ignore:n_beta=0")
@pytest.mark.parametrize("call", ["susceptibilities", "bif"])
@pytest.mark.parametrize(("change", "message"), BAD + IN_SUITES + IN_BIF, ids=[b[1][-20:] for b in BAD + IN_SUITES + IN_BIF])
def test_a_control_that_cannot_be_is_refused_before_any_compute(call, change, message, tmp_path, monkeypatch):
    if (change, message) in (IN_BIF if call == "susceptibilities" else IN_SUITES):
        return
    monkeypatch.chdir(tmp_path)
    model, calls = TinyLM(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    arguments = (SUITE if call == "susceptibilities" else {"observables": OBSERVABLES}) | SHORT | {"control": True} | change
    with pytest.raises(DevinterpInputError, match=message):
        getattr(devinterp, call)(model, DATA, **arguments)
    assert not calls
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("call", ["susceptibilities", "bif"])
def test_another_run_at_the_path_of_a_control_is_refused_before_the_first_chain(call, tmp_path):
    name = "s_control_mix" if call == "susceptibilities" else "s_control"
    devinterp.sample(TinyLM(), DATA, OBSERVABLES, output_path=tmp_path / name, **SHORT)
    arguments = SUITE if call == "susceptibilities" else {"observables": OBSERVABLES}
    with pytest.raises(RunMismatchError, match="n_beta"):
        getattr(devinterp, call)(TinyLM(), DATA, control=True, output_path=tmp_path / "s", **arguments, **SHORT)
    assert sorted(p.name for p in tmp_path.iterdir()) == [name, f"{name}.run"]


def test_a_control_that_fails_is_listed_and_the_rest_is_there(tmp_path):
    model = TinyLM()
    start = model.mix.weight.detach().clone()
    out = model.out.weight.detach().clone()

    def loss_fn(model, ids):
        losses = torch.nn.functional.cross_entropy(model(ids)[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
        if (
            not torch.equal(model.out.weight, out)
            and torch.equal(model.mix.weight, start)
            and (tmp_path / "s_control_out").exists()
        ):
            raise MemoryError("out of memory")
        return losses

    with pytest.warns(UserWarning, match="1 of 6 restrictions failed and are left out. control_out: .*out of memory"):
        tree = devinterp.susceptibilities(
            model, DATA, control=True, loss_fn=loss_fn, loss_fn_id="x", output_path=tmp_path / "s", chains_together="sequential",
            **SUITE, **SHORT,
        )  # fmt: skip
    assert tree["control"].wr.values.tolist() == ["mix"]
    assert tree["susceptibilities"].wr.values.tolist() == ["mix", "out"]
    assert list(tree.attrs["failed"]) == ["control_out"]


def test_a_control_warns_about_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        devinterp.bif(TinyLM(), DATA, OBSERVABLES, control=True, **SHORT)
