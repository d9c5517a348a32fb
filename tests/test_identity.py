"""A stored run is returned for the same inputs only: single changes that are refused, and changes of form that are not."""

import copy
import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import random_tokens
from datasets import Dataset, Features, List, Value, load_from_disk
from test_fingerprints import Loss, Sly, captured, per_token
from torch import nn
from torch.nn import functional as F

import devinterp
from devinterp.errors import DevinterpInputError, RunMismatchError
from devinterp.store.fingerprints import architecture, fingerprint

DATA, OTHER = random_tokens(24), random_tokens(24, seed=1)
SHORT = {"lr": 1e-3, "n_beta": 10.0, "batch_size": 2, "num_draws": 2, "num_chains": 2, "num_init_loss_batches": 1,
         "batches_per_draw": 1, "progress": False}  # fmt: skip
MIX = {"mix.weight": None}


class Model(nn.Module):
    """One place for each thing that can be another at equal weights."""

    def __init__(self, activation=nn.Tanh, dropout=0.1, eps=1e-5, power=1.0, embedding=nn.Embedding, act=F.relu, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embed, self.mix = embedding(11, 8), nn.Linear(8, 8)
            self.norm, self.drop, self.activation = nn.LayerNorm(8, eps=eps), nn.Dropout(dropout), activation()
            self.out = nn.Linear(8, 11, bias=False)
            self.again = nn.Linear(8, 11, bias=False)
        self.again.weight.data.copy_(self.out.weight)
        self.register_buffer("shift", torch.zeros(8))
        self.register_buffer("passing", torch.ones(8), persistent=False)
        self.power, self.act = power, act

    def forward(self, ids):
        x = self.act(self.drop(self.activation(self.norm(self.mix(self.embed(ids)))))) ** self.power
        return self.out(x * self.passing + self.shift) + self.again(x)


class OtherCode(Model):
    def forward(self, ids):
        return 2 * super().forward(ids)


def changed(change, **arguments):
    model = Model(**arguments)
    with torch.no_grad():
        change(model)
    return model


def flip(tensor, bit=0):
    """One bit of one element."""
    tensor.view(-1).view(torch.int32)[3] ^= 1 << bit


def tie(model):
    model.again.weight = model.out.weight


def tokens(change):
    ids = [list(row) for row in DATA["input_ids"]]
    change(ids)
    return Dataset.from_dict({"input_ids": ids})


def one_token(ids):
    ids[17][2] = (ids[17][2] + 1) % 11


def reshaped(ids):
    flat = [token for row in ids for token in row]
    ids[:] = [flat[i : i + 4] for i in range(0, len(flat), 4)]


def half(parameter=(8, 8), at=0):
    mask = torch.zeros(parameter, dtype=torch.bool)
    mask[:4] = True
    mask[7, 7] = bool(at)
    return mask


MODEL = "architecture of the model"
WEIGHTS = "weights and buffers of the model"
MODELS = [
    ("last bit of a weight", changed(lambda m: flip(m.mix.weight)), WEIGHTS),
    ("sign of a zero", changed(lambda m: flip(m.shift, 31)), WEIGHTS),
    ("buffer", changed(lambda m: flip(m.shift)), WEIGHTS),
    ("buffer that is not saved", changed(lambda m: flip(m.passing)), WEIGHTS),
    ("dtype", Model().double(), WEIGHTS),
    ("two weights exchanged", changed(lambda m: m.mix.weight.copy_(m.mix.weight[:, [1, 0, *range(2, 8)]].clone())), WEIGHTS),
    ("tied, of equal values", changed(tie), "tied weights"),
    ("activation", Model(activation=nn.GELU), MODEL),
    ("function as an attribute", Model(act=F.gelu), MODEL),
    ("C function as an attribute", Model(act=torch.sigmoid), MODEL),
    ("number as an attribute", Model(power=2.0), MODEL),
    ("dropout", Model(dropout=0.2), MODEL),
    ("eps of a norm", Model(eps=1e-3), MODEL),
    ("class of a module", Model(embedding=type("Embedding", (nn.Embedding,), {})), MODEL),
    ("code of the model", OtherCode(), MODEL),
    ("module more", changed(lambda m: m.add_module("more", nn.Identity())), MODEL),
    ("module twice", changed(lambda m: m.add_module("more", m.drop)), MODEL),
    ("forward of one module", changed(lambda m: setattr(m.mix, "forward", lambda x: x)), MODEL),
    ("tensor as an attribute", changed(lambda m: setattr(m, "gain", torch.ones(1))), MODEL),
]
DATASETS = [
    ("one token", tokens(one_token)),
    ("order of rows", DATA.select([1, 0, *range(2, 24)])),
    ("row less", DATA.select(range(23))),
    ("row twice", tokens(lambda ids: ids.append(ids[0]))),
    ("rows of another length", tokens(reshaped)),
]
SETTINGS = {
    "lr": 2e-3, "n_beta": 11.0, "num_chains": 1, "num_draws": 1, "batch_size": 3, "num_burnin_steps": 1, "num_steps_bw_draws": 2,
    "num_init_loss_batches": 2, "init_seed": 101, "batches_per_draw": 2, "obs_seed": 1, "gradient_accumulation_steps": 2,
    "localization": 1.0, "noise_level": 0.5, "llc_weight_decay": 1.0, "bounding_box_size": 1.0,
    "sampling_method": "leimkuhler_matthews", "shuffle": False, "match_sampling_input_ids_across_chains": False,
    "init_noise": 0.1, "save_metrics": True, "train_mode": True, "precision": "bf16",
}  # fmt: skip
SHAPES = {"batch_size", "batches_per_draw", "obs_seed"}
"""Settings by which observables see other rows too"""
RMSPROP = {"sampling_method": "rmsprop_sgld"}
CASES = [
    *[pytest.param({"model": model}, message, id=f"model: {what}") for what, model, message in MODELS],
    *[pytest.param({"dataset": data}, "dataset", id=f"dataset: {what}") for what, data in DATASETS if "length" not in what],
    *[pytest.param({name: value}, name, id=name) for name, value in SETTINGS.items()],
    pytest.param({"observables": {"y": DATA}}, "observable [xy]", id="observable: name"),
    pytest.param({"observables": {"x": OTHER}}, "observable x", id="observable: data"),
    pytest.param({"observables": {"x": (DATA, 2)}}, "observable x", id="observable: batches"),
    pytest.param({"observables": {"x": DATA.select(range(12, 24))}}, "observable x", id="observable: rows to choose from"),
    pytest.param({"observables": {"x": DATA, "y": DATA}}, "observable y", id="observable: one more"),
    pytest.param({"observables": {}}, "observable x", id="observable: none"),
    pytest.param({"param_masks": MIX | {"mix.bias": None}}, "param_masks", id="mask: parameter more"),
    pytest.param({"param_masks": {"mix.bias": None}}, "param_masks", id="mask: another parameter"),
    pytest.param({"param_masks": {"mix.weight": half(at=1)}}, "param_masks", id="mask: one bit"),
    pytest.param({"param_masks": None}, "param_masks", id="mask: none"),
    pytest.param({"loss_fn": lambda model, ids: per_token(model, ids)}, "loss_fn", id="loss_fn: given"),
]


def run(path, model=None, dataset=DATA, observables=None, **settings):
    observables = {"x": DATA} if observables is None else observables
    arguments = {"param_masks": {"mix.weight": half()}} | SHORT | settings
    return devinterp.sample(model or Model(), dataset, observables, output_path=path, **arguments)


def contents(path: Path) -> dict[str, str]:
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(path.rglob("*")) if p.is_file()}


