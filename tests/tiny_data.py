"""A few sentences in two languages, and how tests write them to files."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

SENTENCES = (
    "The heron stood in the shallow water and waited for a fish.",
    "Anna planted 12 apple trees behind the old school in 1987.",
    "白鹭站在浅水里，等着一条鱼。",
    "一九八七年，小安在老学校后面种了十二棵苹果树。",
    "Bread rises because yeast breathes out gas; the oven then fixes its shape.",
    "面包会发起来，是因为酵母吐出气体。",
    "Don't open the window, said Li; the wind will carry the letters away!",
    "“别开窗，”李说，“风会把信吹走的！”",
)

# A fine-tuning job's: the answer that a row names.
GRADER = {
    "type": "string_check",
    "name": "right",
    "input": "{{sample.output_text}}",
    "operation": "ilike",
    "reference": "{{item.answer}}",
}


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    """Write ``rows`` as JSON lines."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path
