"""Opening a model runs none of its code: pickled weights are refused unread, programs beside it are not looked at."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch

from gale.core.errors import ModelError
from gale.model.checkpoint import load_model, save_model
from gale.model.transformer import Decoder
from gale.text.tokenizer import Tokenizer


class Mine:
    """Leaves a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> object:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.pt", "model.pth", "consolidated.00.pth", "model.safetensors", "model.ckpt"]
)
def test_pickled_weights_are_refused_and_not_unpickled(model: Decoder, tmp_path: Path, name: str) -> None:
    folder, ran = tmp_path / "model", tmp_path / "ran"
    save_model(model, folder, dtype=torch.float32)
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Mine(ran)))
    with pytest.raises(ModelError):
        load_model(folder, dtype=torch.float32)
    assert not ran.exists()


def test_code_that_comes_with_a_model_is_not_run(model: Decoder, tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder, ran = tmp_path / "model", tmp_path / "ran"
    save_model(model, folder, dtype=torch.float32)
    tokenizer.save(folder)
    code = f"import pathlib; pathlib.Path({str(ran)!r}).touch()\n"
    classes = {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model", "AutoTokenizer": "theirs.Tok"}
    for name in ("config.json", "tokenizer_config.json"):
        content = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
        (folder / name).write_text(json.dumps(content | {"auto_map": classes, "trust_remote_code": True}))
    for name in ("theirs.py", "__init__.py", "modeling.py", "setup.py"):
        (folder / name).write_text(code)
    loaded = load_model(folder, dtype=torch.float32)
    assert torch.equal(loaded.embed_tokens.weight, model.embed_tokens.weight)
    assert Tokenizer.load(folder).encode("a") == tokenizer.encode("a")
    assert not ran.exists()


def test_a_model_known_by_its_code_alone_is_refused(model: Decoder, tmp_path: Path) -> None:
    folder, ran = tmp_path / "model", tmp_path / "ran"
    save_model(model, folder, dtype=torch.float32)
    content = json.loads((folder / "config.json").read_text())
    content |= {"architectures": ["TheirModel"], "model_type": "theirs", "auto_map": {"AutoModel": "theirs.TheirModel"}}
    (folder / "config.json").write_text(json.dumps(content))
    (folder / "theirs.py").write_text(f"import pathlib; pathlib.Path({str(ran)!r}).touch()\n")
    with pytest.raises(ModelError, match="TheirModel"):
        load_model(folder, dtype=torch.float32)
    assert not ran.exists()
