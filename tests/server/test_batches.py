"""``/v1/batches`` with the official client over a real server, up to kills in the middle."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from openai import OpenAI

from gale.platform.store import Store
from gale.server import batch_lines, openai_batches
from gale.server.batch_journal import Journal
from gale.server.batch_lines import lines, validate
from tests.databases import address
from tests.server.live import Live, eventually, start
from tests.server.scripted_engine import ScriptedEngine

CHAT = "/v1/chat/completions"


def line(custom_id: str, content: str = "hello", **change: Any) -> dict[str, Any]:
    body = {"model": "scripted/one", "messages": [{"role": "user", "content": content}]}
    return {"custom_id": custom_id, "method": "POST", "url": CHAT, "body": body, **change}


def jsonl(*rows: dict[str, Any]) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("batches")
    with address(request, folder) as url:
        store = Store.open(url, files=folder / "files")
        live = start(store)
        yield live
        live.stop()
        store.close()


@pytest.fixture
def client(server: Live) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)


def begin(client: OpenAI, content: bytes, endpoint: Any = CHAT, **more: Any) -> Any:
    file = client.files.create(file=("requests.jsonl", content), purpose="batch")
    return client.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window="24h", **more)


def ended(client: OpenAI, batch_id: str) -> Any:
    deadline = time.monotonic() + 60
    while (batch := client.batches.retrieve(batch_id)).status not in ("completed", "failed", "expired", "cancelled"):
        assert time.monotonic() < deadline, batch
        time.sleep(0.05)
    return batch


def answers(client: OpenAI, file_id: str | None) -> dict[str, dict[str, Any]]:
    assert file_id is not None
    rows = [json.loads(row) for row in client.files.content(file_id).text.splitlines()]
    assert len({row["custom_id"] for row in rows}) == len(rows)
    return {row["custom_id"]: row for row in rows}


def said(row: dict[str, Any]) -> str:
    text: str = row["response"]["body"]["choices"][0]["message"]["content"]
    return text


def test_a_batch_s_whole_life(client: OpenAI) -> None:
    rows = [line(f"line-{n}", f"你好 number {n}") for n in range(20)]
    batch = begin(client, jsonl(*rows), metadata={"for": "a test"})
    assert batch.id.startswith("batch_")
    assert (batch.status, batch.endpoint, batch.completion_window) == ("validating", CHAT, "24h")
    assert batch.expires_at == pytest.approx(batch.created_at + 24 * 3600, abs=2)
    done = ended(client, batch.id)
    assert (done.status, done.model, done.metadata) == ("completed", "scripted/one", {"for": "a test"})
    assert (done.request_counts.total, done.request_counts.completed, done.request_counts.failed) == (20, 20, 0)
    assert (done.usage.input_tokens, done.usage.output_tokens, done.usage.total_tokens) == (80, 60, 140)
    assert done.in_progress_at <= done.finalizing_at <= done.completed_at
    assert done.error_file_id is None
    output = client.files.retrieve(done.output_file_id)
    assert (output.purpose, output.filename) == ("batch_output", f"{batch.id}_output.jsonl")
    found = answers(client, done.output_file_id)
    assert {name: said(row) for name, row in found.items()} == {f"line-{n}": f"你好 number {n}" for n in range(20)}
    one = found["line-3"]
    assert one["error"] is None
    assert one["response"]["status_code"] == 200
    assert one["response"]["request_id"] == one["id"]
    assert batch.id in [each.id for each in client.batches.list(limit=1)]


def test_lines_that_fail_stand_in_the_error_file(client: OpenAI) -> None:
    bad = line("unknown-model")
    for row in (rows := [line("good"), line("too-long", "word " * 200), line("bug", "bug-at-once"), bad]):
        row["body"]["model"] = "scripted/one"
    rows[3]["body"]["temperature"] = 9
    done = ended(client, begin(client, jsonl(*rows)).id)
    assert done.status == "completed"
    assert (done.request_counts.completed, done.request_counts.failed) == (1, 3)
    assert list(answers(client, done.output_file_id)) == ["good"]
    failed = answers(client, done.error_file_id)
    statuses = {name: row["response"]["status_code"] for name, row in failed.items()}
    assert statuses == {"too-long": 400, "bug": 500, "unknown-model": 400}
    assert failed["unknown-model"]["response"]["body"]["error"]["param"] == "temperature"
    assert "secret" not in json.dumps(failed)


def test_completions_are_batched_too_and_what_is_not_there_is_refused(client: OpenAI, tiny: Live) -> None:
    own = OpenAI(base_url=f"{tiny.url}/v1", api_key="any", max_retries=0)
    for endpoint, body in (
        ("/v1/completions", {"model": "tiny", "prompt": "The river", "max_tokens": 3}),
        ("/v1/embeddings", {"model": "tiny", "input": ["a", "b"]}),
        ("/v1/responses", {"model": "tiny", "input": "Hello", "max_output_tokens": 16, "store": False}),
    ):
        done = ended(own, begin(own, jsonl(line("x", url=endpoint, body=body)), endpoint).id)
        assert done.status == "completed", done
        assert done.request_counts.completed == 1, own.files.content(done.error_file_id).text
        assert done.usage.input_tokens > 0
    for endpoint in ("/v1/embeddings", "/v1/files", "/v1/videos"):
        with pytest.raises(openai.BadRequestError) as caught:
            begin(client, jsonl(line("x")), endpoint)
        assert caught.value.param == "endpoint"


def test_whoever_waits_for_an_answer_is_served_before_a_batch(client: OpenAI, server: Live) -> None:
    ended(client, begin(client, jsonl(line("x", "patient words"))).id)
    client.chat.completions.create(model="scripted/one", messages=[{"role": "user", "content": "now"}])
    engine = server.engine
    priority = {p[-1]["content"]: s.priority for p, s in zip(engine.prompts, engine.sampling, strict=True)}
    assert priority["now"] < priority["patient words"]


def faults(client: OpenAI, content: bytes) -> list[tuple[str, int | None]]:
    done = ended(client, begin(client, content).id)
    assert (done.status, done.output_file_id, done.request_counts.completed) == ("failed", None, 0)
    assert done.failed_at is not None
    return [(fault.code, fault.line) for fault in done.errors.data]


def test_a_file_is_checked_line_by_line_before_anything_is_answered(client: OpenAI, server: Live) -> None:
    before = len(server.engine.prompts)
    other = line("f")
    other["body"]["model"] = "another"
    stream = line("g")
    stream["body"]["stream"] = True
    content = b"\n".join(
        (
            jsonl(line("a")).strip(),
            b"{not json}",
            b"[]",
            jsonl(line("a")).strip(),
            jsonl(line("e", url="/v1/embeddings")).strip(),
            jsonl(other).strip(),
            jsonl(stream).strip(),
            jsonl(line("h", method="GET")).strip(),
            jsonl({"custom_id": "i"}).strip(),
            b'{"custom_id": "j", "custom_id": "k"}',
            b"\xff\xfe",
            b'{"custom_id": NaN}',
            b"[" * 100_000,
        )
    )
    assert faults(client, content) == [
        ("invalid_json_line", 2),
        ("invalid_type", 3),
        ("duplicate_custom_id", 4),
        ("mismatched_url", 5),
        ("mismatched_model", 6),
        ("unsupported_parameter", 7),
        ("invalid_value", 8),
        ("missing_required_parameter", 9),
        ("invalid_json_line", 10),
        ("invalid_json_line", 11),
        ("invalid_type", 12),
        ("invalid_json_line", 13),
    ]
    assert faults(client, b"") == [("empty_file", None)]
    assert len(server.engine.prompts) == before


def test_byte_order_mark_crlf_and_empty_lines_are_no_faults(client: OpenAI) -> None:
    content = b"\xef\xbb\xbf" + jsonl(line("a")).replace(b"\n", b"\r\n") + b"\r\n  \n" + jsonl(line("b")).strip()
    assert set(answers(client, ended(client, begin(client, content).id).output_file_id)) == {"a", "b"}


def test_limits_of_a_file_have_line_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"

    def found(content: bytes) -> list[tuple[str, int | None]]:
        path.write_bytes(content)
        return [(fault["code"], fault["line"]) for fault in validate(path, CHAT).errors]

    huge = line("huge", "x" * (9 * 2**20))
    assert found(jsonl(line("a"), huge, line("b"))) == [("line_too_long", 2)]
    assert found(jsonl(line("a")) + b"x" * (17 * 2**20)) == [("line_too_long", 2)]
    monkeypatch.setattr(batch_lines, "MOST_LINES", 3)
    assert found(jsonl(*(line(f"{n}") for n in range(5)))) == [("too_many_requests", 4)]
    monkeypatch.setattr(batch_lines, "MOST_ERRORS", 2)
    assert found(b"x\n" * 5) == [("invalid_json_line", 1), ("invalid_json_line", 2)]
    monkeypatch.setattr(batch_lines, "MOST_BYTES", 5)
    assert found(b"x\n" * 5) == [("file_too_large", None)]


def test_a_batch_is_cancelled_with_what_was_answered(client: OpenAI, server: Live) -> None:
    active = server.engine.active
    batch = begin(client, jsonl(line("quick"), *(line(f"{n}", "endless") for n in range(20))))
    eventually(lambda: server.engine.active == active + 8)
    assert client.batches.cancel(batch.id).status == "cancelling"
    with pytest.raises(openai.ConflictError):
        client.batches.cancel(batch.id)
    done = ended(client, batch.id)
    assert done.status == "cancelled"
    assert done.cancelling_at <= done.cancelled_at
    assert server.engine.active == active
    assert list(answers(client, done.output_file_id)) == ["quick"]
    assert (done.request_counts.total, done.request_counts.completed) == (21, 1)
    with pytest.raises(openai.ConflictError):
        client.batches.cancel(batch.id)


def test_the_file_of_a_batch_at_work_cannot_be_deleted(client: OpenAI, server: Live) -> None:
    batch = begin(client, jsonl(line("a", "endless")))
    with pytest.raises(openai.ConflictError):
        client.files.delete(batch.input_file_id)
    client.batches.cancel(batch.id)
    ended(client, batch.id)
    assert client.files.delete(batch.input_file_id).deleted


def test_a_batch_whose_time_is_over_keeps_what_was_answered(
    client: OpenAI, server: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openai_batches, "WINDOW_S", 3)
    active = server.engine.active
    done = ended(client, begin(client, jsonl(line("quick"), line("slow", "endless"), line("late", "silent"))).id)
    assert done.status == "expired"
    assert done.expired_at >= done.expires_at
    assert server.engine.active == active
    assert list(answers(client, done.output_file_id)) == ["quick"]
    late = answers(client, done.error_file_id)
    assert set(late) == {"slow", "late"}
    assert (late["slow"]["response"], late["slow"]["error"]["code"]) == (None, "batch_expired")


@pytest.mark.parametrize(
    ("change", "status", "param"),
    [
        ({"input_file_id": "file_unknown"}, 404, None),
        ({"input_file_id": None}, 400, "input_file_id"),
        ({"completion_window": "1h"}, 400, "completion_window"),
        ({"metadata": {str(n): "x" for n in range(17)}}, 400, "metadata"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 1}}, 400, "output_expires_after.seconds"),
    ],
)
def test_bad_batches_are_refused(
    client: OpenAI, server: Live, change: dict[str, Any], status: int, param: str | None
) -> None:
    file = client.files.create(file=("a", jsonl(line("a"))), purpose="batch")
    good = {"input_file_id": file.id, "endpoint": CHAT, "completion_window": "24h"}
    answer = server.http.post("/v1/batches", json={**good, **change})
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)


def test_a_file_for_something_else_is_refused(client: OpenAI) -> None:
    file = client.files.create(file=("a", jsonl(line("a"))), purpose="fine-tune")
    with pytest.raises(openai.BadRequestError, match="purpose 'fine-tune'"):
        client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")


def test_an_overloaded_engine_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Overloaded(ScriptedEngine):
        asked = 0

        def _script(self, content: str, prompt: int, sampling: Any) -> Any:
            self.asked += 1
            return super()._script("overloaded" if self.asked < 3 else content, prompt, sampling)

    from gale.server import batch_run

    monkeypatch.setattr(batch_run, "_LONGEST_WAIT_S", 0.05)
    store = Store.open(f"sqlite:///{tmp_path / 'gale.db'}", files=tmp_path / "files")
    live = start(store, engine=Overloaded())
    client = OpenAI(base_url=f"{live.url}/v1", api_key="any", max_retries=0)
    try:
        done = ended(client, begin(client, jsonl(line("a"))).id)
        assert said(answers(client, done.output_file_id)["a"]) == "hello"
        assert live.engine.asked == 3
    finally:
        live.stop()
        store.close()


def test_a_journal_goes_on_after_its_last_whole_line(tmp_path: Path) -> None:
    usage = {"prompt_tokens": 2, "completion_tokens": 3}
    row = {"custom_id": "a", "response": {"body": {"usage": usage}}}
    journal = Journal(tmp_path)
    journal.add("output", "a", json.dumps(row), usage)
    journal.close()
    with (tmp_path / "output.jsonl").open("ab") as file:
        file.write(b'{"custom_id": "b", "respon')
    journal = Journal(tmp_path)
    assert (journal.done, journal.counts, journal.tokens.shown["total_tokens"]) == ({"a"}, (1, 0), 5)
    journal.add("output", "c", json.dumps({**row, "custom_id": "c"}))
    journal.close()
    assert [json.loads(each)["custom_id"] for each in (tmp_path / "output.jsonl").open()] == ["a", "c"]


Start = Callable[[], tuple[subprocess.Popen[str], str]]


@pytest.fixture
def start_process(tmp_path: Path) -> Iterator[Start]:
    started: list[subprocess.Popen[str]] = []
    command = [sys.executable, "-m", "tests.server.serve_scripted", "--port", "0"]
    command += ["--db", f"sqlite:///{tmp_path / 'gale.db'}"]
    environment = {**os.environ, "GALE_HOME": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2])}

    def run() -> tuple[subprocess.Popen[str], str]:
        log = (tmp_path / "log").open("a")
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
        started.append(process)
        assert process.stdout is not None
        return process, process.stdout.readline().split()[4]

    yield run
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.mark.slow
def test_a_killed_server_s_batch_goes_on_without_repeating_a_line(start_process: Start, tmp_path: Path) -> None:
    total = 60
    process, url = start_process()
    client = OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)
    batch = begin(client, jsonl(*(line(f"{n}", f"late {n}") for n in range(total))))
    journal = tmp_path / "files" / "batches" / batch.id / "output.jsonl"
    for kill in range(2):
        eventually(lambda: journal.exists() and journal.read_bytes().count(b"\n") > 10 * (kill + 1))  # noqa: B023
        process.kill()
        process.wait()
        process, url = start_process()
    written = [json.loads(row) for row in journal.read_bytes().splitlines() if row.endswith(b"}")]
    client = OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)
    done = ended(client, batch.id)
    assert (done.status, done.request_counts.completed) == ("completed", total)
    found = answers(client, done.output_file_id)
    assert set(found) == {f"{n}" for n in range(total)}
    # What was answered before the kills is what stands there: nothing was asked twice.
    assert all(found[row["custom_id"]]["id"] == row["id"] for row in written)
    assert not journal.parent.exists()


@pytest.mark.slow
def test_a_server_that_stops_lets_the_next_one_go_on(start_process: Start) -> None:
    process, url = start_process()
    client = OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)
    batch = begin(client, jsonl(*(line(f"{n}", f"late {n}") for n in range(30))))
    deadline = time.monotonic() + 30
    while client.batches.retrieve(batch.id).request_counts.completed == 0:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.terminate()
    assert process.wait(30) == 0
    _, url = start_process()
    client = OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)
    assert ended(client, batch.id).request_counts.completed == 30
    assert httpx2.get(f"{url}/readyz").status_code == 200


def test_lines_are_read_as_they_were_checked(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(line("a", "Grüße"), line("b")))
    assert validate(path, CHAT).total == 2
    assert [(each.number, each.custom_id) for each in lines(path)] == [(1, "a"), (2, "b")]
    assert json.loads(next(lines(path)).body)["messages"][0]["content"] == "Grüße"


def test_the_worker_s_engine_is_still_a_reader(engine: Any) -> None:
    from gale.engine.request import Reader
    from gale.server.batch_engine import patient

    assert isinstance(patient(engine), Reader)
    assert not isinstance(patient(ScriptedEngine()), Reader)
    assert asyncio.run(patient(engine).embed([[5, 6]])).prompt_tokens == 2