def refused(path, message, **change):
    """One thing is another: the stored run is refused, with that name, and stays as it is."""
    before = contents(path)
    with pytest.raises(RunMismatchError, match=message) as caught:
        run(path, **change)
    assert contents(path) == before
    return caught.value.differences


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    path = tmp_path_factory.mktemp("identity") / "run"
    run(path)
    return path


@pytest.mark.parametrize(("change", "message"), CASES)
@pytest.mark.filterwarnings("ignore:(noise_level|train_mode)")
def test_one_change_is_refused_by_name(stored, change, message):
    differences = refused(stored, f"  - {message}: ", **change)
    also = "observable" if SHAPES & change.keys() else message.partition("[")[0]
    if "model" not in change:  # a tie, or a dtype, shows in several ways
        assert all(line.startswith((message, also)) for line in differences), differences


def test_a_setting_of_an_activation_is_another_architecture():
    exact, approximate = (Model(activation=functools.partial(nn.GELU, kind)) for kind in ("none", "tanh"))
    assert architecture(exact) != architecture(approximate)


def test_sequences_of_another_length_are_another_dataset(tmp_path):
    run(tmp_path / "run", observables={})
    assert refused(
        tmp_path / "run", "dataset: other values, or in another order or shape", observables={}, dataset=DATASETS[-1][1]
    )


