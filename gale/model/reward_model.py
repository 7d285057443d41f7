"""A decoder with one number a token in place of the next token's scores: reward model and critic; or with a few.

The reward of a conversation is the value at its last token (Stiennon et al. 2020, Ouyang et al. 2022); the value at
every token is what PPO's critic estimates (Schulman et al. 2017). Of a classifier (:mod:`gale.model.classifier`) each
label has a number of its own. Folders are in Hugging Face layout (``Qwen3ForSequenceClassification``), so transformers
and vLLM open them.

Shape suffixes as in :mod:`gale.model.transformer`: N tokens, C hidden size, L labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gale.core.errors import ModelError
from gale.core.model_folder import read_json
from gale.model.checkpoint import load_decoder, save_model
from gale.model.config import FAMILIES, ModelConfig
from gale.model.transformer import Attend, Decoder

_WRITES, _SCORES = "ForCausalLM", "ForSequenceClassification"
_REWARD = ("reward",)


class RewardModel(nn.Module):
    """``trunk`` reads, ``score`` turns its last hidden state into a number, or into ``labels`` of them.

    The trunk's own head is not used.
    """

    def __init__(self, trunk: Decoder, labels: int = 1) -> None:
        super().__init__()
        assert trunk.config.tied_embeddings, "a head of its own would be weights without a use"
        self.trunk = trunk
        weight = trunk.embed_tokens.weight
        self.score = nn.Linear(trunk.config.hidden_size, labels, bias=False, dtype=weight.dtype, device=weight.device)

    @classmethod
    def from_decoder(cls, decoder: Decoder, labels: int = 1) -> RewardModel:
        """A model that scores everything 0, on top of ``decoder``, which is taken over and loses its output head."""
        decoder.config = replace(decoder.config, tied_embeddings=True)
        decoder.retie()
        model = cls(decoder, labels)
        nn.init.zeros_(model.score.weight)
        return model

    @property
    def config(self) -> ModelConfig:
        """The shape of the trunk."""
        return self.trunk.config

    def forward(self, ids_N: Tensor, positions_N: Tensor, attend: Attend) -> Tensor:
        """The value [N] at each token, or [N, L] of several labels, fp32.

        Arguments are those of :class:`gale.model.transformer.Decoder`.
        """
        x_NC: Tensor = self.trunk(ids_N, positions_N, attend)
        # In fp32, as rewards are compared with one another: bf16 tells 256 steps between 1 and 2.
        return F.linear(x_NC.float(), self.score.weight.float()).squeeze(-1)


def load_reward_model(
    folder: Path, *, dtype: torch.dtype, device: torch.device | None = None, labels: int = 1
) -> RewardModel:
    """The reward model of a folder, in evaluation mode.

    Raises :class:`ModelError`, also for a chat model and for one of another number of labels.
    """
    config = reward_config(folder)
    score_LC = torch.empty(labels, config.hidden_size, dtype=dtype, device=device)
    trunk = load_decoder(folder, config, dtype=dtype, device=device, beside={"score.weight": score_LC})
    model = RewardModel(trunk, labels)
    model.score.weight = nn.Parameter(score_LC)
    return model.eval()


def save_reward_model(
    model: RewardModel,
    folder: Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    pad_token_id: int | None = None,
    labels: Sequence[str] = _REWARD,
) -> None:
    """Write ``config.json`` and ``model.safetensors``. Labels other than a reward are judged each by itself.

    Without ``pad_token_id`` transformers refuses batches of several texts, since it looks for the last token that is
    no padding.
    """
    family = model.config.family
    settings = {
        "architectures": [name.replace(_WRITES, _SCORES) for name, known in FAMILIES.items() if known == family],
        "num_labels": len(labels),
        "id2label": {str(place): label for place, label in enumerate(labels)},
        "label2id": {label: place for place, label in enumerate(labels)},
        "problem_type": "regression" if tuple(labels) == _REWARD else "multi_label_classification",
        "pad_token_id": pad_token_id,
    }
    save_model(model.trunk, folder, dtype=dtype, beside={"score.weight": model.score.weight}, settings=settings)


def is_reward_model(folder: Path) -> bool:
    """Whether a model folder says of itself that it scores texts."""
    names = read_json(folder / "config.json").get("architectures")
    return isinstance(names, list) and bool(names) and str(names[0]).endswith(_SCORES)


def reward_config(folder: Path) -> ModelConfig:
    """The shape of a reward model's trunk. Raises :class:`ModelError`, also for a folder that is no reward model."""
    content = read_json(folder / "config.json")
    if not content:
        return ModelConfig.load(folder)  # which says what is missing
    if not is_reward_model(folder):
        raise ModelError(
            f"{folder} is no reward model: its architecture is {content.get('architectures')}.",
            hint="A chat model cannot score answers; make a reward model with `gale train reward`.",
        )
    names = [str(content["architectures"][0]).replace(_SCORES, _WRITES)]
    return ModelConfig.from_hugging_face({**content, "architectures": names, "tie_word_embeddings": True})
