"""The decoder's shape, read from and written to Hugging Face's ``config.json``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gale.core.errors import ModelError
from gale.core.model_folder import read_json

FAMILIES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
}
_ROPE_TYPES = ("default", "linear", "llama3")


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the trained context: ``linear`` (Chen et al. 2023) or ``llama3``."""

    kind: str
    factor: float
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_context_length: int = 8192


@dataclass(frozen=True, slots=True)
class Experts:
    """A mixture of experts (:mod:`gale.model.experts`) in place of the feed-forward of some layers, or of all.

    Of ``count`` experts, ``per_token`` compute a token, each with ``intermediate_size`` hidden units; ``normalise``
    makes their weights sum to 1. Every ``every``-th layer has experts, those in ``dense_layers`` (from 0) excepted.
    ``balance_loss`` and ``z_loss`` weigh the losses of the same name in training.
    """

    count: int
    per_token: int
    intermediate_size: int
    normalise: bool = True
    every: int = 1
    dense_layers: tuple[int, ...] = ()
    balance_loss: float = 0.001
    z_loss: float = 0.0


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One decoder-only transformer: the Qwen3 shape, with Llama, Mistral, Qwen2 and Qwen3-MoE as settings of it.

    ``hidden_size`` is C, ``heads`` H, ``kv_heads`` K, ``head_dim`` D in the shape suffixes of
    :mod:`gale.model.transformer`. ``sliding_window`` limits attention to that many newest tokens.
    """

    family: str
    vocabulary_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    context_length: int
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-6
    tied_embeddings: bool = True
    qk_norm: bool = True
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None
    sliding_from_layer: int = 0
    experts: Experts | None = None

    def __post_init__(self) -> None:
        assert (self.experts is not None) == (self.family == "qwen3_moe"), "the family tells that there are experts"

    @classmethod
    def load(cls, folder: Path) -> ModelConfig:
        """Read ``config.json``. Raises :class:`ModelError` for what is missing, damaged or unsupported."""
        path = folder / "config.json"
        if not folder.exists():
            raise ModelError(
                f"There is no model folder {folder}.", hint="Give --model a folder in Hugging Face layout."
            )
        if (folder / "adapter_config.json").is_file() and not path.is_file():
            raise ModelError(
                f"{folder} is an adapter, not a whole model.",
                hint="Put it over its base with `gale train merge ADAPTER --base BASE --out DIR`.",
            )
        if not path.is_file():
            raise ModelError(f"{folder} has no config.json, so it is not a model folder in Hugging Face layout.")
        return cls.from_hugging_face(read_json(path))

    @classmethod
    def from_hugging_face(cls, content: dict[str, Any]) -> ModelConfig:
        """Translate the content of a ``config.json``. Raises :class:`ModelError`."""
        family = _read_family(content)
        if content.get("quantization_config"):
            raise ModelError("Gale cannot open pre-quantised checkpoints yet.", hint="Use the model's bf16 checkpoint.")
        if (activation := content.get("hidden_act", "silu")) not in ("silu", "swish"):
            raise ModelError(f"Gale cannot open models with activation {activation!r}; only silu is supported.")
        try:
            heads = int(content["num_attention_heads"])
            hidden = int(content["hidden_size"])
            layers = int(content["num_hidden_layers"])
            window, window_from = _read_sliding_window(content, family, layers)
            bias = family in ("llama", "qwen3", "qwen3_moe") and bool(content.get("attention_bias", False))
            config = cls(
                family=family,
                vocabulary_size=int(content["vocab_size"]),
                hidden_size=hidden,
                intermediate_size=int(content["intermediate_size"]),
                layers=layers,
                heads=heads,
                kv_heads=int(content.get("num_key_value_heads") or heads),
                head_dim=int(content.get("head_dim") or (128 if family == "qwen3" else hidden // heads)),
                context_length=int(content.get("max_position_embeddings") or 2048),
                rope_theta=float((content.get("rope_parameters") or content).get("rope_theta") or 10_000.0),
                rope_scaling=_read_rope_scaling(content),
                norm_eps=float(content.get("rms_norm_eps", 1e-6)),
                tied_embeddings=bool(content.get("tie_word_embeddings", False)),
                qk_norm=family in ("qwen3", "qwen3_moe"),
                qkv_bias=family == "qwen2" or bias,
                output_bias=bias,
                mlp_bias=family == "llama" and bool(content.get("mlp_bias", False)),
                sliding_window=window,
                sliding_from_layer=window_from,
                experts=_read_experts(content) if family == "qwen3_moe" else None,
            )
        except KeyError as error:
            raise ModelError(f"config.json lacks {error.args[0]!r}.") from error
        except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise ModelError(f"config.json holds a value of the wrong kind: {error}") from error
        config._check()
        return config

    def _check(self) -> None:
        for name in (
            *("vocabulary_size", "hidden_size", "intermediate_size", "layers", "heads", "kv_heads", "head_dim"),
            *("context_length", "rope_theta"),
        ):
            if not getattr(self, name) > 0:
                raise ModelError(f"config.json asks for a model with {name} {getattr(self, name)}.")
        if self.heads % self.kv_heads:
            raise ModelError(f"config.json asks for {self.heads} heads, which {self.kv_heads} key heads cannot share.")
        if self.head_dim % 2:
            raise ModelError(f"config.json asks for heads of {self.head_dim} dimensions; rotary positions need pairs.")
        if (experts := self.experts) is None:
            return
        for name in ("count", "per_token", "intermediate_size", "every"):
            if not getattr(experts, name) > 0:
                raise ModelError(f"config.json asks for experts with {name} {getattr(experts, name)}.")
        if experts.per_token > experts.count:
            raise ModelError(f"config.json asks for {experts.per_token} of {experts.count} experts a token.")

    def to_hugging_face(self, *, dtype: str) -> dict[str, Any]:
        """The content of a ``config.json`` that transformers (4 and 5), vLLM and llama.cpp open."""
        architecture = next(name for name, family in FAMILIES.items() if family == self.family)
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": self.rope_theta}
        scaling: dict[str, Any] | None = None
        if self.rope_scaling:
            scaling = {"rope_type": self.rope_scaling.kind, "factor": self.rope_scaling.factor}
            if self.rope_scaling.kind == "llama3":
                scaling |= {
                    "low_freq_factor": self.rope_scaling.low_frequency_factor,
                    "high_freq_factor": self.rope_scaling.high_frequency_factor,
                    "original_max_position_embeddings": self.rope_scaling.original_context_length,
                }
            rope |= scaling
        content = {
            "architectures": [architecture],
            "model_type": self.family,
            "vocab_size": self.vocabulary_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.context_length,
            "hidden_act": "silu",
            "rms_norm_eps": self.norm_eps,
            "tie_word_embeddings": self.tied_embeddings,
            "attention_bias": self.qkv_bias if self.family != "qwen2" else False,
            "mlp_bias": self.mlp_bias,
            "attention_dropout": 0.0,
            "initializer_range": 0.02,
            "use_cache": True,
            # Both spellings: transformers 5 reads rope_parameters, everything older the other two.
            "rope_theta": self.rope_theta,
            "rope_scaling": scaling,
            "rope_parameters": rope,
            "torch_dtype": dtype,
            "dtype": dtype,
        }
        if self.family == "mistral":
            content["sliding_window"] = self.sliding_window  # where it is absent, transformers takes 4096
        elif self.sliding_window is not None:
            content |= {
                "use_sliding_window": True,
                "sliding_window": self.sliding_window,
                "max_window_layers": self.sliding_from_layer,
            }
        if self.experts is not None:
            content |= {
                "num_experts": self.experts.count,
                "num_experts_per_tok": self.experts.per_token,
                "moe_intermediate_size": self.experts.intermediate_size,
                "norm_topk_prob": self.experts.normalise,
                "decoder_sparse_step": self.experts.every,
                "mlp_only_layers": list(self.experts.dense_layers),
                "router_aux_loss_coef": self.experts.balance_loss,
                "router_z_loss_coef": self.experts.z_loss,  # no setting of Qwen's: the name is Switch Transformer's
                "output_router_logits": False,
            }
        return content

    def has_experts(self, layer: int) -> bool:
        """Whether layer ``layer`` (from 0) has experts instead of one feed-forward."""
        if self.experts is None or layer in self.experts.dense_layers:
            return False
        return (layer + 1) % self.experts.every == 0

    @property
    def body_parameters(self) -> int:
        """Parameters outside the embedding and the output head: what N stands for in scaling laws."""
        return self._body(self.experts.count if self.experts else 0)

    @property
    def active_body_parameters(self) -> int:
        """Those of :attr:`body_parameters` that compute one token: of the experts only the chosen ones."""
        return self._body(self.experts.per_token if self.experts else 0)

    def _body(self, experts: int) -> int:
        """Parameters in the matrices of all layers, where each mixture counts ``experts`` of its experts."""
        attention = self.hidden_size * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        dense = 3 * self.hidden_size * self.intermediate_size
        mixture = 0
        if self.experts is not None:
            mixture = self.hidden_size * (self.experts.count + 3 * experts * self.experts.intermediate_size)
        mixtures = sum(map(self.has_experts, range(self.layers)))
        return self.layers * attention + (self.layers - mixtures) * dense + mixtures * mixture

    def flops_per_token(self, context_length: int) -> float:
        """Floating-point operations of one trained token, forward and backward (6N plus attention, Kaplan et al. 2020).

        The output head counts, the embedding look-up does not, and of the experts only the chosen ones do; causal
        attention sees half the context on average.
        """
        head = self.hidden_size * self.vocabulary_size
        attention = self.layers * self.heads * self.head_dim * context_length
        return 6.0 * (self.active_body_parameters + head) + 6.0 * attention


def _read_family(content: dict[str, Any]) -> str:
    architectures = content.get("architectures")
    architecture = architectures[0] if isinstance(architectures, list) and architectures else None
    model_type = content.get("model_type")
    if architecture is None and model_type in FAMILIES.values():
        return str(model_type)
    if family := FAMILIES.get(str(architecture)):
        return family
    if str(architecture).endswith("ForSequenceClassification"):
        raise ModelError(
            f"This is no model that writes text but one that scores it ({architecture}), such as a reward model.",
            hint="Give the chat model here; a reward model belongs where rewards are asked for.",
        )
    raise ModelError(
        f"Gale cannot open models of architecture {architecture or model_type or 'unnamed'}.",
        hint=f"Supported are: {', '.join(sorted(FAMILIES))}.",
    )


def _read_sliding_window(content: dict[str, Any], family: str, layers: int) -> tuple[int | None, int]:
    """The window, and the first layer that has it."""
    if family == "mistral":
        window = content.get("sliding_window", 4096)  # what transformers takes where the key is absent
        return (int(window) if window else None), 0
    if family == "llama" or not content.get("use_sliding_window") or not content.get("sliding_window"):
        return None, 0
    if family == "qwen3_moe":
        return int(content["sliding_window"]), 0
    if kinds := content.get("layer_types"):
        full = kinds.count("full_attention")
        if len(kinds) != layers or kinds != (["full_attention"] * full + ["sliding_attention"] * (len(kinds) - full)):
            raise ModelError("Gale cannot open models whose full and sliding attention layers alternate.")
    else:
        full = int(content.get("max_window_layers", 28))
    return int(content["sliding_window"]), full


def _read_experts(content: dict[str, Any]) -> Experts:
    # transformers 5 writes the number of experts under a name of its own; what is absent is as it takes it.
    count = content.get("num_local_experts")
    return Experts(
        count=int(content["num_experts"] if count is None else count),
        per_token=int(content["num_experts_per_tok"]),
        intermediate_size=int(content["moe_intermediate_size"]),
        normalise=bool(content.get("norm_topk_prob", False)),
        every=int(content.get("decoder_sparse_step", 1)),
        dense_layers=tuple(int(layer) for layer in content.get("mlp_only_layers") or ()),
        balance_loss=float(content.get("router_aux_loss_coef", 0.001)),
        z_loss=float(content.get("router_z_loss_coef", 0.0)),
    )


def _read_rope_scaling(content: dict[str, Any]) -> RopeScaling | None:
    raw = content.get("rope_parameters") or content.get("rope_scaling")
    if not raw:
        return None
    if raw.get("partial_rotary_factor", 1.0) != 1.0:
        raise ModelError("Gale cannot open models that rotate only a part of each head.")
    kind = raw.get("rope_type") or raw.get("type") or "default"
    if kind not in _ROPE_TYPES:
        raise ModelError(
            f"Gale cannot open models with RoPE scaling {kind!r}.", hint=f"Supported: {', '.join(_ROPE_TYPES)}."
        )
    if kind == "default":
        return None
    return RopeScaling(
        kind=kind,
        factor=float(raw["factor"]),
        low_frequency_factor=float(raw.get("low_freq_factor", 1.0)),
        high_frequency_factor=float(raw.get("high_freq_factor", 4.0)),
        original_context_length=int(raw.get("original_max_position_embeddings", 8192)),
    )
