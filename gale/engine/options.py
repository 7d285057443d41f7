"""How much an engine does at once, and what it does to be faster."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """``max_running`` requests are answered at once, and ``max_unfinished`` answered or waiting; more are refused.

    ``max_cached_tokens`` bounds the keys and values of all; None measures what fits into half of the free memory.
    ``prefill_chunk`` is the most that one step reads of prompts. ``prefix_cache`` keeps what was read in that memory
    for prompts that begin alike. ``ngram_drafts`` guess from what a text has said before how it goes on; a draft model
    takes their place.
    """

    max_running: int = 64
    max_unfinished: int = 256
    max_cached_tokens: int | None = None
    prefill_chunk: int = 256
    prefix_cache: bool = True
    ngram_drafts: bool = True
