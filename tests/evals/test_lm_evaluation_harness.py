"""lm-evaluation-harness, asking a live server through ``/v1/completions``, measures what ``gale eval`` measures.

Two tasks of its own on local files: BLiMP-like pairs without a context, and multiple choice; and a generative one.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")

from gale.engine.local import LocalEngine  # noqa: E402
from gale.evals.report import evaluate  # noqa: E402
from gale.model.transformer import Decoder  # noqa: E402
from gale.platform.store import Store  # noqa: E402
from gale.text.tokenizer import END_OF_TEXT, Tokenizer  # noqa: E402
from tests.evals.folder import choice_rows, figures, pair_rows, recipe, save_tiny, task  # noqa: E402
from tests.server.live import Live, start  # noqa: E402
from tests.tiny_data import write_jsonl  # noqa: E402

pytestmark = pytest.mark.slow

PAIRS = """
task: tiny_pairs
output_type: multiple_choice
dataset_path: json
dataset_kwargs: {data_files: {validation: PATH}}
validation_split: validation
doc_to_text: ""
doc_to_target: 0
doc_to_choice: "{{[good, bad]}}"
metric_list: [{metric: acc}]
"""
CHOICES = """
task: tiny_choices
output_type: multiple_choice
dataset_path: json
dataset_kwargs: {data_files: {train: SHOTS, validation: PATH}}
validation_split: validation
fewshot_split: train
fewshot_config: {sampler: first_n}
num_fewshot: 2
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_target: answer
doc_to_choice: "{{choices}}"
metric_list: [{metric: acc}, {metric: acc_norm}, {metric: acc_bytes}]
"""
WRITTEN = """
task: tiny_written
output_type: generate_until
dataset_path: json
dataset_kwargs: {data_files: {validation: PATH}}
validation_split: validation
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["e", "o", "a", "u", "i"], max_gen_toks: 8, do_sample: false}
metric_list: [{metric: exact_match, ignore_case: false}]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, model: Decoder, tokenizer: Tokenizer) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"), model, tokenizer)


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Iterator[Live]:
    store = Store.open(f"sqlite:///{tmp_path_factory.mktemp('store') / 'gale.db'}")
    engine = LocalEngine.load(folder)
    server = start(store, engine=engine)
    yield server
    server.stop()
    asyncio.run(engine.close())
    store.close()


def measure(live: Live, folder: Path, tokenizer: Tokenizer, task_files: Path, *names: str, **options: Any) -> Any:
    """What the harness finds, asked as its own command line asks."""
    from lm_eval.tasks import TaskManager

    arguments = {
        "model": live.engine.model_id,
        "base_url": f"{live.url}/v1/completions",
        "tokenizer_backend": "huggingface",
        "tokenizer": str(folder),
        "max_length": live.engine.context_length,
        # What stands before a text without context: the token that begins a document, not the one that ends a turn.
        "custom_prefix_token_id": tokenizer.token_id(END_OF_TEXT),
        **options,
    }
    found = lm_eval.simple_evaluate(
        "local-completions",
        model_args=arguments,
        tasks=list(names),
        task_manager=TaskManager(include_path=str(task_files), include_defaults=False),
        bootstrap_iters=0,
    )
    return found["results"]


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is asked of the network, and no cache but this test's own is used."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    "options", [{}, {"num_concurrent": 4}, {"batch_size": 8}], ids=["one by one", "at once", "batches"]
)
def test_pairs_and_choices_score_exactly_the_same(
    tmp_path: Path, live: Live, folder: Path, tokenizer: Tokenizer, options: dict[str, Any]
) -> None:
    ours = [
        task(tmp_path, pair_rows(), name="tiny_pairs", kind="pairs"),
        task(
            tmp_path,
            choice_rows()[2:],
            name="tiny_choices",
            kind="choices",
            prompt="Question: {question}\nAnswer:",
            shots=2,
            shots_path=str(write_jsonl(tmp_path / "shots.jsonl", choice_rows()[:2])),
        ),
    ]
    expected = figures(evaluate(folder, recipe(*ours)))
    files = tmp_path / "tasks"
    files.mkdir()
    (files / "pairs.yaml").write_text(PAIRS.replace("PATH", ours[0]["path"]))
    (files / "choices.yaml").write_text(
        CHOICES.replace("PATH", ours[1]["path"]).replace("SHOTS", ours[1]["shots_path"])
    )
    theirs = measure(live, folder, tokenizer, files, "tiny_pairs", "tiny_choices", **options)
    found = {(name, metric): round(theirs[name][f"{metric},none"], 4) for name, metric in expected}
    assert found == expected
    assert len(set(expected.values())) > 1, "figures that are all alike would prove little"


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("tokenized", [True, False])
def test_generated_answers_are_the_same(
    tmp_path: Path, live: Live, folder: Path, tokenizer: Tokenizer, tokenized: bool
) -> None:
    rows = [{"question": row["question"], "answer": "x"} for row in choice_rows(10)]
    settings = {
        "name": "tiny_written",
        "kind": "generate",
        "prompt": "{question}",
        "verifier": "exact",
        "options": {"ignore_case": False},
        "chat": False,
        "max_tokens": 8,
        "stop": ["e", "o", "a", "u", "i", tokenizer.eos_token],
    }
    first = evaluate(folder, recipe(task(tmp_path, rows, **settings)))
    for row, sample in zip(rows, first["tasks"]["tiny_written"]["samples"], strict=False):
        row["answer"] = sample["given"]  # half of the answers are known now, so half must be right
    ours = task(tmp_path, rows, **settings)
    files = tmp_path / "tasks"
    files.mkdir()
    (files / "written.yaml").write_text(WRITTEN.replace("PATH", ours["path"]))
    theirs = measure(live, folder, tokenizer, files, "tiny_written", tokenized_requests=tokenized)
    expected = figures(evaluate(folder, recipe(ours)))["tiny_written", "exact"]
    assert theirs["tiny_written"]["exact_match,none"] == expected >= 0.5
