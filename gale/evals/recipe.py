"""What ``gale eval`` measures."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from gale.core.recipe import Recipe
from gale.data.recipe import Source
from gale.data.verifiers import VERIFIERS, VerifierOptions

DEFAULT_RECIPE = Path(__file__).parent / "held_out" / "default.toml"


class TaskFile(Recipe):
    """What every task has: a local file of rows. Templates name a row's keys: ``{question}``, ``{options[0]}``."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$", description="The task's row in the report.")
    path: Path = Field(description="JSON lines or Parquet, plain or packed; never a file that was trained on.")
    licence: str = Field(min_length=1)
    origin: str = Field(min_length=1, description="Where the rows come from.")
    only: tuple[str, ...] = Field(default=(), description='Take only rows whose "source" is one of these.')
    limit: int | None = Field(default=None, ge=1, description="Take this many rows, evenly spread over the file.")


class WithShots(TaskFile):
    """A task whose prompt may begin with solved examples."""

    prompt: str = Field(min_length=1, description="Template of what the model reads.")
    chat: bool = Field(default=False, description="Ask as a user's message instead of as plain text to be continued.")
    shots: int = Field(default=0, ge=0, le=64, description="Solved examples before each question.")
    shots_path: Path | None = Field(default=None, description="The examples are this file's first rows.")

    @model_validator(mode="after")
    def _shots_have_a_file(self) -> WithShots:
        if (self.shots > 0) != (self.shots_path is not None):
            raise ValueError("shots and shots_path belong together")
        if self.shots_path == self.path:
            raise ValueError("shots_path must be another file than path, or answers would be given away")
        return self


class PairsTask(TaskFile):
    """Minimal pairs (Warstadt et al. 2020): the good sentence should be likelier than the bad one."""

    kind: Literal["pairs"]
    good: str = "good"
    bad: str = "bad"
    group: str | None = Field(default=None, description="A key whose values get shares of their own.")
    delimiter: str = Field(default=" ", description="Stands before each sentence, as lm-evaluation-harness has it.")


class ChoicesTask(WithShots):
    """Multiple choice: the choice that is likeliest after the prompt is the answer."""

    kind: Literal["choices"]
    choices: str = Field(default="choices", description="The key of the list of choices.")
    answer: str = Field(default="answer", description="The key of the right one: its place from 0, or its letter.")
    strip: str | None = Field(default=None, description="A regular expression to take off each choice's beginning.")
    delimiter: str = Field(default=" ", description="Stands between prompt and choice; not in a chat.")
    group: str | None = Field(default=None, description="A key whose values get shares of their own.")

    @field_validator("strip")
    @classmethod
    def _strip_compiles(cls, strip: str | None) -> str | None:
        if strip is not None:
            try:
                re.compile(strip)
            except re.error as error:
                raise ValueError(f"{strip!r} is no regular expression: {error}") from error
        return strip


class GenerateTask(WithShots):
    """Answers written greedily and judged by a verifier of :mod:`gale.data.verifiers`."""

    kind: Literal["generate"]
    chat: bool = Field(default=True, description="Ask as a user's message instead of as plain text to be continued.")
    expected: str = Field(default="{answer}", description="Template of what the verifier compares with.")
    verifier: str
    options: VerifierOptions = VerifierOptions()
    max_tokens: int = Field(default=128, ge=1)
    stop: tuple[str, ...] = Field(default=(), description="Texts that end an answer.")

    @field_validator("verifier")
    @classmethod
    def _verifier_exists(cls, verifier: str) -> str:
        if verifier not in VERIFIERS:
            raise ValueError(f"there is no verifier {verifier!r}; there are {', '.join(sorted(VERIFIERS))}")
        return verifier


class ClassifyTask(WithShots):
    """Labels: the likeliest label text after the prompt, the first one that the answer names, or a classifier's.

    Of a classifier the prompt is the text to judge, and the texts of ``labels`` are its labels; one that is not is what
    a text is that is given none of them.
    """

    kind: Literal["classify"]
    label: str = Field(default="label", description="The key of the right label.")
    labels: dict[str, str] = Field(min_length=2, description="Each value of the key, as text, and its label's text.")
    by: Literal["likelihood", "generation", "classifier"] = "likelihood"
    delimiter: str = Field(default=" ", description="Stands between prompt and label; not in a chat.")
    max_tokens: int = Field(default=16, ge=1, description="Of a generated label.")

    @property
    def texts(self) -> list[str]:
        """The labels' texts, each once."""
        return list(dict.fromkeys(self.labels.values()))

    @model_validator(mode="after")
    def _labels_differ(self) -> ClassifyTask:
        if self.by == "classifier":
            if self.shots or self.chat:
                raise ValueError("a classifier reads the text alone: leave out shots and chat")
        elif len(self.texts) < len(self.labels):
            raise ValueError("labels: two of them have the same text")
        if len(self.texts) < 2:
            raise ValueError("labels: all of them have the same text")
        return self


def _kind(value: Any) -> str | None:
    kind = value.get("kind") if isinstance(value, dict) else getattr(value, "kind", None)
    return kind if isinstance(kind, str) else None


Task = Annotated[
    Annotated[PairsTask, Tag("pairs")]
    | Annotated[ChoicesTask, Tag("choices")]
    | Annotated[GenerateTask, Tag("generate")]
    | Annotated[ClassifyTask, Tag("classify")],
    Discriminator(
        _kind,
        custom_error_type="task_kind",
        custom_error_message="kind must be pairs, choices, generate or classify",
    ),
]


class EvalRecipe(Recipe):
    """Held-out sources, whose ``split`` names the row of the report, tasks, and prompts to answer.

    Sources of the format qa are answered and scored; all others are read and scored in bits per byte.
    """

    sources: tuple[Source, ...] = ()
    tasks: tuple[Task, ...] = ()
    prompts: tuple[str, ...] = Field(default=(), description="Answered greedily and printed, good or bad.")
    max_bytes_per_source: int = Field(default=1_000_000, ge=1, description="Running text read of each source.")
    max_questions_per_source: int = Field(default=100, ge=1)
    max_answer_tokens: int = Field(default=96, ge=1)
    window_tokens: int = Field(default=512, ge=16, description="Longest context given when scoring running text.")
    seed: int = 0

    @model_validator(mode="after")
    def _something_to_measure(self) -> EvalRecipe:
        names = [*(source.split for source in self.sources), *(task.name for task in self.tasks)]
        if not names:
            raise ValueError("there is nothing to measure: give sources or tasks")
        if doubled := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two rows of the report would be called {doubled[0]!r}")
        return self
