"""The report of a run: one self-contained page, made from the metrics alone, whatever state the run is in."""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from gale.core.charts import smooth, thin
from gale.core.errors import DataError, GaleError
from gale.train.pretrain import pretrain
from gale.train.report import plot_curves, to_toml, write_report
from gale.train.run_log import read_run
from gale.train.tensorboard import TensorBoardLog, write_tensorboard
from tests.train.runs import recipe

HEADER = {
    "stage": "pretrain",
    "started": "2026-01-02T03:04:05+00:00",
    "machine": {"device": "abacus", "threads": 2},
    "commit": "0123abc",
    "gale": "9.9",
    "recipe": {"steps": 60, "optimiser": {"learning_rate": 0.5, "schedule": "wsd"}, "data": "here.toml"},
    "parameters": 4_100_000,
}


def rows(steps: int) -> list[dict[str, Any]]:
    """Metrics of ``steps`` steps, with everything a stage may add."""
    made: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        row: dict[str, Any] = {
            "step": step,
            "tokens": step * 100,
            "loss": 7 * math.exp(-step / 30),
            "learning_rate": 0.5,
            "gradient_norm": 1.0 + step % 3,
            "tokens_per_second": 1000.0,
            "seconds": 0.1,
            "reward": step / 10,
            "balance": {"layer_0": 1.0, "layer_1": 1.0 + 1 / step},
            "note": "text is no number",
        }
        if step % 20 == 0:
            row["held_out"] = {"english": 5.0 + step / 100, "中文": 6.0 - step / 100}
            row["samples"] = [{"prompt": "Once <b>", "text": f"upon & a time {step}\x1b[31m<script>alert(1)</script>"}]
        made.append(row)
    return made


def written(folder: Path, *lines: dict[str, Any], end: str = "") -> Path:
    """A run's folder with these lines of metrics."""
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + end)
    return folder


