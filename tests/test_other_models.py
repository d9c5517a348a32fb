"""Models that are no language models: any columns, a loss for each row or position, through everything without tricks."""

import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from cases import TinyLM, random_tokens
from datasets import Array2D, Dataset, Features, Value
from naive import correlation, standard_error, susceptibility
from sklearn.datasets import load_digits
from torch import nn

import devinterp
from devinterp.errors import RunMismatchError

DIGITS = load_digits()
X, Y = torch.tensor(DIGITS.data / 16, dtype=torch.float32), torch.tensor(DIGITS.target)
SHORT = {"lr": "auto", "sampling_method": "leimkuhler_matthews", "n_beta": 30.0, "localization": 100.0, "batch_size": 16,
         "num_chains": 2, "num_draws": 8, "num_init_loss_batches": 2, "progress": False}  # fmt: skip


def classifier() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 10))


def of_pair(model, batch):
    x, y = batch
    return nn.functional.cross_entropy(model(x), y, reduction="none")


def of_dict(model, batch):
    return nn.functional.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


def by_row(model, ids):
    """The way around before: row numbers as token ids."""
    row = ids[:, 0]
    return nn.functional.cross_entropy(model(X[row]), Y[row], reduction="none")[:, None]


def test_a_run_equals_that_by_row_numbers():
    """The same rows, losses, noise: the same numbers to the last bit."""
    rows = Dataset.from_dict({"input_ids": [[i, 0] for i in range(len(X))]})
    old = devinterp.sample(classifier(), rows, {"a": rows}, loss_fn=by_row, **(SHORT | {"lr": 1e-3}))
    new = devinterp.sample(classifier(), (X, Y), {"a": (X, Y)}, loss_fn=of_pair, **(SHORT | {"lr": 1e-3}))
    for name in ("sampling_loss", "baseline_loss", "loss_a", "init_loss_a", "init_loss", "step_loss"):
        np.testing.assert_array_equal(new[name], old[name])
    np.testing.assert_array_equal(new.row_a, old.input_ids_a[:, 0])
    np.testing.assert_array_equal(new.item_0_a, X[new.row_a.values])
    np.testing.assert_array_equal(new.item_1_a, Y[new.row_a.values])
    assert new.loss_a.dims == ("chain", "draw", "batch_a", "token_pos")
    assert new.sizes["token_pos"] == 1
    assert "input_ids_a" not in new
    result = [devinterp.compute_llc(samples) for samples in (old, new)]
    assert result[0].llc_mean == result[1].llc_mean


class Pairs(torch.utils.data.Dataset):
    def __len__(self):
        return len(X)

    def __getitem__(self, i):
        return X[i], int(Y[i])


class Named(Pairs):
    def __getitem__(self, i):
        return {"x": X[i].numpy(), "y": Y[i]}


