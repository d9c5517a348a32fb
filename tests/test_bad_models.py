"""Models, masks and loss functions that cannot be used are refused, at the latest by one batch before the run."""

import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cases import GOOD, INF, NAN, TinyLM, random_tokens

import devinterp
from devinterp.engine.checkpoint import check_model

DATA = random_tokens()


def model_with(change) -> TinyLM:
    model = TinyLM()
    change(model)
    return model


def tie(model):
    model.out.weight = model.embed.weight


def parametrise(model):
    torch.nn.utils.parametrizations.weight_norm(model.mix)


def add(dtype, **arguments):
    return lambda model: model.register_parameter("more", torch.nn.Parameter(torch.zeros(3).to(dtype), **arguments))


def quantise(model):
    model.mix = type("Linear", (torch.nn.Linear,), {"__module__": "torch.ao.nn.quantized.modules.linear"})(8, 8)


MODELS = [
    (lambda m: m.mix.weight.data.fill_(NAN), {}, "'mix.weight' with NaN"),
    (lambda m: m.mix.bias.data[0].fill_(INF), {}, "'mix.bias' with NaN or infinite"),
    (lambda m: m.requires_grad_(False), {}, "all parameters frozen.*requires_grad_"),
    (lambda m: m.to("meta"), {}, "meta device"),
    (lambda m: None, {"param_masks": {"mix.wieght": None}}, r"'mix.wieght'.*\['mix.weight'"),
    (lambda m: None, {"param_masks": {"mix.weight": torch.ones(3, dtype=torch.bool)}}, r"\(3,\).*\(8, 8\)"),
    (lambda m: None, {"param_masks": {"mix.weight": torch.zeros(8, 8, dtype=torch.bool)}}, "all False"),
    (lambda m: None, {"param_masks": {}}, "at least one"),
    (lambda m: None, {"param_masks": {"mix.weight": torch.full((8, 8), 0.5)}}, "0 and 1"),
    (lambda m: None, {"param_masks": {"mix.weight": torch.full((8, 8), NAN)}}, "0 and 1"),
    (lambda m: None, {"param_masks": {"mix.weight": np.ones((8, 8))}}, "bool tensor"),
    (lambda m: None, {"param_masks": ["mix.weight"]}, "a dict"),
    (tie, {"param_masks": {"out.weight": None}}, "tied weight, 'embed.weight'"),
    (parametrise, {}, "parametrised weight.*remove_parametrizations"),
    (parametrise, {"param_masks": {"mix.weight": None}}, "mix.weight"),
    (quantise, {}, "quantised module 'mix'.*unquantised"),
    (add(torch.int8, requires_grad=False), {}, "'more'='torch.int8'.*param_masks"),
    (add(torch.int8, requires_grad=False), {"param_masks": {"more": None}}, "'more'='torch.int8'.*unquantised"),
    (add(torch.complex64), {}, "'more'='torch.complex64'"),
    (add(torch.float8_e4m3fn), {}, "'more'='torch.float8_e4m3fn'"),
    (lambda m: setattr(m, "more", torch.nn.LazyLinear(3)), {}, "lazy parameter 'more.weight'.*forward pass first"),
    (lambda m: m.out.to("meta"), {}, "meta device"),
]


@pytest.mark.parametrize(("change", "settings", "message"), MODELS, ids=[m[2][:25] for m in MODELS])
def test_models_and_masks(refused, change, settings, message):
    refused(message, model=model_with(change), **settings)


@pytest.mark.parametrize("change", [parametrise, add(torch.int8, requires_grad=False)])
def test_odd_parameters_that_stay_as_they_are_do_not_matter(change):
    assert devinterp.sample(model_with(change), DATA, {}, param_masks={"out.bias": None}, **GOOD).attrs["completed"]


def test_a_model_that_is_partly_offloaded_is_refused():
    model = TinyLM()
    model.parameters = lambda: iter(
        [SimpleNamespace(device=torch.device("cuda:0")), SimpleNamespace(device=torch.device("cpu"))]
    )
    with pytest.raises(ValueError, match=r"on devices \['cpu', 'cuda:0'\].*without device_map"):
        check_model(model)


