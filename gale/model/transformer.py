"""The decoder that trainer, engine and evaluation share.

Tokens are always flattened: a batch of sequences is one list of N tokens, with a position for each. The linear
layers never need to know where one sequence ends, and attention - the only place that does - is handed in as
``attend``: the trainer passes causal attention over packed rows, the engine attention over its KV cache. So there
is one forward pass, whoever runs it.

Shape suffixes: N tokens, C hidden size, H query heads, K key/value heads, D head dimension, V vocabulary.

References: Qwen3 (Yang et al. 2025), RMSNorm (Zhang & Sennrich 2019), RoPE (Su et al. 2021), grouped-query
attention (Ainslie et al. 2023), SwiGLU (Shazeer 2020), QK-norm (Dehghani et al. 2023), Gemma 2 and 3 (Gemma Team
2024, 2025), YaRN (Peng et al. 2023), LongRoPE (Ding et al. 2024). Mixtures of experts stand in
:mod:`gale.model.experts`, with references of their own.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gale.model import kernels
from gale.model.config import ModelConfig
from gale.model.experts import AUXILIARY_LOSSES, MixtureOfExperts
from gale.model.native import NativeLayers

# The matrices that write into the residual stream.
_OUTPUT_PROJECTIONS = ("o_proj.weight", "down_proj.weight", "experts.down_proj")


class Attend(Protocol):
    """Attention of one layer: queries [N, H, D], keys and values [N, K, D] of the new tokens -> [N, H, D]."""

    def __call__(self, layer: int, q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor) -> Tensor: ...


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over the last dimension, computed in fp32 whatever the weights are.

    With ``unit_offset`` the factor is 1 + weight, applied in fp32 too (Gemma).
    """

    def __init__(self, size: int, eps: float, *, unit_offset: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size) if unit_offset else torch.ones(size))
        self.eps = eps
        self.unit_offset = unit_offset

    def forward(self, x: Tensor) -> Tensor:
        if not self.unit_offset and kernels.serve(x):
            return kernels.norm(x, self.weight, self.eps)
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        if self.unit_offset:
            return (wide * scale * (1 + self.weight.float())).to(x.dtype)
        return (wide * scale).to(x.dtype) * self.weight


class Attention(nn.Module):
    """Grouped-query attention with rotary positions and, for Qwen3 and Gemma 3, per-head QK-norm."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=config.qkv_bias)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=config.output_bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.norm_eps, unit_offset=config.unit_offset_norms)
            self.k_norm = RMSNorm(config.head_dim, config.norm_eps, unit_offset=config.unit_offset_norms)
        self.qk_norm, self.norm_eps, self.unit_offset = config.qk_norm, config.norm_eps, config.unit_offset_norms
        # Every ``attend`` divides by the root of D; what another scale is apart from that is multiplied in before.
        scalar = config.query_pre_attn_scalar
        self.query_scale = 1.0 if scalar is None else (config.head_dim / scalar) ** 0.5

    def forward(self, x_NC: Tensor, cos_ND: Tensor, sin_ND: Tensor, attend: Attend) -> Tensor:
        q_NHD = self.q_proj(x_NC).unflatten(-1, (-1, self.head_dim))
        k_NKD = self.k_proj(x_NC).unflatten(-1, (-1, self.head_dim))
        v_NKD = self.v_proj(x_NC).unflatten(-1, (-1, self.head_dim))
        plain = not self.unit_offset and self.query_scale == 1 and cos_ND.shape[-1] == self.head_dim
        if plain and kernels.serve(x_NC):
            q_weight, k_weight = (self.q_norm.weight, self.k_norm.weight) if self.qk_norm else (None, None)
            q_NHD = kernels.norm_rotate(q_NHD, q_weight, self.norm_eps, cos_ND, sin_ND)
            k_NKD = kernels.norm_rotate(k_NKD, k_weight, self.norm_eps, cos_ND, sin_ND)
        else:
            if self.qk_norm:
                q_NHD, k_NKD = self.q_norm(q_NHD), self.k_norm(k_NKD)
            if self.query_scale != 1:
                q_NHD = q_NHD * self.query_scale
            q_NHD, k_NKD = rotate(q_NHD, cos_ND, sin_ND), rotate(k_NKD, cos_ND, sin_ND)
        return self.o_proj(attend(self.layer, q_NHD, k_NKD, v_NKD).flatten(-2))  # type: ignore[no-any-return]


class MLP(nn.Module):
    """SwiGLU feed-forward, or GeGLU for Gemma."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.activation = config.activation

    def forward(self, x_NC: Tensor) -> Tensor:
        gate_NI, up_NI = self.gate_proj(x_NC), self.up_proj(x_NC)
        if self.activation == "gelu_tanh":
            hidden_NI = F.gelu(gate_NI, approximate="tanh") * up_NI
        elif kernels.serve(x_NC):
            hidden_NI = kernels.silu_gate(gate_NI, up_NI)
        else:
            hidden_NI = F.silu(gate_NI) * up_NI
        return self.down_proj(hidden_NI)  # type: ignore[no-any-return]


