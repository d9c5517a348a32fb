"""Settings that cannot be used are refused before any forward pass and before any file is made; doubtful ones are warned about."""

import os
import shutil

import pytest
import torch
from cases import GOOD, INF, NAN, TinyLM, Weights, quadratic, random_tokens, rows

import devinterp

DATA = random_tokens()
SETTINGS = [
    ("lr", NAN), ("lr", INF), ("lr", 0), ("lr", 0.0), ("lr", -1e-3), ("lr", 1e30), ("lr", "fast"), ("lr", None), ("lr", True),
    ("n_beta", NAN), ("n_beta", INF), ("n_beta", -1.0), ("n_beta", "30"), ("n_beta", None),
    ("localization", NAN), ("localization", INF), ("localization", -1.0), ("localization", None),
    ("noise_level", NAN), ("noise_level", -1.0), ("noise_level", INF),
    ("llc_weight_decay", -0.1), ("llc_weight_decay", NAN), ("llc_weight_decay", INF),
    ("bounding_box_size", 0), ("bounding_box_size", -1.0), ("bounding_box_size", NAN), ("bounding_box_size", INF),
    ("init_noise", -1.0), ("init_noise", NAN),
    ("num_chains", 0), ("num_chains", -1), ("num_chains", 1.5), ("num_chains", True), ("num_chains", "4"),
    ("num_draws", 0), ("num_draws", 1.5), ("num_draws", True), ("batch_size", True), ("num_burnin_steps", -1), ("num_steps_bw_draws", 0), ("batch_size", 0),
    ("gradient_accumulation_steps", 0), ("num_init_loss_batches", 0), ("batches_per_draw", 0),
    ("init_seed", -1), ("init_seed", 2**64), ("init_seed", 1.0), ("init_seed", True), ("obs_seed", -1), ("obs_seed", True), ("obs_seed", 0.5), ("obs_seed", 2**64),
    ("shuffle", 1), ("save_metrics", "yes"), ("train_mode", 0), ("match_sampling_input_ids_across_chains", None),
    ("sampling_method", "sgld"), ("sampling_method", None), ("on_diverged", "drop"),
    ("device", "cuda:99"), ("device", "cud"), ("device", "cuda:-1"), ("device", "meta"),
    ("output_path", "http://host/run"), ("output_path", "ftp://host/run"), ("output_path", "file:///run"),
    ("output_path", "memory::x"), ("output_path", __file__ + "/run"), ("output_path", 3), ("output_path", "a\0b"),
    ("output_path", __file__), ("output_path", "x" * 5000),
    ("loss_fn", 3), ("sampling_method_kwargs", 3),
]  # fmt: skip

TOGETHER = [
    ({"n_beta": 0.0, "localization": 0.0}, "n_beta=0 .*random walk"),
    ({"lr": 5.0}, "lr=5.0.*diverges"),
    ({"lr": "auto", "sampling_method": "rmsprop_sgld"}, "lr='auto'"),
    ({"lr": "auto", "sampling_method": "adam_sgld"}, "lr='auto' with sampling_method='adam_sgld'"),
    ({"lr": 4.0, "sampling_method": "preconditioned_leimkuhler_matthews"}, "lr=4.0: in its metric .*Try lr=1, or lr='auto'"),
    ({"lr": 1.0, "sampling_method": "sgnht", "localization": 4.0}, "the chain diverges"),
    *[
        ({"sampling_method": "adam_sgld", "sampling_method_kwargs": {"beta1": value}}, r"\['beta1'\].*>= 0 and < 1")
        for value in (-0.1, 1.0, NAN)
    ],
    ({"sampling_method": "adam_sgld", "sampling_method_kwargs": {"beta2": 1.0}}, r"\['beta2'\]=1.0.*< 1"),
    ({"sampling_method": "adam_sgld", "sampling_method_kwargs": {"eps": 0.0}}, r"\['eps'\].*> 0"),
    ({"sampling_method": "sgnht", "sampling_method_kwargs": {"friction": 0.0}}, r"\['friction'\].*> 0"),
    ({"sampling_method": "sgnht", "sampling_method_kwargs": {"coupling": -0.1}}, r"\['coupling'\].*>= 0"),
    (
        {"sampling_method": "preconditioned_leimkuhler_matthews", "lr": 1.0, "sampling_method_kwargs": {"damping": 0.0}},
        r"\['damping'\].*> 0",
    ),
    ({"rmsprop_eps": 0.1}, "rmsprop_eps=0.1"),
    ({"sampling_method": "rmsprop_sgld", "rmsprop_eps": 0.0}, r"sampling_method_kwargs\['eps'\]"),
    ({"sampling_method": "rmsprop_sgld", "rmsprop_alpha": 1.5}, r"sampling_method_kwargs\['alpha'\]=1.5.*<= 1"),
    ({"sampling_method": "rmsprop_sgld", "rmsprop_eps": 0.1, "sampling_method_kwargs": {"eps": 0.1}}, "rmsprop_eps=0.1.*once"),
    ({"sampling_method": "rmsprop_sgld", "sampling_method_kwargs": {"lr": 1.0}}, r"sampling_method_kwargs\['lr'\]"),
    ({"sampling_method": "rmsprop_sgld", "sampling_method_kwargs": {"beta": 1.0}}, r"\['beta'\].*alpha"),
    ({"sampling_method": "rmsprop_sgld", "sampling_method_kwargs": {"add_grad_correction": True}}, "add_grad_correction"),
    ({"sampling_method": "rmsprop_sgld", "sampling_method_kwargs": {"bias_correction": True, "alpha": 1.0}}, "below 1"),
    ({"sampling_method_kwargs": {"alpha": 0.9}}, "sgmcmc_sgld takes"),
    *[({"sampling_method": "rmsprop_sgld", "rmsprop_alpha": value}, r"\['alpha'\].*<= 1") for value in (-0.1, NAN, INF)],
    *[({"sampling_method": "rmsprop_sgld", "rmsprop_eps": value}, r"\['eps'\].*> 0") for value in (-0.1, NAN, INF)],
    ({"sampling_method": "rmsprop_sgld", "rmsprop_alpha": 0.9, "sampling_method_kwargs": {"alpha": 0.9}}, "alpha=0.9.*once"),
    ({"sampling_method": "rmsprop_sgld", "sampling_method_kwargs": {"noise_level": 2.0}}, "arguments of their own"),
    ({"sampling_method": "sgdl"}, "sampling_method='sgdl'.*'sgmcmc_sgld', 'rmsprop_sgld', 'leimkuhler_matthews'.*Did you mean"),
    ({"device": "cuda:99"}, r"one of \['cpu'.*device=None"),
    ({"num_chains": True}, "num_chains=True: must be an integer"),
]


