"""Every bad input is refused before any forward pass and before any file is made, with argument, value, range and fix."""

import math
import re

import numpy as np
import pytest
import torch
from cases import TinyLM, Weights, quadratic, random_tokens, rows
from datasets import Dataset, IterableDataset

import devinterp
from devinterp.errors import DevinterpInputError

GOOD = {"lr": 1e-3, "n_beta": 10.0, "localization": 1.0, "num_chains": 2, "num_draws": 2, "batch_size": 4,
        "num_init_loss_batches": 1, "progress": False}  # fmt: skip
NAN, INF = math.nan, math.inf

SETTINGS = [
    ("lr", NAN), ("lr", INF), ("lr", 0), ("lr", 0.0), ("lr", -1e-3), ("lr", 1e30), ("lr", "fast"), ("lr", None), ("lr", True),
    ("n_beta", NAN), ("n_beta", INF), ("n_beta", -1.0), ("n_beta", "30"), ("n_beta", None),
    ("localization", NAN), ("localization", INF), ("localization", -1.0), ("localization", None),
    ("noise_level", NAN), ("noise_level", -1.0), ("noise_level", INF),
    ("llc_weight_decay", -0.1), ("llc_weight_decay", NAN),
    ("bounding_box_size", 0), ("bounding_box_size", -1.0), ("bounding_box_size", NAN),
    ("init_noise", -1.0), ("init_noise", NAN),
    ("num_chains", 0), ("num_chains", -1), ("num_chains", 1.5), ("num_chains", True), ("num_chains", "4"),
    ("num_draws", 0), ("num_burnin_steps", -1), ("num_steps_bw_draws", 0), ("batch_size", 0),
    ("gradient_accumulation_steps", 0), ("num_init_loss_batches", 0), ("batches_per_draw", 0),
    ("init_seed", -1), ("init_seed", 2**64), ("init_seed", 1.0), ("init_seed", True), ("obs_seed", -1), ("obs_seed", True),
    ("shuffle", 1), ("save_metrics", "yes"), ("train_mode", 0), ("match_sampling_input_ids_across_chains", None),
    ("sampling_method", "sgld"), ("sampling_method", None), ("on_diverged", "drop"),
    ("device", "cuda:99"), ("device", "cud"),
    ("output_path", "s3://bucket/run"), ("output_path", "http://host/run"), ("output_path", 3), ("output_path", "a\0b"),
    ("output_path", __file__), ("output_path", "x" * 5000),
    ("loss_fn", 3), ("sampling_method_kwargs", 3),
]  # fmt: skip

TOGETHER = [
    ({"n_beta": 0.0, "localization": 0.0}, "n_beta=0 .*random walk"),
    ({"lr": 5.0}, "lr=5.0.*diverges"),
    ({"lr": "auto", "sampling_method": "rmsprop_sgld"}, "lr='auto'"),
    ({"rmsprop_eps": 0.1}, "rmsprop_eps=0.1"),
    ({"sampling_method": "rmsprop_sgld", "rmsprop_eps": 0.0}, r"sampling_method_kwargs\['eps'\]"),
    ({"sampling_method": "rmsprop_sgld", "rmsprop_alpha": 1.5}, r"sampling_method_kwargs\['alpha'\]=1.5.*<= 1"),
    ({"sampling_method": "rmsprop_sgld", "rmsprop_eps": 0.1, "sampling_method_kwargs": {"eps": 0.1}}, "rmsprop_eps=0.1.*once"),
    ({"sampling_method": "rmsprop_sgld", "sampling_method_kwargs": {"lr": 1.0}}, r"sampling_method_kwargs\['lr'\]"),
    ({"sampling_method": "rmsprop_sgld", "sampling_method_kwargs": {"beta": 1.0}}, r"\['beta'\].*alpha"),
    ({"sampling_method": "rmsprop_sgld", "sampling_method_kwargs": {"add_grad_correction": True}}, "add_grad_correction"),
    ({"sampling_method": "rmsprop_sgld", "sampling_method_kwargs": {"bias_correction": True, "alpha": 1.0}}, "below 1"),
    ({"sampling_method_kwargs": {"alpha": 0.9}}, "sgmcmc_sgld takes"),
]


