"""One dial: from a depth, or from a number of FLOPs, everything else that a pretraining recipe has to say.

The idea is nanochat's (Karpathy 2025): a family of models with one knob, compute-optimal at every setting. Each value
comes with its reason; what a recipe says itself wins, and what follows from it follows from that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from gale.core.errors import GaleError
from gale.data.prepare import ready_data
from gale.data.shards import read_manifest
from gale.model.config import ModelConfig
from gale.train.plan import optimal_batch_tokens
from gale.train.plan_model import CHINCHILLA_TOKENS_PER_PARAMETER, vocabulary_of

ROW_TOKENS = 512
_WIDTH_PER_LAYER = 64
_DEEPEST = 256
# The learning rates of recipes/smoke.toml (96 wide, 5e-3) and recipes/builtin/pretrain.toml (256 wide, 2.5e-3) lie on
# width^-0.7, between nanochat's -1/2 and the -1 that mu-P derives for Adam (Yang et al. 2022).
_RATE, _RATE_WIDTH, _RATE_EXPONENT = 2.5e-3, 256, -0.7
_MICRO_TOKENS = 8192

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Dial:
    """Values by recipe key (dotted), the reason of each, and what the run they make comes to.

    ``parameters`` are those that multiply: all but an untied input embedding.
    """

    values: dict[str, Any]
    reasons: dict[str, str]
    parameters: int
    tokens: int
    flops: float

    def complete(self, content: dict[str, Any]) -> None:
        """Put the values into the ``content`` of a recipe, beside what it says itself."""
        for key, value in self.values.items():
            table, _, name = key.rpartition(".")
            target = content.setdefault(table, {}) if table else content
            if isinstance(target, dict):
                target.setdefault(name, value)


def turn_dial(
    *,
    depth: int | None = None,
    flops: float | None = None,
    vocabulary_size: int,
    row_tokens: int,
    given: Mapping[str, Any] | None = None,
) -> Dial:
    """Derive a recipe from ``depth`` layers or from the ``flops`` it may cost; ``given`` holds what is settled already.

    By FLOPs it is the deepest model that can be trained on 20 tokens a parameter for them, and all of them are spent.
    Raises :class:`GaleError` where not exactly one is given, or it makes no model.
    """
    given = given or {}
    if (depth is None) == (flops is None):
        raise GaleError("Turn one dial, --depth or --flops.")
    if flops is None:
        assert depth is not None
        if not 1 <= depth <= _DEEPEST:
            raise GaleError(f"A depth of {depth} makes no model.", hint=f"Give 1 to {_DEEPEST} layers.")
        return _derive(depth, None, vocabulary_size, row_tokens, given)
    settled = given.get("model.layers")
    least, best = _derive(settled or 1, None, vocabulary_size, row_tokens, given), None
    for candidate in [settled] if settled else range(1, _DEEPEST + 1):
        if _derive(candidate, None, vocabulary_size, row_tokens, given).flops > flops:
            break
        best = candidate
    if best is None:
        raise GaleError(
            f"{flops:.3g} FLOPs are too few for a model of {least.values['model.layers']} layer(s) and "
            f"{vocabulary_size:,} tokens of vocabulary.",
            hint=f"Give {least.flops:.2g} or more, or a smaller vocabulary.",
        )
    return _derive(best, flops, vocabulary_size, row_tokens, given)


def _derive(depth: int, flops: float | None, vocabulary: int, row_tokens: int, given: Mapping[str, Any]) -> Dial:
    values: dict[str, Any] = {}
    reasons: dict[str, str] = {}

    def settle(key: str, value: Value, reason: str) -> Value:
        if key in given:
            value, reason = given[key], "as given"
        values[key], reasons[key] = value, reason
        return value

    by = f"the deepest that {flops:.3g} FLOPs train on 20 tokens a parameter" if flops else "the dial"
    layers = settle("model.layers", depth, by)
    ideal = _WIDTH_PER_LAYER * layers
    head_dim = settle("model.head_dim", 64 if ideal < 1024 else 128, "64, and 128 from 1,024 wide (nanochat, Qwen3)")
    hidden = settle(
        "model.hidden_size",
        head_dim * math.ceil(ideal / head_dim),
        f"{_WIDTH_PER_LAYER} a layer, in whole heads (nanochat)",
    )
    heads = settle("model.heads", max(1, hidden // head_dim), "width over head_dim")
    settle(
        "model.kv_heads",
        heads // 2 if heads % 2 == 0 else heads,
        "half the heads where they are even: half the KV cache (Ainslie et al. 2023)",
    )
    intermediate = settle(
        "model.intermediate_size",
        64 * max(1, round(8 * hidden / 3 / 64)),
        "8/3 of the width in steps of 64: SwiGLU with the parameters of the classic 4 (Shazeer 2020)",
    )
    row_tokens = settle("row_tokens", row_tokens, "what the built-in model was trained on")
    settle("model.context_length", row_tokens, "the longest row that is trained")
    config = ModelConfig(
        family="qwen3",
        vocabulary_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        layers=layers,
        heads=heads,
        kv_heads=values["model.kv_heads"],
        head_dim=head_dim,
        context_length=values["model.context_length"],
    )
    parameters = config.body_parameters + vocabulary * hidden
    per_token = config.flops_per_token(row_tokens)
    horizon = CHINCHILLA_TOKENS_PER_PARAMETER * parameters
    if flops:
        horizon = flops / per_token
        why = f"what {flops:.3g} FLOPs pay, {horizon / parameters:.0f} a parameter (20: Hoffmann et al. 2022)"
    else:
        why = f"20 for each of {parameters:,} parameters (Hoffmann et al. 2022)"
    wanted = optimal_batch_tokens(per_token * horizon)
    micro_rows, rows = _rows(wanted, row_tokens, horizon, given)
    batch_rows = settle(
        "batch_rows", rows, f"{wanted:,.0f} tokens a step: 0.292 x FLOPs^0.3271 (DeepSeek-AI 2024, from 1e17 up)"
    )
    settle("micro_rows", micro_rows, f"at most {_MICRO_TOKENS:,} tokens at once, to stay small in memory")
    step_tokens = batch_rows * row_tokens
    steps = settle("steps", max(1, round(horizon / step_tokens)), f"{horizon:,.0f} tokens: {why}")
    rate = _RATE * (hidden / _RATE_WIDTH) ** _RATE_EXPONENT
    settle(
        "optimiser.learning_rate",
        float(f"{rate:.2g}"),
        f"{_RATE:g} x (width / {_RATE_WIDTH})^{_RATE_EXPONENT:g}, through the smoke and the built-in recipe; "
        "for Muon too, whose updates have AdamW's size (Liu et al. 2025)",
    )
    settle(
        "optimiser.warmup_steps",
        min(2000, max(1, round(0.03 * steps)), steps - 1),
        "3% of the steps, at most 2,000",
    )
    settle("optimiser.decay_share", 0.4, "as the built-in model; long decays serve short runs (Hägele et al. 2024)")
    tokens = steps * step_tokens
    return Dial(values, reasons, parameters, tokens, per_token * tokens)


def _rows(wanted: float, row_tokens: int, horizon: float, given: Mapping[str, Any]) -> tuple[int, int]:
    """Rows at once and rows of a step: a power of two near the wanted tokens, and no fewer than ten steps."""
    most = max(1, min(wanted, horizon / 10) / row_tokens)
    rows = int(2 ** max(0, round(math.log2(most))))
    if "batch_rows" in given:
        rows = int(given["batch_rows"])
    if "micro_rows" in given:
        micro = int(given["micro_rows"])
        return micro, micro * max(1, round(rows / micro))
    limit = max(1, min(rows, _MICRO_TOKENS // row_tokens))
    return next(size for size in range(limit, 0, -1) if rows % size == 0), rows


def dial_recipe(content: dict[str, Any], data: Path, *, depth: int | None, flops: float | None, prepare: bool) -> Dial:
    """Turn the dial over the ``content`` of a recipe and complete it with what it does not say.

    The vocabulary is that of ``data``, which is prepared for it where need be and ``prepare`` allows; else
    :class:`GaleError` is raised where it cannot be told.
    """
    if isinstance(model := content.get("model"), dict) and model.get("experts"):
        raise GaleError(
            "The dial derives dense models only, and this recipe has experts.",
            hint="Write the recipe out, or train a dense model by the dial and grow it: `gale train grow`.",
        )
    vocabulary = vocabulary_of(data)
    if vocabulary is None and prepare:
        vocabulary = int(read_manifest(ready_data(data))["vocabulary_size"])
    if vocabulary is None:
        raise GaleError(f"The vocabulary of {data} is not known yet.", hint="Run `gale data prepare` on it first.")
    given = _settled(content)
    row_tokens = given.get("row_tokens", ROW_TOKENS)
    dial = turn_dial(depth=depth, flops=flops, vocabulary_size=vocabulary, row_tokens=row_tokens, given=given)
    dial.complete(content)
    return dial


def _settled(content: dict[str, Any]) -> dict[str, Any]:
    """What a recipe says, by dotted key. What makes no sense is left for the recipe's own check to name."""
    flat = {
        f"{table}{key}": value
        for table, values in (("", content), ("model.", content.get("model")), ("optimiser.", content.get("optimiser")))
        if isinstance(values, dict)
        for key, value in values.items()
    }
    return {
        key: value
        for key, value in flat.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and value > 0
        if isinstance(value, int) or key.startswith("optimiser.")
    }
