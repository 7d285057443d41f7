"""``gale serve`` as a process: its one line, its signals, and what survives a kill."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import pytest

from gale.core.errors import GaleError
from gale.platform.access import LOCAL_OWNER
from gale.platform.store import Store
from gale.server.runner import listen
from tests.server.live import Live

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    started: list[subprocess.Popen[str]] = []

    def run(*arguments: str) -> subprocess.Popen[str]:
        command = [
            sys.executable,
            "-m",
            "tests.server.serve_scripted",
            "--port",
            "0",
            "--db",
            f"sqlite:///{tmp_path / 'gale.db'}",
            *arguments,
        ]
        environment = {**os.environ, "GALE_HOME": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2])}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        started.append(process)
        return process

    yield run
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def url_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("Gale is ready at http://127.0.0.1:"), line
    assert line.endswith(" - model scripted/one - Ctrl-C stops\n")
    link = process.stdout.readline()
    assert link.startswith("Make it yours (once, within a day): " + line.split()[4] + "/#sign-in="), link
    return line.split()[4]


def begin_endless_turn(url: str) -> tuple[str, socket.socket]:
    conversation = httpx2.post(f"{url}/api/conversations", json={}).json()["id"]
    body = json.dumps({"content": "endless", "parent_id": None}).encode()
    sock = socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1])), timeout=30)
    head = f"POST /api/conversations/{conversation}/turns HTTP/1.1\r\nHost: localhost\r\n".encode()
    sock.sendall(head + b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    answer = b""
    while b"tick" not in answer:
        answer += sock.recv(65536)
    return conversation, sock


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_open_streams_and_exits_with_0(start: Start, tmp_path: Path, number: int) -> None:
    process = start()
    conversation, sock = begin_endless_turn(url_of(process))
    process.send_signal(number)
    answer = b""
    while part := sock.recv(65536):
        answer += part
    assert b"event: error\ndata: {" in answer
    assert b"server_shutting_down" in answer
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (0, "")
    assert "Traceback" not in err
    store = Store.open(f"sqlite:///{tmp_path / 'gale.db'}")
    _, messages = asyncio.run(store.conversations(LOCAL_OWNER).get(conversation))
    store.close()
    assert messages[1].status == "stopped"
    assert messages[1].content.startswith("tick ")


def test_a_question_survives_kill_9(start: Start) -> None:
    process = start()
    conversation, sock = begin_endless_turn(url_of(process))
    process.kill()
    process.wait()
    sock.close()
    url = url_of(start())
    loaded = httpx2.get(f"{url}/api/conversations/{conversation}").json()
    assert [message["role"] for message in loaded["messages"]] == ["user", "assistant"]
    assert loaded["messages"][0]["content"] == "endless"
    assert loaded["messages"][1]["status"] == "stopped"
    assert loaded["title"] == "endless"
    body = {"content": "hello again", "parent_id": loaded["leaf_id"]}
    assert "event: done" in httpx2.post(f"{url}/api/conversations/{conversation}/turns", json=body).text


def refused(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert out == ""
    assert "Traceback" not in err
    return err


def test_a_second_server_on_the_same_database_is_refused(start: Start) -> None:
    url = url_of(start())
    assert "Another Gale server" in refused(start())
    assert httpx2.post(f"{url}/api/conversations", json={}).status_code == 201


def test_a_port_in_use(start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"Port {port} on 127.0.0.1 is in use" in refused(start("--port", port))


def test_an_address_that_others_reach_is_refused(start: Start) -> None:
    assert "no keys" in refused(start("--host", "0.0.0.0"))
    for host in ("::", "192.0.2.1", "gale.example", ""):
        with pytest.raises(GaleError, match="no keys"):
            listen(host, 0)


def test_other_loopback_addresses_are_listened_on() -> None:
    for host in ("localhost", "127.0.0.1", "127.0.0.2"):
        listen(host, 0).close()


def test_a_database_that_cannot_be_opened(start: Start, tmp_path: Path) -> None:
    assert "unable to open" in refused(start("--db", f"sqlite:///{tmp_path}"))


def test_another_server_can_answer_in_the_model_s_place(start: Start, live: Live) -> None:
    url = url_of(start("--upstream", live.url, "--upstream-key-env", "HOME"))
    body = {"model": "scripted/one", "messages": [{"role": "user", "content": "one two"}]}
    answer = httpx2.post(f"{url}/v1/chat/completions", json=body, timeout=20).json()
    assert answer["choices"][0]["message"]["content"] == "one two"


def test_what_is_wrong_about_another_server_is_said(start: Start, live: Live, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("sk secret\n")
    for arguments, problem in (
        (["--model", "x"], "--upstream-model"),
        (["--upstream-key-env", "NO_SUCH_KEY"], "no key in the environment variable NO_SUCH_KEY"),
        (["--upstream-key-file", str(key)], "is no key"),
    ):
        said = refused(start("--upstream", live.url, *arguments))
        assert problem in said
        assert "secret" not in said
