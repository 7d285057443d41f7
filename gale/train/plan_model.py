"""A model as the planner sees it: how many parameters, how many of them work on a token, and of what shape."""

from __future__ import annotations

import math
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gale.core.errors import GaleError, ModelError
from gale.core.model_folder import read_json

CHINCHILLA_TOKENS_PER_PARAMETER = 20.0  # Hoffmann et al. 2022


@dataclass(frozen=True, slots=True)
class PlannedModel:
    """``parameters`` counts all, ``active`` those that work on one token; the input embedding only looks up.

    ``intermediate`` is the feed-forward width that one token passes (of all its experts together), ``gated`` whether
    there are three matrices to it (SwiGLU) or two.
    """

    name: str
    parameters: float
    active: float
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    tied: bool
    gated: bool = True

    def flops_per_token(self, sequence: int) -> float:
        """Of one trained token, forward and backward: 6N plus causal attention (Kaplan et al. 2020), no recomputation.

        The input embedding multiplies nothing; causal attention sees half the sequence on average.
        """
        looked_up = 0 if self.tied else self.vocabulary * self.hidden
        return 6.0 * (self.active - looked_up) + 6.0 * self.layers * self.heads * self.head_dim * sequence


def from_shape(
    name: str,
    *,
    layers: int,
    hidden: int,
    heads: int,
    vocabulary: int,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    intermediate: int | None = None,
    gated: bool = False,
    tied: bool = True,
    experts: int = 0,
    experts_per_token: int = 0,
    expert_layers: int | None = None,
    expert_intermediate: int = 0,
    shared_intermediate: int = 0,
) -> PlannedModel:
    """Count the matrices of a decoder. ``intermediate`` defaults to the four times ``hidden`` of GPT-3."""
    kv_heads, head_dim = kv_heads or heads, head_dim or hidden // heads
    intermediate = intermediate or 4 * hidden
    matrices = 3 if gated else 2
    attention = hidden * head_dim * (2 * heads + 2 * kv_heads)
    sparse = (layers if expert_layers is None else expert_layers) if experts else 0
    passed = experts_per_token * expert_intermediate + shared_intermediate
    held = experts * expert_intermediate + shared_intermediate
    router = hidden * experts
    embeddings = vocabulary * hidden * (1 if tied else 2)
    dense = layers * attention + (layers - sparse) * matrices * hidden * intermediate + embeddings
    return PlannedModel(
        name,
        parameters=dense + sparse * (matrices * hidden * held + router),
        active=dense + sparse * (matrices * hidden * passed + router),
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=passed if sparse else intermediate,
        vocabulary=vocabulary,
        tied=tied,
        gated=gated,
    )


def from_parameters(
    parameters: float,
    *,
    active: float | None = None,
    layers: int | None = None,
    hidden: int | None = None,
    vocabulary: int = 32_000,
) -> PlannedModel:
    """A model of so many parameters; what is not given of its shape is that of most: about 128 wide a layer.

    Raises :class:`GaleError` where the numbers make no model.
    """
    if not (parameters >= 1 and (active is None or 1 <= active <= parameters)):
        raise GaleError("A model has at least one parameter, and no more active ones than parameters.")
    worked = active or parameters
    if layers is None and hidden is None:
        layers = max(1, round((worked / (12 * 128**2)) ** (1 / 3)))
        layers = 4 * round(layers / 4) if layers > 8 else layers  # so that a pipeline has something to divide
    if layers is None:
        layers = max(1, round(worked / (12 * (hidden or 1) ** 2)))
    if hidden is None:
        ideal = math.sqrt(worked / (12 * layers))
        head_dim = 128 if ideal >= 1024 else 64
        hidden = head_dim * max(1, round(ideal / head_dim))
    head_dim = 128 if hidden % 128 == 0 else 64
    heads = max(1, hidden // head_dim)
    intermediate = 8 * round(8 * hidden / 3 / 8)
    tied = parameters < 1e9
    return PlannedModel(
        f"{parameters:.3g} parameters",
        parameters,
        worked,
        layers,
        hidden,
        heads,
        heads,
        head_dim,
        intermediate,
        vocabulary,
        tied,
    )


def from_folder(folder: Path) -> PlannedModel:
    """The model of a Hugging Face folder, of which ``config.json`` is enough. Raises :class:`ModelError`."""
    content = read_json(folder / "config.json")
    if not content:
        raise ModelError(f"{folder} has no config.json.", hint="Give a model folder, a recipe, or --parameters.")
    try:
        layers, hidden = int(content["num_hidden_layers"]), int(content["hidden_size"])
        experts = int(content.get("num_experts") or content.get("num_local_experts") or 0)
        width = int(content.get("moe_intermediate_size") or content["intermediate_size"])
        return from_shape(
            folder.name,
            layers=layers,
            hidden=hidden,
            heads=int(content["num_attention_heads"]),
            kv_heads=int(content.get("num_key_value_heads") or content["num_attention_heads"]),
            head_dim=int(content.get("head_dim") or 0) or None,
            intermediate=int(content["intermediate_size"]),
            vocabulary=int(content["vocab_size"]),
            gated=True,
            tied=bool(content.get("tie_word_embeddings", False)),
            experts=experts,
            experts_per_token=int(content.get("num_experts_per_tok") or 0),
            expert_layers=_expert_layers(content, layers),
            expert_intermediate=width,
            shared_intermediate=int(content.get("shared_expert_intermediate_size") or 0) if experts else 0,
        )
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ModelError(f"{folder / 'config.json'} is not that of a decoder Gale can plan for: {error!r}") from error


def _expert_layers(content: dict[str, Any], layers: int) -> int:
    """How many layers have experts: every ``decoder_sparse_step``-th but those in ``mlp_only_layers`` (Qwen-MoE)."""
    dense, every = content.get("mlp_only_layers") or [], int(content.get("decoder_sparse_step") or 1)
    return sum((layer + 1) % every == 0 and layer not in dense for layer in range(layers))


def vocabulary_of(data: Path) -> int | None:
    """Vocabulary size of prepared data, or of the recipe that would prepare it; None where it cannot be told yet."""
    path: Any = data
    for _ in range(2):
        if path.is_dir():
            size = read_json(path / "manifest.json").get("vocabulary_size")
            return int(size) if size else None
        try:
            content = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        if "vocabulary_size" in content:
            return int(content["vocabulary_size"])
        if "tokenizer" not in content:
            return None
        path = path.parent / str(content["tokenizer"])
        if (path / "tokenizer.json").is_file():
            return len(read_json(path / "tokenizer.json").get("model", {}).get("vocab", {})) or None
    return None
