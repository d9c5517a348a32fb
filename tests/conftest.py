"""Shared fixtures."""

import pytest
from cases import TinyLM, random_tokens
from datasets import Dataset


@pytest.fixture
def tiny() -> TinyLM:
    return TinyLM()


@pytest.fixture
def tokens() -> Dataset:
    return random_tokens()