FORMS = {
    "tuple": ((X, Y), of_pair),
    "arrays": ((DIGITS.data / 16, DIGITS.target), of_pair),
    "tensor dataset": (torch.utils.data.TensorDataset(X, Y), of_pair),
    "torch dataset": (Pairs(), of_pair),
    "subset": (torch.utils.data.Subset(Pairs(), range(len(X))), of_pair),
    "dict": ({"x": X, "y": Y}, of_dict),
    "dict of arrays": ({"x": DIGITS.data / 16, "y": DIGITS.target.astype(np.int32)}, of_dict),
    "torch dataset of dicts": (Named(), of_dict),
    "hugging face": (Dataset.from_dict({"x": (DIGITS.data / 16).tolist(), "y": DIGITS.target.tolist()}), of_dict),
    "hugging face, torch": (Dataset.from_dict({"x": X.numpy(), "y": Y.numpy()}).with_format("torch"), of_dict),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_the_data_gives_the_same_run(form, tmp_path):
    data, loss_fn = FORMS[form]
    settings = SHORT | {"lr": 1e-3, "num_draws": 2, "output_path": tmp_path / "run"}
    samples = devinterp.sample(classifier(), data, {"a": (data, 2)}, loss_fn=loss_fn, **settings)
    expected = devinterp.sample(classifier(), (X, Y), {"a": ((X, Y), 2)}, loss_fn=of_pair, **(settings | {"output_path": None}))
    for name in ("sampling_loss", "loss_a", "row_a"):
        np.testing.assert_array_equal(samples[name], expected[name])
    if loss_fn is of_dict:  # what is compared is the data, not what holds it
        again = devinterp.sample(classifier(), {"x": X, "y": Y}, {"a": ({"x": X, "y": Y}, 2)}, loss_fn=loss_fn, **settings)
        xr.testing.assert_identical(again.to_dataset(), samples.to_dataset())


def test_large_data_is_read_row_by_row(monkeypatch):
    data, loss_fn = FORMS["hugging face"]
    one = devinterp.sample(classifier(), data.shuffle(seed=1), {}, loss_fn=loss_fn, **SHORT)
    monkeypatch.setattr("devinterp.engine.rows.KEPT_IN_MEMORY", 0)
    monkeypatch.setattr("devinterp.engine.columns.READ_BYTES", 10_000)
    monkeypatch.setattr("devinterp.store.data.COLUMN_BYTES", 1000)
    other = devinterp.sample(classifier(), data.shuffle(seed=1), {"a": data}, loss_fn=loss_fn, **SHORT)
    np.testing.assert_array_equal(one.sampling_loss, other.sampling_loss)
    assert "x_a" not in other, "too large: the row numbers are enough"
    assert "y_a" in other
    assert one.attrs["metadata"]["identity"]["dataset column 'x'"] == other.attrs["metadata"]["identity"]["dataset column 'x'"]


@pytest.fixture(scope="module")
def samples():
    zeros = Y == 0
    data = {"a": (X, Y), "zeros": ((X[zeros], Y[zeros]), 2)}
    return devinterp.sample(classifier(), (X, Y), data, loss_fn=of_pair, **(SHORT | {"num_draws": 12}))


def test_llcs_of_all_kinds(samples):
    found = devinterp.compute_llc(samples, per="sequence")
    excess = samples.sampling_loss.values.astype(float) - samples.baseline_loss.values.astype(float)
    assert float(found.llc_mean) == pytest.approx(30.0 * excess.mean(), rel=1e-6)
    trace = excess.mean(axis=(2, 3))
    assert float(found.llc_sem) == pytest.approx(30.0 * standard_error(trace), rel=1e-6)
    own = samples.loss_zeros.values.astype(float)[..., 0] - samples.init_loss_zeros.values.astype(float)[:, 0]
    np.testing.assert_allclose(found.llc_sequence_zeros, 30.0 * own.mean(axis=(0, 1)), rtol=1e-6)
    assert devinterp.diagnose(samples).llc_mean == found.llc_mean
    assert len(devinterp.describe(devinterp.diagnose(samples))) > 50


def test_influences_between_rows(samples, tmp_path):
    ds = samples.to_dataset()
    traces = np.concatenate([ds.loss_a.values, ds.loss_zeros.values], axis=2)[..., 0].transpose(2, 0, 1).reshape(80, -1)
    for method, dims in (("token", 4), ("sequence", 2)):
        found = devinterp.compute_bif(samples, correlation_method=method, errors=True)
        assert found.influences.ndim == dims
        for i, j in ((0, 1), (3, 60), (50, 50)):
            value = found.influences.isel(batch_1=i, batch_2=j).squeeze()
            assert float(value) == pytest.approx(correlation(traces[i], traces[j]), abs=1e-5)
    np.testing.assert_array_equal(found.row, np.concatenate([ds.row_a, ds.row_zeros]))
    assert "input_ids" not in found
    found = devinterp.compute_bif(samples, queries=[(5, 0)], top_k=3)
    assert found.target_position.values.tolist() == [[0, 0, 0]]
    with pytest.raises(ValueError, match=r"target_position in \[0, 0\]"):
        devinterp.compute_bif(samples, queries=[(5, 1)])
    written = devinterp.compute_bif(samples, output_path=tmp_path / "bif")
    np.testing.assert_array_equal(written.row, found.row)
    one_call = devinterp.bif(classifier(), (X, Y), {"a": (X, Y)}, loss_fn=of_pair, control=True, **SHORT)
    assert one_call.influences_control.shape == (48, 48, 1, 1)


def test_susceptibilities_of_layers_to_rows():
    observables = {"a": {"x": X, "y": Y}, "b": {"x": X[:50], "y": Y[:50]}}
    layers = {"full": None, "first": {"0.weight": None, "0.bias": None}}
    settings = SHORT | {"lr": 1e-3, "batches_per_draw": 1, "loss_fn": of_dict}
    found = devinterp.susceptibilities(classifier(), observables["a"], observables, layers, sampling_task="a", **settings)
    runs = [devinterp.sample(classifier(), observables["a"], observables, param_masks=m, **settings).to_dataset()
            for m in layers.values()]  # fmt: skip
    table, context = found["susceptibilities"], found["context"]
    np.testing.assert_allclose(table.sus[:, 0], susceptibility(runs[1], runs[0], "a", "b", "two_chain")[:, 0], rtol=1e-6)
    np.testing.assert_array_equal(context.row, runs[0].row_b)
    assert "position" not in context.coords
    np.testing.assert_array_equal(table.batch, range(16))
    weights = devinterp.compute_patterning(found, {"first": -0.001}, alpha=0.01, per="sequence").weights
    assert weights.sizes == {"sus_flat": 16}


def test_calibrate_finds_settings():
    model = classifier()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        of_pair(model, (X, Y)).mean().backward()
        optimizer.step()
    found = devinterp.calibrate(
        model,
        (X, Y),
        loss_fn=of_pair,
        batch_size=64,
        largest_excess=0.2,
        max_steps=400,
        progress=False,
        num_init_loss_batches=4,
    )
    assert found.settings["loss_fn"] is of_pair
    samples = devinterp.sample(model, (X, Y), {}, progress=False, **(found.settings | {"num_draws": 4}))
    assert samples.attrs["completed"]


class Image(nn.Module):
    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.convolution, self.norm, self.out = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 10)

    def forward(self, pixel_values):
        return self.out(torch.relu(self.norm(self.convolution(pixel_values[:, None]))).mean((2, 3)))


