"""The recipes of data preparation and tokenizer training."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from gale.core.recipe import Recipe
from gale.data.cleaning_recipe import Decontamination, Languages, NearDuplicates, PersonalData, Quality, Step
from gale.data.source_files import FileKind

# What a row of each format is made of, in Gale's own names.
FORMAT_KEYS: dict[str, tuple[str, ...]] = {
    "text": ("text",),
    "chat": ("messages", "role", "content"),
    "parallel": ("en", "zh"),
    "qa": ("context", "question", "answers"),
    "instruction": ("instruction", "input", "output"),
    "preference": ("prompt", "chosen", "rejected", "role", "content"),
}


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
    """One file, folder or pattern of files with documents."""

    path: Path = Field(
        description="A file, a folder, or a pattern such as books/*.txt: JSON lines, Parquet, text, Markdown or HTML, "
        "plain or packed as .gz or .zst (Parquet packs itself)."
    )
    licence: str = Field(min_length=1, description="Goes into the manifest and the model card.")
    origin: str = Field(min_length=1, description="Where the text comes from; goes into the manifest.")
    kind: FileKind | None = Field(default=None, description="How to read the files; by default their suffix decides.")
    encoding: str = Field(default="utf-8", description="Of text and Markdown files; gb18030 for older Chinese ones.")
    format: Literal["text", "chat", "parallel", "qa", "instruction", "preference"] = Field(
        default="text",
        description="text: {text}; chat: {messages}; parallel: {en, zh}; qa: {context, question, answers}; "
        "instruction: {instruction, input, output}; preference: {prompt, chosen, rejected}.",
    )
    text_key: str = Field(default="text", min_length=1, description="Where the format text finds its text.")
    fields: dict[str, str] = Field(
        default={},
        description='Where the other formats find theirs, such as {messages = "conversations", role = "from", '
        'content = "value"}; a dot leads into a nested table.',
    )
    max_broken_lines: int = Field(default=0, ge=0, description="Skip and count this many rows that cannot be read.")
    split: str = Field(
        default="train", pattern=r"^[a-z][a-z0-9_]*$", description="train, or the name of a held-out split."
    )
    epochs: float = Field(
        default=1.0, gt=0, le=100, description="0.5 takes half of the documents, 3 takes each thrice."
    )
    weight: float | None = Field(
        default=None,
        gt=0,
        description="In place of epochs: the share of the training tokens, against the other sources' weights.",
    )
    max_epochs: float = Field(default=1.0, gt=0, le=100, description="With weight: repeat documents at most so often.")
    only: tuple[str, ...] = Field(default=(), description='Keep only rows whose "source" is one of these.')
    skip: tuple[Step, ...] = Field(default=(), description="Cleaning steps that this source does not go through.")
    questions: QuestionTemplates | None = Field(default=None, description="Required for the format qa.")

    @model_validator(mode="after")
    def _keys_that_belong_together(self) -> Source:
        if (self.format == "qa") != (self.questions is not None):
            raise ValueError("the table `questions` belongs to the format qa, which needs it")
        names = FORMAT_KEYS[self.format]
        if wrong := sorted(self.fields.keys() - {*names, "source"}):
            keys = ", ".join((*names, "source"))
            raise ValueError(f"fields: the format {self.format} has no {wrong[0]!r}, only {keys}")
        if self.text_key != "text" and self.format != "text":
            raise ValueError(f"text_key belongs to the format text; the format {self.format} has `fields`")
        if self.kind in ("text", "markdown", "html") and self.format != "text":
            raise ValueError(f"files of the kind {self.kind} hold running text, not the format {self.format}")
        if self.weight is None and "max_epochs" in self.model_fields_set:
            raise ValueError("max_epochs belongs to weight; with epochs alone documents are taken as often as it says")
        if self.weight is not None and self.format == "preference":
            raise ValueError("preferences have epochs, not a weight: they are pairs, not a share of a text")
        if self.weight is not None and ("epochs" in self.model_fields_set or self.split != "train"):
            raise ValueError("weight stands in place of epochs, and only where split is train")
        try:
            io.TextIOWrapper(io.BytesIO(), encoding=self.encoding)  # refuses codecs that are not of text, as rot13
        except LookupError as error:
            raise ValueError(f"encoding: {error}") from error
        return self


class DataRecipe(Recipe):
    """``gale data prepare``: sources to packed token shards."""

    tokenizer: Path = Field(description="Folder with tokenizer.json, or a tokenizer recipe (.toml) to make one from.")
    seed: int = 0
    replace: dict[str, str] = Field(default={}, description="Placeholders in the data and what stands for them.")
    shard_tokens: int = Field(default=2**26, ge=1024, description="Most tokens in one shard file.")
    workers: int = Field(
        default=0,
        ge=0,
        le=1024,
        description="Processes that clean and tokenise; 0 is one per core, or none where there is little to do. "
        "The result is the same with any number.",
    )
    personal_data: PersonalData | None = None
    languages: Languages | None = None
    quality: Quality | None = None
    decontamination: Decontamination | None = None
    near_duplicates: NearDuplicates | None = None
    sources: tuple[Source, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _pairs_apart(self) -> DataRecipe:
        for split in {source.split for source in self.sources}:
            if len({source.format == "preference" for source in self.sources if source.split == split}) > 1:
                raise ValueError(f"the split {split!r} mixes sources of the format preference with others")
        return self

    @model_validator(mode="after")
    def _weights_for_all_or_none(self) -> DataRecipe:
        weighted = [source.weight is not None for source in self.sources if source.split == "train"]
        if any(weighted) and not all(weighted):
            raise ValueError("either every training source has a weight or none has")
        return self


class TokenizerRecipe(Recipe):
    """``gale train tokenizer``."""

    vocabulary_size: int = Field(ge=300, le=1_000_000)
    max_bytes_per_source: int = Field(default=20_000_000, ge=1000, description="Read at most this much of each source.")
    seed: int = 0
    replace: dict[str, str] = Field(default={}, description="As in data preparation.")
    sources: tuple[Source, ...] = Field(min_length=1)