class Block(nn.Module):
    """One layer: attention, then feed-forward, each on a normalised residual stream.

    With ``post_norms`` what they give is normalised as well, and the names of the norms shift by one, as Gemma's do.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()

        def norm() -> RMSNorm:
            return RMSNorm(config.hidden_size, config.norm_eps, unit_offset=config.unit_offset_norms)

        self.input_layernorm = norm()
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = norm()
        self.post_norms = config.post_norms
        if config.post_norms:
            self.pre_feedforward_layernorm, self.post_feedforward_layernorm = norm(), norm()
        self.mlp = MixtureOfExperts(config) if config.has_experts(layer) else MLP(config)

    def forward(self, x_NC: Tensor, cos_ND: Tensor, sin_ND: Tensor, attend: Attend) -> Tensor:
        attended_NC = self.self_attn(self.input_layernorm(x_NC), cos_ND, sin_ND, attend)
        if self.post_norms:
            x_NC = x_NC + self.post_attention_layernorm(attended_NC)
            mlp_NC = self.mlp(self.pre_feedforward_layernorm(x_NC))
            return x_NC + self.post_feedforward_layernorm(mlp_NC)  # type: ignore[no-any-return]
        x_NC = x_NC + attended_NC
        return x_NC + self.mlp(self.post_attention_layernorm(x_NC))  # type: ignore[no-any-return]


class Decoder(nn.Module):
    """The whole model. Parameter names are Hugging Face's without the ``model.`` prefix of the trunk.

    Only the experts of a layer are named otherwise: they are stacked (:class:`gale.model.experts.ExpertWeights`).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        # Not drawn by torch, which without memory ("meta") loads its compiler for that: a second, and 70 MB.
        blank_VC = torch.empty(config.vocabulary_size, config.hidden_size)
        self.embed_tokens = nn.Embedding.from_pretrained(blank_VC, freeze=False)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, unit_offset=config.unit_offset_norms)
        self.lm_head = nn.Linear(config.hidden_size, config.vocabulary_size, bias=False)
        self.mapped_bytes = 0  # of weights that are a file, which the system counts as free memory
        self.native: NativeLayers | None = None  # all layers in one call
        self.hooked = False  # whether hooks change what single layers compute now
        self.retie()

    def retie(self) -> None:
        """Set what is not stored: the tied head and the rotary frequencies. Call after ``to_empty``."""
        if self.config.tied_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        device = self.embed_tokens.weight.device
        if device.type == "meta":  # nothing is computed there, and torch would load its compiler to do so
            return
        # Not a buffer: the rotary frequencies must stay fp32 when the weights are cast to bf16.
        with torch.device(device):
            self._frequencies = {False: rotary_frequencies(self.config)}
            if self.config.local_rope_theta is not None:
                self._frequencies[True] = rotary_frequencies(self.config, local=True)

    def forward(self, ids_N: Tensor, positions_N: Tensor, attend: Attend) -> Tensor:
        """Final normalised hidden states [N, C] of tokens ``ids_N`` standing at ``positions_N`` of their sequences."""
        config = self.config
        x_NC = self.embed_tokens(ids_N)
        if config.embedding_scale != 1:  # a number of the weights' own format, as Gemma was trained with
            x_NC = x_NC * torch.tensor(config.embedding_scale, dtype=x_NC.dtype)
        batch = getattr(attend, "batch", None)  # attention over sequences' own caches has one
        if self.native is not None and not self.hooked and batch is not None and kernels.serve(x_NC):
            return self.native(x_NC, positions_N, batch, partial(self.rotary, dtype=x_NC.dtype))
        tables = local = self.rotary(positions_N, x_NC.dtype)
        if config.local_rope_theta is not None:
            local = self.rotary(positions_N, x_NC.dtype, local=True)
        for layer, block in enumerate(self.layers):
            x_NC = block(x_NC, *(tables if config.window(layer) is None else local), attend)
        return self.norm(x_NC)  # type: ignore[no-any-return]

    def logits(self, x_NC: Tensor) -> Tensor:
        """Scores [N, V] of the next token; ask only for the rows that are needed, this is the widest product."""
        logits_NV: Tensor = self.lm_head(x_NC)
        cap = self.config.logit_softcap
        return logits_NV if cap is None else torch.tanh(logits_NV / cap) * cap

    def auxiliary_losses(self) -> dict[str, Tensor]:
        """The routers' unweighted losses in the last forward, by name, each the mean over the layers with experts.

        They belong to that forward's graph. Empty for a dense model and in evaluation. ``config.experts`` holds the
        weight of each under the same name.
        """
        mixtures = [block.mlp for block in self.layers if isinstance(block.mlp, MixtureOfExperts) and block.mlp.losses]
        if not mixtures:
            return {}
        return {name: torch.stack([mlp.losses[name] for mlp in mixtures]).mean() for name in AUXILIARY_LOSSES}

    def rotary(self, positions_N: Tensor, dtype: torch.dtype, *, local: bool = False) -> tuple[Tensor, Tensor]:
        """Cosine and sine tables [N, 1, D] in the two-halves layout of Hugging Face.

        D is :attr:`ModelConfig.rotary_dim`; ``local`` asks for those of layers with a window, where they differ.
        """
        frequencies_D = self._frequencies[local] = self._frequencies[local].to(positions_N.device)  # it may have moved
        scaling = None if local else self.config.rope_scaling
        scale = 1.0 if scaling is None else scaling.attention_factor
        compute = rotary_tables if torch.compiler.is_compiling() else _tables
        tables: tuple[Tensor, Tensor] = compute(positions_N, frequencies_D, dtype, scale)
        return tables

    def initialise(self, seed: int) -> None:
        """Draw fresh weights: normal with 0.02, output projections scaled down by depth (GPT-2)."""
        generator = torch.Generator().manual_seed(seed)
        depth_scale = 1.0 / math.sqrt(2 * self.config.layers)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                from_zero = name.endswith("bias") or self.config.unit_offset_norms
                nn.init.zeros_(parameter) if from_zero else nn.init.ones_(parameter)
            else:
                scale = depth_scale if name.endswith(_OUTPUT_PROJECTIONS) else 1.0
                nn.init.normal_(parameter, std=0.02 * scale, generator=generator)