def test_images_in_a_dataset_with_labels():
    features = Features({"pixel_values": Array2D((8, 8), "float32"), "labels": Value("int8")})
    data = Dataset.from_dict(
        {"pixel_values": (DIGITS.images / 16).tolist(), "labels": DIGITS.target.tolist()}, features=features
    )

    def loss_fn(model, batch):
        assert batch["pixel_values"].dtype == torch.float32
        assert batch["labels"].dtype == torch.int64
        return nn.functional.cross_entropy(model(batch["pixel_values"]), batch["labels"], reduction="none")

    for options in ({}, {"train_mode": True}, {"chains_together": "vmap"}, {"gradient_accumulation_steps": 2}):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            samples = devinterp.sample(Image(), data, {"a": data}, loss_fn=loss_fn, **(SHORT | options))
        assert samples.pixel_values_a.shape == (48, 8, 8)
        assert np.isfinite(devinterp.compute_llc(samples).llc_mean)
        model = Image().eval()
        x = torch.tensor(DIGITS.images / 16, dtype=torch.float32)[samples.row_a.values]
        expected = nn.functional.cross_entropy(model(x), Y[samples.row_a.values], reduction="none").detach()
        if not options.get("train_mode"):
            np.testing.assert_allclose(samples.init_loss_a[:, 0], expected, rtol=1e-5)


def test_frozen_layers_of_a_classifier_are_replayed():
    model, masks = nn.Sequential(classifier()[:2], classifier()[2:]), {"1.2.weight": None, "1.2.bias": None}
    settings = SHORT | {"loss_fn": of_pair, "param_masks": masks}
    fast = devinterp.sample(model, (X, Y), {"a": (X, Y)}, **settings)
    assert fast.attrs["metadata"]["computed"]["prefix"] == ["0"]
    plain = devinterp.sample(model, (X, Y), {"a": (X, Y)}, reuse_prefix=False, **settings)
    np.testing.assert_array_equal(fast.loss_a, plain.loss_a)


def test_losses_of_several_outputs_are_positions():
    model, targets = nn.Linear(64, 3), torch.randn(len(X), 3)
    samples = devinterp.sample(
        model, (X, targets), {"a": (X, targets)}, loss_fn=lambda m, b: (m(b[0]) - b[1]).square(), **SHORT
    )
    expected = (model(X) - targets).square().detach()[samples.row_a.values]
    np.testing.assert_allclose(samples.init_loss_a, expected, rtol=1e-4, atol=1e-6)


