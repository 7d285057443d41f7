"""Every kind of task scores what it says it scores, says what chance is, and says the same twice."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gale.core import files
from gale.core.errors import DataError, RecipeError
from gale.core.printable import printable
from gale.core.recipe import load_recipe
from gale.engine.local import LocalEngine
from gale.evals.bits_per_byte import bits_per_byte
from gale.evals.classification import macro_f1
from gale.evals.generation import ask
from gale.evals.likelihood import Request, log_likelihoods, split_text
from gale.evals.page import to_html, to_markdown
from gale.evals.recipe import EvalRecipe
from gale.evals.report import evaluate
from gale.evals.scores import bootstrap, share_score, wilson
from gale.model.attention import PackedAttention
from gale.model.transformer import Decoder
from gale.text.template import ChatTemplate, Message
from gale.text.tokenizer import END_OF_TEXT, Tokenizer
from tests.evals.folder import choice_rows, figures, pair_rows, recipe, save_tiny, task
from tests.tiny_data import write_jsonl
from tests.tiny_model import make_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, model: Decoder, tokenizer: Tokenizer) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"), model, tokenizer)


def teacher(model: Decoder, context: list[int], continuation: list[int]) -> float:
    """The log-likelihood as simply as it can be said."""
    ids = [*context, *continuation]
    with torch.inference_mode():
        hidden = model(torch.tensor(ids), torch.arange(len(ids)), PackedAttention([len(ids)]))
        logprobs = torch.log_softmax(model.logits(hidden).double(), -1)
    places = torch.arange(len(context), len(ids))
    return float(logprobs[places - 1, torch.tensor(ids)[places]].sum())


def test_log_likelihoods_are_those_of_one_pass_over_each_text(model: Decoder, tokenizer: Tokenizer) -> None:
    texts = [("The wind", " came over"), ("风", "从山上吹来。"), ("a" * 200, " b" * 150), ("The sea", "")]
    requests = [split_text(tokenizer, *pair) for pair in texts]
    scored = log_likelihoods(model, requests, title="t")
    for value, request in zip(scored.nats, requests, strict=True):
        assert value == pytest.approx(teacher(model, request.context, request.continuation), rel=1e-5, abs=1e-5)
    assert scored.truncated == 0


def test_texts_are_split_as_the_harness_splits_them(tokenizer: Tokenizer) -> None:
    moved = split_text(tokenizer, "The wind  ", "came")
    assert moved == split_text(tokenizer, "The wind", "  came")
    assert moved.context == tokenizer.encode("The wind")
    assert moved.context + moved.continuation == tokenizer.encode("The wind  came")
    whole = split_text(tokenizer, "", " came")
    assert whole == Request([tokenizer.token_id(END_OF_TEXT)], tokenizer.encode(" came"))  # type: ignore[list-item]


def test_too_long_a_context_loses_its_beginning_and_is_counted(tokenizer: Tokenizer) -> None:
    short = make_model(tokenizer, context_length=20)
    ids = tokenizer.encode("The wind came over the hill and the door fell shut. " * 4)
    assert len(ids) > 30
    scored = log_likelihoods(short, [Request(ids, [5, 6]), Request([1], ids)], title="t")
    assert scored.truncated == 2
    assert scored.nats[0] == pytest.approx(teacher(short, ids[-17:], [5, 6]), rel=1e-5)
    assert scored.nats[1] == pytest.approx(teacher(short, ids[-19:-18], ids[-18:]), rel=1e-5)


def test_pairs(tmp_path: Path, folder: Path, model: Decoder, tokenizer: Tokenizer) -> None:
    rows = pair_rows()
    report = evaluate(folder, recipe(task(tmp_path, rows, name="pairs", kind="pairs", group="field")))
    start = [tokenizer.token_id(END_OF_TEXT) or 0]
    better = [
        teacher(model, start, tokenizer.encode(" " + row["good"]))
        > teacher(model, start, tokenizer.encode(" " + row["bad"]))
        for row in rows
    ]
    [score] = report["scores"]
    assert score["value"] == pytest.approx(np.mean(better), abs=1e-4)
    assert (score["chance"], score["items"]) == (0.5, 24)
    assert 0 <= score["low"] < score["value"] < score["high"] <= 1
    groups = {group["task"]: group for group in report["tasks"]["pairs"]["groups"]}
    assert sum(group["items"] for group in groups.values()) == 24
    wind = [right for right, row in zip(better, rows, strict=True) if row["field"] == "wind"]
    assert groups["wind"]["value"] == pytest.approx(np.mean(wind), abs=1e-4)


def test_equal_sentences_are_no_success(tmp_path: Path, folder: Path) -> None:
    rows = [{"good": "The sea.", "bad": "The sea."}] * 3
    report = evaluate(folder, recipe(task(tmp_path, rows, name="same", kind="pairs")))
    assert figures(report) == {("same", "acc"): 0}


@pytest.mark.parametrize("chat", [False, True])
def test_choices(tmp_path: Path, folder: Path, model: Decoder, tokenizer: Tokenizer, chat: bool) -> None:
    rows = choice_rows()
    settings = {"name": "choices", "kind": "choices", "prompt": "Question: {question}\nAnswer:", "chat": chat}
    report = evaluate(folder, recipe(task(tmp_path, rows, **settings)))
    template = ChatTemplate(tokenizer.chat_template or "", tokenizer)
    right: dict[str, list[bool]] = {"acc": [], "acc_norm": [], "acc_bytes": []}
    for row in rows:
        prompt = f"Question: {row['question']}\nAnswer:"
        if chat:
            read = template.prompt([Message(role="user", content=prompt)])
            nats = [teacher(model, read, tokenizer.encode(choice)) for choice in row["choices"]]
        else:
            read = tokenizer.encode(prompt)
            nats = [
                teacher(model, read, tokenizer.encode(f"{prompt} {choice}")[len(read) :]) for choice in row["choices"]
            ]
        right["acc"].append(np.argmax(nats) == row["answer"])
        right["acc_norm"].append(
            np.argmax([n / len(c) for n, c in zip(nats, row["choices"], strict=True)]) == row["answer"]
        )
        per_byte = [n / len(c.encode()) for n, c in zip(nats, row["choices"], strict=True)]
        right["acc_bytes"].append(np.argmax(per_byte) == row["answer"])
    for metric, values in right.items():
        assert figures(report)["choices", metric] == pytest.approx(np.mean(values), abs=1e-4)
    assert report["scores"][0]["chance"] == pytest.approx((1 / 3 + 1 / 4) / 2, abs=1e-4)
    assert report["scores"][0]["majority"] == pytest.approx(1 / 3, abs=1e-4)


def test_letters_before_choices_can_be_taken_off_and_letters_can_be_answers(tmp_path: Path, folder: Path) -> None:
    rows = [{"question": "1 + 1?", "options": ["A)1", "B)2"], "answer": "B"}]
    settings = {"name": "aqua", "kind": "choices", "prompt": "{question}", "choices": "options"}
    report = evaluate(folder, recipe(task(tmp_path, rows, **settings, strip=r"[A-E]\)\s*")))
    assert report["tasks"]["aqua"]["samples"][0]["expected"] == "2"


def test_solved_examples_stand_before_the_question(tmp_path: Path, folder: Path) -> None:
    shots = write_jsonl(tmp_path / "train.jsonl", choice_rows(3))
    settings = {"name": "few", "kind": "choices", "prompt": "Q: {question}\nA:", "shots": 2, "shots_path": str(shots)}
    few = task(tmp_path, choice_rows(), **settings)
    with_shots = evaluate(folder, recipe(few))
    first, second = choice_rows(2)
    spelled = "".join(f"Q: {row['question']}\nA: {row['choices'][row['answer']]}\n\n" for row in (first, second))
    by_hand = {**few, "prompt": spelled + "Q: {question}\nA:", "shots": 0, "shots_path": None}
    assert figures(evaluate(folder, recipe(by_hand))) == figures(with_shots)
    with pytest.raises(ValueError, match="another file"):
        recipe({**few, "shots_path": few["path"]})
    with pytest.raises(DataError, match="only 3 rows"):
        evaluate(folder, recipe({**few, "shots": 4}))


@pytest.mark.parametrize("chat", [False, True])
def test_generated_answers_are_the_engine_s_and_the_verifier_judges_them(
    tmp_path: Path, folder: Path, chat: bool
) -> None:
    questions = ["Where does the river go?", "门关上了。", "a" * 2000]

    async def answers() -> list[str]:
        engine = LocalEngine.load(folder)
        try:
            if chat:
                return [await ask(engine, [Message(role="user", content=q)], 12) for q in questions[:2]]
            return []
        finally:
            await engine.close()

    given = asyncio.run(answers())
    rows = [{"question": q, "answer": a} for q, a in zip(questions, [*given, "x"] if chat else "xyz", strict=True)]
    settings = {"name": "written", "kind": "generate", "prompt": "{question}", "verifier": "exact", "chat": chat}
    report = evaluate(folder, recipe(task(tmp_path, rows, **settings, max_tokens=12)))
    samples = report["tasks"]["written"]["samples"]
    assert report["tasks"]["written"]["notes"] == {"too_long": 1}
    assert report["scores"][0]["chance"] == 0
    if chat:
        assert [sample["given"] for sample in samples] == [*given, ""]
        assert [sample["points"] for sample in samples] == [1, 1, 0]
    else:
        assert all(sample["given"] for sample in samples[:2])


def test_labels_by_likelihood_and_as_written(
    tmp_path: Path, folder: Path, model: Decoder, tokenizer: Tokenizer
) -> None:
    rows = choice_rows()
    settings: dict[str, Any] = {"kind": "classify", "prompt": "{question} Odd?", "labels": {"0": "no", "1": "yes"}}
    report = evaluate(
        folder,
        recipe(
            task(tmp_path, rows, name="likely", **settings),
            task(tmp_path, rows, name="written", **settings, by="generation", max_tokens=4),
        ),
    )
    given = []
    for row in rows:
        read = tokenizer.encode(f"{row['question']} Odd?")
        nats = [
            teacher(model, read, tokenizer.encode(f"{row['question']} Odd? {t}")[len(read) :]) for t in ("no", "yes")
        ]
        given.append(int(np.argmax(nats)))
    right = [row["label"] for row in rows]
    assert figures(report)["likely", "acc"] == pytest.approx(np.mean(np.array(given) == right), abs=1e-4)
    assert figures(report)["likely", "macro_f1"] == pytest.approx(
        macro_f1(np.array(right), np.array(given), 2), abs=1e-4
    )
    accuracy, f1 = report["scores"][:2]
    assert (accuracy["chance"], accuracy["majority"], f1["chance"]) == (0.5, 0.5, 0.5)
    assert f1["majority"] == pytest.approx(1 / 3, abs=1e-4)
    assert set(report["tasks"]["written"]["notes"]) == {"too_long", "without_label"}


def test_macro_f1_is_scikit_learn_s() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    draw = np.random.default_rng(1)
    right, given = draw.integers(3, size=50), draw.integers(3, size=50)
    assert macro_f1(right, given, 3) == pytest.approx(metrics.f1_score(right, given, average="macro"))


def test_intervals_are_the_textbook_s_and_always_the_same() -> None:
    stats = pytest.importorskip("scipy.stats")
    for successes, items in ((0, 5), (5, 5), (37, 90)):
        expected = stats.binomtest(successes, items).proportion_ci(method="wilson")
        assert wilson(successes, items) == pytest.approx((expected.low, expected.high), abs=1e-6)
    values = np.random.default_rng(2).random(400)
    low, high = bootstrap(lambda chosen: float(values[chosen].mean()), 400)
    assert low is not None
    assert high is not None
    half = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.005)
    assert share_score("t", "m", list(values), chance=0) == share_score("t", "m", list(values), chance=0)
    assert bootstrap(lambda _: 1.0, 1) == (None, None)


def test_a_limit_takes_rows_from_all_over_the_file(tmp_path: Path, folder: Path) -> None:
    rows = choice_rows(20)
    settings = {"name": "some", "kind": "choices", "prompt": "{question}"}
    report = evaluate(folder, recipe(task(tmp_path, rows, **settings, limit=4)))
    assert [s["prompt"] for s in report["tasks"]["some"]["samples"]] == [rows[n]["question"] for n in (0, 5, 10, 15)]
    odd = evaluate(folder, recipe(task(tmp_path, rows, **settings, only=["s1"])))
    assert odd["scores"][0]["items"] == 10


def test_the_whole_evaluation_says_the_same_twice_and_its_pages_show_it(tmp_path: Path, folder: Path) -> None:
    text = {"licence": "CC0", "origin": "written for this test", "split": "english"}
    path = write_jsonl(tmp_path / "text.jsonl", [{"text": "The wind came over the hill."}, {"text": "门关上了。"}])
    rows = choice_rows(8)
    ask_all = {"prompt": "{question} <b>"}
    whole = recipe(
        task(tmp_path, pair_rows(8), name="pairs", kind="pairs", group="field"),
        task(tmp_path, rows, name="choices", kind="choices", **ask_all),
        task(tmp_path, rows, name="labels", kind="classify", labels={"0": "no", "1": "yes"}, **ask_all),
        task(
            tmp_path, rows, name="written", kind="generate", verifier="f1", max_tokens=5, expected="{answer}", **ask_all
        ),
        sources=[{**text, "path": str(path)}],
        prompts=["Hello!"],
        max_answer_tokens=4,
    )
    first, second = evaluate(folder, whole), evaluate(folder, whole)
    assert json.dumps(first) == json.dumps(second)
    page = to_html(first)
    assert page == to_html(second)
    assert "http://" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    )
    assert "<script" not in page
    assert page.count("<b>") == 2  # of the charts' titles, and not the prompt's
    assert page.count("<svg") == 2
    for score in first["scores"]:
        row = f"| {score['task']} | {score['metric']} | {score['value']:.3f} |"
        assert row in to_markdown(first)
        assert f"{score['chance']:.3f}" in page


def test_rows_with_half_characters_and_dollars_cost_no_report(tmp_path: Path, folder: Path) -> None:
    rows = [{**row, "field": "$a|_{$\ud800<b>", "good": row["good"] + "\ud800"} for row in pair_rows(4)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = {"name": "pairs", "kind": "pairs", "group": "field", "path": str(tmp_path / "p.jsonl")}
    report = evaluate(folder, recipe({**pairs, "licence": "CC0", "origin": "written for this test"}))
    files.write_json(tmp_path / "report.json", report)
    files.write_text(tmp_path / "report.html", to_html(report))
    assert "$a|_{$\ufffd&lt;b&gt;" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert r"| $a\|_{$" in printable(to_markdown(report))
    assert printable(to_markdown(report)).encode()


def test_bits_per_byte_has_an_interval_over_texts(model: Decoder, tokenizer: Tokenizer) -> None:
    score = bits_per_byte(model, tokenizer, ["The wind.", "门关上了。", "river " * 30], window=16, title="t")
    assert (score.chance, score.items) == (8, 3)
    assert score.low is not None
    assert score.high is not None
    assert score.low < score.value < score.high
    assert bits_per_byte(model, tokenizer, ["The wind."], window=16, title="t").low is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"prompt": "{quest}"}, "quest"),
        ({"choices": "question"}, "no list"),
        ({"answer": "question"}, "neither a place"),
        ({"answer": "nowhere"}, "no key 'nowhere'"),
        ({"group": "nowhere"}, "no key 'nowhere'"),
        ({"only": ["s9"]}, "no row"),
        ({"path": "/nowhere.jsonl"}, "do not exist: /nowhere.jsonl"),
        ({"strip": ".*"}, "empty"),
    ],
)
def test_what_does_not_fit_the_file_is_said_with_its_place(
    tmp_path: Path, folder: Path, changes: dict[str, Any], said: str
) -> None:
    settings = {"name": "choices", "kind": "choices", "prompt": "{question}", **changes}
    with pytest.raises(DataError, match=said):
        evaluate(folder, recipe(task(tmp_path, choice_rows(2), **settings)))


def test_a_recipe_s_problems_are_named_within_their_task(tmp_path: Path) -> None:
    path = tmp_path / "eval.toml"
    path.write_text(
        '[[tasks]]\nkind = "choices"\nname = "a"\npath = "a"\nlicence = "x"\norigin = "x"\npromt = "x"\n'
        '[[tasks]]\nkind = "quiz"\n'
        '[[tasks]]\nkind = "generate"\nname = "a"\npath = "a"\nlicence = "x"\norigin = "x"\nprompt = "x"\n'
        'verifier = "nmber"\n'
    )
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, EvalRecipe)
    found = str(caught.value)
    assert "tasks.1.choices.promt: no such key; did you mean 'prompt'?" in found
    assert "tasks.2: kind must be pairs, choices, generate or classify" in found
    assert "tasks.3.generate.verifier: there is no verifier 'nmber'; there are choice, contains" in found
