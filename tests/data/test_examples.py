"""Uploaded rows: what is trained is what the person marked, and a row that cannot be is named by its line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from gale.data import examples
from gale.data.examples import Examples, RowError, prepare_examples, prepare_questions
from gale.data.graders import Grader, GraderError
from gale.data.shards import TokenSplit, verify
from gale.text.template import ChatTemplate
from gale.text.tokenizer import Tokenizer
from gale.train.batches import IGNORED, WholeRows
from tests.tiny_data import write_jsonl

CONTEXT = 400
QUESTION = {"role": "user", "content": "Where does the river go?"}
ANSWER = {"role": "assistant", "content": "To the sea."}
ROW: dict[str, Any] = {"messages": [QUESTION, ANSWER]}
PAIR: dict[str, Any] = {
    "input": {"messages": [QUESTION]},
    "preferred_output": [ANSWER],
    "non_preferred_output": [{"role": "assistant", "content": "No."}],
}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": '{"at": "sea"}'}}


@pytest.fixture
def base(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    tokenizer.save(tmp_path / "base")
    return tmp_path / "base"


def prepare(
    base: Path, rows: list[dict[str, Any]], method: Literal["supervised", "dpo"] = "supervised"
) -> tuple[TokenSplit, Examples]:
    path = write_jsonl(base.parent / "rows.jsonl", rows)
    out = base.parent / "data"
    found = prepare_examples(method, {"train": ("training_file", path)}, base, out, context=CONTEXT)
    verify(out)
    return TokenSplit(out, "train"), found["train"]


def trained_text(split: TokenSplit, tokenizer: Tokenizer, index: int = 0) -> str:
    ids, trained = split.document(index)
    return tokenizer.decode(ids[trained].tolist(), control_tokens=True)


def test_only_answers_of_weight_1_are_trained(base: Path, tokenizer: Tokenizer) -> None:
    talk = [
        {"role": "developer", "content": "Be kind."},
        QUESTION,
        {**ANSWER, "weight": 0},
        QUESTION,
        {"role": "assistant", "content": "East.", "weight": 1},
    ]
    split, found = prepare(base, [{"messages": talk}] + [ROW] * 10)
    assert trained_text(split, tokenizer) == "East.<|end|>"
    assert trained_text(split, tokenizer, 1) == "To the sea.<|end|>"
    assert found.rows == len(split) == 11
    assert found.longest == split.lengths().max()


def test_no_row_is_dropped_or_cut_and_an_epoch_reads_each_once(base: Path) -> None:
    split, _ = prepare(base, [ROW] * 12)  # duplicates too: how often a row stands there is the person's choice
    rows = WholeRows(split, seed=3)
    assert rows.rows_of_epoch(0) == 12
    batch = rows.batch(0, 12)
    assert batch.lengths == [int(split.lengths()[0])] * 12
    ids, trained = split.document(0)
    targets = batch.targets_N[: len(ids)].numpy()
    assert np.array_equal(targets[:-1] != IGNORED, trained[1:])
    assert np.array_equal(targets[:-1][trained[1:]], ids[1:][trained[1:]])


def test_tools_and_calls_are_read_as_they_are_when_served(base: Path, tokenizer: Tokenizer) -> None:
    called = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    result = {"role": "tool", "tool_call_id": "call_1", "content": "water"}
    split, _ = prepare(base, [{"messages": [QUESTION, called, result, ANSWER], "tools": [TOOL]}] * 10)
    template = ChatTemplate(str(tokenizer.chat_template), tokenizer)
    prompt = template.prompt([QUESTION], tools=[TOOL])  # type: ignore[list-item]
    ids, _ = split.document(0)
    assert ids[: len(prompt)].tolist() == prompt
    text = trained_text(split, tokenizer)
    assert text.startswith("<tool_call>") and text.endswith("To the sea.<|end|>") and "water" not in text


def test_a_template_without_marks_trains_the_same_tokens(base: Path, tokenizer: Tokenizer) -> None:
    marked, _ = prepare(base, [ROW] * 10)
    template = str(tokenizer.chat_template)
    assert "generation %}" in template
    plain = template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    settings = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": plain}))
    (base.parent / "data").rename(base.parent / "marked")
    unmarked, _ = prepare(base, [ROW] * 10)
    assert trained_text(unmarked, tokenizer) == trained_text(marked, tokenizer)


def test_a_preference_is_two_documents_that_differ_in_the_answer(base: Path, tokenizer: Tokenizer) -> None:
    split, found = prepare(base, [PAIR] * 10, "dpo")
    assert split.pairs and len(split) == 20 and found.rows == 10
    assert [trained_text(split, tokenizer, index) for index in (0, 1)] == ["To the sea.<|end|>", "No.<|end|>"]


BROKEN: list[tuple[Any, str]] = [
    ("not json", "it is not JSON"),
    ([], "it is not a JSON object"),
    ({}, "'messages' must be a list"),
    ({"messages": []}, "at least one message"),
    ({"messages": [QUESTION]}, "nothing to learn"),
    ({"messages": [QUESTION, {**ANSWER, "weight": 0}]}, "nothing to learn"),
    ({"messages": [QUESTION, {**ANSWER, "weight": 0.5}]}, "'messages[1].weight' must be 0 or 1"),
    ({"messages": [{**QUESTION, "weight": 1}, ANSWER]}, "belongs to an assistant's message"),
    ({"messages": [{"role": "robot", "content": "x"}, ANSWER]}, "'messages[0].role' must be one of"),
    ({"messages": [{"role": "user", "content": 7}, ANSWER]}, "'messages[0].content' must be text"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, ANSWER]}, "of the type 'text'"),
    ({"messages": [QUESTION, {"role": "assistant", "content": None}]}, "'messages[1].content' must be text"),
    ({"messages": [{"role": "user", "content": "\ud800"}, ANSWER]}, "half of a surrogate pair"),
    ({"messages": [QUESTION, {"role": "assistant", "tool_calls": [{"id": 3}]}]}, "'messages[1].tool_calls[0]'"),
    ({**ROW, "tools": [{"type": "search"}]}, "'tools[0]'"),
    ({**ROW, "functions": []}, "'functions' is not known here"),
    (
        {"messages": [{"role": "user", "content": "The wind came over the hill. " * 60}, ANSWER]},
        "tokens, and the model",
    ),
]


@pytest.mark.parametrize(("row", "reason"), BROKEN)
def test_a_row_that_cannot_be_trained_on_is_named(base: Path, row: Any, reason: str) -> None:
    lines = [json.dumps(ROW)] * 6
    lines.insert(4, row if isinstance(row, str) else json.dumps(row))
    path = base.parent / "rows.jsonl"
    path.write_text("\n".join([*lines[:2], "", *lines[2:]]))
    with pytest.raises(RowError) as caught:
        prepare_examples("supervised", {"train": ("training_file", path)}, base, base.parent / "data", context=CONTEXT)
    assert (caught.value.param, caught.value.line) == ("training_file", 6)
    assert reason in caught.value.message
    assert not (base.parent / "data").exists()


@pytest.mark.parametrize("rows", [0, 1, 9])
def test_too_few_rows_are_counted(base: Path, rows: int) -> None:
    with pytest.raises(RowError, match=f"ends with {rows} examples, and at least 10"):
        prepare(base, [ROW] * rows)


def test_bytes_that_are_no_text_and_endless_lines_are_refused(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examples, "MOST_LINE_BYTES", 200)
    path = base.parent / "rows.jsonl"
    for content, reason in ((b'{"messages": "\xff"}', "not UTF-8"), (b"1" * 300, "longer than 200 bytes")):
        path.write_bytes(content)
        with pytest.raises(RowError, match=f"line 1: it is {reason}"):
            list(examples.read_rows(path, "training_file", least=1))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"preferred_output": [ANSWER, ANSWER]}, "must be a list of one assistant message"),
        ({"preferred_output": [QUESTION]}, "must be a list of one assistant message"),
        ({"non_preferred_output": [ANSWER]}, "nothing to prefer"),
        ({"input": []}, "'input' must be an object"),
    ],
)
def test_a_preference_without_a_difference_is_refused(base: Path, change: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowError, match=reason):
        prepare(base, [{**PAIR, **change}] * 10, "dpo")


def test_questions_get_what_the_grader_expects(base: Path) -> None:
    grader = Grader.read(
        {
            "type": "string_check",
            "name": "g",
            "input": "{{sample.output_text}}",
            "operation": "eq",
            "reference": "={{ item.right.value }}",
        }
    )
    rows = [{"messages": [QUESTION], "right": {"value": number}} for number in range(10)]
    sources = {"train": ("training_file", write_jsonl(base.parent / "rows.jsonl", rows))}
    found = prepare_questions(sources, grader, base, base.parent / "data", context=CONTEXT)
    written = [json.loads(line) for line in (base.parent / "data" / "train.jsonl").read_text().splitlines()]
    assert [row["expected"] for row in written] == [f"={number}" for number in range(10)]
    assert found["train"].rows == 10
    for wrong, reason in (
        ({"messages": [QUESTION]}, "which this row lacks"),
        ({**rows[0], "messages": [QUESTION, ANSWER]}, "must be a question"),
        ({**rows[0], "tools": [TOOL]}, "'tools'"),
    ):
        write_jsonl(base.parent / "rows.jsonl", [*rows, wrong])
        with pytest.raises(RowError, match=reason) as caught:
            prepare_questions(sources, grader, base, base.parent / "other", context=CONTEXT)
        assert caught.value.line == 11


CHECK = {"type": "string_check", "name": "g", "input": "{{sample.output_text}}", "reference": "{{item.a}}"}


@pytest.mark.parametrize(
    ("content", "verifier", "ignore_case"),
    [
        ({**CHECK, "operation": "eq"}, "equal", False),
        ({**CHECK, "operation": "ne"}, "unequal", False),
        ({**CHECK, "operation": "like"}, "includes", False),
        ({**CHECK, "operation": "ilike"}, "includes", True),
        ({**CHECK, "type": "text_similarity", "evaluation_metric": "rouge_l"}, "rouge_l", True),
        ({**CHECK, "type": "verifier", "verifier": "number", "options": {"tolerance": 0.1}}, "number", True),
    ],
)
def test_graders_are_verifiers(content: dict[str, Any], verifier: str, ignore_case: bool) -> None:
    grader = Grader.read(content)
    assert (grader.verifier, grader.options.ignore_case) == (verifier, ignore_case)


@pytest.mark.parametrize(
    ("content", "param"),
    [
        ({"type": "score_model", "name": "g"}, "type"),
        ({"type": "python", "source": "def grade(): ..."}, "type"),
        ({"type": "multi", "graders": {}}, "type"),
        ({}, "type"),
        ({**CHECK, "operation": "regex"}, "operation"),
        ({**CHECK, "type": "text_similarity", "evaluation_metric": "cosine"}, "evaluation_metric"),
        ({**CHECK, "type": "verifier", "verifier": "taste"}, "verifier"),
        ({**CHECK, "type": "verifier", "verifier": "regex", "options": {"pattern": "("}}, "options"),
        ({**CHECK, "operation": "eq", "input": "{{item.a}}"}, "input"),
        ({**CHECK, "operation": "eq", "reference": "{{sample.output_json.a}}"}, "reference"),
        ({**CHECK, "operation": "eq", "temperature": 1}, "temperature"),
    ],
)
def test_what_no_program_can_judge_is_refused_by_name(content: dict[str, Any], param: str) -> None:
    with pytest.raises(GraderError) as caught:
        Grader.read(content)
    assert caught.value.param == param
