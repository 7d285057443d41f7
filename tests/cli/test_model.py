"""``gale model``: list, show, import and export from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import pytest
import torch

from gale.model.checkpoint import load_model, stored_dtype
from gale.text.tokenizer import Tokenizer
from tests.cli.conftest import Gale
from tests.tiny_model import MIXTURE, save_folder


@pytest.fixture
def folder(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    return save_folder(tokenizer, tmp_path / "heron", **MIXTURE)


def test_an_imported_model_is_listed_shown_and_verified(gale: Gale, folder: Path, gale_home: Path) -> None:
    assert gale("model", "import", folder, "--name", "bird").out.startswith("Imported as bird")
    listed = gale("model", "list").out.splitlines()
    assert [line.split()[0] for line in listed] == ["name", "gale-0", "bird"]
    shown = gale("model", "show", "bird", "--verify")
    assert shown.code == 0
    assert "2 of 6 a token" in shown.out
    assert "model.safetensors" in shown.out
    assert "All files are what they were" in shown.out

    (gale_home / "models" / "bird" / "README.md").write_text("---\nlicense: mit\x1b[2J\n---\n")
    (gale_home / "models" / "bird" / "config.json").write_text("{}")
    listed = gale("model", "list").out.splitlines()
    assert listed[2].startswith("bird")
    assert "cannot be opened" in listed[2]
    assert listed[1].startswith("gale-0"), "a broken model does not hide the others"


def test_changed_files_fail_the_verification(gale: Gale, folder: Path, gale_home: Path) -> None:
    gale("model", "import", folder)
    (gale_home / "models" / "heron" / "tokenizer_config.json").write_text("{}")
    result = gale("model", "show", "heron", "--verify")
    assert result.code == 1
    assert "Changed since the import: tokenizer_config.json" in result.err
    result = gale("model", "show", "gale-0", "--verify")
    assert result.code == 1
    assert "no SHA256SUMS" in result.err


def test_what_a_card_says_cannot_command_the_terminal(gale: Gale, folder: Path) -> None:
    (folder / "README.md").write_text("---\nlicense: mit\x1b[2J\n---\n")
    gale("model", "import", folder)
    for command in (("list",), ("show", "heron")):
        result = gale("model", *command)
        assert "mit[2J" in result.out
        assert "\x1b" not in result.out


def test_nor_can_names_of_files_and_what_errors_quote(gale: Gale, folder: Path, gale_home: Path) -> None:
    (folder / "note\x1b[2J.txt").write_text("")
    gale("model", "import", folder, "--name", "heron")
    (gale_home / "models" / "heron").rename(gale_home / "models" / "heron\x1b[2J")
    (folder / "config.json").write_text(json.dumps({"architectures": ["\x1b[2J\ud800"]}))
    for command in (("list",), ("show", "heron\x1b[2J"), ("show", folder)):
        result = gale("model", *command)
        assert "[2J" in result.out + result.err
        assert "\x1b" not in result.out + result.err


@pytest.mark.parametrize(("dtype", "stored"), [(None, "F32"), ("bf16", "BF16"), ("q8_0", "Q8_0")])
def test_a_gguf_file_is_written_in_the_format_asked_for(
    gale: Gale, tokenizer: Tokenizer, tmp_path: Path, dtype: str | None, stored: str
) -> None:
    folder = save_folder(tokenizer, tmp_path / "run" / "model", hidden_size=64)
    asked = ("--dtype", dtype) if dtype else ()
    assert gale("model", "export", folder, "--to", "gguf", "--out", tmp_path / "a.gguf", *asked).code == 0
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    assert reader.fields["general.name"].contents() == "run"
    assert {t.tensor_type.name for t in reader.tensors if t.name.endswith("attn_q.weight")} == {stored}


def test_a_hugging_face_folder_is_written_in_the_format_asked_for(gale: Gale, folder: Path, tmp_path: Path) -> None:
    assert gale("model", "export", folder, "--to", "hf", "--out", tmp_path / "copy").code == 0
    assert gale("model", "export", folder, "--to", "hf", "--out", tmp_path / "half", "--dtype", "bf16").code == 0
    assert stored_dtype(tmp_path / "copy") == torch.float32
    assert stored_dtype(tmp_path / "half") == torch.bfloat16
    assert load_model(tmp_path / "half", dtype=torch.float32).config == load_model(folder, dtype=torch.float32).config


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("export", "heron", "--to", "hf", "--out", "o", "--dtype", "q8_0"), 2, "no q8_0"),
        (("export", "nothing", "--to", "hf", "--out", "o"), 1, "no model folder nothing"),
        (("export", "gale-0", "--to", "onnx", "--out", "o"), 2, "onnx"),
        (("import", "nothing"), 1, "no model folder"),
        (("import", "heron", "--name", "gale-0"), 1, "cannot be the name"),
        (("show", "nothing"), 1, "Known names: gale-0"),
        (("export", "heron", "--to", "gguf", "--out", "heron/config.json"), 1, "not replaced"),
    ],
)
def test_what_cannot_be_done_is_said(
    gale: Gale,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    code: int,
    said: str,
) -> None:
    monkeypatch.chdir(folder.parent)
    result = gale("model", *arguments)
    assert result.code == code
    assert said in result.err
    assert json.loads((folder / "config.json").read_text())