@pytest.mark.parametrize(("name", "value"), SETTINGS, ids=lambda v: repr(v)[:20])
def test_settings(refused, name, value):
    refused(f"(?s){name}=.*must be.*\\.", **{name: value})


@pytest.mark.parametrize("name", ["num_chains", "num_draws", "init_seed", "batch_size"])
def test_true_is_no_number(refused, name):
    refused(f"{name}=True", kind=TypeError, **{name: True})


def test_unknown_settings(refused):
    refused("num_chain", kind=TypeError, num_chain=3)
    for call in (devinterp.llc, devinterp.bif):
        with pytest.raises(TypeError, match="num_chain"):
            call(TinyLM(), DATA, {"x": DATA}, **GOOD, num_chain=3)


@pytest.mark.parametrize(("settings", "message"), TOGETHER, ids=[str(sorted(t[0]))[:60] for t in TOGETHER])
def test_settings_that_do_not_go_together(refused, settings, message):
    refused(message, **settings)


def test_places_that_cannot_be_written_to(refused, tmp_path, monkeypatch):
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="output_path=.*a link to nothing"):
        devinterp.sample(TinyLM(), DATA, {}, output_path=link, **GOOD)
    assert [path.name for path in tmp_path.iterdir()] == ["link"]
    link.unlink()
    monkeypatch.setattr(os, "access", lambda *_: False)
    refused("output_path=.*must be in a writable directory.*is not writable")


def test_runs_that_do_not_fit_are_refused_with_their_bytes(refused, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(os, "sysconf", lambda name: 10)
        refused("one chain of 259 moving weights needs 2,072 bytes.*cpu has 100.*param_masks", kind=MemoryError)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 100))
    refused(r"the run needs about [\d,]+ bytes, 100 are free.*fewer draws", kind=OSError)


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


def test_what_was_warned_about_is_recorded():
    with pytest.warns(UserWarning, match="noise_level"):
        samples = devinterp.sample(TinyLM(), DATA, {}, noise_level=0.5, **GOOD)
    assert samples.attrs["metadata"]["config"]["sampler"]["noise_level"] == 0.5


def test_large_seeds_are_allowed():
    devinterp.sample(TinyLM(), DATA, {}, **(GOOD | {"init_seed": 2**64 - 1, "obs_seed": 2**40}))


def test_a_diverging_lr_is_certain_for_a_quadratic():
    chosen = GOOD | {"lr": 0.25, "num_draws": 1, "localization": 0.0}  # lr n_beta h = 5
    with pytest.warns(UserWarning, match=r"is 5 at the checkpoint \(h_max=2\).*Try lr=0.05"):
        devinterp.sample(Weights(torch.ones(3)), rows(8), {}, loss_fn=quadratic(2.0), **chosen)
