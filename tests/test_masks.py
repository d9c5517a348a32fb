"""Padding and label masks: what does not count is NaN in the store and left out of every mean."""

import copy
import logging

import numpy as np
import pytest
import torch
import transformers
import xarray as xr
from cases import TinyLM, plan_of, random_tokens
from datasets import Dataset
from naive import susceptibility, susceptibility_error, token_influences
from torch import nn
from zoo import tiny_model

import devinterp
from devinterp.engine import proof as proof_module
from devinterp.engine import vocabulary
from devinterp.engine.walker import Walker
from devinterp.errors import ChainsUnusable, RunMismatchError, StoreError

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning:transformers.*")]

SHORT = {"n_beta": 10.0, "localization": 5.0, "num_chains": 2, "num_draws": 6, "batch_size": 4, "num_init_loss_batches": 2,
         "progress": False}  # fmt: skip
LENGTH, PAD = 11, 0


def sequences(count=24, seed=0, shortest=2, longest=LENGTH, vocabulary=40) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(shortest, longest + 1, count)
    lengths[0] = longest
    return [rng.integers(4, vocabulary, n).tolist() for n in lengths]


def padded(rows: list[list[int]], side: str, length: int = LENGTH, labels: bool = False) -> Dataset:
    def filled(row, values, fill):
        rest = [fill] * (length - len(row))
        return values + rest if side == "right" else rest + values

    columns = {
        "input_ids": [filled(row, row, PAD) for row in rows],
        "attention_mask": [filled(row, [1] * len(row), 0) for row in rows],
    }
    if labels:
        columns["labels"] = [filled(row, row, -100) for row in rows]
    return Dataset.from_dict(columns)


def losses_of(model: nn.Module, row: list[int]) -> torch.Tensor:
    """Of one sequence without padding, by itself."""
    ids = torch.tensor([row])
    return nn.functional.cross_entropy(model(ids).logits[0, :-1].float(), ids[0, 1:], reduction="none")


def real(losses: np.ndarray, row: list[int], side: str) -> np.ndarray:
    """The losses of a padded sequence that are those of its tokens, as the sequence's own losses have them."""
    count = len(row) - 1
    return losses[..., :count] if side == "right" else losses[..., losses.shape[-1] - count :]


def model_of(name: str) -> nn.Module:
    return copy.deepcopy(tiny_model(name)).eval()


@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", ["gpt_neox", "gpt2", "llama", "opt"])
def test_losses_of_padded_sequences_are_those_of_the_sequences(name, side, labels):
    model, rows = model_of(name), sequences()
    data = padded(rows, side, labels=labels)
    samples = devinterp.sample(model, data, {"x": (data, 6)}, lr=1e-4, **SHORT)
    losses, numbers = samples.init_loss_x.values, samples.row_x.values
    assert sorted(numbers) == list(range(24))
    for row, found in zip(numbers, losses, strict=True):
        expected = losses_of(model, rows[row]).detach()
        np.testing.assert_allclose(real(found, rows[row], side), expected, rtol=2e-4, atol=2e-5)
        assert np.isfinite(found).sum() == len(expected)
    assert (np.isnan(samples.loss_x.values) == np.isnan(losses)).all()
    assert (np.isnan(samples.sampling_loss.values) == np.isnan(samples.baseline_loss.values)).all()
    assert np.isfinite(samples.step_loss).all()