def _tables(positions_N: Tensor, frequencies_D: Tensor, dtype: torch.dtype, scale: float) -> tuple[Tensor, Tensor]:
    """``scale`` times cosine and sine [N, 1, D] of each position times each of the D/2 frequencies."""
    angles_ND = torch.outer(positions_N.float(), frequencies_D)
    angles_ND = torch.cat((angles_ND, angles_ND), dim=-1)[:, None]
    cos_ND, sin_ND = angles_ND.cos(), angles_ND.sin()
    if scale != 1:
        cos_ND, sin_ND = cos_ND * scale, sin_ND * scale
    return cos_ND.to(dtype), sin_ND.to(dtype)


# A custom operator, so that torch.compile does not compute sines and cosines anew in every kernel that uses them.
rotary_tables = torch.library.custom_op("gale::rotary_tables", _tables, mutates_args=())


@rotary_tables.register_fake
def _(positions_N: Tensor, frequencies_D: Tensor, dtype: torch.dtype, scale: float) -> tuple[Tensor, Tensor]:
    shape = (len(positions_N), 1, 2 * len(frequencies_D))
    return tuple(positions_N.new_empty(shape, dtype=dtype) for _ in range(2))  # type: ignore[return-value]


def rotate(x_NHD: Tensor, cos_ND: Tensor, sin_ND: Tensor) -> Tensor:
    """Rotate each pair (i, i + D/2) of a head by its position's angle (RoPE); beyond the tables' D nothing changes."""
    if (size := cos_ND.shape[-1]) < x_NHD.shape[-1]:
        return torch.cat((rotate(x_NHD[..., :size], cos_ND, sin_ND), x_NHD[..., size:]), dim=-1)
    first, second = x_NHD.chunk(2, dim=-1)
    return x_NHD * cos_ND + torch.cat((-second, first), dim=-1) * sin_ND


def rotary_frequencies(config: ModelConfig, *, local: bool = False) -> Tensor:
    """Angle per position of each of the D/2 pairs, scaled as the configuration says; fp32.

    ``local`` asks for those of layers with a window, where they have a base of their own.
    """
    size = config.rotary_dim
    exponents_D = torch.arange(0, size, 2, dtype=torch.int64).float() / size
    if local:
        assert config.local_rope_theta is not None, "local frequencies need a base"
        return 1.0 / config.local_rope_theta**exponents_D
    frequencies_D = 1.0 / config.rope_theta**exponents_D
    scaling = config.rope_scaling
    if scaling is None or scaling.kind == "dynamic":  # which stretches only what is longer than the context
        return frequencies_D
    if scaling.kind == "linear":
        return frequencies_D / scaling.factor
    original = scaling.original_context_length
    if scaling.kind == "longrope":
        # One choice for all lengths, since a cache must not change its frequencies in the middle of an answer.
        return frequencies_D / torch.tensor(scaling.long if config.context_length > original else scaling.short)
    if scaling.kind == "yarn":

        def pair(turns: float) -> float:
            """The place among the pairs that turns so often within the original context."""
            return size * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))

        low, high = pair(scaling.beta_fast), pair(scaling.beta_slow)
        if scaling.whole_dimensions:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, size - 1)
        places_D = torch.arange(size // 2, dtype=torch.float32)
        kept_D = 1 - ((places_D - low) / (high - low if high != low else 0.001)).clamp(0, 1)
    else:  # Llama 3.1: long waves are stretched, short ones kept, and those between blended.
        turns_D = original * frequencies_D / (2 * math.pi)
        span = scaling.high_frequency_factor - scaling.low_frequency_factor
        kept_D = ((turns_D - scaling.low_frequency_factor) / span).clamp(0, 1)
    return (1 - kept_D) * frequencies_D / scaling.factor + kept_D * frequencies_D
