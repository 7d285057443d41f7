"""``/v1/files`` and ``/v1/uploads`` with the official client over a real server, and what no good client sends."""

from __future__ import annotations

import asyncio
import hashlib
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI

from gale.platform.access import LOCAL_OWNER
from gale.platform.files import FileLimits
from gale.platform.store import Store
from tests.databases import address
from tests.server.live import Live, start

TEXT = b'{"text": "Gr\xc3\xbc\xc3\x9fe"}\n' * 1000


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A server that takes files of at most 2 MiB, parts of at most 1 MiB, and 8 MiB of a project."""
    folder = tmp_path_factory.mktemp("files")
    limits = FileLimits(file_bytes=2**21, upload_bytes=2**22, part_bytes=2**20, project_bytes=2**23)
    with address(request, folder) as url:
        store = Store.open(url, files=folder / "files", file_limits=limits)
        live = start(store)
        yield live
        live.stop()
        store.close()


@pytest.fixture
def client(server: Live) -> Iterator[OpenAI]:
    made = OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)
    yield made
    for file in made.files.list():
        made.files.delete(file.id)


def on_disk(server: Live) -> list[Path]:
    return [path for path in server.store.file_folder.root.rglob("*") if path.is_file()]


def form(server: Live, content: bytes, boundary: str = "b", path: str = "/v1/files") -> Any:
    headers = {"content-type": f"multipart/form-data; boundary={boundary}"}
    return server.http.post(path, content=content, headers=headers)


def part(name: str, value: str, filename: str | None = None) -> bytes:
    file = f'; filename="{filename}"' if filename is not None else ""
    return f'--b\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n{value}\r\n'.encode()


def test_a_file_s_whole_life(client: OpenAI, server: Live) -> None:
    made = client.files.create(file=("train 你.jsonl", TEXT), purpose="fine-tune")
    assert made.id.startswith("file_")
    assert (made.object, made.bytes, made.filename, made.purpose) == ("file", len(TEXT), "train 你.jsonl", "fine-tune")
    assert (made.status, made.expires_at) == ("processed", None)
    assert client.files.retrieve(made.id) == made
    answer = client.files.with_raw_response.content(made.id)
    assert answer.content == TEXT
    assert answer.headers["content-disposition"] == (
        "attachment; filename=\"train _.jsonl\"; filename*=UTF-8''train%20%E4%BD%A0.jsonl"
    )
    assert answer.headers["content-type"] == "application/octet-stream"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert client.files.delete(made.id).deleted
    for call in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError):
            call(made.id)
    assert on_disk(server) == []


def test_files_are_listed_page_by_page_and_by_purpose(client: OpenAI) -> None:
    ids = [client.files.create(file=(f"{n}", b"x"), purpose="user_data").id for n in range(5)]
    other = client.files.create(file=("other", b"x"), purpose="evals").id
    assert [file.id for file in client.files.list(purpose="user_data", limit=2)] == ids[::-1]
    assert [file.id for file in client.files.list(order="asc", limit=4)] == [*ids, other]
    page = client.files.list(limit=2)
    assert page.has_more
    with pytest.raises(openai.BadRequestError) as caught:
        client.files.list(after="file_unknown")
    assert caught.value.param == "after"


def test_files_for_batches_go_after_thirty_days_and_others_when_asked(client: OpenAI) -> None:
    batch = client.files.create(file=("a", b"x"), purpose="batch")
    assert batch.expires_at == batch.created_at + 30 * 24 * 3600
    soon = client.files.create(
        file=("a", b"x"), purpose="vision", expires_after={"anchor": "created_at", "seconds": 3600}
    )
    assert soon.expires_at == soon.created_at + 3600
    for seconds in (3599, 2_592_001):
        with pytest.raises(openai.BadRequestError) as caught:
            client.files.create(
                file=("a", b"x"), purpose="vision", expires_after={"anchor": "created_at", "seconds": seconds}
            )
        assert caught.value.param == "expires_after.seconds"


def test_a_range_is_answered_with_the_whole(client: OpenAI, server: Live) -> None:
    made = client.files.create(file=("a", TEXT), purpose="user_data")
    ranges = "bytes=" + ",".join(f"{n}-{n}" for n in range(1000))
    answer = server.http.get(f"/v1/files/{made.id}/content", headers={"range": ranges})
    assert (answer.status_code, answer.content) == (200, TEXT)


def test_names_are_shown_without_folders_and_cannot_leave_the_folder(client: OpenAI, server: Live) -> None:
    for name, shown in (("../../etc/passwd", "passwd"), ("C:\\x\\y.txt", "y.txt"), ("..", "..")):
        assert client.files.create(file=(name, b"x"), purpose="user_data").filename == shown
    assert form(server, part("file", "x", "a\x7fb") + part("purpose", "evals") + b"--b--").json()["filename"] == "ab"
    assert form(server, part("file", "x", "") + part("purpose", "evals") + b"--b--").json()["filename"] == "file"
    assert {path.name.partition("_")[0] for path in on_disk(server)} == {"file"}


def test_forms_that_are_none_are_refused_and_leave_nothing(client: OpenAI, server: Live) -> None:
    good = part("purpose", "evals") + part("file", "x", "x")
    for content, param in (
        (b"", None),
        (b"garbage", None),
        (good, None),
        (good + part("purpose", "evals") + b"--b--", None),
        (good + part("file", "x", "x") + b"--b--", None),
        (part("purpose", "evals") + b"--b--", "file"),
        (part("purpose", "evals") + part("file", "x") + b"--b--", "file"),
        (part("purpose", "evals", "f") + b"--b--", "purpose"),
        (part("file", "x", "x") + b"--b--", "purpose"),
        (part("purpose", "batch_output") + part("file", "x", "x") + b"--b--", "purpose"),
        (part("purpose", "e" * 5000) + part("file", "x", "x") + b"--b--", "purpose"),
        (good + part("expires_after[seconds]", "3600") + b"--b--", "expires_after.anchor"),
        (b"--b\r\nX: " + b"y" * 10_000 + b"\r\n\r\n--b--", None),
        (b"--b\r\n\r\nno name\r\n--b--", None),
    ):
        answer = form(server, content)
        assert answer.status_code == 400, content[:80]
        assert answer.json()["error"]["param"] == param, content[:80]
    assert form(server, good, boundary="c" * 80).status_code == 400
    assert server.http.post("/v1/files", json={"purpose": "evals"}).status_code == 415
    assert on_disk(server) == []
    assert list(client.files.list()) == []


def test_very_many_parts_and_endless_fields_are_refused_while_they_come(server: Live) -> None:
    many = b"".join(part(f"field{n}", "x") for n in range(100_000))
    assert form(server, many).json()["error"]["code"] == "invalid_form"

    def endless() -> Iterator[bytes]:
        yield b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\n'
        for _ in range(64):
            yield b"x" * 2**16

    headers = {"content-type": "multipart/form-data; boundary=b"}
    answer = server.http.post("/v1/files", content=endless(), headers=headers)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "purpose")


def test_a_file_over_the_limit_is_refused_and_leaves_nothing(client: OpenAI, server: Live) -> None:
    assert client.files.create(file=("a", b"x" * 2**21), purpose="evals").bytes == 2**21
    with pytest.raises(openai.APIStatusError) as caught:
        client.files.create(file=("a", b"x" * (2**21 + 1)), purpose="evals")
    assert (caught.value.status_code, caught.value.code) == (413, "file_too_large")
    assert len(on_disk(server)) == 1


def test_a_project_keeps_no_more_than_its_share(client: OpenAI, server: Live) -> None:
    for _ in range(4):
        client.files.create(file=("a", b"x" * 2**21), purpose="evals")
    with pytest.raises(openai.APIStatusError) as caught:
        client.files.create(file=("a", b"x"), purpose="evals")
    assert (caught.value.status_code, caught.value.code) == (413, "storage_quota_exceeded")
    with pytest.raises(openai.APIStatusError):
        client.uploads.create(bytes=1, filename="a", mime_type="text/plain", purpose="evals")
    assert len(on_disk(server)) == 4


def test_bodies_of_other_routes_stay_small(server: Live) -> None:
    answer = server.http.post("/v1/chat/completions", content=b"x" * (9 * 2**20))
    assert answer.status_code == 413


def test_a_client_that_leaves_half_way_leaves_nothing(server: Live) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as sock:
        sock.sendall(b"POST /v1/files HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n")
        sock.sendall(b"Content-Type: multipart/form-data; boundary=b\r\n\r\n" + part("file", "x" * 1000, "x"))
    from tests.server.live import eventually

    eventually(lambda: on_disk(server) == [])


def test_parts_become_one_file(client: OpenAI, server: Live, tmp_path: Path) -> None:
    content = bytes(range(256)) * 12_000
    (tmp_path / "big.bin").write_bytes(content)
    upload = client.uploads.upload_file_chunked(
        file=tmp_path / "big.bin",
        mime_type="application/octet-stream",
        purpose="user_data",
        part_size=2**20,
        md5=hashlib.md5(content).hexdigest(),
    )
    assert (upload.status, upload.bytes) == ("completed", len(content))
    assert upload.file is not None
    assert (upload.file.filename, upload.file.bytes) == ("big.bin", len(content))
    assert client.files.content(upload.file.id).read() == content
    assert len(on_disk(server)) == 1


def test_parts_are_joined_in_the_order_that_is_asked_for(client: OpenAI) -> None:
    upload = client.uploads.create(bytes=6, filename="a", mime_type="text/plain", purpose="evals")
    one, two, three = (client.uploads.parts.create(upload.id, data=data).id for data in (b"one", b"two", b"THREE"))
    for part_ids, param in (
        ([one], "part_ids"),
        ([one, one], "part_ids"),
        ([one, three], "part_ids"),
        ([one, "part_x"], "part_ids[1]"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            client.uploads.complete(upload.id, part_ids=part_ids)
        assert caught.value.param == param
    with pytest.raises(openai.BadRequestError) as caught:
        client.uploads.complete(upload.id, part_ids=[two, one], md5="0" * 32)
    assert caught.value.param == "md5"
    done = client.uploads.complete(upload.id, part_ids=[two, one], md5=hashlib.md5(b"twoone").hexdigest().upper())
    assert done.file is not None
    assert client.files.content(done.file.id).read() == b"twoone"
    for call in (
        lambda: client.uploads.complete(upload.id, part_ids=[two, one]),
        lambda: client.uploads.cancel(upload.id),
        lambda: client.uploads.parts.create(upload.id, data=b"x"),
    ):
        with pytest.raises(openai.ConflictError):
            call()


def test_a_cancelled_upload_takes_nothing_and_keeps_nothing(client: OpenAI, server: Live) -> None:
    upload = client.uploads.create(bytes=3, filename="a", mime_type="text/plain", purpose="evals")
    client.uploads.parts.create(upload.id, data=b"abc")
    assert client.uploads.cancel(upload.id).status == "cancelled"
    with pytest.raises(openai.ConflictError):
        client.uploads.parts.create(upload.id, data=b"abc")
    assert on_disk(server) == []


def test_an_upload_takes_no_more_than_was_announced(client: OpenAI, server: Live) -> None:
    upload = client.uploads.create(bytes=2, filename="a", mime_type="text/plain", purpose="evals")
    with pytest.raises(openai.BadRequestError) as caught:
        client.uploads.parts.create(upload.id, data=b"abcde")
    assert caught.value.param == "data"
    with pytest.raises(openai.APIStatusError) as large:
        client.uploads.parts.create(upload.id, data=b"x" * (2**20 + 1))
    assert large.value.status_code == 413
    with pytest.raises(openai.APIStatusError) as larger:
        client.uploads.create(bytes=2**22 + 1, filename="a", mime_type="text/plain", purpose="evals")
    assert larger.value.status_code == 413
    client.uploads.cancel(upload.id)
    assert on_disk(server) == []


def test_an_upload_expires(client: OpenAI, server: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gale.platform.uploads.LASTS_S", -1)
    upload = client.uploads.create(bytes=2, filename="a", mime_type="text/plain", purpose="evals")
    assert upload.status == "expired"
    with pytest.raises(openai.ConflictError, match="expired"):
        client.uploads.parts.create(upload.id, data=b"ab")


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"bytes": 0}, "bytes"),
        ({"bytes": 2**63}, "bytes"),
        ({"bytes": True}, "bytes"),
        ({"filename": ""}, "filename"),
        ({"purpose": "batch_output"}, "purpose"),
        ({"purpose": None}, "purpose"),
        ({"expires_after": {"anchor": "now", "seconds": 3600}}, "expires_after.anchor"),
    ],
)
def test_bad_uploads_are_refused(server: Live, change: dict[str, Any], param: str) -> None:
    good = {"bytes": 1, "filename": "a", "mime_type": "text/plain", "purpose": "evals"}
    answer = server.http.post("/v1/uploads", json={**good, **change})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_what_killed_processes_left_is_swept_away(client: OpenAI, server: Live, run_on: Callable[..., Any]) -> None:
    kept = client.files.create(file=("a", b"x"), purpose="evals")
    upload = client.uploads.create(bytes=3, filename="a", mime_type="text/plain", purpose="evals")
    client.uploads.parts.create(upload.id, data=b"abc")
    server.store.file_folder.incoming(10).write(b"half")
    assert len(on_disk(server)) == 3
    run_on(server.store.sweep())
    assert len(on_disk(server)) == 3
    run_on(server.store.sweep(abandoned_s=0))
    assert [path.name for path in on_disk(server)] == [kept.id]


def test_files_whose_time_is_over_are_gone(
    client: OpenAI, server: Live, run_on: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    client.files.create(file=("a", b"x"), purpose="vision", expires_after={"anchor": "created_at", "seconds": 3600})
    from gale.platform import files

    now = files.now_us()
    monkeypatch.setattr(files, "now_us", lambda: now + 3600 * 1_000_000)
    assert list(client.files.list()) == []
    run_on(server.store.sweep())
    assert on_disk(server) == []


@pytest.fixture
def run_on() -> Callable[..., Any]:
    return lambda work: asyncio.run(work)


def test_a_file_that_a_job_needs_cannot_be_deleted(client: OpenAI, server: Live, run_on: Callable[..., Any]) -> None:
    made = client.files.create(file=("a", b"x"), purpose="fine-tune")
    jobs = server.store.jobs
    job = run_on(jobs.create(LOCAL_OWNER, "fine_tuning", {"training_file": made.id}, prefix="ftjob", state="queued"))
    with pytest.raises(openai.ConflictError, match=job.id):
        client.files.delete(made.id)
    run_on(jobs.change(LOCAL_OWNER, "fine_tuning", job.id, ("queued",), "cancelled"))
    assert client.files.delete(made.id).deleted
