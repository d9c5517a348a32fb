"""Every fast path against the plain one: losses without whole logits, the frozen prefix, joined batches, bf16, compile."""

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from cases import TinyLM, batch_of, plan_of, random_tokens
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from zoo import tiny_model, tiny_tokens

import devinterp
from devinterp.engine import chain as chain_module
from devinterp.engine import proof as proof_module
from devinterp.engine import vocabulary
from devinterp.engine.chain import Walk, run_chains
from devinterp.engine.checkpoint import Checkpoint
from devinterp.engine.forward import Forward
from devinterp.engine.prefix import Recorder, find_prefix
from devinterp.engine.proof import find_forward
from devinterp.engine.selection import Selection, check_masks
from devinterp.engine.vocabulary import _CrossEntropy, _losses, find_head
from devinterp.engine.walker import Walker

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:transformers.*"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch.*"),
]

SHORT = {"lr": 1e-3, "n_beta": 10.0, "localization": 5.0, "batch_size": 4, "num_draws": 4, "num_chains": 2,
         "num_init_loss_batches": 1, "progress": False}  # fmt: skip


def checkpoint_of(model: nn.Module) -> Checkpoint:
    return Checkpoint(model.eval(), None, torch.device("cpu"))


def forward_of(model: nn.Module, masks=None, ids=None, **options) -> Forward:
    checkpoint = checkpoint_of(model)
    selection = Selection.of(checkpoint.parameters, check_masks(model, masks))
    ids = tiny_tokens(4).numpy() if ids is None else ids
    return find_forward(
        checkpoint, selection, batch_of(ids), **({"reuse_prefix": True, "compiled": False, "precision": None} | options)
    )


@pytest.fixture
def any_vocabulary(monkeypatch):
    """Chunked losses also where all logits would fit the cache, in chunks that do not divide the batch."""
    monkeypatch.setattr(proof_module, "SMALL_LOGITS", 0)
    monkeypatch.setattr(vocabulary, "CHUNK_ELEMENTS", {"cpu": 7 * 64})


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("scale", "cap"), [(1.0, None), (0.25, None), (1.0, 2.0), (1.5, 3.0)])
def test_chunked_cross_entropy_against_the_whole_one(scale, cap, bias, any_vocabulary):
    generator = torch.Generator().manual_seed(0)
    hidden, weight, b = (torch.randn(shape, generator=generator) for shape in ((3, 7, 8), (64, 8), (64,)))
    targets = torch.randint(0, 64, (3, 7), generator=generator)

    def whole(hidden, weight, b):
        logits = scale * (hidden @ weight.T + (b if bias else 0))
        logits = logits if cap is None else cap * torch.tanh(logits / cap)
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(3, 7)

    leaves = [[t.clone().requires_grad_() for t in (hidden, weight, b)] for _ in range(2)]
    expected = whole(*leaves[0])
    w, v, u = leaves[1]
    losses = _CrossEntropy.apply(w, v, u if bias else None, targets, scale, cap)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(_losses(hidden, weight, b if bias else None, targets, scale, cap), expected.detach())
    (3.0 * expected.mean()).backward()
    (3.0 * losses.mean()).backward()
    for exact, fast in zip(*leaves, strict=True):
        if exact.grad is not None:
            torch.testing.assert_close(fast.grad, exact.grad, rtol=1e-4, atol=1e-6)


def test_chunked_gradients_of_anything_but_a_mean_are_refused():
    hidden, weight = torch.randn(2, 3, 4, requires_grad=True), torch.randn(5, 4)
    losses = _CrossEntropy.apply(hidden, weight, None, torch.zeros(2, 3, dtype=torch.long), 1.0, None)
    with pytest.raises(RuntimeError, match="mean or sum"):
        (losses * torch.arange(6.0).view(2, 3)).sum().backward()


