"""Data and observables that cannot be used are refused before any forward pass and before any file is made."""

import warnings

import pytest
import torch
from cases import GOOD, TinyLM, random_tokens
from datasets import Dataset, DatasetDict, IterableDataset

import devinterp


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
    (two([[1, 2, None]] * 8), "rows 0 to 7 hold nulls"),
    (two([[]] * 8), "integer token ids"),
    (two([[True, False]] * 8), "integer token ids"),
    (two([[[1, 2], [3, 4]]] * 8), "integer token ids"),
    (DatasetDict({"train": two([[1, 2]] * 8)}), "a datasets.Dataset"),
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
    ({"\u0441\u043ede": DATA}, "letters"),  # looks like "code"
    ({"../../x": DATA, "------x": DATA}, "would both"),
    ({"x": DATA, "y": random_tokens(vocabulary=99)}, "vocabulary of 11"),
    ({"x" * 300: DATA}, "1 to 64"),
    ({"naïve": DATA}, "naïve"),
    ({"sampling": DATA}, "taken"),
    ({3: DATA}, "observables=3: must be a string"),
    (DATA, "a dict"),
]


@pytest.mark.parametrize(("dataset", "message"), DATASETS, ids=[d[1][:25] for d in DATASETS])
def test_datasets(refused, dataset, message):
    refused(message, dataset=dataset, forwards=int("vocabulary" in message))  # known from a forward pass on zeros


@pytest.mark.parametrize(("observables", "message"), OBSERVABLES, ids=[o[1][:25] for o in OBSERVABLES])
def test_observables(refused, observables, message):
    refused(message, observables=observables, forwards=int("vocabulary" in message))


@pytest.mark.parametrize(
    "name", ["../../x", "/abs", "a\0b", "\u202eabc", "x/y", "a.b", "1st", "chain", "init_loss", "x" * 64], ids=repr
)
def test_names_are_made_safe(name, tmp_path):
    samples = devinterp.sample(TinyLM(), DATA, {name: DATA}, output_path=tmp_path / "run", **GOOD)
    (stored,) = (item["obs_id"] for item in samples.attrs["metadata"]["config"]["observables"])
    assert stored.isidentifier()
    assert stored.isascii()
    assert samples[f"loss_{stored}"].shape == (2, 2, 12, 5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "run.run"]
    assert (tmp_path / "run" / f"loss_{stored}" / "zarr.json").is_file()


def test_no_observables_are_legal():
    assert not [name for name in devinterp.sample(TinyLM(), DATA, {}, **GOOD).data_vars if name.startswith("loss_")]


def test_a_dataset_without_a_format_of_tensors_is_converted():
    assert devinterp.sample(TinyLM(), DATA.with_format(None), {"x": DATA.with_format("torch")}, **GOOD).attrs["completed"]


def test_shuffling_a_dataset_later_leaves_the_run_alone(tmp_path):
    """A run is of the rows as they were; other rows are another run."""
    arguments = GOOD | {"output_path": tmp_path / "run"}
    devinterp.sample(TinyLM(), DATA, {}, **arguments)
    with pytest.raises(ValueError, match="dataset: other values"):
        devinterp.sample(TinyLM(), DATA.shuffle(seed=1), {}, **arguments)


def test_padding_is_warned_about():
    model = TinyLM()
    model.config = type("Config", (), {"pad_token_id": 0, "eos_token_id": 1})()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        devinterp.sample(model, two([[1, 2, 0, 0]] * 8), {}, **GOOD)
    assert len([warning for warning in caught if "end in the padding token 0" in str(warning.message)]) == 1
