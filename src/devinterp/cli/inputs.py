"""Models and texts that a command names: local files, or hub ids."""

import sys
from pathlib import Path
from typing import Any

from devinterp.errors import InputValueError, got


def load_model(model: str, revision: str | None) -> tuple[Any, Any]:
    """The model and its tokenizer."""
    from transformers.utils.logging import disable_progress_bar

    from devinterp.engine.origin import Pretrained, named

    if not sys.stderr.isatty():
        disable_progress_bar()
    origin = named(model, "MODEL")
    if revision is not None:
        if origin.revision is not None:
            raise InputValueError(got("MODEL", model, "without '@' where --revision is given", "Give the revision once."))
        origin = Pretrained(origin.source, revision)
    tokenizer = origin.tokenizer("MODEL")
    return origin.load("MODEL"), tokenizer


def tokenize(option: str, source: str, tokenizer: Any, column: str, split: str, context: int, sequences: int) -> Any:
    from devinterp.utils import tokenize_and_concatenate

    text = load_text(option, source, column, split)
    made = tokenize_and_concatenate(text, tokenizer, max_length=context, column_name=column,
                                    add_bos_token=tokenizer.bos_token_id is not None)  # fmt: skip
    return made.select(range(min(len(made), sequences)))


FILES = (".txt", ".jsonl", ".json", ".parquet")


def check_source(option: str, source: str) -> None:
    """Refuse a file that is not there or of no known kind. The name of a hub dataset is not looked up.

    Raises:
        InputValueError: it is no file that can be read.
    """
    path = Path(source)
    if (path.exists() or path.suffix in FILES) and not (path.is_file() and path.suffix in FILES):
        problem = "no such file" if not path.exists() else "unknown ending"
        raise InputValueError(got(option, source, "a .txt, .jsonl or .parquet file, or a hub dataset", f"{problem}."))


def load_text(option: str, source: str, column: str, split: str) -> Any:
    from datasets import Dataset, load_dataset

    check_source(option, source)
    path = Path(source)
    if path.suffix == ".txt" and path.is_file():
        try:
            return Dataset.from_dict({column: [path.read_text()]})
        except UnicodeDecodeError as error:
            raise InputValueError(got(option, source, "text in UTF-8", str(error))) from error
    if path.is_file():
        return (Dataset.from_parquet if path.suffix == ".parquet" else Dataset.from_json)(str(path))
    try:
        return load_dataset(source, split=split)
    except Exception as error:
        fix = f"Check the name. ({str(error).strip().split(chr(10))[0]})"
        raise InputValueError(got(option, source, "a file or a hub dataset", fix)) from error
