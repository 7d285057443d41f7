"""OpenAI's graders as the verifiers they are here: programs that say how right an answer is.

``string_check`` and ``text_similarity`` by ROUGE are such programs; ``verifier`` is Gale's own kind, which names one of
:mod:`gale.data.verifiers`. Graders that ask a model or run code are not.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from gale.core.errors import GaleError
from gale.data.verifiers import VERIFIERS, VerifierOptions

_CHECKS: dict[str, tuple[str, bool]] = {
    "eq": ("equal", False),
    "ne": ("unequal", False),
    "like": ("includes", False),
    "ilike": ("includes", True),
}
_METRICS = ("rouge_1", "rouge_2", "rouge_3", "rouge_4", "rouge_5", "rouge_l")
_PLACEHOLDER = re.compile(r"\{\{\s*([^{}]*?)\s*\}\}")
_ANSWER = "sample.output_text"


class GraderError(GaleError):
    """A grader that cannot be used; ``param`` is the path of what is at fault within it."""

    def __init__(self, param: str, reason: str) -> None:
        super().__init__(reason)
        self.param = param


@dataclass(frozen=True, slots=True)
class Grader:
    """A verifier, its options, and the template of what it expects of each row (``{{item.answer}}``)."""

    verifier: str
    options: VerifierOptions
    reference: str

    @classmethod
    def read(cls, content: dict[str, Any]) -> Grader:
        """A grader as the API has it. Raises :class:`GraderError`."""
        kind = content.get("type")
        match kind:
            case "string_check":
                _refuse_unknown(content, {"type", "name", "input", "operation", "reference"})
                if content.get("operation") not in _CHECKS:
                    raise GraderError("operation", f"it must be one of {', '.join(_CHECKS)}")
                verifier, ignore_case = _CHECKS[content["operation"]]
                options = VerifierOptions(ignore_case=ignore_case)
            case "text_similarity":
                _refuse_unknown(content, {"type", "name", "input", "evaluation_metric", "reference"})
                verifier, options = str(content.get("evaluation_metric")), VerifierOptions()
                if verifier not in _METRICS:
                    raise GraderError("evaluation_metric", f"Gale measures {', '.join(_METRICS)}, not {verifier!r}")
            case "verifier":
                _refuse_unknown(content, {"type", "name", "input", "verifier", "options", "reference"})
                verifier = str(content.get("verifier"))
                if verifier not in VERIFIERS:
                    raise GraderError("verifier", f"there is none {verifier!r}, only {', '.join(sorted(VERIFIERS))}")
                try:
                    options = VerifierOptions.model_validate(content.get("options") or {})
                except ValidationError as error:
                    raise GraderError("options", str(error.errors()[0]["msg"])) from error
            case _:
                known = "string_check, text_similarity and verifier"
                raise GraderError("type", f"graders of the type {kind!r} are not supported, only {known}")
        answer = content.get("input", "{{" + _ANSWER + "}}")
        found = _PLACEHOLDER.fullmatch(answer) if isinstance(answer, str) else None
        if found is None or found[1] != _ANSWER:
            raise GraderError("input", "it must be {{" + _ANSWER + "}}, the whole answer")
        reference = content.get("reference")
        if not isinstance(reference, str) or not reference:
            raise GraderError("reference", "it must be a text, such as {{item.answer}}")
        for name in _PLACEHOLDER.findall(reference):
            if not name.startswith("item."):
                raise GraderError("reference", f"{{{{{name}}}}} is not known; fields of a row are {{{{item.NAME}}}}")
        return cls(verifier, options, reference)

    def expected(self, row: dict[str, Any]) -> str:
        """What is expected of the answer to ``row``. Raises :class:`KeyError` naming a field that the row lacks."""

        def value(found: re.Match[str]) -> str:
            item: Any = row
            for key in found[1].split(".")[1:]:
                if not isinstance(item, dict) or key not in item:
                    raise KeyError(found[1].removeprefix("item."))
                item = item[key]
            return item if isinstance(item, str) else json.dumps(item, ensure_ascii=False)

        return _PLACEHOLDER.sub(value, self.reference)


def _refuse_unknown(content: dict[str, Any], known: set[str]) -> None:
    if unknown := sorted(content.keys() - known):
        raise GraderError(unknown[0], f"a grader of the type {content['type']!r} has no such field")