def test_a_loss_fn_takes_plain_token_ids_where_there_is_no_other_column():
    seen = []

    def loss_fn(model, ids):
        seen.append(type(ids))
        return nn.functional.cross_entropy(model(ids)[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")

    data = random_tokens()
    one = devinterp.sample(TinyLM(), data, {"a": data}, loss_fn=loss_fn, **SHORT)
    ids = {"input_ids": torch.tensor(data["input_ids"])}
    other = devinterp.sample(TinyLM(), ids, {"a": ids}, loss_fn=loss_fn, **SHORT)
    xr.testing.assert_identical(one.to_dataset().drop_attrs(), other.to_dataset().drop_attrs())
    assert one.attrs["metadata"]["identity"]["dataset"] == other.attrs["metadata"]["identity"]["dataset"]
    assert set(seen) == {torch.Tensor}


def test_masks_act_on_losses_of_a_loss_fn_where_positions_are_known():
    ids = torch.tensor(random_tokens(32, 6)["input_ids"])
    mask = torch.ones_like(ids)
    mask[:16, -2:] = 0
    data = {"input_ids": ids, "attention_mask": mask}

    def next_token(model, batch):
        logits = model(batch["input_ids"])
        return nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), batch["input_ids"][:, 1:], reduction="none")

    samples = devinterp.sample(TinyLM(), data, {"a": (data, 2)}, loss_fn=next_token, **SHORT)
    np.testing.assert_array_equal(np.isfinite(samples.init_loss_a), mask[samples.row_a.values][:, 1:])
    samples = devinterp.sample(
        TinyLM(), data, {"a": data}, loss_fn=lambda m, b: next_token(m, b).mean(1), **(SHORT | {"batch_size": 8})
    )
    assert samples.init_loss_a.shape == (24, 1)
    assert np.isfinite(samples.init_loss_a).all()


def broken(name, row, value):
    columns = {"x": X.clone(), "y": Y.clone()}
    columns[name][row] = value
    return columns