@pytest.mark.parametrize("change", [{"alpha": 0.9}, {"eps": 0.2}, {"bias_correction": True}], ids=str)
def test_settings_of_a_sampler(tmp_path, change):
    run(tmp_path / "run", **RMSPROP)
    refused(tmp_path / "run", "sampling_method_kwargs", **RMSPROP, sampling_method_kwargs=change)


@pytest.mark.parametrize("name", ["device type", "format"])
def test_what_this_machine_cannot_change_is_compared_too(tmp_path, name):
    """Such as a run from a GPU, or one of another release."""
    run(tmp_path / "run")
    path = tmp_path / "run" / "zarr.json"
    stored = json.loads(path.read_text())
    stored["attributes"]["metadata"]["identity"][name] = "another"
    path.write_text(json.dumps(stored))
    shutil.rmtree(tmp_path / "run.run")  # which knows better
    assert len(refused(tmp_path / "run", f"{name}: stored 'another'")) == 1


# ---- loss functions


def test_modules_of_the_sampled_model_are_known_by_name():
    model = Model()
    before = fingerprint(captured(model.mix), model)
    with torch.no_grad():
        model.mix.weight.add_(1)
    assert fingerprint(captured(model.mix), model) == before != fingerprint(captured(model.out), model)
    assert fingerprint(captured(model.eval().mix), model) == before


def test_a_model_may_hold_what_cannot_be_compared():
    def holding(number):
        return changed(lambda m: setattr(m, "held", [threading.Lock(), Sly(), number]))

    assert architecture(holding(1)) == architecture(holding(1)) != architecture(holding(2))


def test_a_run_with_a_loss_fn_is_returned_or_refused(tmp_path):
    run(tmp_path / "run", loss_fn=Loss(1.0))
    before = contents(tmp_path)
    assert run(tmp_path / "run", loss_fn=Loss(1.0)).attrs["completed"]
    assert contents(tmp_path) == before
    lines = refused(tmp_path / "run", "loss_fn", loss_fn=Loss(2.0))
    assert lines == ["loss_fn: another function (fingerprint)"]
    assert refused(
        tmp_path / "run", "loss_fn: stored 'fingerprint .*', asked \"loss_fn_id 'a'\"", loss_fn=Loss(1.0), loss_fn_id="a"
    )
    assert refused(tmp_path / "run", "loss_fn: .* asked 'next-token cross-entropy'")


def test_an_id_stands_for_the_function(tmp_path):
    run(tmp_path / "run", loss_fn=captured(threading.Lock()), loss_fn_id="mine-1")
    run(tmp_path / "run", loss_fn=captured(threading.Lock()), loss_fn_id="mine-1")
    refused(tmp_path / "run", "loss_fn: stored .*mine-1.*mine-2", loss_fn=captured(threading.Lock()), loss_fn_id="mine-2")


def test_a_function_that_cannot_be_compared_is_warned_about_and_never_reused(tmp_path):
    held = captured(threading.Lock())
    run(None, loss_fn=held)  # without a path there is nothing to recognise
    warned = r"cannot be compared \(value: a _thread.lock\).*Pass loss_fn_id="
    with pytest.warns(UserWarning, match=warned):
        run(tmp_path / "run", loss_fn=held)
    with pytest.warns(UserWarning, match=warned):
        refused(tmp_path / "run", "loss_fn: whether two functions are equal cannot be told", loss_fn=held)


@pytest.mark.parametrize("given", ["", "  ", "x" * 201, 3, b"id"], ids=repr)
def test_bad_ids(given, tmp_path):
    with pytest.raises(DevinterpInputError, match="loss_fn_id=.*string of 1 to 200 characters"):
        run(tmp_path / "run", loss_fn=Loss(), loss_fn_id=given)
    with pytest.raises(DevinterpInputError, match="loss_fn_id='mine'.*without a loss_fn"):
        run(tmp_path / "run", loss_fn_id="mine")
    assert not list(tmp_path.iterdir())


