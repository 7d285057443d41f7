"""What a configuration says about rotary positions (RoPE, Su et al. 2021), read from and written to ``config.json``.

The frequencies that follow from it are computed in :mod:`gale.model.transformer`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from gale.core.errors import ModelError

_KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the trained context.

    ``linear`` (Chen et al. 2023); ``llama3``, with the two frequency factors; ``yarn`` (Peng et al. 2023), with the two
    betas; ``longrope`` (Ding et al. 2024), with a divisor for each frequency: ``long`` where the model's context is
    longer than the original one, else ``short``; ``dynamic``, which stretches nothing within the model's context.
    ``attention_factor`` multiplies the rotated queries and keys.
    """

    kind: str
    factor: float
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_context_length: int = 8192
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    whole_dimensions: bool = True
    short: tuple[float, ...] = ()
    long: tuple[float, ...] = ()

    def to_hugging_face(self) -> dict[str, Any]:
        """The settings as ``rope_scaling`` and ``rope_parameters`` hold them."""
        content: dict[str, Any] = {"rope_type": self.kind, "factor": self.factor}
        if self.kind in ("llama3", "yarn", "longrope"):
            content["original_max_position_embeddings"] = self.original_context_length
        match self.kind:
            case "llama3":
                content["low_freq_factor"] = self.low_frequency_factor
                content["high_freq_factor"] = self.high_frequency_factor
            case "yarn":
                content |= {"attention_factor": self.attention_factor, "truncate": self.whole_dimensions}
                content |= {"beta_fast": self.beta_fast, "beta_slow": self.beta_slow}
            case "longrope":
                del content["factor"]  # follows from the two context lengths, and is told by the attention factor
                content |= {"attention_factor": self.attention_factor}
                content |= {"short_factor": list(self.short), "long_factor": list(self.long)}
        return content


class Rope(NamedTuple):
    """All that a ``config.json`` says: ``share`` is the part of each head that is rotated, ``local_theta`` the base in
    layers with a sliding window, if it differs there."""

    theta: float
    scaling: RopeScaling | None
    share: float
    local_theta: float | None


def read_rope(content: dict[str, Any], *, default_theta: float, default_local_theta: float | None) -> Rope:
    """Rotary settings in all spellings that Hugging Face has had. Raises :class:`ModelError`."""
    new, old = content.get("rope_parameters"), content.get("rope_scaling")
    local: dict[str, Any] | None = None
    if isinstance(new, dict) and {"full_attention", "sliding_attention"} & new.keys():  # one table a kind of layer
        local, new = new.get("sliding_attention"), new.get("full_attention")
    raw = new or old or {}
    theta = raw.get("rope_theta") or content.get("rope_theta") or default_theta
    local = local or {}
    if (local.get("rope_type") or "default") != "default":
        raise ModelError("Gale cannot open models that scale RoPE in layers with a sliding window.")
    local_theta = local.get("rope_theta") or content.get("rope_local_base_freq") or default_local_theta
    share = raw.get("partial_rotary_factor", content.get("partial_rotary_factor"))
    return Rope(
        theta=float(theta),
        scaling=_read_scaling(raw, content),
        share=1.0 if share is None else float(share),
        local_theta=None if local_theta is None else float(local_theta),
    )


def _read_scaling(raw: dict[str, Any], content: dict[str, Any]) -> RopeScaling | None:
    kind = raw.get("rope_type") or raw.get("type") or "default"
    if content.get("model_type") == "phi3" and kind in ("su", "yarn"):
        kind = "longrope"  # what Phi-3's first folders called it
    if kind not in _KINDS:
        raise ModelError(
            f"Gale cannot open models with RoPE scaling {kind!r}.", hint=f"Supported: {', '.join(_KINDS)}."
        )
    if kind == "default":
        return None
    if kind in ("linear", "dynamic"):
        return RopeScaling(kind, float(raw["factor"]))
    context = int(content.get("max_position_embeddings") or 2048)
    # Phi-3 has it beside the table, and there it counts.
    original = int(
        content.get("original_max_position_embeddings") or raw.get("original_max_position_embeddings") or context
    )
    factor = raw.get("factor")
    if factor is None and kind == "llama3":
        raise KeyError("factor")
    factor = context / original if factor is None else float(factor)
    if kind == "llama3":
        low, high = float(raw.get("low_freq_factor", 1.0)), float(raw.get("high_freq_factor", 4.0))
        return RopeScaling(kind, factor, low, high, original)
    attention = raw.get("attention_factor")
    if kind == "longrope":
        if attention is None:
            attention = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        short, long = (tuple(map(float, raw[name])) for name in ("short_factor", "long_factor"))
        # Of the factor nothing but the attention factor follows.
        return RopeScaling(
            kind,
            context / original,
            original_context_length=original,
            attention_factor=float(attention),
            short=short,
            long=long,
        )
    if attention is None:
        scale, all_dimensions = raw.get("mscale"), raw.get("mscale_all_dim")
        attention = _yarn_scale(factor, 1.0)
        if scale and all_dimensions:
            attention = _yarn_scale(factor, float(scale)) / _yarn_scale(factor, float(all_dimensions))
    return RopeScaling(
        kind,
        factor,
        original_context_length=original,
        attention_factor=float(attention),
        beta_fast=float(raw.get("beta_fast") or 32),
        beta_slow=float(raw.get("beta_slow") or 1),
        whole_dimensions=bool(raw.get("truncate", True)),
    )


def _yarn_scale(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0
