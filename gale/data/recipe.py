"""The recipes of data preparation and tokenizer training."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from gale.core.recipe import Recipe


class QuestionTemplates(Recipe):
    """How rows of a question-answering set become conversations.

    Each row becomes a question on its passage (share ``grounded``), the same question on another row's passage
    that does not contain the answer (``unanswerable``), or the question alone (``closed_book``), so that a model
    learns both to read and to say when there is nothing to read.
    """

    prompts: tuple[str, ...] = Field(min_length=1, description="Texts with {context} and {question}.")
    unanswerable_reply: str
    closed_book_reply: str
    grounded: float = Field(default=0.7, ge=0, le=1)
    unanswerable: float = Field(default=0.15, ge=0, le=1)
    closed_book: float = Field(default=0.15, ge=0, le=1)
    context_characters: tuple[int, int] = Field(
        default=(100, 400), description="Passages are cut, at sentence ends, to a length drawn between these two."
    )
    variants: int = Field(
        default=1,
        ge=1,
        le=100,
        description="Conversations drawn from each row, each with a kind and prompt of its own.",
    )
    spans_only: bool = Field(default=False, description="Leave out rows whose answer does not stand in the passage.")

    @model_validator(mode="after")
    def _shares_sum_to_one(self) -> QuestionTemplates:
        if abs(self.grounded + self.unanswerable + self.closed_book - 1) > 1e-6:
            raise ValueError("grounded, unanswerable and closed_book must sum to 1")
        for prompt in self.prompts:
            if "{context}" not in prompt or "{question}" not in prompt:
                raise ValueError(f"the prompt {prompt!r} must hold {{context}} and {{question}}")
            try:
                prompt.format(context="", question="")
            except (KeyError, IndexError, ValueError, AttributeError) as error:
                raise ValueError(f"the prompt {prompt!r} must hold no other braces") from error
        if self.context_characters[0] > self.context_characters[1]:
            raise ValueError("context_characters must be a smaller and a larger number")
        return self


class Source(Recipe):
    """One file of documents."""

    path: Path = Field(description="JSON lines, plain or packed as .gz or .zst.")
    licence: str = Field(min_length=1, description="Goes into the manifest and the model card.")
    origin: str = Field(min_length=1, description="Where the text comes from; goes into the manifest.")
    format: Literal["text", "chat", "parallel", "qa", "preference"] = Field(
        default="text",
        description="text: {text}; chat: {messages}; parallel: {en, zh}; qa: {context, question, answers}; "
        "preference: {prompt, chosen, rejected}.",
    )
    split: str = Field(
        default="train", pattern=r"^[a-z][a-z0-9_]*$", description="train, or the name of a held-out split."
    )
    epochs: float = Field(
        default=1.0, gt=0, le=100, description="0.5 takes half of the documents, 3 takes each thrice."
    )
    only: tuple[str, ...] = Field(default=(), description='Keep only rows whose "source" is one of these.')
    questions: QuestionTemplates | None = Field(default=None, description="Required for the format qa.")

    @model_validator(mode="after")
    def _questions_for_qa(self) -> Source:
        if (self.format == "qa") != (self.questions is not None):
            raise ValueError("the table `questions` belongs to the format qa, which needs it")
        return self


class DataRecipe(Recipe):
    """``gale data prepare``: sources to packed token shards."""

    tokenizer: Path = Field(description="Folder with tokenizer.json, or a tokenizer recipe (.toml) to make one from.")
    seed: int = 0
    replace: dict[str, str] = Field(default={}, description="Placeholders in the data and what stands for them.")
    shard_tokens: int = Field(default=2**26, ge=1024, description="Most tokens in one shard file.")
    sources: tuple[Source, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _pairs_apart(self) -> DataRecipe:
        for split in {source.split for source in self.sources}:
            if len({source.format == "preference" for source in self.sources if source.split == split}) > 1:
                raise ValueError(f"the split {split!r} mixes sources of the format preference with others")
        return self


class TokenizerRecipe(Recipe):
    """``gale train tokenizer``."""

    vocabulary_size: int = Field(ge=300, le=1_000_000)
    max_bytes_per_source: int = Field(default=20_000_000, ge=1000, description="Read at most this much of each source.")
    seed: int = 0
    replace: dict[str, str] = Field(default={}, description="As in data preparation.")
    sources: tuple[Source, ...] = Field(min_length=1)
