"""The decoder's shape, read from and written to Hugging Face's ``config.json``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gale.core.errors import ModelError
from gale.core.model_folder import read_json
from gale.model.rope import RopeScaling, read_rope

FAMILIES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3_text",
    "Phi3ForCausalLM": "phi3",
}
_WITH_IMAGES = "Gemma3ForConditionalGeneration"  # of which the text half is opened
_GEMMA = ("gemma2", "gemma3_text")
# Families whose published folders leave out what transformers takes by default.
_GEMMA_DEFAULTS: dict[str, Any] = {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "sliding_window": 4096,
    "query_pre_attn_scalar": 256,
    "tie_word_embeddings": True,
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma2": {
        **_GEMMA_DEFAULTS,
        "vocab_size": 256_000,
        "max_position_embeddings": 8192,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    "gemma3_text": {**_GEMMA_DEFAULTS, "vocab_size": 262_208, "max_position_embeddings": 131_072},
    "phi3": {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
}
_WITH_BIAS = ("llama", "qwen3", "qwen3_moe", "gemma3_text")  # where attention_bias means something
_ACTIVATIONS: dict[str, Literal["silu", "gelu_tanh"]] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
}


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
    """One decoder-only transformer: the Qwen3 shape, with Llama, Mistral, Qwen2, Gemma and Phi-3 as settings of it.

    ``hidden_size`` is C, ``heads`` H, ``kv_heads`` K, ``head_dim`` D in the shape suffixes of
    :mod:`gale.model.transformer`. ``sliding_window`` limits attention to that many newest tokens in all layers but
    ``full_layers`` (:meth:`window`); where it does, ``local_rope_theta`` may replace ``rope_theta`` and its scaling.
    ``rotary_share`` is the part of a head that is rotated. Gemma's: ``unit_offset_norms`` multiply by 1 + weight,
    ``post_norms`` stand behind attention and feed-forward too, ``query_pre_attn_scalar`` takes the place of D in the
    scale of attention, and a soft-cap c bends scores x to c tanh(x / c).
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
    full_layers: tuple[int, ...] = ()
    experts: Experts | None = None
    local_rope_theta: float | None = None
    rotary_share: float = 1.0
    activation: Literal["silu", "gelu_tanh"] = "silu"
    unit_offset_norms: bool = False
    post_norms: bool = False
    embedding_scale: float = 1.0
    query_pre_attn_scalar: int | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None

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
        family, content = _read_family(content)
        if content.get("quantization_config"):
            raise ModelError("Gale cannot open pre-quantised checkpoints yet.", hint="Use the model's bf16 checkpoint.")
        gemma = family in _GEMMA
        named = content.get("hidden_activation") or "gelu_pytorch_tanh" if gemma else content.get("hidden_act", "silu")
        if named not in _ACTIVATIONS:
            hint = f"Supported are {', '.join(_ACTIVATIONS)}."
            raise ModelError(f"Gale cannot open models with activation {named!r}.", hint=hint)
        if content.get("use_bidirectional_attention"):
            raise ModelError(
                "This model reads in both directions, as embedding models do; Gale opens those that write."
            )
        try:
            heads = int(content["num_attention_heads"])
            hidden = int(content["hidden_size"])
            layers = int(content["num_hidden_layers"])
            window, full_layers = _read_sliding_window(content, family, layers)
            bias = family in _WITH_BIAS and bool(content.get("attention_bias", False))
            local = 10_000.0 if family == "gemma3_text" else None
            rope = read_rope(content, default_theta=1e6 if local else 10_000.0, default_local_theta=local)
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
                rope_theta=rope.theta,
                rope_scaling=rope.scaling,
                norm_eps=float(content.get("rms_norm_eps", 1e-6)),
                tied_embeddings=bool(content.get("tie_word_embeddings", False)),
                qk_norm=family in ("qwen3", "qwen3_moe", "gemma3_text"),
                qkv_bias=family == "qwen2" or bias,
                output_bias=bias,
                mlp_bias=family == "llama" and bool(content.get("mlp_bias", False)),
                sliding_window=window,
                full_layers=full_layers,
                experts=_read_experts(content) if family == "qwen3_moe" else None,
                local_rope_theta=rope.local_theta if window else None,
                rotary_share=rope.share,
                activation=_ACTIVATIONS[named],
                unit_offset_norms=gemma,
                post_norms=gemma,
                embedding_scale=hidden**0.5 if gemma else 1.0,
                query_pre_attn_scalar=int(content["query_pre_attn_scalar"]) if gemma else None,
                attention_softcap=_optional(content.get("attn_logit_softcapping")) if family == "gemma2" else None,
                logit_softcap=_optional(content.get("final_logit_softcapping")) if gemma else None,
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
            *("context_length", "rope_theta", "rotary_share"),
        ):
            if not getattr(self, name) > 0:
                raise ModelError(f"config.json asks for a model with {name} {getattr(self, name)}.")
        if self.heads % self.kv_heads:
            raise ModelError(f"config.json asks for {self.heads} heads, which {self.kv_heads} key heads cannot share.")
        if self.rotary_dim % 2 or not 0 < self.rotary_dim <= self.head_dim:
            of = f"{self.rotary_dim} of {self.head_dim}" if self.rotary_share != 1 else str(self.head_dim)
            raise ModelError(f"config.json asks for heads of {of} dimensions; rotary positions need pairs.")
        scaling = self.rope_scaling
        if scaling is not None and not (scaling.factor > 0 and scaling.original_context_length > 0):
            raise ModelError(f"config.json asks to scale RoPE by {scaling.factor}.")
        if scaling is not None and scaling.kind == "longrope":
            for divisors in (scaling.short, scaling.long):
                if len(divisors) != self.rotary_dim // 2 or not min(divisors) > 0:
                    raise ModelError(f"config.json must hold {self.rotary_dim // 2} factors above 0 for longrope.")
        for name in ("query_pre_attn_scalar", "attention_softcap", "logit_softcap", "local_rope_theta"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ModelError(f"config.json asks for a model with {name} {value}.")
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
        scaling = self.rope_scaling and self.rope_scaling.to_hugging_face()
        rope |= scaling or {}
        if self.family == "phi3":
            rope["partial_rotary_factor"] = self.rotary_share
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
            "hidden_act": "silu" if self.activation == "silu" else "gelu_pytorch_tanh",
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
        if self.family in ("mistral", "phi3"):
            content["sliding_window"] = self.sliding_window  # where Mistral has none, transformers takes 4096
        elif self.sliding_window is not None or self.family in _GEMMA:
            kinds = ["sliding_attention" if self.window(layer) else "full_attention" for layer in range(self.layers)]
            content |= {"sliding_window": self.sliding_window, "layer_types": kinds}
            if self.family not in _GEMMA:
                content |= {"use_sliding_window": True, "max_window_layers": len(self.full_layers)}
        if self.family == "phi3":
            original = self.rope_scaling.original_context_length if self.rope_scaling else self.context_length
            # transformers fills in 32000, which a small vocabulary lacks.
            content |= {"original_max_position_embeddings": original, "pad_token_id": None}
            content |= {"partial_rotary_factor": self.rotary_share}
        if self.family in _GEMMA:
            content |= {
                "hidden_activation": content.pop("hidden_act"),
                "query_pre_attn_scalar": self.query_pre_attn_scalar,
                "attn_logit_softcapping": self.attention_softcap,
                "final_logit_softcapping": self.logit_softcap,
            }
        if self.family == "gemma3_text":
            local = {"rope_type": "default", "rope_theta": self.local_rope_theta or 10_000.0}
            content |= {
                "rope_local_base_freq": local["rope_theta"],
                "rope_parameters": {"full_attention": rope, "sliding_attention": local},
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

    def window(self, layer: int) -> int | None:
        """How many of the newest tokens layer ``layer`` (from 0) sees; None for all."""
        return None if layer in self.full_layers else self.sliding_window

    @property
    def rotary_dim(self) -> int:
        """How many of a head's dimensions, the first ones, are rotated."""
        return int(self.head_dim * self.rotary_share)

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


def _read_family(content: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The family, and all that is said about its text model, defaults included."""
    architectures = content.get("architectures")
    architecture = architectures[0] if isinstance(architectures, list) and architectures else None
    model_type = content.get("model_type")
    text = content.get("text_config")
    if architecture == _WITH_IMAGES and isinstance(text, dict):
        outer = {key: content[key] for key in ("tie_word_embeddings", "quantization_config") if key in content}
        return "gemma3_text", {**_DEFAULTS["gemma3_text"], **outer, **text}
    family = FAMILIES.get(str(architecture))
    if architecture is None and model_type in FAMILIES.values():
        family = str(model_type)
    if family:
        return family, {**_DEFAULTS.get(family, {}), **content}
    if str(architecture).endswith("ForSequenceClassification"):
        raise ModelError(
            f"This is no model that writes text but one that scores it ({architecture}), such as a reward model.",
            hint="Give the chat model here; a reward model belongs where rewards are asked for.",
        )
    raise ModelError(
        f"Gale cannot open models of architecture {architecture or model_type or 'unnamed'}.",
        hint=f"Supported are: {', '.join(sorted([*FAMILIES, _WITH_IMAGES]))}.",
    )


def _read_sliding_window(content: dict[str, Any], family: str, layers: int) -> tuple[int | None, tuple[int, ...]]:
    """The window, and the layers that do without it."""
    window = content.get("sliding_window")
    if family == "llama":
        window = None
    elif family == "mistral":
        window = content.get("sliding_window", 4096)  # what transformers takes where the key is absent
    elif family.startswith("qwen") and not content.get("use_sliding_window"):
        window = None
    if not window:
        return None, ()
    kinds = content.get("layer_types")
    if family in ("mistral", "phi3", "qwen3_moe"):
        full: tuple[int, ...] = ()
    elif kinds:
        if len(kinds) < layers or not set(kinds) <= {"full_attention", "sliding_attention"}:
            raise ModelError(f"config.json must name full_attention or sliding_attention for each of {layers} layers.")
        full = tuple(layer for layer in range(layers) if kinds[layer] == "full_attention")
    elif family in _GEMMA:
        every = int(content.get("sliding_window_pattern") or 6) if family == "gemma3_text" else 2
        full = tuple(range(every - 1, layers, every))
    else:
        full = tuple(range(min(int(content.get("max_window_layers", 28)), layers)))
    # transformers wants a window of Gemma even where no layer has one.
    return (None, ()) if len(full) == layers and family not in _GEMMA else (int(window), full)


def _optional(value: Any) -> float | None:
    return None if value is None else float(value)


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
