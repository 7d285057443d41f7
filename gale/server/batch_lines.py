"""The lines of a batch's file: what each asks for, and everything that is wrong with them, by number."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from gale.platform.jsonl import numbered_lines
from gale.server.errors import ApiError
from gale.server.json_body import parse_json
from gale.server.json_text import to_json

# OpenAI's limits; a line is a request, and as long as one may be.
MOST_LINES = 50_000
MOST_BYTES = 200 * 1000 * 1000
MOST_LINE_BYTES = 8 * 1024 * 1024
MOST_ERRORS = 100


class _Line(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    custom_id: Annotated[str, Field(min_length=1, max_length=512)]
    method: Literal["POST"]
    url: str
    body: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Line:
    """One request."""

    number: int
    custom_id: str
    body: bytes


@dataclass
class Findings:
    """What a file holds: how many requests of which model; and what is wrong, as OpenAI's batches list it."""

    total: int = 0
    model: str | None = None
    errors: list[dict[str, Any]] = field(default_factory=list)

    def add(self, code: str, message: str, line: int | None, param: str | None = None) -> None:
        """Another fault."""
        self.errors.append({"code": code, "message": message, "line": line, "param": param})


def validate(path: Path, endpoint: str) -> Findings:
    """Read all lines; reading ends at the hundredth fault. Blocks, for seconds where the file is large."""
    found = Findings()
    if (size := path.stat().st_size) > MOST_BYTES:
        found.add("file_too_large", f"The file has {size:,} bytes; a batch may have {MOST_BYTES:,}.", None)
        return found
    seen: dict[str, int] = {}
    for number, content in numbered_lines(path, MOST_LINE_BYTES):
        found.total += 1
        if found.total > MOST_LINES:
            found.add("too_many_requests", f"A batch may have at most {MOST_LINES:,} requests.", number)
        else:
            _check(found, seen, endpoint, number, content)
        if found.total > MOST_LINES or len(found.errors) >= MOST_ERRORS:
            return found
    if not found.total:
        found.add("empty_file", "The file has no requests.", None)
    return found


def lines(path: Path) -> Iterator[Line]:
    """The requests of a file that :func:`validate` found nothing wrong with. Blocks."""
    for number, content in numbered_lines(path, MOST_LINE_BYTES):
        line = parse_json(content or b"", _Line)
        yield Line(number, line.custom_id, to_json(line.body).encode())


def _check(found: Findings, seen: dict[str, int], endpoint: str, number: int, content: bytes | None) -> None:
    if content is None:
        found.add("line_too_long", f"This line is longer than {MOST_LINE_BYTES:,} bytes.", number)
        return
    try:
        line = parse_json(content, _Line)
    except ApiError as error:
        reason = error.message.replace("The request body", "This line", 1)
        found.add("invalid_json_line" if error.code == "invalid_json" else str(error.code), reason, number, error.param)
        return
    if (first := seen.setdefault(line.custom_id, number)) != number:
        found.add(
            "duplicate_custom_id",
            f"The custom_id '{line.custom_id}' stands in line {first} already.",
            number,
            "custom_id",
        )
    if line.url != endpoint:
        found.add("mismatched_url", f"The url must be the batch's endpoint, {endpoint}.", number, "url")
    for name in ("stream", "background"):
        if line.body.get(name) not in (None, False):
            found.add("unsupported_parameter", f"A batch has no '{name}'.", number, f"body.{name}")
    model = line.body.get("model")
    if not isinstance(model, str):
        found.add("missing_required_parameter", "The body must name a model.", number, "body.model")
    elif found.model is None:
        found.model = model
    elif model != found.model:
        found.add("mismatched_model", f"All lines must ask the same model, {found.model!r}.", number, "body.model")
