"""The file of principles: what answers are judged by, and the words in which the model is asked."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from gale.core.recipe import Recipe

_PLACEHOLDERS = {
    "critique": ("prompt", "answer", "principle"),
    "revision": ("prompt", "answer", "principle", "critique"),
    "comparison": ("prompt", "principle", "a", "b"),
}


class Principle(Recipe):
    """One principle, in the language in which the model is asked about it."""

    name: str = Field(min_length=1, description="Goes into the rows, so that one can see what became of it.")
    language: str = Field(default="en", min_length=1, description="Which of the `prompts` asks about it.")
    text: str = Field(min_length=1, description="The principle itself, as the model reads it.")


class Questions(Recipe):
    """How a model is asked in one language; {prompt}, {answer}, {principle} and so on stand for what they name."""

    critique: str = Field(description="Needs {prompt}, {answer} and {principle}.")
    revision: str = Field(description="Needs {prompt}, {answer}, {principle} and {critique}.")
    comparison: str = Field(description="Needs {prompt}, {principle}, {a} and {b}; is answered with A or B.")

    @field_validator("*")
    @classmethod
    def _whole(cls, text: str, info: ValidationInfo) -> str:
        wanted = _PLACEHOLDERS[str(info.field_name)]
        if missing := [key for key in wanted if f"{{{key}}}" not in text]:
            raise ValueError(f"must hold {{{missing[0]}}}")
        try:
            text.format(**dict.fromkeys(wanted, ""))
        except (KeyError, IndexError, ValueError, AttributeError) as error:
            raise ValueError(f"must hold no braces but {', '.join(wanted)}") from error
        return text


class Constitution(Recipe):
    """``gale data constitution``: principles that turn a model's own judgement into preferences (Bai et al. 2022).

    ``revise``: the answer is criticised and revised under each principle, and the revision is preferred to it.
    ``compare``: two answers are compared under each principle by how likely the model calls A or B the better one,
    in both orders, and the likelier one is preferred.
    """

    method: Literal["revise", "compare"] = "revise"
    answers: int = Field(default=1, ge=1, le=16, description="Answers to each prompt; compare needs 2, 4, ...")
    principles_per_prompt: int = Field(default=0, ge=0, description="So many, drawn for each prompt; 0: all of them.")
    temperature: float = Field(default=1.0, ge=0, le=2, description="Of answers; critiques and revisions are greedy.")
    max_tokens: int = Field(default=256, ge=1, description="Longest answer, critique and revision.")
    least_lead: float = Field(
        default=0.0, ge=0, lt=1, description="compare: drop pairs whose probability of being better is nearer to 1/2."
    )
    prompts: dict[str, Questions] = Field(min_length=1, description="The model's questions by language.")
    principles: tuple[Principle, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _consistent(self) -> Constitution:
        if unknown := {p.language for p in self.principles} - self.prompts.keys():
            raise ValueError(f"no prompts in the language {min(unknown)!r}, which a principle is written in")
        names = [principle.name for principle in self.principles]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two principles are called {twice[0]!r}")
        if self.method == "compare" and self.answers < 2:
            raise ValueError("the method compare needs at least 2 answers")
        if self.method == "compare" and self.answers % 2:
            raise ValueError(f"the method compare pairs its answers, and of {self.answers} one would be left over")
        return self
