"""default_nbeta and tokenize_and_concatenate."""

import math

import pytest
from datasets import Dataset
from tokenizers import ByteLevelBPETokenizer
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from devinterp import default_nbeta, tokenize_and_concatenate
from devinterp.errors import DevinterpInputError


def test_default_nbeta():
    assert default_nbeta(32) == pytest.approx(32 / math.log(32))
    assert default_nbeta(8, gradient_accumulation_steps=4) == pytest.approx(32 / math.log(32))
    assert default_nbeta(DataLoader(list(range(10)), batch_size=5)) == pytest.approx(5 / math.log(5))
    with pytest.warns(UserWarning, match="undefined for n = 1"):
        assert default_nbeta(1) == 1.0
    with pytest.raises(TypeError, match="dataloader_or_batch_size"):
        default_nbeta("32")


@pytest.fixture(scope="module")
def tokenizer():
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(["a few words"], vocab_size=260, special_tokens=["<|end|>"], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token="<|end|>", eos_token="<|end|>")


def test_texts_are_joined_and_cut(tokenizer):
    texts = ["a few words", "more words", "and the last of them"]
    end = tokenizer.eos_token_id
    stream = [token for text in texts for token in [*tokenizer(text)["input_ids"], end]]
    made = tokenize_and_concatenate(Dataset.from_dict({"text": texts, "n": [1, 2, 3]}), tokenizer, max_length=8)
    assert made.column_names == ["input_ids"]
    rows = made["input_ids"][:]
    assert made.format["type"] == "torch"
    assert all(row[0] == end and len(row) == 8 for row in rows)
    assert [int(token) for row in rows for token in row[1:]] == stream[: 7 * len(rows)]
    assert len(rows) == len(stream) // 7
    bare = tokenize_and_concatenate(Dataset.from_dict({"text": texts}), tokenizer, max_length=8, add_bos_token=False)
    assert bare[0]["input_ids"].tolist() == stream[:8]


def test_streams_stay_streams(tokenizer):
    stream = Dataset.from_dict({"text": ["a few words"] * 5}).to_iterable_dataset()
    rows = list(tokenize_and_concatenate(stream, tokenizer, streaming=True, max_length=6))
    assert rows
    assert all(len(row["input_ids"]) == 6 for row in rows)


@pytest.mark.parametrize(("change", "message"), [({"max_length": 1}, "max_length=1"), ({"column_name": "body"}, r"one of \['text'\]"),
                                                 ({"max_length": 10_000}, "too little text")])  # fmt: skip
def test_errors(tokenizer, change, message):
    with pytest.raises(DevinterpInputError, match=message):
        tokenize_and_concatenate(Dataset.from_dict({"text": ["a few words"]}), tokenizer, **change)


def test_tokenizers_without_special_tokens_are_refused():
    bpe = ByteLevelBPETokenizer()
    bare = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer)
    with pytest.raises(DevinterpInputError, match="add_bos_token=True"):
        tokenize_and_concatenate(Dataset.from_dict({"text": ["a"]}), bare)
    with pytest.raises(DevinterpInputError, match="end-of-text"):
        tokenize_and_concatenate(Dataset.from_dict({"text": ["a"]}), bare, add_bos_token=False)
