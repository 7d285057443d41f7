"""A summary tells what a model is, from its folder alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gale.core.errors import ModelError
from gale.model.checkpoint import load_model
from gale.registry.summary import ModelSummary
from gale.text.tokenizer import Tokenizer
from tests.tiny_model import MIXTURE, save_folder


@pytest.mark.parametrize("kind", [{}, {"tied_embeddings": False}, {**MIXTURE, "qkv_bias": True, "output_bias": True}])
def test_every_parameter_is_counted(kind: dict[str, Any], tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = save_folder(tokenizer, tmp_path / "heron", **kind)
    summary = ModelSummary.of(folder)
    model = load_model(folder, dtype=torch.float32)
    assert summary.parameters == sum(parameter.numel() for parameter in model.parameters())
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    assert summary.active_parameters == summary.parameters - experts * 4 // 6
    assert summary.tokens == tokenizer.vocabulary_size
    assert summary.size == sum(file.stat().st_size for file in folder.iterdir())


def test_the_lines_are_for_people(tokenizer: Tokenizer, tmp_path: Path) -> None:
    lines = dict(ModelSummary.of(save_folder(tokenizer, tmp_path / "heron", **MIXTURE)).lines())
    assert lines["shape"] == "2 layers of 48, 6 heads on 2 key heads"
    assert lines["experts"] == "2 of 6 a token, 24 wide, in 2 layers"
    assert "of which" in lines["parameters"]
    assert lines["context"] == "700 tokens"
    assert lines["numbers"] == "fp32"
    assert lines["licence"] == "not said in a README.md"


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlanguage: [en]\nlicense: apache-2.0\n---\nlicense: none\n", "apache-2.0"),
        ("---\r\nlicence: mit\r\n---\r\n", "mit"),
        ("---\nlanguage: en\n---\nlicense: mit\n", None),
        ("# No front matter\n\nlicense: mit\n", None),
        ("", None),
    ],
)
def test_the_licence_is_the_cards(card: str, licence: str | None, tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = save_folder(tokenizer, tmp_path / "heron")
    (folder / "README.md").write_bytes(card.encode())
    assert ModelSummary.of(folder).licence == licence


def test_what_cannot_be_opened_is_said(tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = save_folder(tokenizer, tmp_path / "heron")
    (folder / "README.md").write_bytes(b"\xff\xfe")
    with pytest.raises(ModelError, match=r"README\.md cannot be read"):
        ModelSummary.of(folder)
