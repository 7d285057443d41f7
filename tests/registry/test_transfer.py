"""Models come in checked and go out whole, by copy, by link or in another number format."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gale.core.errors import GaleError, ModelError
from gale.model.checkpoint import load_model
from gale.registry.models import known_models, resolve_model
from gale.registry.transfer import changed_files, checksums, export_folder, import_model
from gale.text.tokenizer import Tokenizer
from tests.tiny_model import MIXTURE, save_folder


@pytest.fixture
def folder(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    folder = save_folder(tokenizer, tmp_path / "elsewhere" / "heron")
    (folder / "README.md").write_text("---\nlicense: cc0-1.0\n---\n# Heron\n")
    return folder


def same_weights(first: Path, second: Path) -> bool:
    a, b = (load_model(path, dtype=torch.float32) for path in (first, second))
    return all(torch.equal(a.get_parameter(name), parameter) for name, parameter in b.named_parameters())


@pytest.mark.parametrize("link", [False, True])
def test_an_imported_model_is_found_by_name_and_is_the_same(folder: Path, home: Path, link: bool) -> None:
    target = import_model(folder, link=link)
    assert target == resolve_model("heron") == home / "models" / "heron"
    assert list(known_models()) == ["gale-0", "heron"]
    assert same_weights(folder, target)
    assert Tokenizer.load(target).vocabulary == Tokenizer.load(folder).vocabulary
    assert {file.is_symlink() for file in target.iterdir() if file.name != "SHA256SUMS"} == {link}
    assert not (folder / "SHA256SUMS").exists(), "the source is not written to"


def test_the_checksums_are_those_of_sha256sum_and_find_what_changed(folder: Path) -> None:
    target = import_model(folder)
    subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=target, check=True, capture_output=True)
    assert set(checksums(target)) == {file.name for file in folder.iterdir()}
    assert changed_files(target) == []
    (target / "config.json").write_text("{}")
    (target / "README.md").unlink()
    assert changed_files(target) == ["README.md", "config.json"]


def test_the_name_of_a_run_stands_for_its_model(tokenizer: Tokenizer, tmp_path: Path) -> None:
    assert import_model(save_folder(tokenizer, tmp_path / "my-run" / "model")).name == "my-run"
    assert import_model(tmp_path / "my-run" / "model", "other").name == "other"


@pytest.mark.parametrize("name", ["a/b", "..", ".hidden", "gale-0"])
def test_a_name_that_is_none_is_refused(folder: Path, name: str) -> None:
    with pytest.raises(ModelError, match="cannot be the name"):
        import_model(folder, name)


def test_a_name_that_is_taken_is_refused(folder: Path) -> None:
    import_model(folder)
    with pytest.raises(ModelError, match="a model heron already"):
        import_model(folder)


def test_a_model_that_does_not_open_is_not_taken_in(folder: Path, home: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": config["vocab_size"] - 1}))
    with pytest.raises(ModelError, match="embed_tokens"):
        import_model(folder)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"no tokenizer\.json"):
        import_model(folder)
    assert not list((home / "models").glob("*"))


def test_a_tokenizer_of_more_tokens_than_the_model_knows_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = save_folder(tokenizer, tmp_path / "small", vocabulary_size=tokenizer.vocabulary_size - 1)
    with pytest.raises(ModelError, match="the tokenizer knows"):
        import_model(folder)


def test_weights_in_formats_that_gale_does_not_read_stay_behind(folder: Path) -> None:
    for name in ("pytorch_model.bin", "model.gguf", "consolidated.safetensors", ".hidden"):
        (folder / name).write_bytes(b"x" * 1000)
    target = import_model(folder)
    left = {file.name for file in folder.iterdir()} - {file.name for file in target.iterdir()}
    assert left == {"pytorch_model.bin", "model.gguf", "consolidated.safetensors", ".hidden"}


def test_sharded_weights_come_with_their_index(folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="60KB")
    target = import_model(folder)
    assert (target / "model.safetensors.index.json").is_file()
    assert same_weights(folder, target)


def test_an_export_without_a_number_format_is_a_copy(folder: Path, tmp_path: Path) -> None:
    export_folder(folder, tmp_path / "out")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == {
        file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_an_export_in_another_number_format_keeps_all_else(
    dtype: torch.dtype, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    folder = save_folder(tokenizer, tmp_path / "heron", **MIXTURE)
    config = json.loads((folder / "config.json").read_text()) | {"eos_token_id": 1, "unheard_of": True}
    (folder / "config.json").write_text(json.dumps(config))
    export_folder(folder, tmp_path / "out", dtype=dtype)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {weight.dtype for weight in stored.values()} == {dtype}
    for name, weight in load_file(folder / "model.safetensors").items():
        assert torch.equal(stored[name], weight.to(dtype))
    name = str(dtype).removeprefix("torch.")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written == config | {"dtype": name, "torch_dtype": name}
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_what_overflows_in_fp16_is_said(tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = save_folder(tokenizer, tmp_path / "heron")
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] = 1e6
    from safetensors.torch import save_file

    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ModelError, match="too large"):
        export_folder(folder, tmp_path / "out", dtype=torch.float16)
    assert not (tmp_path / "out").exists()


def test_nothing_but_a_model_folder_is_replaced(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    (tmp_path / "file").write_text("dear")
    for out in (tmp_path / "full", tmp_path / "file", folder):
        with pytest.raises(GaleError, match="not replaced"):
            export_folder(folder, out)
    (folder.parent / "config.json").write_text("{}")  # a model folder by its look, with the source in it
    with pytest.raises(GaleError, match="not replaced"):
        export_folder(folder, folder.parent, dtype=torch.float16)
    assert (folder / "config.json").is_file()
    export_folder(folder, tmp_path / "out")
    export_folder(folder, tmp_path / "out")