@pytest.mark.parametrize(
    ("model_type", "scale", "cap", "bias"),
    [
        ("gpt_neox", 1.0, None, False),
        ("gpt2", 1.0, None, False),  # tied to the embedding
        ("gemma2", 1.0, 30.0, False),  # soft cap
        ("cohere", 0.0625, None, False),  # scaled
        ("phi", 1.0, None, True),  # bias
    ],
)
def test_the_output_embedding_is_found_with_what_the_model_does_to_logits(model_type, scale, cap, bias, any_vocabulary):
    forward = forward_of(tiny_model(model_type))
    assert (forward.head.scale, forward.head.cap, forward.head.bias is not None) == (scale, cap, bias)
    ids = tiny_tokens(3, seed=1)
    plain = Forward(forward.checkpoint)
    for model in (forward, plain):
        assert model.losses({}, batch_of(ids), {}).shape == (3, ids.shape[1] - 1)
    torch.testing.assert_close(forward.losses({}, batch_of(ids), {}), plain.losses({}, batch_of(ids), {}), rtol=2e-5, atol=2e-5)


def test_an_output_that_is_no_scaled_or_capped_matrix_keeps_the_plain_path(any_vocabulary, caplog):
    class Odd(TinyLM):
        def forward(self, ids):
            return super().forward(ids).square()

    class Mixed(TinyLM):
        def forward(self, ids):
            logits = super().forward(ids)
            return logits - logits.mean(-1, keepdim=True).square()

    for model in (Odd(), Mixed()):
        assert find_head(checkpoint_of(model), batch_of(torch.zeros(1, 5, dtype=torch.long))) is None
        assert forward_of(model, ids=np.zeros((4, 5), dtype=np.int64)).head is None


def test_a_head_that_the_weights_reach_in_another_way_is_not_used(any_vocabulary, caplog):
    class TwoWays(TinyLM):
        """Right at the checkpoint, wrong elsewhere: a weight acts on the logits past the output embedding."""

        def __init__(self):
            super().__init__()
            self.past = nn.Parameter(torch.zeros(11))

        def forward(self, ids):
            return super().forward(ids) + self.past

    with caplog.at_level(logging.INFO, "devinterp"):
        assert forward_of(TwoWays(), ids=random_tokens(4).with_format("numpy")["input_ids"][:]).head is None
    assert "losses without whole logits: not used, difference from the plain ones" in caplog.text


def test_half_precision_with_a_head(any_vocabulary):
    forward = forward_of(tiny_model("llama").bfloat16())
    assert forward.head is not None
    ids = tiny_tokens(3)
    torch.testing.assert_close(
        forward.losses({}, batch_of(ids), {}), Forward(forward.checkpoint).losses({}, batch_of(ids), {}), rtol=0.02, atol=0.02
    )


PREFIXED = ["gpt_neox", "gpt2", "llama", "gemma2", "mixtral", "bloom", "phi", "olmo2", "mamba2", "deepseek_v3"]


@pytest.mark.parametrize("model_type", PREFIXED)
def test_frozen_layers_are_replayed_bit_by_bit(model_type):
    model = tiny_model(model_type)
    layer = max(int(part) for name, _ in model.named_parameters() for part in name.split(".") if part.isdigit())
    name = [n for n, _ in model.named_parameters() if f".{layer}." in n and "norm" not in n][-1]
    forward = forward_of(model, {name: None})
    assert forward.prefix is not None
    assert 1 <= len(forward.prefix.needed) <= 4
    plan = plan_of(model, random_tokens(16, 11, 40), masks={name: None}, batch_size=4, n_beta=5.0)
    walkers = [
        Walker(plan, 0),
        Walker(replace(plan, forward=forward), 0, recorder=Recorder(forward.checkpoint, [forward.prefix], 1)),
    ]
    for t in range(3):
        plain, replayed = (walker.differentiate(t) for walker in walkers)
        assert torch.equal(plain, replayed)
        assert torch.equal(walkers[0].gradient, walkers[1].gradient)
        assert walkers[0].gradient.any()
        for walker in walkers:
            walker.step()


def test_a_weight_that_is_read_past_its_module_is_found_by_the_proof(caplog):
    class Past(TinyLM):
        """`mix` is never called: what looks like a frozen prefix depends on a moving weight."""

        def __init__(self):
            super().__init__()
            self.first = nn.Linear(8, 8)
            self.inner = nn.ModuleList([nn.Identity()])

        def forward(self, ids):
            hidden = self.first(self.embed(ids)) + self.embed(ids) @ self.mix.weight
            return self.out(torch.tanh(self.inner[0](hidden)))

    model, ids = Past(), random_tokens(4).with_format("numpy")["input_ids"][:]
    assert find_prefix(checkpoint_of(model), ["mix.weight"], batch_of(ids)) is None
    nested = nn.Sequential(model)
    with caplog.at_level(logging.INFO, "devinterp"):
        assert forward_of(nested, {"0.mix.weight": None}, ids).prefix is None


