"""Growing a trained decoder: a larger one that computes the same function, to be trained on.

Three ways, which may be combined in the order deeper, wider, experts; each is a pure function of a decoder:

* :func:`deepen` copies layers and silences the copies, so that each is the identity until it has learned otherwise
  (stacking: Gong et al. 2019, Du et al. 2024; silent copies: LLaMA-Pro, Wu et al. 2024).
* :func:`widen` repeats hidden units, heads and feed-forward units a whole number of times and divides what reads them
  (HyperCloning, Samragh et al. 2024), with noise that cancels, so that the copies part when they are trained.
* :func:`upcycle` makes every feed-forward a mixture of experts that are copies of it (sparse upcycling, Komatsuzaki et
  al. 2023). A share of their units may be drawn anew (drop-upcycling, Nakamura et al. 2025): not function-preserving.

Shape suffixes as in :mod:`gale.model.transformer`; I feed-forward units, E experts; R rows, S columns of any matrix.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from gale.core.errors import ModelError
from gale.model.attention import PackedAttention
from gale.model.config import Experts, ModelConfig
from gale.model.transformer import Decoder

Placement = Literal["top", "interleave"]

# What writes into the residual stream: a layer whose writers are zero is the identity.
_WRITERS = ("o_proj.weight", "o_proj.bias", "down_proj.weight", "down_proj.bias", "experts.down_proj")
_ROUTER_STD = 0.02
# Which axes of a parameter grow along with what: (rows, columns), None for an axis that stays.
_AXES: dict[str, tuple[str | None, str | None]] = {
    "self_attn.q_proj.weight": ("queries", "hidden"),
    "self_attn.k_proj.weight": ("keys", "hidden"),
    "self_attn.v_proj.weight": ("keys", "hidden"),
    "self_attn.o_proj.weight": ("hidden", "queries"),
    "mlp.gate_proj.weight": ("units", "hidden"),
    "mlp.up_proj.weight": ("units", "hidden"),
    "mlp.down_proj.weight": ("hidden", "units"),
    "mlp.gate.weight": (None, "hidden"),
    "mlp.experts.gate_up_proj": ("experts' gate and up", "hidden"),
    "mlp.experts.down_proj": ("hidden", "experts' units"),
    "lm_head.weight": (None, "hidden"),
    "self_attn.q_proj.bias": ("queries", None),
    "self_attn.k_proj.bias": ("keys", None),
    "self_attn.v_proj.bias": ("keys", None),
    "self_attn.o_proj.bias": ("hidden", None),
    "mlp.gate_proj.bias": ("units", None),
    "mlp.up_proj.bias": ("units", None),
    "mlp.down_proj.bias": ("hidden", None),
    "input_layernorm.weight": ("hidden", None),
    "post_attention_layernorm.weight": ("hidden", None),
    "self_attn.q_norm.weight": (None, None),
    "self_attn.k_norm.weight": (None, None),
}


def deepen(model: Decoder, layers: int, *, placement: Placement = "top", preserve: bool = True) -> Decoder:
    """A decoder of ``layers`` layers, the new ones copies of the old.

    ``top`` puts the stack on itself, from its lowest layer on, as often as it fits; ``interleave`` puts each copy above
    its original. With ``preserve`` the copies' output projections are zero: the function is the same, and they learn
    from the first step on. Without, they are copied too, as G_stack does (Du et al. 2024): another function.

    Raises :class:`ModelError` where ``layers`` is not larger than the model's.
    """
    config = _growable(model)
    if layers <= config.layers:
        raise ModelError(f"The base has {config.layers} layers; growing it to {layers} would not make it deeper.")
    if placement == "top":
        sources = [layer % config.layers for layer in range(layers)]
        copied = [layer >= config.layers for layer in range(layers)]
    else:
        sources = [layer * config.layers // layers for layer in range(layers)]
        copied = [layer > 0 and sources[layer - 1] == source for layer, source in enumerate(sources)]
    grown = replace(config, layers=layers)
    grown = replace(grown, full_layers=tuple(n for n, source in enumerate(sources) if source in config.full_layers))
    if config.experts is not None:
        dense = tuple(layer for layer, source in enumerate(sources) if not config.has_experts(source))
        grown = replace(grown, experts=replace(config.experts, every=1, dense_layers=dense))
    old = _weights(model)
    weights = {name: weight for name, weight in old.items() if not name.startswith("layers.")}
    for layer, source in enumerate(sources):
        prefix = f"layers.{source}."
        for name, weight in old.items():
            if name.startswith(prefix):
                silent = preserve and copied[layer] and name.endswith(_WRITERS)
                weights[f"layers.{layer}.{name.removeprefix(prefix)}"] = torch.zeros_like(weight) if silent else weight
    return _assembled(grown, weights)


def widen(
    model: Decoder,
    *,
    hidden_size: int | None = None,
    intermediate_size: int | None = None,
    heads: int | None = None,
    kv_heads: int | None = None,
    noise: float = 0.3,
    seed: int = 0,
) -> Decoder:
    """A decoder whose sizes are whole multiples of the model's; None leaves a size as it is. The function is the same.

    The residual stream becomes n equal copies of itself. RMSNorm does not notice, as the mean square of copies is that
    of the original; whatever reads n copies has its columns divided by n. Heads keep their size, so rotary positions
    and QK-norm stay as they are; query heads are laid out so that each still meets its own key head. A tied head cannot
    be divided without the embedding, so the final norm is, by n.

    Of a mixture ``intermediate_size`` is that of an expert; feed-forwards between the mixtures grow along.

    ``noise`` is the standard deviation of what is added to divided columns, as a share of their root mean square (0.3
    is about the 10 dB of the paper). It sums to zero over the copies of a column, so it changes nothing until the
    copies are trained; without it they would get equal gradients and never part.

    Raises :class:`ModelError` where a size is not a whole multiple of the model's.
    """
    config = _growable(model)
    heads, kv_heads = heads or config.heads, kv_heads or config.kv_heads
    units, expert_units = config.intermediate_size, config.experts.intermediate_size if config.experts else 0
    hidden = _factor("hidden_size", config.hidden_size, hidden_size)
    inner = _factor("intermediate_size", expert_units or units, intermediate_size)
    expert_units_I = torch.arange(expert_units).repeat(inner)
    queries, keys = _heads(config, heads, kv_heads)
    axes = {
        "hidden": torch.arange(config.hidden_size).repeat(hidden),
        "units": torch.arange(units).repeat(inner),
        "experts' units": expert_units_I,
        "experts' gate and up": torch.cat([expert_units_I, expert_units + expert_units_I]),
        "queries": queries,
        "keys": keys,
    }
    generator = torch.Generator().manual_seed(seed)
    old = _weights(model)
    silent = _silent_modules(old)
    weights: dict[str, Tensor] = {}
    for name, weight in old.items():
        if name == "embed_tokens.weight":
            weights[name] = weight[:, axes["hidden"]]
        elif name == "norm.weight":
            weights[name] = weight[axes["hidden"]] / (hidden if config.tied_embeddings else 1)
        else:
            rows, columns = _axes(name)
            wide = weight
            if rows is not None:
                wide = wide.index_select(-2 if columns else -1, axes[rows])
            if columns is not None:
                wide = _divided(wide, axes[columns], noise, generator)
            doubled = columns == "hidden" and wide.shape[-2] > weight.shape[-2]
            if doubled and hidden == 1 and _module(name) in silent:
                # Copied rows that read the same and write nothing would never part. As nothing follows from them yet,
                # they may differ at once.
                wide = wide + noise * _rms(wide) * _normal(wide, generator)
            weights[name] = wide
    grown = replace(
        config,
        hidden_size=config.hidden_size * hidden,
        intermediate_size=config.intermediate_size * inner,
        heads=heads,
        kv_heads=kv_heads,
        experts=config.experts and replace(config.experts, intermediate_size=expert_units * inner),
    )
    return _assembled(grown, weights)


def upcycle(model: Decoder, experts: Experts, *, redrawn: float = 0.0, seed: int = 0) -> Decoder:
    """A mixture of ``experts`` that are copies of the model's feed-forwards, behind small random routers.

    Equal experts whose weights sum to 1 compute what the one feed-forward did, whichever are chosen. With ``redrawn``
    that share of each expert's units, chosen for each expert on its own, is drawn anew from a normal distribution with
    the mean and standard deviation that the replaced weights had; gate, up and down weights of a unit go together.
    From then on the function is another, by the very nature of the method.

    Raises :class:`ModelError` where the model has experts already or cannot have any.
    """
    config = _growable(model)
    if config.experts is not None:
        raise ModelError(
            "The base is a mixture of experts already.", hint="Grow it deeper or wider, or take a dense base."
        )
    if config.family != "qwen3":
        raise ModelError(
            f"Experts cannot be put into a {config.family} model: the Qwen3-MoE layout has QK-norm, and this has none.",
            hint="Grow it deeper or wider, or take a Qwen3 base.",
        )
    if config.sliding_window and config.full_layers:
        raise ModelError("Experts cannot be put into a model of which some layers have a window: the layout has one.")
    if experts.intermediate_size != config.intermediate_size:
        raise ModelError(
            f"Experts of {experts.intermediate_size} units cannot be copies of a feed-forward that has "
            f"{config.intermediate_size}."
        )
    if not experts.normalise:
        raise ModelError("The weights of copied experts must sum to 1, or the sum of their outputs is too small.")
    grown = replace(config, family="qwen3_moe", experts=experts)
    generator = torch.Generator().manual_seed(seed)
    weights = _weights(model)
    count = round(redrawn * config.intermediate_size)
    for layer in filter(grown.has_experts, range(config.layers)):
        prefix = f"layers.{layer}.mlp"
        gate_IC, up_IC, down_CI = (weights.pop(f"{prefix}.{name}_proj.weight") for name in ("gate", "up", "down"))
        router_EC = torch.empty(experts.count, config.hidden_size)
        weights[f"{prefix}.gate.weight"] = nn.init.normal_(router_EC, std=_ROUTER_STD, generator=generator)
        # Copied, since what is drawn anew is written into them.
        gates, ups, downs = ([w.clone() for _ in range(experts.count)] for w in (gate_IC, up_IC, down_CI.T))
        for matrices in zip(gates, ups, downs, strict=True) if count else ():
            chosen = torch.randperm(config.intermediate_size, generator=generator)[:count]
            for matrix in matrices:
                replaced = matrix[chosen]
                deviation = replaced.std() if replaced.numel() > 1 else 0.0
                matrix[chosen] = replaced.mean() + deviation * _normal(replaced, generator)
        up_E2IC = torch.stack([torch.cat(pair) for pair in zip(gates, ups, strict=True)])
        weights[f"{prefix}.experts.gate_up_proj"] = up_E2IC
        weights[f"{prefix}.experts.down_proj"] = torch.stack([down.T for down in downs])
    return _assembled(grown, weights)


def logit_difference(one: Decoder, other: Decoder, *, tokens: int = 256, seed: int = 0) -> tuple[float, float]:
    """Largest absolute difference of the two models' scores on random tokens, and the largest absolute score."""
    count = min(tokens, one.config.context_length)
    ids_N = torch.randint(0, one.config.vocabulary_size, (count,), generator=torch.Generator().manual_seed(seed))

    def scores(model: Decoder) -> Tensor:
        attend = PackedAttention([count], config=model.config)
        return model.logits(model(ids_N, torch.arange(count), attend))

    with torch.no_grad():
        first_NV, second_NV = scores(one), scores(other)
    return float((first_NV - second_NV).abs().max()), float(first_NV.abs().max())


