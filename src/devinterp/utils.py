"""Small helpers around sampling: a default n_beta, and text to equal-length token sequences."""

import math
import warnings
from typing import Any

from devinterp.errors import InputTypeError, InputValueError, got


def default_nbeta(dataloader_or_batch_size: Any, gradient_accumulation_steps: int = 1) -> float:
    """n / ln n with n = batch size x accumulation: the inverse temperature of WBIC times n (Watanabe 2013).

    Args:
        dataloader_or_batch_size: sequences per micro-batch, or a torch DataLoader with a batch_size.
        gradient_accumulation_steps: micro-batches per step.

    Returns:
        n_beta; 1.0, with a warning, for n <= 1.
    """
    batch_size = getattr(dataloader_or_batch_size, "batch_size", dataloader_or_batch_size)
    if isinstance(batch_size, bool) or not isinstance(batch_size, int):
        allowed = "an integer batch size, or a DataLoader that has one"
        raise InputTypeError(got("dataloader_or_batch_size", dataloader_or_batch_size, allowed, "Try 32."))
    n = batch_size * gradient_accumulation_steps
    if n <= 1:
        warnings.warn(f"n_beta = n / ln n is undefined for n = {n}; taking 1.", UserWarning, stacklevel=2)
        return 1.0
    return n / math.log(n)


def tokenize_and_concatenate(
    dataset: Any,
    tokenizer: Any,
    streaming: bool = False,
    max_length: int = 1024,
    column_name: str = "text",
    add_bos_token: bool = True,
    num_proc: int = 10,
) -> Any:
    """Text to token sequences of equal length: tokenise, join with the end token between texts, cut.

    No sequence is padded: of every 1000 texts, the tokens left over at the end are dropped. A text may be cut in two.

    Args:
        dataset: a Hugging Face Dataset (or, with streaming, an IterableDataset) with a column of text.
        tokenizer: a Hugging Face tokenizer with an end-of-text token.
        streaming: return a stream; `sample` needs a Dataset, so take a part of it first.
        max_length: tokens per sequence, the start token included.
        column_name: the column of text.
        add_bos_token: begin every sequence with the tokenizer's start token.
        num_proc: processes for more than 10,000 texts.

    Returns:
        A Dataset with an `input_ids` column in torch format.
    """
    from datasets import Features, List, Value

    if not isinstance(max_length, int) or max_length < 2 + add_bos_token:
        raise InputValueError(got("max_length", max_length, f"an integer >= {2 + add_bos_token}", "Try 1024."))
    if column_name not in (columns := list(dataset.column_names or [column_name])):
        raise InputValueError(got("column_name", column_name, f"one of {columns}", f"Try {columns[0]!r}."))
    if add_bos_token and tokenizer.bos_token_id is None:
        fix = "Try add_bos_token=False."
        raise InputValueError(got("add_bos_token", True, "False for a tokenizer without a start token", fix))
    if tokenizer.eos_token_id is None:
        fix = "Set tokenizer.eos_token."
        raise InputValueError(got("tokenizer", type(tokenizer).__name__, "one with an end-of-text token", fix))

    start = [tokenizer.bos_token_id] if add_bos_token else []
    body = max_length - len(start)

    def cut(texts: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        encoded = tokenizer(texts[column_name], add_special_tokens=False, verbose=False)["input_ids"]
        joined = [token for ids in encoded for token in (*ids, tokenizer.eos_token_id)]
        ends = range(body, len(joined) + 1, body)
        return {"input_ids": [start + joined[end - body : end] for end in ends]}

    made = dataset.select_columns([column_name])
    if streaming:
        return made.map(cut, batched=True, remove_columns=[column_name])
    processes = min(num_proc, len(made) // 10_000)  # a process costs more than it saves on less
    made = made.map(
        cut,
        batched=True,
        remove_columns=[column_name],
        features=Features({"input_ids": List(Value("int64"))}),
        num_proc=processes if processes > 1 else None,
    )
    if not len(made):
        fix = "Try a smaller max_length, or more text."
        raise InputValueError(got("dataset", "too little text", f"at least {body} tokens", fix))
    return made.with_format("torch")