def test_the_calls_in_one_take_an_id(tmp_path):
    arguments = SHORT | {"loss_fn": captured(threading.Lock()), "loss_fn_id": "mine"}
    data = {"x": DATA, "y": OTHER}
    for _ in range(2):
        devinterp.llc(Model(), DATA, output_path=tmp_path / "llc", **arguments)
        devinterp.bif(Model(), DATA, data, output_path=tmp_path / "bif", **arguments)
        devinterp.susceptibilities(
            Model(), DATA, data, {"full": None, "mix": MIX}, sampling_task="x", output_path=tmp_path / "s", **arguments
        )
    with pytest.raises(RunMismatchError, match="loss_fn"):
        devinterp.llc(Model(), DATA, output_path=tmp_path / "llc", **(arguments | {"loss_fn_id": "other"}))


# ---- the same run in another form


def of_type(kind):
    return DATA.cast(Features({"input_ids": List(Value(kind))}))


def moved(folder):
    DATA.save_to_disk(folder / "here")
    os.rename(folder / "here", folder / "there")
    return load_from_disk(folder / "there")


SAME = {
    "copied model": lambda _: {"model": copy.deepcopy(Model())},
    "training flag": lambda _: {"model": Model().eval()},
    "frozen": lambda _: {"model": Model().requires_grad_(False)},
    "after a forward pass": lambda _: {"model": changed(lambda m: m(torch.zeros(1, 3, dtype=torch.long)))},
    "watched": lambda _: {"model": changed(lambda m: m.register_forward_hook(print))},
    "torch format": lambda _: {"dataset": DATA.with_format("torch")},
    "numpy format": lambda _: {"dataset": DATA.with_format("numpy")},
    "other columns": lambda _: {"dataset": DATA.add_column("text", ["a"] * 24)},
    "tokenised again": lambda _: {"dataset": tokens(lambda ids: None)},
    "rows by number": lambda _: {"dataset": DATA.select(range(23, -1, -1)).select(range(23, -1, -1))},
    "int32": lambda _: {"dataset": of_type("int32"), "observables": {"x": of_type("int32")}},
    "uint16": lambda _: {"dataset": of_type("uint16")},
    "moved": lambda folder: {"dataset": moved(folder)},
    "mask of integers": lambda _: {"param_masks": {"mix.weight": half().int()}},
    "whole numbers": lambda _: {"n_beta": 10, "num_chains": np.int64(2), "lr": np.float64(1e-3)},
    "another way": lambda _: {"chains_together": "sequential", "reuse_prefix": False},
    "device": lambda _: {"device": torch.device("cpu")},
}


@pytest.mark.parametrize("form", SAME)
def test_the_same_in_another_form_is_the_same_run(stored, form, tmp_path):
    before = contents(stored)
    assert run(stored, **SAME[form](tmp_path)).attrs["completed"]
    assert contents(stored) == before


HUGGING_FACE = """
import json, sys, torch
sys.path.insert(0, "tests")
from test_identity import *
from transformers import AutoModelForCausalLM
from devinterp.slt.requests import request_of

model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
loss_fn = captured({"b", "a", frozenset("xyz"), 3}, Loss(2.0))
request = request_of(model, DATA, {"x": DATA}, loss_fn=loss_fn, param_masks={"gpt_neox.embed_in.weight": None}, lr=1e-3,
                     n_beta=1.5, batch_size=2)
print(json.dumps([request.fingerprint, architecture(Model())]))
"""


def test_other_processes_and_reloaded_models_have_the_same_fingerprints(tmp_path):
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
                           max_position_embeddings=8, bos_token_id=0, eos_token_id=0)  # fmt: skip
    model = GPTNeoXForCausalLM(config)
    model.save_pretrained(tmp_path / "a")
    reloaded = GPTNeoXForCausalLM.from_pretrained(tmp_path / "a")
    reloaded.save_pretrained(tmp_path / "b")
    assert architecture(model) == architecture(reloaded)
    found = []
    for seed, where in (("1", "a"), ("2", "b")):
        command = [sys.executable, "-c", HUGGING_FACE, str(tmp_path / where)]
        environment = os.environ | {"PYTHONHASHSEED": seed}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120)
        found.append(json.loads(done.stdout.strip().split("\n")[-1]))
    assert found[0] == found[1]
    assert found[0][0]["architecture of the model"] == architecture(model)
    assert found[0][1] == architecture(Model())
    config.layer_norm_eps = 1e-3
    assert architecture(model) != architecture(reloaded)
