"""The samples that a run shows: greedy answers to the recipe's prompts, by the engine, over the model being trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from gale.core.errors import DataError
from gale.engine.rollouts import continue_texts, prompt_tokens
from gale.model.transformer import Decoder
from gale.text.tokenizer import Tokenizer
from gale.train.recipe import StageRecipe

Samples = Callable[[Decoder, Sequence[str], int], list[dict[str, str]]]


def decoder_samples(recipe: StageRecipe, tokenizer: Tokenizer, context_length: int, *, chat: bool) -> Samples:
    """What a stage that trains a decoder gives as :attr:`gale.train.stage.Stage.samples`.

    With ``chat`` prompts are a person's turns, else the beginnings of documents. Raises :class:`DataError` at once, not
    in the middle of a run, where a prompt with its answer would not fit.
    """
    for prompt, ids in zip(
        recipe.sample_prompts, prompt_tokens(tokenizer, recipe.sample_prompts, chat=chat), strict=True
    ):
        if len(ids) + recipe.sample_tokens > context_length:
            raise DataError(
                f"The sample prompt {prompt[:40]!r} has {len(ids)} tokens; with sample_tokens ({recipe.sample_tokens}) "
                f"that exceeds the model's context of {context_length}."
            )
    return lambda model, prompts, tokens: continue_texts(model, tokenizer, prompts, tokens, chat=chat)
