"""Adapters begin as nothing, train nothing but themselves, merge to the same function, and are PEFT's own folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gale.core.errors import GaleError, ModelError
from gale.model.adapter_folder import load_adapter, merge_adapter, open_with_adapter, save_adapter
from gale.model.attention import PackedAttention
from gale.model.checkpoint import load_model, save_model
from gale.model.lora import LoraShape, adapted, add_lora, merge_lora
from gale.model.reward_model import RewardModel, load_reward_model, save_reward_model
from gale.model.transformer import Decoder
from gale.registry.summary import ModelSummary
from gale.text.tokenizer import Tokenizer
from tests.tiny_model import MIXTURE, make_model

IDS = torch.arange(1, 24)
SHAPE = LoraShape(rank=4, alpha=8)


def logits(model: Decoder) -> Tensor:
    with torch.no_grad():
        return model.logits(model(IDS, torch.arange(len(IDS)), PackedAttention([len(IDS)])))


def rewards(model: RewardModel) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS, torch.arange(len(IDS)), PackedAttention([len(IDS)]))
    return found


def shake(model: nn.Module) -> None:
    """Give every trainable weight a value of its own, as training does."""
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter) * 0.2)


@pytest.fixture
def base(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    """A model folder in fp32 with its tokenizer."""
    save_model(make_model(tokenizer), tmp_path / "base", dtype=torch.float32)
    tokenizer.save(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_adapter_changes_no_bit(base: Path, dtype: torch.dtype) -> None:
    model = load_model(base, dtype=dtype)
    before = logits(model)
    add_lora(model, LoraShape(rank=4, alpha=8, dropout=0.5), seed=1)
    assert torch.equal(logits(model.eval()), before)


def test_beside_a_model_that_only_answers_nothing_drops_out(base: Path) -> None:
    model = load_model(base, dtype=torch.float32)
    add_lora(model, LoraShape(rank=4, alpha=8, dropout=0.5), seed=1)
    shake(model)
    assert torch.equal(logits(model), logits(model))
    assert not torch.equal(logits(model.train()), logits(model))


def test_only_adapters_are_trained_and_every_one_is(base: Path) -> None:
    model = load_model(base, dtype=torch.float32)
    frozen = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    add_lora(model, SHAPE, seed=1)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * 7 * model.config.layers  # q, k, v, o, gate, up, down
    assert all(name.endswith(("lora_A.weight", "lora_B.weight")) for name in trained)
    model.logits(model(IDS, torch.arange(len(IDS)), PackedAttention([len(IDS)]))).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad
        if not parameter.requires_grad:
            assert torch.equal(parameter, frozen[name])


def test_patterns_choose_layers_by_their_names(base: Path) -> None:
    model = load_model(base, dtype=torch.float32)
    add_lora(model, LoraShape(rank=2, alpha=2, targets=("q_proj", "layers.1.mlp.*_proj")), seed=1)
    assert set(adapted(model)) == {
        "layers.0.self_attn.q_proj",
        "layers.1.self_attn.q_proj",
        *(f"layers.1.mlp.{kind}_proj" for kind in ("gate", "up", "down")),
    }
    with pytest.raises(ModelError, match="no linear layer 'w_qkv'") as caught:
        add_lora(load_model(base, dtype=torch.float32), LoraShape(rank=2, alpha=2, targets=("w_qkv",)), seed=1)
    assert "q_proj" in str(caught.value.hint)


def test_of_a_mixture_of_experts_the_attention_alone_is_adapted(tokenizer: Tokenizer) -> None:
    with pytest.raises(ModelError, match="stacked weights of a mixture of experts") as caught:
        add_lora(make_model(tokenizer, **MIXTURE), SHAPE, seed=1)
    assert "q_proj" in str(caught.value.hint)
    model = make_model(tokenizer, **MIXTURE)
    add_lora(model, LoraShape(rank=2, alpha=2, targets=("q_proj", "o_proj")), seed=1)
    assert len(adapted(model)) == 2 * model.config.layers


def test_merging_keeps_the_function(base: Path) -> None:
    model = load_model(base, dtype=torch.float32)
    add_lora(model, SHAPE, seed=1)
    shake(model)
    before = logits(model)
    merge_lora(model)
    assert not adapted(model)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-4)


def test_an_adapter_goes_on_from_where_it_was_saved(base: Path, tmp_path: Path) -> None:
    model = load_model(base, dtype=torch.float32)
    add_lora(model, LoraShape(rank=3, alpha=5, dropout=0.1, targets=("v_proj",)), seed=1)
    shake(model)
    save_adapter(model, tmp_path / "adapter", base=base, dtype=torch.float32)
    again = open_with_adapter(base, tmp_path / "adapter", dtype=torch.float32)
    assert torch.equal(logits(again.eval()), logits(model.eval()))  # type: ignore[arg-type]
    layer = next(iter(adapted(again).values()))
    assert (layer.dropout, layer.scale) == (0.1, 5 / 3)
    assert layer.lora_A.weight.requires_grad


@pytest.mark.parametrize("targets", [("layers.*",), ("q_proj", "down_proj"), ("layers.1.*",)])
def test_peft_computes_the_same_over_its_own_base(base: Path, tmp_path: Path, targets: tuple[str, ...]) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    model = load_model(base, dtype=torch.float32)
    add_lora(model, LoraShape(rank=4, alpha=6, targets=targets), seed=1)
    shake(model)
    save_adapter(model, tmp_path / "adapter", base=base, dtype=torch.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(IDS[None]).logits[0], logits(model), rtol=0, atol=1e-4)


def test_an_adapter_of_peft_opens_here(base: Path, tmp_path: Path) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    config = peft.LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(theirs, config)
    shake(theirs)
    theirs.eval().save_pretrained(tmp_path / "adapter")
    model = load_model(base, dtype=torch.float32)
    load_adapter(model, tmp_path / "adapter", base=base)
    with torch.no_grad():
        torch.testing.assert_close(logits(model.eval()), theirs(IDS[None]).logits[0], rtol=0, atol=1e-4)


def test_a_reward_models_adapter_carries_its_score_and_is_pefts_too(base: Path, tmp_path: Path) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    model = RewardModel.from_decoder(load_model(base, dtype=torch.float32))
    add_lora(model, SHAPE, seed=1)
    assert model.score.weight.requires_grad
    shake(model)
    save_adapter(model, tmp_path / "adapter", base=base, dtype=torch.float32)
    again = open_with_adapter(base, tmp_path / "adapter", dtype=torch.float32)
    assert isinstance(again, RewardModel)
    assert torch.equal(rewards(again.eval()), rewards(model.eval()))

    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=1, pad_token_id=0, attn_implementation="eager"
    )
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(IDS[None]).logits[0, 0], rewards(model)[-1], rtol=0, atol=1e-4)

    merge_adapter(tmp_path / "adapter", base, tmp_path / "merged", dtype=torch.float32)
    merged = load_reward_model(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(rewards(merged), rewards(model), rtol=0, atol=1e-4)


def test_a_reward_model_may_be_the_base(tokenizer: Tokenizer, tmp_path: Path) -> None:
    save_reward_model(RewardModel.from_decoder(make_model(tokenizer)), tmp_path / "base", dtype=torch.float32)
    model = load_reward_model(tmp_path / "base", dtype=torch.float32)
    add_lora(model, SHAPE, seed=1)
    shake(model)
    save_adapter(model, tmp_path / "adapter", base=tmp_path / "base", dtype=torch.float32)
    again = open_with_adapter(tmp_path / "base", tmp_path / "adapter", dtype=torch.float32)
    assert torch.equal(rewards(again.eval()), rewards(model.eval()))  # type: ignore[arg-type]


def test_a_merged_folder_is_a_whole_model(base: Path, tmp_path: Path) -> None:
    model = load_model(base, dtype=torch.float32)
    add_lora(model, SHAPE, seed=1)
    shake(model)
    save_adapter(model, tmp_path / "adapter", base=base, dtype=torch.float32)
    merge_adapter(tmp_path / "adapter", base, tmp_path / "merged", dtype=torch.float32)
    merged = load_model(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(merged), logits(model), rtol=0, atol=1e-4)
    assert Tokenizer.load(tmp_path / "merged").vocabulary == Tokenizer.load(base).vocabulary
    with pytest.raises(ModelError, match="is an adapter, not a whole model") as caught:
        load_model(tmp_path / "adapter", dtype=torch.float32)
    assert "gale train merge" in str(caught.value.hint)


def test_the_licence_of_the_base_stays_with_what_is_merged(base: Path, tmp_path: Path) -> None:
    model = load_model(base, dtype=torch.float32)
    add_lora(model, SHAPE, seed=1)
    save_adapter(model, tmp_path / "adapter", base=base, dtype=torch.float32)
    merge_adapter(tmp_path / "adapter", base, tmp_path / "without")
    assert not (tmp_path / "without" / "README.md").exists()
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n# 底座\n")
    merge_adapter(tmp_path / "adapter", base, tmp_path / "merged")
    assert dict(ModelSummary.of(tmp_path / "merged").lines())["licence"] == "apache-2.0"
    card = (tmp_path / "merged" / "README.md").read_text(encoding="utf-8").splitlines()
    assert card[:4] == ["---", "license: apache-2.0", "---", "# 底座"]
    assert card[4:] == ["", "The adapter adapter was merged into these weights."]


def test_merging_replaces_neither_the_base_nor_the_adapter(base: Path, tmp_path: Path) -> None:
    model = load_model(base, dtype=torch.float32)
    add_lora(model, SHAPE, seed=1)
    adapter = base / "adapter"
    save_adapter(model, adapter, base=base, dtype=torch.float32)
    for out in (base, adapter):
        with pytest.raises(GaleError, match="is not replaced"):
            merge_adapter(adapter, base, out)
    assert (base / "model.safetensors").is_file()
    merge_adapter(adapter, base, tmp_path / "merged")


def test_an_adapter_for_another_base_is_refused(base: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = load_model(base, dtype=torch.float32)
    add_lora(model, SHAPE, seed=1)
    adapter = tmp_path / "adapter"
    save_adapter(model, adapter, base=base, dtype=torch.float32)
    other = make_model(tokenizer)
    with torch.no_grad():
        other.norm.weight += 0.5  # same shape, other weights: nothing else would notice
    save_model(other, tmp_path / "other", dtype=torch.float32)
    with pytest.raises(ModelError, match="was made for another base") as caught:
        open_with_adapter(tmp_path / "other", adapter, dtype=torch.float32)
    assert str(base) in str(caught.value.hint)

    (adapter / "base.json").unlink()  # as PEFT leaves it; then shapes and names must do
    save_model(make_model(tokenizer, hidden_size=40), tmp_path / "narrow", dtype=torch.float32)
    with pytest.raises(ModelError, match=r"another base: its .* has shape \[4, 48\]"):
        open_with_adapter(tmp_path / "narrow", adapter, dtype=torch.float32)
    save_model(make_model(tokenizer, layers=1), tmp_path / "shallow", dtype=torch.float32)
    with pytest.raises(ModelError, match=r"no linear layer 'layers.1"):
        open_with_adapter(tmp_path / "shallow", adapter, dtype=torch.float32)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"peft_type": "IA3"}, "peft_type IA3"),
        ({"use_dora": True}, "use_dora"),
        ({"alora_invocation_tokens": [5, 7]}, "alora_invocation_tokens"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"modules_to_save": ["embed_tokens"]}, "modules_to_save"),
        ({"r": "many"}, "damaged"),
        ({"r": 10**12}, "damaged"),
        ({"r": 0}, "damaged"),
        ({"lora_alpha": float("inf")}, "damaged"),
        ({"lora_dropout": 5}, "damaged"),
        ({"modules_to_save": 3}, "wrong kind"),
    ],
)
def test_what_is_no_plain_lora_is_refused_by_name(
    base: Path, tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    model = load_model(base, dtype=torch.float32)
    add_lora(model, SHAPE, seed=1)
    save_adapter(model, tmp_path / "adapter", base=base, dtype=torch.float32)
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ModelError, match=reason):
        open_with_adapter(base, tmp_path / "adapter", dtype=torch.float32)


def test_damaged_adapters_are_messages(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="holds no adapter"):
        open_with_adapter(base, tmp_path / "absent", dtype=torch.float32)
    model = load_model(base, dtype=torch.float32)
    add_lora(model, SHAPE, seed=1)
    save_adapter(model, tmp_path / "adapter", base=base, dtype=torch.float32)
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({name: tensor for name, tensor in tensors.items() if "0.mlp.up_proj.lora_B" not in name}, path)
    with pytest.raises(ModelError, match=r"lacks the weight .*layers.0.mlp.up_proj.lora_B"):
        open_with_adapter(base, tmp_path / "adapter", dtype=torch.float32)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ModelError, match="is damaged"):
        open_with_adapter(base, tmp_path / "adapter", dtype=torch.float32)