def test_modules_called_twice_or_changed_in_place_are_not_replayed():
    class InPlace(TinyLM):
        def forward(self, ids):
            hidden = self.embed(ids)
            hidden += 1.0
            return self.out(torch.tanh(self.mix(hidden)))

    class Shared(TinyLM):
        def forward(self, ids):
            return self.out(torch.tanh(self.mix(self.embed(ids) + self.embed(ids.flip(1)))))

    ids = random_tokens(4).with_format("numpy")["input_ids"][:]
    for model in (InPlace(), Shared()):
        wrapped = Wrapped(model)
        prefix = forward_of(wrapped, {"inner.out.weight": None}, ids).prefix
        assert prefix is None or wrapped.inner.embed not in prefix.modules


class Wrapped(nn.Module):
    """A model whose layers lie one level down, as in real ones."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, ids):
        return self.inner(ids)


def test_the_prefix_is_computed_once_for_all_chains_and_runs():
    model = tiny_model("gpt_neox", "mha")
    calls = []
    data = random_tokens(16, 11, 40)
    masks = {"full": None, "a": "l1h0", "b": "l1h1", "c": "l1h2"}
    settings = SHORT | {"lr": 1e-4, "num_chains": 3, "chains_together": "sequential"}
    observables = {"pile": (data, 2), "x": (data, 1)}
    layer = model.gpt_neox.layers[0].attention  # a replayed layer is called, what is inside it is not
    stores = {}
    for reuse in (True, False):
        handle = layer.register_forward_hook(lambda *_: calls.append(1))
        stores[reuse] = devinterp.susceptibilities(
            model, data, observables, masks, sampling_task="pile", reuse_prefix=reuse, **settings
        )
        handle.remove()
        stores[reuse, "calls"] = len(calls)
        calls.clear()
    np.testing.assert_array_equal(stores[True]["susceptibilities"].sus, stores[False]["susceptibilities"].sus)
    saved = stores[False, "calls"] - stores[True, "calls"]
    # 3 restrictions x 3 chains x (5 steps + 4 draws of 2 observables): one pass a step, and one an observable, are left
    assert saved >= 100


def test_a_suite_has_the_numbers_of_its_runs_alone(tmp_path):
    model = tiny_model("gpt_neox", "mha")
    data = random_tokens(16, 11, 40)
    names = {"full": None, "l0h1": "l0h1", "l1h0": "l1h0", "l1 mlp": "l1 mlp"}
    path = tmp_path / "suite"
    devinterp.susceptibilities(model, data, {"pile": data, "x": data}, names, sampling_task="pile", batches_per_draw=1,
                               output_path=path, **SHORT)  # fmt: skip
    for name in list(names)[1:]:
        alone = devinterp.sample(model, data, {"pile": data, "x": data}, batches_per_draw=1,
                                 param_masks=devinterp.create_param_masks(model, name), **SHORT)  # fmt: skip
        together = devinterp.sample(model, data, {"pile": data, "x": data}, batches_per_draw=1,
                                    param_masks=devinterp.create_param_masks(model, name),
                                    output_path=f"{path}_{name}", **SHORT)  # fmt: skip
        for variable in ("sampling_loss", "loss_x", "baseline_loss", "init_loss", "init_loss_pile", "step_loss"):
            np.testing.assert_array_equal(alone[variable], together[variable], err_msg=f"{name} {variable}")


def test_joined_batches_of_observables_are_those_of_single_ones(tiny, tokens, monkeypatch):
    joined = devinterp.sample(tiny, tokens, {"x": (tokens, 5)}, **SHORT)
    monkeypatch.setattr("devinterp.engine.forward.TOKENS_AT_ONCE", {"cpu": 1})
    single = devinterp.sample(tiny, tokens, {"x": (tokens, 5)}, **SHORT)
    np.testing.assert_allclose(joined.loss_x, single.loss_x, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(joined.sampling_loss, single.sampling_loss)


def test_batches_are_not_joined_where_rows_depend_on_one_another():
    class Coupled(TinyLM):
        def forward(self, ids):
            logits = super().forward(ids)
            return logits + logits.mean(0, keepdim=True)

    ids = random_tokens(4).with_format("numpy")["input_ids"][:]
    assert not forward_of(Coupled(), ids=ids).rows_joined
    assert forward_of(TinyLM(), ids=ids).rows_joined


def test_bf16_observables_tell_their_error(tmp_path):
    model = tiny_model("gpt_neox")
    data = random_tokens(16, 11, 40)
    plain = devinterp.sample(model, data, {"x": (data, 2)}, **SHORT)
    rounded = devinterp.sample(model, data, {"x": (data, 2)}, precision="bf16", **SHORT)
    np.testing.assert_array_equal(plain.sampling_loss, rounded.sampling_loss)
    difference = np.abs(plain.init_loss_x - rounded.init_loss_x).max()
    told = rounded.attrs["metadata"]["precision_error"]["x"]
    assert 0 < difference < 0.1
    assert told["largest"] == pytest.approx(float(difference), rel=1.0)
    assert 0 < told["root_mean_square"] < told["largest"]
    assert "precision_error" not in plain.attrs["metadata"]


def test_which_path_runs_is_said_and_stored(any_vocabulary, caplog):
    model, data = tiny_model("gpt_neox"), random_tokens(16, 11, 40)
    with caplog.at_level(logging.INFO, "devinterp"):
        samples = devinterp.sample(model, data, {}, param_masks=devinterp.create_param_masks(model, "l1h0"), **SHORT)
    computed = samples.attrs["metadata"]["computed"]
    assert computed["head"] == "lm_head" if hasattr(model, "lm_head") else computed["head"] == "embed_out"
    assert "gpt_neox.layers.0" in computed["prefix"]
    assert computed["way"] == "sequential"
    assert "losses without whole logits: used" in caplog.text
    assert "reuse of frozen modules: used, equal bit by bit" in caplog.text


class CountsWaits(TorchDispatchMode):
    """Counts operators that bring a number to the host."""

    waits = 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        self.waits += "local_scalar_dense" in str(function) or "is_nonzero" in str(function)
        return function(*arguments, **(named or {}))


def test_a_step_waits_for_nothing_between_two_draws(monkeypatch, any_vocabulary):
    """On a GPU every number that is looked at is waited for. Counted on a CPU that is as patient as a GPU."""
    monkeypatch.setattr(chain_module, "PATIENCE", {"cpu": chain_module.PATIENCE_ELSEWHERE})
    model, data = tiny_model("gpt_neox"), random_tokens(16, 11, 40)
    plan = plan_of(model, data, batch_size=4, num_draws=2, num_steps_bw_draws=20, save_metrics=True)
    plan = replace(plan, forward=forward_of(model))
    assert plan.forward.head is not None
    steps = run_chains(Walk(plan, [0]))
    next(steps)
    with CountsWaits() as models_own, torch.no_grad():
        plan.forward.losses({}, batch_of(tiny_tokens(4)), {})
    looks = []

    def counting(look):
        return lambda self, *_: looks.append(1) or look(self)

    for name in ("tolist", "cpu", "numpy"):  # no operators of their own on a CPU
        monkeypatch.setattr(torch.Tensor, name, counting(getattr(torch.Tensor, name)))
    with CountsWaits() as counted:
        for _ in range(18):
            next(steps)
    monkeypatch.undo()
    assert not looks
    assert counted.waits == 18 * models_own.waits


def test_a_patient_watch_finds_the_very_step_of_divergence(monkeypatch):
    model, data = TinyLM(), random_tokens(16)
    wild = {"lr": 1e6, "n_beta": 1e38, "num_draws": 40, "batch_size": 4}
    found = []
    for patience in (1, 64):
        monkeypatch.setattr(chain_module, "PATIENCE", {"cpu": patience})
        plan = plan_of(model, data, num_steps_bw_draws=5, **wild)
        found.append([item for seen in run_chains(Walk(plan, [0])) for item in seen if isinstance(item, chain_module.Diverged)])
    assert found[0] == found[1]
    assert len(found[0]) == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, from within torch.compile
def test_compiled_losses(tiny, tokens):
    plain = devinterp.sample(tiny, tokens, {"x": tokens}, **SHORT)
    compiled = devinterp.sample(tiny, tokens, {"x": tokens}, compile=True, **SHORT)
    assert compiled.attrs["metadata"]["computed"]["compile"] is True
    np.testing.assert_allclose(plain.loss_x, compiled.loss_x, rtol=1e-4, atol=1e-5)
