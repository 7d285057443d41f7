"""A reward model is one number a token, the same here and in transformers, and is never taken for a chat model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gale.core.errors import ModelError
from gale.model.attention import PackedAttention
from gale.model.checkpoint import load_model, save_model
from gale.model.reward_model import RewardModel, load_reward_model, save_reward_model
from gale.text.tokenizer import Tokenizer
from tests.tiny_model import MIXTURE, make_model

PAD = 0


def make_reward_model(tokenizer: Tokenizer, **changes: Any) -> RewardModel:
    model = RewardModel.from_decoder(make_model(tokenizer, **changes))
    torch.manual_seed(1)
    torch.nn.init.normal_(model.score.weight)
    return model.eval()


def values(model: RewardModel, lengths: list[int], ids: Tensor) -> Tensor:
    positions = torch.cat([torch.arange(length) for length in lengths])
    with torch.no_grad():
        found: Tensor = model(ids, positions, PackedAttention(lengths))
    return found


def test_a_fresh_reward_model_prefers_nothing(tokenizer: Tokenizer) -> None:
    model = RewardModel.from_decoder(make_model(tokenizer))
    assert values(model, [5], torch.arange(1, 6)).tolist() == [0.0] * 5


@pytest.mark.parametrize("tied", [True, False])
def test_every_token_has_a_value_in_fp32_and_the_output_head_is_gone(tokenizer: Tokenizer, tied: bool) -> None:
    model = make_reward_model(tokenizer, tied_embeddings=tied).to(torch.bfloat16)
    found = values(model, [7, 3], torch.arange(1, 11))
    assert found.shape == (10,)
    assert found.dtype == torch.float32
    assert not [name for name, _ in model.named_parameters() if "lm_head" in name]


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama", "qwen3_moe"])
def test_transformers_gives_the_same_reward(tokenizer: Tokenizer, tmp_path: Path, family: str) -> None:
    transformers = pytest.importorskip("transformers")
    changes = {"family": family, "qk_norm": family.startswith("qwen3"), "qkv_bias": family == "qwen2"}
    model = make_reward_model(tokenizer, **(changes | (MIXTURE if family == "qwen3_moe" else {})))
    save_reward_model(model, tmp_path, dtype=torch.float32, pad_token_id=PAD)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path, attn_implementation="eager")
    assert type(theirs).__name__ == f"{family.title().replace('_', '')}ForSequenceClassification"
    assert theirs.config.num_labels == 1

    texts = [torch.arange(1, 20), torch.arange(30, 42)]
    lengths = [len(text) for text in texts]
    ours = values(model, lengths, torch.cat(texts))[[lengths[0] - 1, sum(lengths) - 1]]
    padded = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=PAD)
    with torch.no_grad():
        rewards = theirs(padded, attention_mask=(padded != PAD).long()).logits[:, 0]
    torch.testing.assert_close(ours, rewards, rtol=0, atol=1e-4)


def test_a_reward_model_of_transformers_opens_here(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(2)
    config = transformers.Qwen3Config(
        vocab_size=90,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_labels=1,
        pad_token_id=PAD,
        attn_implementation="eager",
    )
    theirs = transformers.Qwen3ForSequenceClassification(config).eval()
    theirs.save_pretrained(tmp_path)
    model = load_reward_model(tmp_path, dtype=torch.float32)
    ids = torch.arange(1, 15)
    with torch.no_grad():
        reward = theirs(ids[None]).logits[0, 0]
    torch.testing.assert_close(values(model, [len(ids)], ids)[-1], reward, rtol=0, atol=1e-4)


def test_what_is_saved_is_loaded(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = make_reward_model(tokenizer)
    save_reward_model(model, tmp_path, dtype=torch.float32)
    again = load_reward_model(tmp_path, dtype=torch.float32)
    for (name, one), (other_name, other) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert name == other_name
        assert torch.equal(one, other)


def test_one_is_not_taken_for_the_other(tokenizer: Tokenizer, tmp_path: Path) -> None:
    save_reward_model(make_reward_model(tokenizer), tmp_path / "reward")
    with pytest.raises(ModelError, match=r"scores it \(Qwen3ForSequenceClassification\)") as caught:
        load_model(tmp_path / "reward", dtype=torch.float32)
    assert "chat model" in str(caught.value.hint)
    save_model(make_model(tokenizer), tmp_path / "chat")
    with pytest.raises(ModelError, match=r"is no reward model: .*Qwen3ForCausalLM") as caught:
        load_reward_model(tmp_path / "chat", dtype=torch.float32)
    assert "gale train reward" in str(caught.value.hint)


def test_a_folder_without_a_score_or_with_several_labels_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no model folder"):
        load_reward_model(tmp_path / "absent", dtype=torch.float32)
    model = make_reward_model(tokenizer)
    save_model(model.trunk, tmp_path, beside={"score.weight": torch.zeros(3, model.config.hidden_size)})
    content = json.loads((tmp_path / "config.json").read_text())
    content["architectures"] = ["Qwen3ForSequenceClassification"]
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match=r"score.weight of shape \[1, 48\], but holds \[3, 48\]"):
        load_reward_model(tmp_path, dtype=torch.float32)
