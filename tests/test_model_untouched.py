"""The caller's model and the global state come back exactly as they were."""

import copy

import numpy as np
import pytest
import torch
from cases import TinyLM, random_tokens
from torch import nn

import devinterp

SHORT = {"lr": 1e-3, "n_beta": 10.0, "batch_size": 4, "num_draws": 3, "num_chains": 2, "num_init_loss_batches": 1,
         "progress": False}  # fmt: skip


class Noisy(TinyLM):
    """With dropout, batch-norm statistics and a frozen parameter."""

    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.5)
        self.norm = nn.BatchNorm1d(8)
        self.mix.bias.requires_grad_(False)

    def forward(self, ids):
        hidden = self.norm(torch.tanh(self.mix(self.embed(ids))).transpose(1, 2)).transpose(1, 2)
        return self.out(self.drop(hidden))


def everything(model: nn.Module) -> dict:
    return {
        "state": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "addresses": {name: p.data_ptr() for name, p in model.named_parameters()},
        "grad": {name: p.grad for name, p in model.named_parameters()},
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "training": [module.training for module in model.modules()],
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state()[1].copy(),  # noqa: NPY002 - the global state is what is looked at
        "threads": torch.get_num_threads(),
        "grad mode": torch.is_grad_enabled(),
        "default dtype": torch.get_default_dtype(),
    }


def check_same(before: dict, after: dict) -> None:
    for name, tensor in before["state"].items():
        assert torch.equal(tensor, after["state"][name]), name
    assert torch.equal(before["torch"], after["torch"])
    assert (before["numpy"] == after["numpy"]).all()
    for key in ("addresses", "grad", "requires_grad", "training", "threads", "grad mode", "default dtype"):
        assert before[key] == after[key], key


@pytest.mark.filterwarnings("ignore:train_mode")
@pytest.mark.parametrize("train_mode", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_model_and_global_state_come_back(tokens, train_mode, training):
    model = Noisy().train(training)
    model.drop.eval()  # flags differ between modules
    before = everything(model)
    devinterp.sample(model, tokens, {"x": tokens}, train_mode=train_mode, **SHORT)
    check_same(before, everything(model))


def test_also_after_an_exception(tokens):
    model, calls = Noisy().train(), []

    def fails_later(model, ids):
        calls.append(1)
        if len(calls) > 8:
            raise RuntimeError("out of patience")
        logits = model(ids)[:, :-1]
        return nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")

    before = everything(model)
    with pytest.raises(RuntimeError, match="out of patience"):
        devinterp.sample(model, tokens, {}, loss_fn=fails_later, **SHORT)
    check_same(before, everything(model))


def test_dropout_is_off_by_default(tokens):
    model = Noisy().train()
    first = devinterp.sample(model, tokens, {}, **SHORT)
    assert np.array_equal(first.baseline_loss, devinterp.sample(model.eval(), tokens, {}, **SHORT).baseline_loss)
    # the checkpoint's loss is that of the model in eval mode
    ids = torch.as_tensor(np.stack(tokens["input_ids"]))
    losses = nn.functional.cross_entropy(model(ids)[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    everywhere = devinterp.sample(model.train(), tokens, {}, **(SHORT | {"num_init_loss_batches": 16}))
    np.testing.assert_allclose(everywhere.init_loss[0], losses.mean(0).detach(), rtol=1e-5)


@pytest.mark.filterwarnings("ignore:train_mode")
def test_train_mode_uses_dropout_repeatably_and_pairs_its_baseline(tokens):
    model = Noisy()
    first = devinterp.sample(model, tokens, {}, train_mode=True, **SHORT)
    torch.manual_seed(99)
    second = devinterp.sample(model, tokens, {}, train_mode=True, **SHORT)
    np.testing.assert_array_equal(first.sampling_loss, second.sampling_loss)
    plain = devinterp.sample(model, tokens, {}, **SHORT)
    assert not np.allclose(plain.baseline_loss, first.baseline_loss)
    # same dropout masks on both sides: the paired difference is far smaller than dropout itself
    paired = (first.sampling_loss - first.baseline_loss).std()
    assert float(paired) < 0.7 * float((first.baseline_loss - plain.baseline_loss).std())


def test_frozen_parameters_do_not_move(tokens):
    """requires_grad=False keeps a parameter still unless param_masks names it."""
    from cases import plan_of

    assert "mix.bias" not in {piece.name for piece in plan_of(Noisy(), tokens).selection.pieces}
    named = plan_of(Noisy(), tokens, masks={"mix.bias": None})
    assert [piece.name for piece in named.selection.pieces] == ["mix.bias"]


def test_works_inside_no_grad_and_inference_mode(tokens):
    model = TinyLM()
    reference = devinterp.sample(model, tokens, {}, **SHORT)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            again = devinterp.sample(model, tokens, {}, **SHORT)
        np.testing.assert_array_equal(again.sampling_loss, reference.sampling_loss)


def test_tied_weights_move_together(tokens):
    model = TinyLM()
    model.out.weight = model.embed.weight
    samples = devinterp.sample(model, tokens, {}, **SHORT)
    untied = copy.deepcopy(TinyLM())
    untied.out.weight.data = untied.embed.weight.data.clone()
    assert np.isfinite(samples.sampling_loss).all()
    # one tensor under two names gets both gradients, so the chains part ways
    other = devinterp.sample(untied, tokens, {}, **SHORT)
    np.testing.assert_allclose(samples.baseline_loss, other.baseline_loss, rtol=1e-6)
    assert not np.allclose(samples.sampling_loss, other.sampling_loss)
    assert model.out.weight is model.embed.weight


def test_hugging_face_model_is_used_as_it_is():
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
                           max_position_embeddings=16, hidden_dropout=0.2, attention_dropout=0.2)  # fmt: skip
    model = GPTNeoXForCausalLM(config).train()
    tokens = random_tokens(40, 12, 50)
    before = everything(model)
    samples = devinterp.sample(model, tokens, {"x": tokens}, **SHORT)
    check_same(before, everything(model))
    ids = torch.as_tensor(samples.input_ids_x.values)
    with torch.no_grad():
        expected = model.eval()(ids, labels=ids).loss
    assert float(samples.init_loss_x.mean()) == pytest.approx(float(expected), rel=1e-5)