class Endless(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(())


REFUSED = [
    ((X, Y[:-1]), of_pair, "column 'item_1' has 1796 rows, 'item_0' has 1797"),
    ({"x": X, "y": Y[:-1]}, of_dict, "column 'y' has 1796 rows, 'x' has 1797"),
    (broken("x", 7, float("nan")), of_dict, r"\['x'\]: row 7 holds NaN"),
    (broken("x", 8, float("inf")), of_dict, r"\['x'\]: row 8 holds NaN or infinite"),
    ({"x": X.double() * 1e300, "y": Y}, of_dict, "must have the same dtype|failed on a batch"),
    ({"x": X.numpy().astype(np.float64) * 1e300, "y": Y}, of_dict, "row 0 holds NaN or infinite"),
    ({"x": np.array([object()] * 1797), "y": Y}, of_dict, r"\['x'\]=.*object.*numbers"),
    ({"x": np.array(["a"] * 1797), "y": Y}, of_dict, r"\['x'\]=.*numbers"),
    ({"x": X.to(torch.complex64), "y": Y}, of_dict, "complex64.*real numbers"),
    ({"x": X.to_sparse(), "y": Y}, of_dict, "dense tensor"),
    ({"x": X, "y": torch.tensor(3)}, of_dict, "'y'.*a single number"),
    ({3: X}, of_dict, "keys are strings"),
    ({"x": X, "a\nb": Y}, of_dict, "column='a.*nb'.*printable"),
    ({"x": X, "": Y}, of_dict, "column=''.*1 to 64"),
    ({"x": X, "y" * 65: Y}, of_dict, "1 to 64 printable"),
    ({"x": X[:, :0], "y": Y}, of_dict, "rows that hold numbers"),
    ({"x": X, "sampling": Y}, of_dict, "KeyError: 'y'.*|another name"),
    ({"x": X, "wrong": Y}, of_dict, r"KeyError: 'y'.*a dict of x \(16, 64\), wrong \(16,\)"),
    ((X[:3], Y[:3]), of_pair, "3 rows.*at least 16 rows"),
    ((), of_pair, "a datasets.Dataset.*tuple of tensors"),
    (X, of_pair, r"tuple of tensors.*\(x, y\)"),
    ((X, Y), None, r"columns \['item_0', 'item_1'\].*loss_fn"),
    (Dataset.from_dict({"x": [[1.0, 2.0]] * 20 + [[1.0]]}), of_dict, r"\['x'\]: row 20 has shape \(1,\), row 0 has \(2,\)"),
    (Dataset.from_dict({"x": [[1.0, 2.0]] * 20 + [None]}), of_dict, r"\['x'\]=.*object"),
    (Dataset.from_dict({"x": ["a"] * 20}), of_dict, r"\['x'\]=.*numbers"),
    (Endless(), of_pair, "torch Dataset with a length"),
    ((X, Y), lambda m, b: of_pair(m, b).mean(), r"shape \(\).*\(16,\), one loss per row.*reduction='none'"),
    ((X, Y), lambda m, b: of_pair(m, b)[:-1], r"shape \(15,\)"),
    ((X, Y), lambda m, b: of_pair(m, b)[:, None, None], r"shape \(16, 1, 1\)"),
    ((X, Y), lambda m, b: 1.0, "loss_fn='float'"),
    ((X, Y), lambda m, b: of_pair(m, b).detach(), "without a gradient"),
    ((X, Y), lambda m, b: of_pair(m, b) * float("nan"), "NaN or infinite losses"),
    ({"x": X, "labels": torch.where(Y == 0, -100, Y)}, lambda m, b: of_dict(m, {"x": b["x"], "y": b["labels"]}), "row 0 is -100"),
]  # fmt: skip


@pytest.mark.parametrize(("data", "loss_fn", "message"), REFUSED, ids=[f"{i} {r[2][:25]}" for i, r in enumerate(REFUSED)])
def test_data_that_cannot_be_used_is_refused(refused, data, loss_fn, message):
    settings = {"batch_size": 16, "loss_fn": loss_fn, "loss_fn_id": None if loss_fn is None else "loss"}
    refused(message, model=classifier(), dataset=data, forwards=4, **settings)


@pytest.mark.parametrize(
    ("column", "observable"),
    [("loss", "a"), ("init_loss", "a"), ("row", "a"), ("batch", "a"), ("sampling-", "loss"), ("a", "dim_0")],
)
def test_columns_that_would_hide_what_is_stored_are_refused(refused, column, observable):
    data = {"x": X, "y": Y, column: X}
    message = "is taken|another name"
    if column == "sampling-":
        data, message = {"x": X, "y": Y, "sampling_": X, "sampling-": X}, "is taken"
    refused(message, model=classifier(), dataset=data, observables={observable: data}, forwards=4, loss_fn=of_dict,
            loss_fn_id="x")  # fmt: skip


def test_observables_must_be_of_the_same_columns(refused):
    settings = {"model": classifier(), "loss_fn": of_dict, "loss_fn_id": "x"}
    data = {"x": X, "y": Y}
    refused(r"\['a'\]=.*of the columns of dataset: \['x', 'y'\]", dataset=data, observables={"a": {"x": X}}, **settings)
    refused(r"\['x'\]=.*as in dataset: \(64,\)", dataset=data, observables={"a": {"x": X[:, :5], "y": Y}}, **settings)
    refused("a tuple.*a dict", dataset=data, observables={"a": (X, Y)}, **settings)
    refused("number of batches", dataset=data, observables={"a": (data, X)}, **settings)


def test_each_changed_column_is_named(tmp_path):
    settings = SHORT | {"lr": 1e-3, "loss_fn": of_dict, "output_path": tmp_path / "run"}
    data = {"x": X, "y": Y}
    devinterp.sample(classifier(), data, {"a": data}, **settings)
    for name in ("x", "y"):
        other = broken(name, 5, 1)
        with pytest.raises(RunMismatchError) as caught:
            devinterp.sample(classifier(), other, {"a": data}, **settings)
        assert caught.value.differences == [f"dataset column {name!r}: other values"]
        wrong = {"x": data["x"] + (name == "x"), "y": data["y"] * 0 if name == "y" else data["y"]}
        with pytest.raises(RunMismatchError) as caught:
            devinterp.sample(classifier(), data, {"a": wrong}, **settings)
        assert caught.value.differences == [f"observable a column {name!r}: other values"]
    with pytest.raises(RunMismatchError, match="dataset column 'z': not in the stored run"):
        devinterp.sample(classifier(), data | {"z": Y}, {"a": data | {"z": Y}}, **settings)
    more = devinterp.sample(classifier(), data, {"a": data}, **(settings | {"num_chains": 3}))
    fresh = devinterp.sample(classifier(), data, {"a": data}, **(settings | {"num_chains": 3, "output_path": None}))
    np.testing.assert_array_equal(more.loss_a, fresh.loss_a)
    assert devinterp.verify(tmp_path / "run").damaged == {}


@pytest.mark.parametrize("way", ["vmap", "processes"])
@pytest.mark.parametrize("shared", [True, False])
def test_chains_together(way, shared):
    settings = SHORT | {"lr": 1e-3, "match_sampling_input_ids_across_chains": shared, "loss_fn": of_dict}
    data = {"x": X, "y": Y}
    found = [devinterp.sample(classifier(), data, {"a": data}, chains_together=w, **settings) for w in ("sequential", way)]
    assert found[1].attrs["metadata"]["computed"]["way"] == way
    np.testing.assert_allclose(found[0].loss_a, found[1].loss_a, rtol=1e-4, atol=1e-6)


def test_the_page_on_other_models_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parent.parent / "docs" / "other_models.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) > 4
    space: dict = {}
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number, block in enumerate(blocks):
            exec(compile(block, f"other_models.md, block {number}", "exec"), space)
    assert np.isnan(space["padded"].loss_x.values).any()
