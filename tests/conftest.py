"""Fixtures for every room."""

from __future__ import annotations

import pytest

from gale.model.transformer import Decoder
from gale.text.tokenizer import Tokenizer
from tests.tiny_model import make_model, make_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return make_tokenizer()


@pytest.fixture(scope="session")
def model(tokenizer: Tokenizer) -> Decoder:
    return make_model(tokenizer)
