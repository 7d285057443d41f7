"""A GGUF file is a model like any other: by its path, and by name once it is imported."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest
import torch

from gale.core.errors import ModelError
from gale.core.model_folder import model_name
from gale.engine.local import LocalEngine
from gale.model.checkpoint import load_model
from gale.registry.models import known_models, resolve_model
from gale.registry.summary import ModelSummary
from gale.registry.transfer import changed_files, import_model
from gale.text.tokenizer import Tokenizer
from tests.engine.conftest import answer
from tests.model.test_families import our_logits
from tests.model.test_gguf_export import LLAMA, export
from tests.tiny_model import save_folder


@pytest.fixture
def file(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    path = export(save_folder(tokenizer, tmp_path / "model", **LLAMA))
    return path.rename(tmp_path / "tiny.gguf")


def test_a_file_is_unpacked_once_and_again_when_it_has_changed(gale_home: Path, file: Path) -> None:
    folder = resolve_model(str(file))
    assert gale_home in folder.parents
    assert model_name(folder) == "tiny"
    written = (folder / "config.json").stat().st_mtime_ns
    assert resolve_model(str(file)) == folder
    assert (folder / "config.json").stat().st_mtime_ns == written
    os.utime(file, ns=(1, 1))
    assert resolve_model(str(file)) != folder


def test_it_answers_as_the_folder_does_that_it_was_made_from(gale_home: Path, file: Path, tmp_path: Path) -> None:
    def greedy(folder: Path) -> str:
        engine = LocalEngine.load(folder)
        try:
            return asyncio.run(answer(engine, "Where does the river go?", temperature=0, max_tokens=12))[0]
        finally:
            asyncio.run(engine.close())

    assert greedy(resolve_model(str(file))) == greedy(tmp_path / "model")


def test_import_makes_a_folder_of_it(gale_home: Path, file: Path, tmp_path: Path) -> None:
    target = import_model(file)
    assert known_models()["tiny"] == target
    assert changed_files(target) == []
    assert ModelSummary.of(target).dtype == "fp32"
    ids = torch.arange(20)
    ours, theirs = (load_model(folder, dtype=torch.float32) for folder in (target, tmp_path / "model"))
    torch.testing.assert_close(our_logits(ours, ids), our_logits(theirs, ids), rtol=1e-5, atol=1e-5)
    with pytest.raises(ModelError, match="already"):
        import_model(file)


def test_what_is_no_gguf_file_is_refused_and_leaves_nothing(gale_home: Path, file: Path) -> None:
    with pytest.raises(ModelError, match="nothing to link to"):
        import_model(file, link=True)
    file.write_text("a poem")
    for take in (import_model, lambda path: resolve_model(str(path))):
        with pytest.raises(ModelError, match="no GGUF file"):
            take(file)
    assert not [path for path in gale_home.rglob("*") if path.suffix == ".safetensors" or path.name == "tiny"]