class Page(HTMLParser):
    """What stands in a page: its tags with their attributes, its words, and whether every tag is closed."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self._open: list[str] = []
        self.feed(path.read_text())
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


def test_the_page_holds_everything_and_fetches_nothing(tmp_path: Path) -> None:
    page = Page(write_report(written(tmp_path / "my-run", {"header": HEADER}, *rows(60))))
    for words in (
        *("my-run", "All 60 steps are done", "nats per token", "Loss", "Learning rate", "Gradient norm", "Throughput"),
        *("Reward", "Balance", "layer_1", "english", "中文", "upon & a time 60", "abacus", "0123abc", "9.9", "4.1M"),
        *("learning_rate = 0.5", 'data = "here.toml"', "[optimiser]", "6.0 s", "lowest 5.2000, step 20"),
    ):
        assert words in page.words, words
    assert "text is no number" not in page.words
    assert sum(tag == "svg" for tag, _ in page.tags) == 6  # loss, rate, norm, throughput, reward, balance
    assert {"script", "link", "img", "iframe", "object"}.isdisjoint(tag for tag, _ in page.tags)
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            if "href" in name or name == "src":
                assert (value or "").startswith("#"), (tag, name, value)
    identifiers = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))
    assert "\x1b" not in page.words


def test_the_same_metrics_give_the_same_bytes(tmp_path: Path) -> None:
    run = written(tmp_path / "run", {"header": HEADER}, *rows(60))
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first
    plot_curves(run / "metrics.jsonl", run / "one.svg", title="run")
    plot_curves(run / "metrics.jsonl", run / "two.svg", title="run")
    assert (run / "one.svg").read_bytes() == (run / "two.svg").read_bytes()
    assert (run / "one.svg").read_text().startswith("<?xml")


def test_a_run_that_goes_on_or_was_killed_within_a_line_has_a_report(tmp_path: Path) -> None:
    run = written(tmp_path / "run", {"header": HEADER}, *rows(30), end='{"step": 31, "loss": 1.')
    assert "Step 30 of 60 (50%)" in Page(write_report(run)).words
    assert "Unreadable" not in Page(write_report(run)).words
    assert (
        "No step has been written down yet" in Page(write_report(written(tmp_path / "new", {"header": HEADER}))).words
    )
    assert "No step" in Page(write_report(written(tmp_path / "empty"))).words
    assert "1,000" in Page(write_report(written(tmp_path / "bare", {"step": 1000}))).words


def test_what_cannot_be_read_is_counted(tmp_path: Path) -> None:
    run = written(tmp_path / "run", *rows(3), end='\x00\x00\n[1]\n{"loss": 3}\n')
    assert "3 of the metrics" in Page(write_report(run)).words
    with pytest.raises(DataError, match=r"holds no metrics\.jsonl") as caught:
        write_report(tmp_path / "nowhere")
    assert "--out" in str(caught.value.hint)


def test_a_resumed_run_counts_a_step_done_twice_once(tmp_path: Path) -> None:
    again = {"header": HEADER | {"started": "2026-02-02T00:00:00+00:00", "commit": "fedcba9"}}
    run = written(tmp_path / "run", {"header": HEADER}, *rows(40), again, *rows(60)[30:])
    log = read_run(run)
    assert [row["step"] for row in log.rows] == list(range(1, 61))
    words = Page(write_report(run)).words
    assert "2026-01-02T03:04:05+00:00 and resumed 1x" in words
    assert "fedcba9" in words


def test_a_real_run_has_a_report_without_a_header_too(prepared: Path, tmp_path: Path) -> None:
    pretrain(recipe(prepared), tmp_path / "run")
    run = tmp_path / "only-metrics"
    run.mkdir()
    shutil.copy(tmp_path / "run/metrics.jsonl", run)
    words = Page(write_report(run)).words
    assert "Held out: english" in words
    words = Page(write_report(tmp_path / "run")).words
    assert "All 6 steps are done" in words
    assert "hidden_size = 16" in words


def test_what_is_no_loss_is_not_drawn_as_one(tmp_path: Path) -> None:
    made = rows(60)
    for row in made:
        if "held_out" in row:
            row["held_out"] = {"pairs": 0.6 + row["step"] / 1000, "pairs_accuracy": row["step"] / 100}
    page = Page(write_report(written(tmp_path / "run", {"header": HEADER | {"stage": "reward"}}, *made)))
    for words in (
        "nats per pair",
        "Held out: pairs_accuracy",
        "highest 0.6000, step 60",
        "lowest 0.6",
        "more is better",
    ):
        assert words in page.words, words
    assert "nats per token" not in page.words
    assert sum(tag == "svg" for tag, _ in page.tags) == 7


def test_numbers_that_are_none_do_not_stop_the_report(tmp_path: Path) -> None:
    made = rows(60)
    made[7] |= {"loss": math.nan, "gradient_norm": math.inf, "skipped": True}
    page = Page(write_report(written(tmp_path / "run", *made)))
    assert "Skipped" in page.words


def test_a_long_run_has_a_short_page_in_which_every_spike_shows(tmp_path: Path) -> None:
    made = rows(20_000)
    made[12_345]["gradient_norm"] = 777.0
    assert write_report(written(tmp_path / "run", *made)).stat().st_size < 600_000
    x, y = thin([float(row["step"]) for row in made], [row["gradient_norm"] for row in made])
    assert len(x) <= 1300
    assert y[x.index(12_346.0)] == 777.0
    assert smooth([3.0] * 500) == pytest.approx([3.0] * 500)


def test_names_with_dollars_and_dashes_are_drawn_as_they_are(tmp_path: Path) -> None:
    made = [row | {"held_out": {"_$x$ <i>": 3.0}, "a/b c": 1} for row in rows(5)]
    page = Page(write_report(written(tmp_path / "run", *made)))
    assert "_$x$ <i>" in re.sub(r"\s+", " ", page.words)


def test_the_recipe_is_shown_as_toml_that_reads_back(tmp_path: Path) -> None:
    import tomllib

    content = {"steps": 3, "none": None, "text": 'say "这"\n', "list": [1, {"a": 0.5}], "table": {"b": True, "c": None}}
    assert tomllib.loads(to_toml(content)) == {
        "steps": 3,
        "text": 'say "这"\n',
        "list": [1, {"a": 0.5}],
        "table": {"b": True},
    }


def test_tensorboard_reads_back_what_the_metrics_say(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    made = rows(40)
    run = written(tmp_path / "run", {"header": HEADER}, *made)
    for _ in range(2):  # in place of what is there
        folder = write_tensorboard(run)
    events = accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    losses = events.Scalars("loss")
    assert [event.step for event in losses] == list(range(1, 41))
    assert [event.value for event in losses] == pytest.approx([row["loss"] for row in made], rel=1e-6)
    assert losses[9].wall_time - losses[0].wall_time == pytest.approx(0.9, abs=1e-3)
    assert [event.value for event in events.Scalars("held_out/english")] == pytest.approx([5.2, 5.4])
    assert "samples/0/text_summary" in events.Tags()["tensors"]

    # A run that was killed after step 40 and goes on from a checkpoint at 20.
    log = TensorBoardLog(folder, keep_until=20)
    for row in made[20:30]:
        log.append(row | {"loss": 1.5})
    log.close()
    events = accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(1, 31))
    assert events.Scalars("loss")[-1].value == 1.5


def test_without_tensorboard_there_is_a_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(GaleError, match="not installed") as caught:
        TensorBoardLog(tmp_path)
    assert "gale-llm[tensorboard]" in str(caught.value.hint)