def _growable(model: Decoder) -> ModelConfig:
    if model.config.post_norms:
        raise ModelError(
            f"A {model.config.family} model cannot be grown: its norms behind each part undo what copies rely on.",
            hint="Start from a Qwen3, Qwen2, Llama, Mistral or Phi-3 base.",
        )
    return model.config


def _factor(name: str, size: int, wanted: int | None) -> int:
    """How often ``size`` goes into ``wanted``; 1 where nothing is wanted."""
    if wanted is None:
        return 1
    if wanted < size:
        raise ModelError(f"{name} is {size} in the base and cannot shrink to {wanted}.")
    if wanted % size:
        raise ModelError(
            f"{name} is {size} in the base, and {wanted} is not a whole multiple of it: "
            "only if every unit is copied equally often are norms and sums what they were.",
            hint=f"Choose {size * (wanted // size)} or {size * (wanted // size + 1)}.",
        )
    return wanted // size


def _heads(config: ModelConfig, heads: int, kv_heads: int) -> tuple[Tensor, Tensor]:
    """The source row of each row of the query projection, and of the key and value projections."""
    factor, kv_factor = _factor("heads", config.heads, heads), _factor("kv_heads", config.kv_heads, kv_heads)
    if factor % kv_factor:
        raise ModelError(
            f"{factor} times the query heads cannot be shared out among {kv_factor} times the key heads: "
            "the copies of a key head would have unequal numbers of queries.",
            hint=f"Choose heads as a multiple of {config.heads * kv_factor}.",
        )
    shared, new_shared = config.heads // config.kv_heads, heads // kv_heads
    keys_K = torch.arange(config.kv_heads).repeat(kv_factor)
    new_H = torch.arange(heads)
    queries_H = keys_K[new_H // new_shared] * shared + new_H % new_shared % shared
    within_D = torch.arange(config.head_dim)
    return tuple((heads_H[:, None] * config.head_dim + within_D).flatten() for heads_H in (queries_H, keys_K))  # type: ignore[return-value]


def _axes(name: str) -> tuple[str | None, str | None]:
    return next(axes for end, axes in _AXES.items() if name.endswith(end))


def _divided(weight: Tensor, columns: Tensor, noise: float, generator: torch.Generator) -> Tensor:
    """Columns of ``weight`` [..., R, S] repeated as ``columns`` says and divided among their copies, with noise."""
    copies = len(columns) // weight.shape[-1]
    if copies == 1:
        return weight
    wide = weight.index_select(-1, columns) / copies
    drawn = _normal(wide, generator)
    mean = torch.zeros_like(weight).index_add_(-1, columns, drawn) / copies
    # What is left after taking out the mean has a variance of 1 - 1/copies.
    scale = noise * _rms(weight) / copies / math.sqrt(1 - 1 / copies)
    return wide + scale * (drawn - mean.index_select(-1, columns))


def _silent_modules(weights: Mapping[str, Tensor]) -> set[str]:
    """Attentions, feed-forwards and mixtures whose output projections are zero."""
    outputs = ("o_proj.weight", "down_proj.weight", "experts.down_proj")
    found = [name for name, weight in weights.items() if name.endswith(outputs) and not weight.any()]
    return {_module(name) for name in found}


def _module(name: str) -> str:
    """The attention or feed-forward that a parameter belongs to: ``layers.0.mlp``; of all else, its own beginning."""
    return ".".join(name.split(".")[:3])


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator)


def _rms(weight: Tensor) -> Tensor:
    return weight.square().mean().sqrt()


def _weights(model: Decoder) -> dict[str, Tensor]:
    """All weights by name, a tied head under the embedding's name only."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def _assembled(config: ModelConfig, weights: Mapping[str, Tensor]) -> Decoder:
    """A decoder of its own, in evaluation mode, with copies of ``weights``."""
    with torch.device("meta"):
        model = Decoder(config)
    model.to_empty(device="cpu")
    model.retie()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    return model.eval()
