"""The cleaning tables of a data recipe. Each is optional, and a step whose table is missing does not run."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from gale.core.recipe import Recipe
from gale.data.source_files import FileKind

Step = Literal["languages", "quality", "personal_data", "near_duplicates", "decontamination"]
QualityRule = Literal[
    "too_short",
    "too_long",
    "few_sentences",
    "lorem_ipsum",
    "curly_brackets",
    "word_length",
    "symbols",
    "bullet_lines",
    "ellipsis_lines",
    "few_letters",
    "stop_words",
    "unpunctuated_lines",
    "short_lines",
    "repeated_lines",
    "repeated_paragraphs",
    "top_ngrams",
    "repeated_ngrams",
]


class Languages(Recipe):
    """Keep documents in these languages. py3langid (Lui and Baldwin 2012) reads the first 1,000 characters."""

    keep: tuple[str, ...] = Field(
        min_length=1, description='ISO 639 codes such as "en"; "zh" takes in Wu and Cantonese, "zxx" is program text.'
    )
    min_confidence: float = Field(
        default=0.3, ge=0, le=1, description="Less sure than this is dropped; short or mixed text is never very sure."
    )


class Quality(Recipe):
    """Drop running text that does not read like prose.

    The rules are those of Gopher (Rae et al. 2021, table A1), C4 (Raffel et al. 2020) and FineWeb (Penedo et al.
    2024). In scripts without spaces between words (Chinese, Japanese, Thai) characters are counted in place of words,
    and what is about words' own form (``word_length``, ``stop_words``) does not apply.
    """

    skip: tuple[QualityRule, ...] = Field(default=(), description="Rules to leave out.")
    min_words: int = Field(default=20, ge=0, description="too_short; Gopher has 50.")
    max_words: int = Field(default=100_000, ge=1, description="too_long; Gopher.")
    min_characters: int = Field(default=30, ge=0, description="too_short, for scripts without spaces.")
    max_characters: int = Field(default=200_000, ge=1, description="too_long, for scripts without spaces.")
    min_sentences: int = Field(default=1, ge=0, description="few_sentences; C4 has 3.")
    min_word_length: float = Field(default=3.0, ge=0, description="word_length: mean letters in a word; Gopher.")
    max_word_length: float = Field(default=10.0, ge=0, description="word_length; Gopher.")
    max_symbols: float = Field(default=0.1, ge=0, description="symbols: hash signs and ellipses per word; Gopher.")
    max_bullet_lines: float = Field(default=0.9, ge=0, le=1, description="bullet_lines: share of lines; Gopher.")
    max_ellipsis_lines: float = Field(default=0.3, ge=0, le=1, description="ellipsis_lines: share of lines; Gopher.")
    min_letters: float = Field(
        default=0.6, ge=0, le=1, description="few_letters: share of letters among the visible characters, after Gopher."
    )
    min_stop_words: int = Field(
        default=2, ge=0, le=8, description="stop_words: how many of eight common English words; English only; Gopher."
    )
    min_punctuated_lines: float = Field(
        default=0.12, ge=0, le=1, description="unpunctuated_lines: share of lines that end a sentence; FineWeb."
    )
    max_short_lines: float = Field(
        default=0.67,
        ge=0,
        le=1,
        description="short_lines: share of lines that are short and end nothing; after FineWeb.",
    )
    short_line: int = Field(
        default=30, ge=1, description="A line of fewer characters is short (a third of it in scripts without spaces)."
    )
    max_repeated_lines: float = Field(default=0.3, ge=0, le=1, description="repeated_lines: share of lines; Gopher.")
    max_repeated_line_characters: float = Field(
        default=0.2, ge=0, le=1, description="repeated_lines: share of characters; Gopher (FineWeb has 0.1)."
    )
    max_repeated_paragraphs: float = Field(
        default=0.3, ge=0, le=1, description="repeated_paragraphs: share of paragraphs; Gopher."
    )
    max_repeated_paragraph_characters: float = Field(
        default=0.2, ge=0, le=1, description="repeated_paragraphs: share of characters; Gopher."
    )
    max_top_ngrams: tuple[float, ...] = Field(
        default=(0.20, 0.18, 0.16),
        max_length=8,
        description="top_ngrams: most characters in the commonest 2-, 3-, 4-gram (twice that long in characters).",
    )
    max_repeated_ngrams: tuple[float, ...] = Field(
        default=(0.40, 0.38, 0.36, 0.34, 0.32, 0.30),
        max_length=16,
        description="repeated_ngrams: most characters in 5-, 6-, ... 10-grams that came before (likewise). Gopher has "
        "0.15 to 0.10, which drops a tenth of good textbooks and most statutes.",
    )
    drop_notice_lines: bool = Field(
        default=True, description="Cut lines that ask for JavaScript or speak of cookies and terms of use, as C4 does."
    )
    lorem_ipsum: bool = Field(default=True, description="lorem_ipsum: drop documents with printers' filler; C4.")
    curly_brackets: bool = Field(default=False, description="curly_brackets: drop documents with {, as C4 does.")

    @model_validator(mode="after")
    def _something_can_pass(self) -> Quality:
        for what in ("words", "characters", "word_length"):
            least, most = getattr(self, f"min_{what}"), getattr(self, f"max_{what}")
            if least > most:
                raise ValueError(f"min_{what} is {least}, more than max_{what}, {most}, so that nothing passes")
        return self


class PersonalData(Recipe):
    """Put a placeholder such as ``<email>`` in place of what can be recognised with precision."""

    email: bool = True
    phone: bool = Field(default=True, description="International, North American and Chinese numbers.")
    id_number: bool = Field(default=True, description="Chinese resident identity numbers whose check digit is right.")
    bank_card: bool = Field(default=True, description="Card numbers of known issuers whose check digit is right.")
    passport: bool = Field(default=True, description="Numbers that the text itself calls a passport's.")
    secret: bool = Field(default=True, description="API keys and private keys of known forms.")
    ip: bool = Field(default=False, description="Public IPv4 and IPv6 addresses; version numbers can look like them.")


class NearDuplicates(Recipe):
    """Of documents that share most of their n-grams keep the first: MinHash (Broder 1997) with banding.

    Held-out splits come first. Conversations drawn from questions (format qa) share their passages on purpose and are
    left alone. Documents that share bands with 1,000 others without being like them are not remembered.
    """

    threshold: float = Field(default=0.8, gt=0, le=1, description="Jaccard similarity from which two are the same.")
    words: int = Field(default=5, ge=1, le=50, description="Words in an n-gram.")
    characters: int = Field(default=8, ge=1, le=100, description="Characters in one, in scripts without spaces.")
    permutations: Literal[64, 128, 256, 512] = Field(default=128, description="More are more exact and cost more.")


class EvaluationFiles(Recipe):
    """Files whose texts must not be trained on."""

    path: Path = Field(description="A file, a folder, or a pattern such as evals/*.jsonl.")
    kind: FileKind | None = Field(default=None, description="How to read the files; by default their suffix decides.")
    keys: tuple[str, ...] = Field(default=(), description="Which keys of a row to look at; all of them by default.")


class Decontamination(Recipe):
    """Drop training documents that share an n-gram with an evaluation file, after GPT-3 (Brown et al. 2020)."""

    words: int = Field(default=13, ge=2, le=100, description="Words in an n-gram.")
    characters: int = Field(default=20, ge=2, le=200, description="Characters in one, in scripts without spaces.")
    against: tuple[EvaluationFiles, ...] = Field(min_length=1)