@pytest.mark.parametrize("kind", [torch.int64, torch.float32, torch.uint8])
def test_masks_of_numbers_are_converted(kind):
    mask = torch.zeros(8, 8, dtype=kind)
    mask[0] = 1
    one = devinterp.sample(TinyLM(), DATA, {}, param_masks={"mix.weight": mask}, **GOOD)
    other = devinterp.sample(TinyLM(), DATA, {}, param_masks={"mix.weight": mask.bool()}, **GOOD)
    np.testing.assert_array_equal(one.sampling_loss, other.sampling_loss)


def test_model_must_be_a_module():
    with pytest.raises(TypeError, match="model=.*torch.nn.Module"):
        devinterp.sample("EleutherAI/pythia-14m", DATA, {}, **GOOD)


def per_token(change):
    def loss_fn(model, ids):
        losses = torch.nn.functional.cross_entropy(model(ids)[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
        return change(losses, model)

    return loss_fn


def spoil(losses, model):
    with torch.no_grad():
        model.mix.weight.data.add_(1e-3)
    return losses


LOSSES = [
    (per_token(lambda losses, _: losses.mean()), "shape"),
    (per_token(lambda losses, _: losses[:, :-1]), r"shape \(4, 4\).*\(4, 5\)"),
    (per_token(lambda losses, _: losses.detach()), "without a gradient"),
    (per_token(lambda losses, _: losses.long()), "without a gradient"),
    (per_token(lambda losses, _: losses * NAN), "NaN or infinite"),
    (per_token(spoil), "changes the weights"),
    (per_token(lambda losses, _: 1 / 0), "ZeroDivisionError"),
    (per_token(lambda losses, _: None), "failed on a batch"),
]


@pytest.mark.parametrize(("loss_fn", "message"), LOSSES, ids=[x[1][:25] for x in LOSSES])
def test_loss_functions_are_probed_on_one_batch(refused, loss_fn, message):
    refused(message, loss_fn=loss_fn, loss_fn_id="bad", forwards=2)


class Odd(TinyLM):
    def __init__(self, change):
        super().__init__()
        self.change = change

    def forward(self, ids):
        return self.change(super().forward(ids))


OUTPUTS = [
    (lambda logits: (logits,), "output tuple"),
    (lambda logits: None, "output NoneType"),
    (lambda logits: logits[:, 0], r"output \(1, 11\)"),
    (lambda logits: logits[..., :5], "token id 10.*vocabulary of 5"),
    (lambda logits: logits.argmax(-1), "logits"),
    (lambda logits: logits[:, 1:], "logits of 5 positions.*each of 6 tokens"),
    (lambda logits: logits.detach(), "without a gradient"),
    (lambda logits: logits * NAN, "NaN or infinite"),
]


@pytest.mark.parametrize(("change", "message"), OUTPUTS, ids=[o[1][:20] for o in OUTPUTS])
def test_model_outputs_are_probed(refused, change, message):
    refused(message, model=Odd(change), forwards=3)


class Noisy(TinyLM):
    def __init__(self):
        super().__init__()
        self.drop, self.norm = torch.nn.Dropout(0.5), torch.nn.BatchNorm1d(8)

    def forward(self, ids):
        return self.out(self.norm(self.drop(self.embed(ids)).transpose(1, 2)).transpose(1, 2))


def test_dropout_and_batch_norm_are_warned_about_in_train_mode_alone():
    devinterp.sample(Noisy().train(), DATA, {}, **GOOD)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        samples = devinterp.sample(Noisy(), DATA, {}, train_mode=True, **GOOD)
    said = " ".join(str(warning.message) for warning in caught)
    assert "dropout adds noise to every gradient" in said
    assert "batch-norm statistics move" in said
    again = Noisy()
    np.testing.assert_array_equal(samples.step_loss, _quietly(again).step_loss)
    assert again.norm.num_batches_tracked == 0, "they are put back"


def _quietly(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return devinterp.sample(model, DATA, {}, train_mode=True, **GOOD)


def test_nondeterministic_losses_are_warned_about():
    count = []

    def loss_fn(model, ids):
        count.append(1)
        return model(ids)[:, :-1].square().mean(-1) + len(count)

    with pytest.warns(UserWarning, match="cannot be repeated"):
        devinterp.sample(TinyLM(), DATA, {}, loss_fn=loss_fn, **GOOD)