def two(ids):
    return Dataset.from_dict({"input_ids": ids})


DATASETS = [
    (two([]), "0 sequences"),
    (two([[1, 2, 3]] * 3), "3 sequences.*at least 4"),
    (Dataset.from_dict({"text": ["a"] * 8}), r"columns \['text'\]"),
    (two([[1, 2, 3]] * 6 + [[1, 2]] + [[1, 2, 3]]), "row 6 has 2 tokens, row 0 has 3"),
    (two([[1]] * 8), "length 1.*at least 2"),
    (two([[1, 11, 2]] * 8), "token id 11.*vocabulary of 11"),
    (two([[1, 2, 3]] * 5 + [[1, -100, 3]] * 3), "row 5 holds the negative id -100"),
    (two([[1.0, 2.0]] * 8), "integer token ids"),
    (two([["a", "b"]] * 8), "integer token ids"),
    (two(list(range(8))), "one list of integers per row"),
    (IterableDataset.from_generator(lambda: iter([{"input_ids": [1, 2]}])), "random access.*take"),
    ([[1, 2, 3]] * 8, "a datasets.Dataset"),
    (torch.zeros(8, 3), "a datasets.Dataset"),
]

DATA = random_tokens()
OBSERVABLES = [
    ({"x": (DATA,)}, r"observables\['x'\]"),
    ({"x": (DATA, -1)}, r"observables\['x'\].*>= 1"),
    ({"x": (DATA, True)}, r"observables\['x'\]"),
    ({"x": [DATA, 2.5]}, r"observables\['x'\]"),
    ({"x": [DATA, DATA]}, r"observables\['x'\]"),
    ({"x": random_tokens(length=5)}, r"observables\['x'\].*as long as dataset: 6"),
    ({"x": random_tokens(8)}, r"observables\['x'\]=.*8 sequences.*at least 12"),
    ({"x": None}, r"observables\['x'\]"),
    ({"a-b": DATA, "a_b": DATA}, "'a_b' and 'a-b' would both"),
    ({"A": DATA, "a": DATA}, "would both"),
    ({"": DATA}, "observables=''"),
    ({"..": DATA}, "observables='..'"),
    ({"x" * 300: DATA}, "1 to 64"),
    ({"naïve": DATA}, "naïve"),
    ({"sampling": DATA}, "taken"),
    ({3: DATA}, "observables=3: must be a string"),
    (DATA, "a dict"),
    (None, "a dict"),
]


def model_with(change) -> TinyLM:
    model = TinyLM()
    change(model)
    return model


def tie(model):
    model.out.weight = model.embed.weight


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
]


@pytest.fixture
def refused(tmp_path):
    """Calls sample and checks the contract of a refusal."""

    def check(message: str, model=None, dataset=DATA, observables=None, **settings):
        model, calls = model or TinyLM(), []
        model.register_forward_hook(lambda *_: calls.append(1))
        settings = GOOD | {"output_path": tmp_path / "run"} | settings
        with pytest.raises(DevinterpInputError) as caught:
            devinterp.sample(model, dataset, {} if observables is None else observables, **settings)
        assert isinstance(caught.value, ValueError | TypeError)
        assert re.search(message, str(caught.value)), f"{caught.value} does not match {message}"
        assert not calls, "a forward pass ran"
        assert not list(tmp_path.iterdir()), "a file was made"

    return check


@pytest.mark.parametrize(("name", "value"), SETTINGS, ids=lambda v: repr(v)[:20])
def test_settings(refused, name, value):
    refused(f"(?s){name}=.*must be.*\\.", **{name: value})


@pytest.mark.parametrize(("settings", "message"), TOGETHER, ids=[str(sorted(t[0]))[:60] for t in TOGETHER])
def test_settings_that_do_not_go_together(refused, settings, message):
    refused(message, **settings)


