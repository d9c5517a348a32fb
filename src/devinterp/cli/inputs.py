"""Models and texts that a command names: local files, or hub ids."""

import sys
from pathlib import Path
from typing import Any

from devinterp.errors import InputValueError, got


def load_tokenizer(name: str, revision: str | None = None) -> Any:
    from transformers import AutoTokenizer

    try:
        # without the False, transformers asks at a terminal whether to run the code that comes with a checkpoint
        return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        fix = f"Check the path or name. ({_first_line(error)})"
        raise InputValueError(got("--tokenizer", name, "a directory with a tokenizer, or a hub id", fix)) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def load_model(model: str, revision: str | None) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    if not sys.stderr.isatty():
        disable_progress_bar()
    try:
        # without the False, transformers asks at a terminal whether to run the code that comes with a checkpoint
        tokenizer = AutoTokenizer.from_pretrained(model, revision=revision, trust_remote_code=False)
        return AutoModelForCausalLM.from_pretrained(model, revision=revision, trust_remote_code=False), tokenizer
    except (OSError, ValueError) as error:
        fix = f"Check the path or name. ({_first_line(error)})"
        raise InputValueError(got("MODEL", model, "a directory with a model and tokenizer, or a hub id", fix)) from error


def tokenize(option: str, source: str, tokenizer: Any, column: str, split: str, context: int, sequences: int) -> Any:
    from devinterp.utils import tokenize_and_concatenate

    text = load_text(option, source, column, split)
    made = tokenize_and_concatenate(text, tokenizer, max_length=context, column_name=column,
                                    add_bos_token=tokenizer.bos_token_id is not None)  # fmt: skip
    return made.select(range(min(len(made), sequences)))


def load_text(option: str, source: str, column: str, split: str) -> Any:
    from datasets import Dataset, load_dataset

    path = Path(source)
    if path.suffix == ".txt" and path.is_file():
        try:
            return Dataset.from_dict({column: [path.read_text()]})
        except UnicodeDecodeError as error:
            raise InputValueError(got(option, source, "text in UTF-8", str(error))) from error
    readers = {".jsonl": Dataset.from_json, ".json": Dataset.from_json, ".parquet": Dataset.from_parquet}
    if path.suffix in readers and path.is_file():
        return readers[path.suffix](str(path))
    if path.exists() or path.suffix in (*readers, ".txt"):
        problem = "no such file" if not path.exists() else "unknown ending"
        raise InputValueError(got(option, source, "a .txt, .jsonl or .parquet file, or a hub dataset", f"{problem}."))
    try:
        return load_dataset(source, split=split)
    except Exception as error:
        fix = f"Check the name. ({_first_line(error)})"
        raise InputValueError(got(option, source, "a file or a hub dataset", fix)) from error
