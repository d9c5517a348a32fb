"""Models spread over devices, as `device_map` loads them: the numbers are those of the model on one."""

import pytest
import torch
import xarray as xr
from cases import TinyLM, random_tokens
from two_devices import FIRST, SECOND, Placed, spread, two_devices
from zoo import tiny_model

import devinterp
from devinterp.errors import DevinterpInputError

SHORT = {"lr": 1e-3, "n_beta": 10.0, "localization": 5.0, "batch_size": 4, "num_draws": 4, "num_chains": 2, "num_init_loss_batches": 1,
         "sampling_method": "leimkuhler_matthews", "progress": False, "chains_together": "sequential"}  # fmt: skip
CHANGES = {
    "auto": {"lr": "auto"},
    "metric": {"sampling_method": "preconditioned_leimkuhler_matthews"},
    "metrics and a box": {"save_metrics": True, "bounding_box_size": 0.5, "gradient_accumulation_steps": 2},
    "both at once": {"chains_together": "vmap"},
    "a mask over both": {"param_masks": {"mix.weight": torch.eye(8).bool(), "out.bias": None}},
}
DATA = random_tokens()


def halves() -> torch.nn.Module:
    return spread(TinyLM(), ("out",))


def test_the_second_device_is_one():
    with two_devices():
        here, there = torch.zeros(2), torch.ones(2, device=SECOND)
        assert (there + 1).device == SECOND
        assert isinstance(there[1:], Placed)
        with pytest.raises(RuntimeError, match="two devices"):
            here + there
        there[1:] += 1
        assert there.cpu().tolist() == [1, 2]
        assert here.copy_(there).tolist() == [1, 2]


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_spread_model_gives_the_numbers_of_one_device(change):
    settings = SHORT | change
    alone = devinterp.sample(TinyLM(), DATA, {"x": DATA}, **settings)
    model = halves()
    with two_devices():
        apart = devinterp.sample(model, DATA, {"x": DATA}, **settings)
    xr.testing.assert_equal(alone.to_dataset(), apart.to_dataset())
    assert {p.device for p in model.parameters()} == {FIRST, SECOND}


def test_components_of_a_spread_model(tmp_path):
    """Of the first device and of the second."""
    arguments = SHORT | {"sampling_task": "x", "weight_restrictions": {"full": None, "mix": "mix.weight", "out": "out.weight"}}
    alone = devinterp.susceptibilities(TinyLM(), DATA, {"x": DATA, "y": DATA}, **arguments)
    with two_devices():
        apart = devinterp.susceptibilities(halves(), DATA, {"x": DATA, "y": DATA}, output_path=tmp_path / "s", **arguments)
    xr.testing.assert_equal(alone["susceptibilities"].to_dataset(), apart["susceptibilities"].to_dataset())
    assert not apart.attrs["failed"]


def test_a_run_of_a_spread_model_goes_on(tmp_path):
    with two_devices():
        devinterp.sample(halves(), DATA, {}, output_path=tmp_path / "run", **SHORT | {"num_draws": 3})
        longer = devinterp.sample(halves(), DATA, {}, output_path=tmp_path / "run", **SHORT)
    alone = devinterp.sample(TinyLM(), DATA, {}, **SHORT)
    xr.testing.assert_equal(longer["sampling_loss"], alone["sampling_loss"])


@pytest.mark.slow
def test_heads_of_a_spread_transformer():
    """With losses taken without whole logits, and what is frozen computed once."""
    data = random_tokens(16, 11, 40)
    restrictions = {"full": None, "l0h0": "l0h0", "l1h1": "l1h1", "both": ["l0h0", "l1 mlp"]}
    arguments = SHORT | {"sampling_task": "x", "weight_restrictions": restrictions, "lr": "auto"}
    alone = devinterp.susceptibilities(tiny_model("gpt_neox", "mha"), data, {"x": data, "y": data}, **arguments)
    model = spread(tiny_model("gpt_neox", "mha"), ("gpt_neox.layers.1", "gpt_neox.final_layer_norm", "embed_out"))
    with two_devices():
        apart = devinterp.susceptibilities(model, data, {"x": data, "y": data}, **arguments)
    xr.testing.assert_equal(alone["susceptibilities"].to_dataset(), apart["susceptibilities"].to_dataset())


PLACES = {"device": {"device": "cpu"}, "devices": {"devices": ["cpu", "cpu"]}, "processes": {"chains_together": "processes"}}


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_places_that_would_gather_it_are_refused(place, tmp_path):
    with two_devices(), pytest.raises(DevinterpInputError, match="several devices"):
        devinterp.sample(halves(), DATA, {}, output_path=tmp_path / "run", **SHORT | place)
    assert not list(tmp_path.iterdir())