@pytest.mark.parametrize(("dataset", "message"), DATASETS, ids=[d[1][:25] for d in DATASETS])
def test_datasets(refused, dataset, message, tmp_path):
    if "vocabulary" in message:  # the vocabulary is known from one forward pass on zeros
        with pytest.raises(DevinterpInputError, match=message):
            devinterp.sample(TinyLM(), dataset, {}, output_path=tmp_path / "run", **GOOD)
        assert not list(tmp_path.iterdir())
        return
    refused(message, dataset=dataset)


@pytest.mark.parametrize(("observables", "message"), OBSERVABLES, ids=[o[1][:25] for o in OBSERVABLES])
def test_observables(observables, message, tmp_path):
    with pytest.raises(DevinterpInputError, match=message):
        devinterp.sample(TinyLM(), DATA, observables, output_path=tmp_path / "run", **GOOD)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("change", "settings", "message"), MODELS, ids=[m[2][:25] for m in MODELS])
def test_models_and_masks(refused, change, settings, message):
    refused(message, model=model_with(change), **settings)


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
def test_loss_functions_are_probed_on_one_batch(loss_fn, message, tmp_path):
    with pytest.raises(DevinterpInputError, match=message):
        devinterp.sample(TinyLM(), DATA, {}, loss_fn=loss_fn, output_path=tmp_path / "run", **GOOD)
    assert not list(tmp_path.iterdir())


class Odd(TinyLM):
    def forward(self, ids):
        return (super().forward(ids),)


def test_model_outputs_are_probed(tmp_path):
    with pytest.raises(TypeError, match="model='output tuple'.*logits"):
        devinterp.sample(Odd(), DATA, {}, output_path=tmp_path / "run", **GOOD)
    assert not list(tmp_path.iterdir())


WARNED = [
    ({"noise_level": 0.5}, "noise_level=0.5"),
    ({"n_beta": 0.0}, "n_beta=0: the loss does not act"),
    ({"n_beta": 1.0}, "n_beta=1"),
    ({"num_init_loss_batches": 20}, "some are counted more than once"),
    ({"lr": 0.5}, "biases the variance of the weights by 12%"),
    ({"lr": 1e-2, "sampling_method": "rmsprop_sgld", "localization": 20.0}, "up to 50%"),
    ({"lr": 30.0, "localization": 0.0}, "no chain is stable from 4 on"),
]


@pytest.mark.parametrize(("settings", "message"), WARNED, ids=[w[1][:25] for w in WARNED])
def test_legal_but_doubtful_settings_are_warned_about(settings, message):
    with pytest.warns(UserWarning, match=message):
        devinterp.sample(TinyLM(), DATA, {}, **(GOOD | settings))


def test_nondeterministic_losses_are_warned_about():
    count = []

    def loss_fn(model, ids):
        count.append(1)
        return model(ids)[:, :-1].square().mean(-1) + len(count)

    with pytest.warns(UserWarning, match="cannot be repeated"):
        devinterp.sample(TinyLM(), DATA, {}, loss_fn=loss_fn, **GOOD)


def test_padding_is_warned_about():
    model = TinyLM()
    model.config = type("Config", (), {"pad_token_id": 0, "eos_token_id": 1})()
    with pytest.warns(UserWarning, match="end in the padding token 0"):
        devinterp.sample(model, two([[1, 2, 0, 0]] * 8), {}, **GOOD)


def test_large_seeds_are_allowed():
    devinterp.sample(TinyLM(), DATA, {}, **(GOOD | {"init_seed": 2**64 - 1, "obs_seed": 2**40}))


def test_a_diverging_lr_is_certain_for_a_quadratic():
    chosen = GOOD | {"lr": 0.25, "num_draws": 1, "localization": 0.0}  # lr n_beta h = 5
    with pytest.warns(UserWarning, match=r"is 5 at the checkpoint \(h_max=2\).*Try lr=0.05"):
        devinterp.sample(Weights(torch.ones(3)), rows(8), {}, loss_fn=quadratic(2.0), **chosen)
