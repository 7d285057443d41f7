"""What ``gale eval`` measures."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from gale.core.recipe import Recipe
from gale.data.recipe import Source

DEFAULT_RECIPE = Path(__file__).parent / "held_out" / "default.toml"


class EvalRecipe(Recipe):
    """Held-out sources, whose ``split`` names the row of the report, and prompts to answer.

    Sources of the format qa are answered and scored; all others are read and scored in bits per byte.
    """

    sources: tuple[Source, ...] = Field(min_length=1)
    prompts: tuple[str, ...] = Field(default=(), description="Answered greedily and printed, good or bad.")
    max_bytes_per_source: int = Field(default=1_000_000, ge=1, description="Running text read of each source.")
    max_questions_per_source: int = Field(default=100, ge=1)
    max_answer_tokens: int = Field(default=96, ge=1)
    window_tokens: int = Field(default=512, ge=16, description="Longest context given when scoring running text.")
    seed: int = 0
