"""Shared fixtures."""

import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cases import GOOD, TinyLM, random_tokens
from datasets import Dataset

import devinterp
from devinterp.errors import DevinterpInputError

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a script has started the tests in the background


@pytest.fixture
def tiny() -> TinyLM:
    return TinyLM()


@pytest.fixture
def tokens() -> Dataset:
    return random_tokens()


@pytest.fixture(scope="session")
def warm() -> None:
    """What is imported once in a process does not count as time that a refusal takes."""
    devinterp.sample(TinyLM(), random_tokens(), {}, **GOOD)


@pytest.fixture
def refused(tmp_path: Path, warm: None) -> Callable[..., None]:
    """Calls `sample` and checks the contract of a refusal: kind, message, no forward pass (or a probe's few), no file, soon."""

    def check(
        message: str,
        model: Any = None,
        dataset: Any = None,
        observables: Any = None,
        forwards: int = 0,
        kind: type[Exception] = DevinterpInputError,
        **settings: Any,
    ) -> None:
        model, calls = TinyLM() if model is None else model, []
        if hasattr(model, "register_forward_hook"):
            model.register_forward_pre_hook(lambda *_: calls.append(1))
        arguments = GOOD | {"output_path": tmp_path / "new" / "run"} | settings
        dataset = random_tokens() if dataset is None else dataset
        began = time.process_time()
        with pytest.raises(kind) as caught:
            devinterp.sample(model, dataset, {} if observables is None else observables, **arguments)
        assert time.process_time() - began < 1
        assert isinstance(caught.value, ValueError | TypeError) or kind is not DevinterpInputError
        assert re.search(message, str(caught.value)), f"{caught.value} does not match {message}"
        assert len(calls) <= forwards, "a forward pass ran"
        assert not list(tmp_path.iterdir()), "a file was made"

    return check