@pytest.mark.parametrize("side", ["right", "left"])
def test_the_gradient_is_that_of_the_mean_over_real_tokens(side):
    """Of all micro-batches of a step together: long sequences weigh as much as they have tokens."""
    model, rows = model_of("gpt2"), sequences(8)
    plan = plan_of(model, padded(rows, side), batch_size=4, gradient_accumulation_steps=2, shuffle=False)
    walker = Walker(plan, 0)
    losses = walker.differentiate(0)
    mean = torch.cat([losses_of(model, row) for row in rows]).mean()
    mean.backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(walker.gradient[0], expected, rtol=1e-4, atol=1e-6)
    assert float(losses.sum() / walker.counted.sum()) == pytest.approx(mean.item(), rel=1e-5)
    whole = Walker(plan_of(model, padded(rows, side), batch_size=8, shuffle=False), 0)
    whole.differentiate(0)
    torch.testing.assert_close(whole.gradient, walker.gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_padded_dataset_has_the_llc_of_the_unpadded_one(side):
    rows = sequences(24, shortest=8, longest=8)
    settings = SHORT | {"lr": 1e-4, "num_chains": 1}
    bare = Dataset.from_dict({"input_ids": rows})
    one = devinterp.sample(model_of("gpt2"), bare, {"x": bare}, **settings)
    data = padded(rows, side)
    other = devinterp.sample(model_of("gpt2"), data, {"x": data}, **settings)
    a, b = devinterp.compute_llc(one, per="token"), devinterp.compute_llc(other, per="token")
    for name in ("llc_mean", "llc_sem", "llc_variance", "llc_variance_sem", "init_loss", "llc_observable", "loss_trace"):
        np.testing.assert_allclose(a[name], b[name], rtol=2e-3, err_msg=name)
    np.testing.assert_allclose(a.llc_token_x, real(b.llc_token_x.values, rows[0], side), rtol=5e-2, atol=1e-3)
    assert np.isnan(b.llc_token_x.values).sum() == 3 * len(a.llc_token_x)
    assert other.attrs["metadata"]["data"] == {
        "columns": {"input_ids": [LENGTH], "attention_mask": [LENGTH]},
        "stored_columns": {"input_ids": "input_ids", "attention_mask": "attention_mask"},
        "shift": 1,
        "masked": True,
    }
    np.testing.assert_array_equal(other.attention_mask_x.values.sum(1), 8)


def test_every_mean_weighs_losses_alike():
    """LLC and init_loss against sums over all losses that count, and the batch variance against the plain formula."""
    model, data = model_of("gpt2"), padded(sequences(), "right")
    samples = devinterp.sample(model, data, {"x": data}, lr=1e-4, **SHORT)
    found = devinterp.compute_llc(samples)
    excess = samples.sampling_loss.values.astype(float) - samples.baseline_loss.values.astype(float)
    naive = [[excess[c, d][np.isfinite(excess[c, d])].mean() for d in range(6)] for c in range(2)]
    np.testing.assert_allclose(found.excess_trace, naive, rtol=1e-9)
    count = samples.init_loss_count.values
    assert found.init_loss == pytest.approx(float((samples.init_loss.values * count).sum() / count.sum()))
    rows = [r for batch in (plan_of(model, data, batch_size=4, num_init_loss_batches=2).batches.micro(0, k) for k in (0, 1))
            for r in (batch.columns["input_ids"] * batch.columns["attention_mask"])]  # fmt: skip
    real_rows = [[int(t) for t in r if t] for r in rows]
    assert found.init_loss == pytest.approx(torch.cat([losses_of(model, r) for r in real_rows]).mean().item(), rel=1e-4)
    x = samples.loss_x.values.astype(float) - samples.init_loss_x.values.astype(float)
    assert float(found.llc_observable[0]) == pytest.approx(10.0 * np.nanmean(x), rel=1e-6)
    assert found.attrs["num_chains_used"] == 2
    step = np.isfinite(samples.step_loss.values)
    assert step.all()
    mean = np.nanmean(samples.sampling_loss.values[:, 0].astype(float), axis=(1, 2))
    np.testing.assert_allclose(samples.step_loss.values[:, 1], mean, rtol=1e-6)
    assert devinterp.diagnose(samples).llc_mean == found.llc_mean


def test_influences_of_what_counts_alone():
    data = padded(sequences(), "right")
    samples = devinterp.sample(model_of("gpt_neox"), data, {"x": (data, 2)}, lr=1e-3, **SHORT).to_dataset()
    counted = np.isfinite(samples.init_loss_x.values)
    traces = samples.loss_x.values.transpose(2, 3, 0, 1).reshape(8, LENGTH - 1, -1)
    found = devinterp.compute_bif(samples, errors=True)
    with np.errstate(invalid="ignore"):
        expected = token_influences(traces, range(8), range(8))
    np.testing.assert_allclose(found.influences, expected, atol=1e-5)
    np.testing.assert_array_equal(np.isnan(found.influences), np.isnan(expected))
    assert np.isfinite(found.influences_sem.values[~np.isnan(expected)]).all()
    assert found.attrs["constant_traces"] == 0
    averaged = devinterp.compute_bif(samples, average_tokenwise_bif=True).influences
    np.testing.assert_allclose(averaged, np.nanmean(expected, axis=(2, 3)), atol=1e-5)
    covariance = devinterp.compute_bif(samples, compute_covariance=True).influences.values
    np.testing.assert_array_equal(np.isnan(covariance), np.isnan(expected))
    sequence = devinterp.compute_bif(samples, correlation_method="sequence").influences
    means = np.nanmean(traces.astype(float), axis=1)
    np.testing.assert_allclose(sequence, np.corrcoef(means), atol=1e-4)
    top = devinterp.compute_bif(samples, top_k=5)
    assert counted[top.batch_1.values, top.target_position.values - 1].all()
    ids = samples.input_ids_x.values
    np.testing.assert_array_equal(top.token, ids[top.batch_1.values, top.target_position.values])
    short = int(np.flatnonzero(~counted[:, -1])[0])
    with pytest.raises(ValueError, match="a position whose loss counts.*padding"):
        devinterp.compute_bif(samples, queries=[(short, LENGTH - 1)])
    spoilt = samples.copy(deep=True)
    spoilt.loss_x.values[0, 3][counted] = np.nan
    with pytest.raises(StoreError, match="not finite"):
        devinterp.compute_bif(spoilt)


@pytest.mark.parametrize("estimator", ["two_chain", "one_chain"])
def test_susceptibilities_have_a_row_for_every_loss_that_counts(estimator):
    model = model_of("gpt_neox")
    data, others = padded(sequences(), "right"), padded(sequences(seed=1), "left")
    names = {"full": None, "last": {n: None for n, _ in model.named_parameters() if "layers.1" in n}}
    settings = SHORT | {"lr": 1e-3, "batches_per_draw": 1}
    runs = {
        name: devinterp.sample(model, data, {"task": data, "x": others}, param_masks=masks, **settings).to_dataset()
        for name, masks in names.items()
    }
    full, last = runs["full"], runs["last"]
    naive = susceptibility(last, full, "task", "x", estimator)
    counted = np.isfinite(full.init_loss_x.values)
    assert not counted.all()
    found = devinterp.compute_susceptibilities(runs, "task", estimator=estimator)
    table = found["susceptibilities"].to_dataset()
    assert table.sizes["sus_flat"] == counted.sum()
    np.testing.assert_allclose(table.sus[:, 0], naive[counted], rtol=1e-6, atol=1e-12)
    np.testing.assert_array_equal(np.stack([table.batch, table.target_position - 1]), np.nonzero(counted))
    losses, full_losses = (run.loss_x.transpose("chain", "draw", ...) for run in (last, full))
    some = tuple(np.argwhere(counted)[7])
    error = susceptibility_error(last, full, "task", losses[:, :, *some], full_losses[:, :, *some], estimator)
    assert float(table.sus_sem[7, 0]) == pytest.approx(error, rel=1e-5)
    for over, dims in (("sequence", ["token_pos"]), ("dataset", ["batch_x", "token_pos"])):
        mean = devinterp.compute_susceptibilities(runs, "task", estimator=estimator, mean_over=over)["susceptibilities"]
        groups = [counted[i] for i in range(4)] if over == "sequence" else [counted]
        values = [naive[i][groups[i]].mean() for i in range(4)] if over == "sequence" else [naive[counted].mean()]
        np.testing.assert_allclose(mean.sus[:, 0], values, rtol=1e-6)
        means = [x.astype(float).mean(dims) for x in (losses, full_losses)]
        means = [x.isel(batch_x=2) for x in means] if over == "sequence" else means
        at = 2 if over == "sequence" else 0
        error = susceptibility_error(last, full, "task", *means, estimator)
        assert float(mean.sus_sem[at, 0]) == pytest.approx(error, rel=1e-5)
    standard = devinterp.compute_susceptibilities(runs, "task", estimator=estimator, standardize=True)["susceptibilities"]
    assert float(standard.sus.mean()) == pytest.approx(0, abs=1e-9)
    assert devinterp.compute_patterning(found, {"last": -0.01}, alpha=0.01).weights.size == counted.sum()


@pytest.fixture
def any_vocabulary(monkeypatch):
    monkeypatch.setattr(proof_module, "SMALL_LOGITS", 0)
    monkeypatch.setattr(vocabulary, "CHUNK_ELEMENTS", {"cpu": 7 * 64})


@pytest.mark.parametrize("side", ["right", "left"])
def test_losses_without_whole_logits_and_frozen_layers_of_padded_batches(side, any_vocabulary, caplog):
    model, data = model_of("gpt_neox"), padded(sequences(), side)
    masks = {n: None for n, _ in model.named_parameters() if "layers.1" in n or "embed_out" in n}
    settings = SHORT | {"lr": 1e-4, "param_masks": masks}
    with caplog.at_level(logging.INFO):
        fast = devinterp.sample(model, data, {"x": data}, **settings)
    used = fast.attrs["metadata"]["computed"]
    assert used["head"] is not None, caplog.text
    assert used["prefix"], caplog.text
    proof_module.SMALL_LOGITS = 2**30
    plain = devinterp.sample(model, data, {"x": data}, reuse_prefix=False, **settings)
    assert plain.attrs["metadata"]["computed"]["head"] is None
    for name in ("sampling_loss", "loss_x", "baseline_loss", "init_loss", "step_loss"):
        np.testing.assert_allclose(fast[name], plain[name], rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("way", ["vmap", "processes"])
def test_chains_together_on_padded_batches(way, shared):
    model, data = model_of("gpt2"), padded(sequences(), "right")
    settings = SHORT | {"lr": 1e-4, "match_sampling_input_ids_across_chains": shared, "gradient_accumulation_steps": 2}
    alone = devinterp.sample(model, data, {"x": data}, chains_together="sequential", **settings)
    together = devinterp.sample(model, data, {"x": data}, chains_together=way, **settings)
    assert together.attrs["metadata"]["computed"]["way"] == way
    for name in ("sampling_loss", "loss_x", "step_loss"):
        np.testing.assert_allclose(together[name], alone[name], rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("side", ["right", "left"])
def test_curvature_of_padded_batches(side):
    """lr="auto" of a padded dataset is that of the sequences."""
    rows = sequences(16, shortest=7, longest=7)
    bare, data = Dataset.from_dict({"input_ids": rows}), padded(rows, side)
    settings = SHORT | {"lr": "auto", "num_draws": 1, "num_chains": 1}
    found = [devinterp.sample(model_of("gpt2"), d, {}, **settings).attrs["metadata"]["step_size"] for d in (bare, data)]
    assert found[1]["h_max_checkpoint"] == pytest.approx(found[0]["h_max_checkpoint"], rel=0.05)


@pytest.mark.filterwarnings("ignore:lr=1e\\+06")
def test_a_loss_that_counts_and_is_not_finite_ends_the_chain():
    data = without(LABELLED, "attention_mask")
    wild = devinterp.sample(
        TinyLM(40), data, {"x": data}, **(SHORT | {"lr": 1e6, "n_beta": 1e38, "localization": 0.0, "num_draws": 40})
    )
    assert wild.chain_status.values.tolist() == [2, 2]
    with pytest.raises(ChainsUnusable):
        devinterp.compute_llc(wild)
    tame = devinterp.sample(TinyLM(40), data, {"x": data}, lr=1e-4, **SHORT)
    assert np.isnan(tame.sampling_loss.values).any()
    assert tame.chain_status.values.tolist() == [1, 1]
    assert tame.diverged_at.values.tolist() == [-1, -1]


def causal_loss(model, data, count):
    batch = {name: torch.tensor(column[:count]) for name, column in data.to_dict().items()}
    return model(**batch).loss.item()


def test_labels_of_a_causal_model_are_what_its_own_loss_takes_them_for():
    rng = np.random.default_rng(3)
    ids = rng.integers(4, 40, (16, 9))
    labels = np.where(rng.random(ids.shape) < 0.4, -100, ids)
    labels[:, 3] = ids[:, 3]
    data = Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist()})
    model = model_of("gpt_neox")
    samples = devinterp.sample(model, data, {"x": (data, 4)}, lr=1e-4, **SHORT)
    found = samples.init_loss_x.values
    assert found.shape == (16, 8)
    np.testing.assert_array_equal(np.isfinite(found), labels[samples.row_x.values][:, 1:] != -100)
    assert np.nanmean(found) == pytest.approx(causal_loss(model, data, 16), rel=1e-5)


def bert(seed=0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = transformers.BertConfig(vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                                         intermediate_size=40, max_position_embeddings=32)  # fmt: skip
        return transformers.BertForMaskedLM(config).eval()


def hidden_tokens(count=16, length=9, seed=5) -> Dataset:
    rng = np.random.default_rng(seed)
    ids = rng.integers(4, 40, (count, length))
    hidden = rng.random(ids.shape) < 0.3
    hidden[:, 2] = True
    attended = np.ones_like(ids)
    attended[: count // 2, -2:] = 0
    hidden &= attended.astype(bool)
    return Dataset.from_dict({
        "input_ids": np.where(hidden, 3, ids).tolist(), "labels": np.where(hidden, ids, -100).tolist(),
        "attention_mask": attended.tolist(), "token_type_ids": np.zeros_like(ids).tolist(),
    })  # fmt: skip


def test_masked_language_models_predict_the_token_itself():
    model, data = bert(), hidden_tokens()
    samples = devinterp.sample(model, data, {"x": (data, 4)}, lr=1e-4, **SHORT)
    found, labels = samples.init_loss_x.values, np.asarray(data["labels"])[samples.row_x.values]
    assert found.shape == (16, 9), "one loss for each token, none shifted"
    np.testing.assert_array_equal(np.isfinite(found), labels != -100)
    assert np.nanmean(found) == pytest.approx(causal_loss(model, data, 16), rel=1e-5)
    assert samples.attrs["metadata"]["data"]["shift"] == 0
    influences = devinterp.compute_bif(samples, top_k=3)
    ids = samples.input_ids_x.values
    np.testing.assert_array_equal(influences.token, ids[influences.batch_1, influences.target_position])
    assert (influences.token.values == 3).all(), "what is predicted stands there as the mask"
    assert float(devinterp.compute_llc(samples).llc_sem) > 0


def t5() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.T5Config(vocab_size=40, d_model=32, d_ff=40, d_kv=8, num_layers=2, num_heads=4,
                                       decoder_start_token_id=0, dropout_rate=0.0)  # fmt: skip
        return transformers.T5ForConditionalGeneration(config).eval()


def bart() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.BartConfig(vocab_size=40, d_model=32, encoder_ffn_dim=40, decoder_ffn_dim=40, encoder_layers=2,
                                         decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
                                         max_position_embeddings=32)  # fmt: skip
        return transformers.BartForConditionalGeneration(config).eval()


@pytest.mark.parametrize("make", [t5, bart])
@pytest.mark.parametrize("length", [5, 9])  # of the labels; 9 is that of the input too
def test_encoder_decoder_models_predict_their_labels(make, length):
    model, rng = make(), np.random.default_rng(2)
    inputs = padded(sequences(16, longest=9), "right", length=9)
    labels = rng.integers(4, 40, (16, length))
    labels[:5, -2:] = -100
    data = inputs.add_column("labels", labels.tolist())
    samples = devinterp.sample(model, data, {"x": (data, 4)}, lr=1e-4, **SHORT)
    found = samples.init_loss_x.values
    assert found.shape == (16, length)
    np.testing.assert_array_equal(np.isfinite(found), labels[samples.row_x.values] != -100)
    assert np.nanmean(found) == pytest.approx(causal_loss(model, data, 16), rel=1e-5)
    influences = devinterp.compute_bif(samples, top_k=3)
    assert "token" not in influences, "positions are those of the labels"


def without(data: Dataset, *names: str) -> Dataset:
    return data.remove_columns(list(names))


def changed(data: Dataset, name: str, change) -> Dataset:
    values = np.asarray(data[name])
    change(values)
    return data.remove_columns([name]).add_column(name, values.tolist())


class Reversed(transformers.GPTNeoXForCausalLM):
    """Takes labels for those of the tokens before."""

    def forward(self, input_ids, attention_mask=None, labels=None):
        output = super().forward(input_ids, attention_mask=attention_mask)
        if labels is not None:
            output.loss = nn.functional.cross_entropy(output.logits[:, 1:].flatten(0, 1), labels[:, :-1].flatten())
        return output


class Positional(TinyLM):
    """Counts positions from the first token, padding or not, and takes no position_ids."""

    def __init__(self):
        super().__init__(40)
        self.places = nn.Parameter(torch.linspace(-1, 1, 8 * LENGTH).view(LENGTH, 8))

    def forward(self, ids, attention_mask=None):
        return self.out(torch.tanh(self.mix(self.embed(ids) + self.places[: ids.shape[1]])))


RIGHT = padded(sequences(), "right")
LABELLED = padded(sequences(), "right", labels=True)
REFUSED = [
    ("gpt2", changed(RIGHT, "attention_mask", lambda m: m[3].fill(0)), r"\['attention_mask'\]: row 3 is all 0"),
    ("gpt2", changed(RIGHT, "attention_mask", lambda m: m[3].fill(2)), "made of 0 and 1"),
    ("gpt2", changed(RIGHT, "attention_mask", lambda m: m[3, 1:].fill(0)), "row 3 has no position with a loss"),
    ("gpt2", changed(LABELLED, "labels", lambda m: m[5].fill(-100)), "row 5 has no position with a loss.*filter"),
    ("gpt2", changed(LABELLED, "labels", lambda m: m[5].fill(-1)), r"labels'\]: row 5 holds -1.*-100"),
    ("gpt2", changed(LABELLED, "labels", lambda m: m[5].fill(99)), "token id 99.*vocabulary of 64"),
    ("gpt2", LABELLED.rename_column("labels", "label"), "column='label'.*Did you mean 'labels'.*remove_columns"),
    ("gpt2", RIGHT.rename_column("attention_mask", "attention_masks"), "Did you mean 'attention_mask'"),
    ("gpt2", without(LABELLED, "attention_mask").add_column("x", [[1.0] * 3] * 24), "column='x'"),
    ("gpt2", RIGHT.add_column("labels", [[1] * 3] * 24), r"labels'\].*\(3,\).*\(11,\)"),
    ("gpt2", RIGHT.add_column("labels", [[1] * 3] * 23 + [[1, 2]]), r"row 23 has shape \(2,\), row 0 has \(3,\)"),
    ("gpt2", RIGHT.add_column("labels", [[0.5] * 11] * 24), "integers"),
    ("gpt2", without(RIGHT, "attention_mask").add_column("attention_mask", [[1, 0]] * 24), r"of shape \(11,\)"),
    ("gpt2", Dataset.from_dict({"input_ids": sequences(), "attention_mask": [[1] * len(s) for s in sequences()]}), "equal length.*pad"),
    ("bert", without(hidden_tokens(), "labels"), "looks ahead.*labels.*loss_fn"),
    ("bert", random_tokens(16, 6, 40), "looks ahead.*labels.*loss_fn"),
    ("t5", RIGHT, "columns.*with labels"),
    ("tiny", RIGHT, "column='attention_mask'"),
    ("positional", padded(sequences(), "left"), "row 1 of the dataset has other losses with its padding than alone.*on the right"),
    ("reversed", without(LABELLED, "attention_mask"), "its own loss on the labels.*loss_fn"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "data", "message"), REFUSED, ids=[f"{r[0]} {r[2][:28]}" for r in REFUSED])
def test_data_that_cannot_be_used_is_refused(refused, name, data, message):
    makers = {"bert": bert, "t5": t5, "tiny": TinyLM, "positional": Positional,
              "reversed": lambda: Reversed(tiny_model("gpt_neox").config).eval()}  # fmt: skip
    refused(message, model=makers.get(name, lambda: model_of(name))(), dataset=data, forwards=8)


def test_an_observable_without_a_loss_is_refused(refused):
    spoilt = changed(LABELLED, "labels", lambda m: m[:].fill(-100))
    refused("observables.*'x'.*no position", model=model_of("gpt2"), dataset=LABELLED, observables={"x": spoilt}, forwards=8)
    refused("of the columns of dataset", model=model_of("gpt2"), dataset=LABELLED, observables={"x": RIGHT}, forwards=8)


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_padded_observable_beside_data_that_is_not(side):
    model, rows = model_of("gpt2"), sequences()
    whole, data = random_tokens(24, LENGTH, 40), padded(rows, side)
    samples = devinterp.sample(model, whole, {"x": (data, 6), "y": whole}, lr=1e-4, **SHORT)
    for row, found in zip(samples.row_x.values, samples.init_loss_x.values, strict=True):
        np.testing.assert_allclose(real(found, rows[row], side), losses_of(model, rows[row]).detach(), rtol=2e-4, atol=2e-5)
    assert np.isfinite(samples.init_loss_y).all()
    np.testing.assert_array_equal(samples.attention_mask_y, 1)
    assert np.isfinite(devinterp.compute_llc(samples).llc_observable).all()
    found = devinterp.compute_bif(samples)
    assert np.isnan(found.influences.values).any()


def test_a_mask_of_ones_is_no_mask(tmp_path):
    """What every tokenizer adds: the run is that of the token ids alone."""
    data = random_tokens(24, 8, 40)
    model, settings = model_of("gpt2"), SHORT | {"lr": 1e-4, "output_path": tmp_path / "run"}
    one = devinterp.sample(model, data, {"x": data}, **settings)
    ones = data.add_column("attention_mask", [[1] * 8] * 24).add_column("text", ["a"] * 24)
    other = devinterp.sample(model, ones, {"x": ones}, **settings)
    xr.testing.assert_identical(one.to_dataset(), other.to_dataset())
    assert "data" not in other.attrs["metadata"]


def test_each_changed_column_is_named_and_an_interrupted_run_goes_on(tmp_path):
    model, settings = model_of("gpt2"), SHORT | {"lr": 1e-4, "output_path": tmp_path / "run"}
    first = devinterp.sample(model, LABELLED, {"x": LABELLED}, **settings)
    again = devinterp.sample(model, LABELLED, {"x": LABELLED}, **settings)
    xr.testing.assert_identical(first.to_dataset(), again.to_dataset())
    more = devinterp.sample(model, LABELLED, {"x": LABELLED}, **(settings | {"num_draws": 9}))
    whole = devinterp.sample(model, LABELLED, {"x": LABELLED}, **(settings | {"num_draws": 9, "output_path": None}))
    for name in ("sampling_loss", "loss_x", "baseline_loss", "init_loss_count"):
        np.testing.assert_array_equal(more[name], whole[name])
    settings["num_draws"] = 9

    def hide(labels):
        labels[0, 4] = -100

    other = changed(LABELLED, "labels", hide)
    for data, seen, message in (
        (other, LABELLED, ["dataset column 'labels': other values"]),
        (LABELLED, other.select(range(24)), None),
        (without(LABELLED, "attention_mask"), without(LABELLED, "attention_mask"), "attention_mask"),
    ):
        with pytest.raises(RunMismatchError) as caught:
            devinterp.sample(model, data, {"x": seen} if message != [] else {}, **(settings | {"batches_per_draw": 6}))
        lines = [line for line in caught.value.differences if "batches_per_draw" not in line and "observable x:" not in line]
        if isinstance(message, list):
            assert [line for line in lines if line.startswith("dataset")] == message
        elif message:
            assert any("dataset column 'attention_mask'" in line for line in lines)
        else:
            assert any("observable x column 'labels': other values" in line for line in lines)
