"""What the comparison found, as figures and as ``docs/conformance.md``."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from gale.server.not_offered import instead_of
from tests.conformance.checker import Checker
from tests.conformance.parameters import Parameters


@dataclass(frozen=True, slots=True)
class Score:
    """Operations of OpenAI's document: all, those offered, those whose every answer fits; answers compared."""

    operations: int
    offered: int
    fitting: int
    answers: int
    ignored: tuple[str, ...]


def score(checker: Checker, parameters: dict[str, Parameters]) -> Score:
    """The figures."""
    return Score(
        operations=len(checker.specification["names"]),
        offered=len(checker.checked),
        fitting=sum(not checked.problems for checked in checker.checked.values()),
        answers=sum(checked.answers for checked in checker.checked.values()),
        ignored=tuple(f"{operation}: {name}" for operation, found in parameters.items() for name in found.ignored),
    )


def markdown(checker: Checker, parameters: dict[str, Parameters]) -> str:
    """The page."""
    found = score(checker, parameters)
    groups: dict[str, list[str]] = defaultdict(list)
    for name in checker.specification["names"]:
        groups[name.split("/")[1]].append(name)
    lines = [
        "# Conformance with OpenAI's specification",
        "",
        "Made by `python -m tests.conformance`: a live Gale is asked, and its answers are held against the schemas of",
        f"OpenAI's own OpenAPI document (version {checker.specification['version']}). `make test` does the same and "
        "fails where an answer stops fitting.",
        "",
        f"- **{found.fitting} of the {found.offered}** operations that Gale offers answer exactly as the document says "
        f"({found.answers} answers compared).",
        f"- The document has {found.operations} operations. The others answer 404 with what to use instead.",
        f"- **{len(found.ignored)}** parameters are silently ignored: each is honoured, or refused by name with 400.",
        "",
        "Four answers are unlike the document on purpose. Two follow OpenAI's service, because its clients do: the",
        "first token of an echoed prompt has a score of null, and with `encoding_format: base64` a vector is a string.",
        "A fine-tuning job that is paused says so, and the audit log has types of its own for what is done to jobs.",
        "",
        "| group | offered | of | what is missing |",
        "|---|---|---|---|",
    ]
    for group, names in groups.items():
        offered = [name for name in names if name in checker.checked]
        missing = [name for name in names if name not in checker.checked]
        said = _short(missing) if offered else (instead_of(_path(names[0])) or "not built")
        lines.append(f"| `{group}` | {len(offered)} | {len(names)} | {said} |")
    lines += ["", "## Parameters", "", "| operation | honoured | refused by name |", "|---|---|---|"]
    for operation, each in parameters.items():
        lines.append(f"| `{operation}` | {_names(each.ours)} | {_names(each.refused)} |")
    if any(checked.problems for checked in checker.checked.values()):
        lines += ["", "## What does not fit", ""]
        for checked in checker.checked.values():
            lines += [f"- `{checked.operation}`: {problem}" for problem in checked.problems]
    return "\n".join(lines) + "\n"


def _path(name: str) -> str:
    return "/v1" + name.split(" ")[1]


def _short(missing: list[str]) -> str:
    if not missing:
        return ""
    return "; ".join(f"`{name}`" for name in missing) if len(missing) <= 6 else f"{len(missing)} operations"


def _names(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
