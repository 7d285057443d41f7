"""Record what llama.cpp's ``llama-server`` answers, into ``recordings/llama_cpp.json``. Needs its binary and a model:

gale model export gale-0 --to gguf --out /tmp/gale-0.gguf
python -m tests.server.record_llama_cpp path/to/llama-server /tmp/gale-0.gguf
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import openai

from gale.core.errors import GaleError
from tests.server.llama_cpp_cases import ENGINE, GALE_SERVE, RESTARTED, WRONG_KEY, ask_all, chat
from tests.server.recorded import Recorded, relaying, store
from tests.server.upstreams import on
from tests.train.runs import free_port

ARGUMENTS = ("--alias", "gale-0", "--ctx-size", "512", "--parallel", "1", "--threads", "1", "--jinja")


class LlamaServer:
    """A ``llama-server`` of this machine, and every exchange with it."""

    def __init__(self, binary: Path, model: Path, *more: str) -> None:
        self._command = [str(binary), "-m", model.name, *ARGUMENTS, *more]
        self._folder = model.parent  # so that no answer holds a path
        self.port = free_port()
        self.seen: list[Recorded] = []
        self.start()

    def start(self) -> None:
        command = [*self._command, "--host", "127.0.0.1", "--port", str(self.port)]
        self._process = subprocess.Popen(
            command, cwd=self._folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait()

    def ready(self) -> None:
        while self.ask("GET", "/health", None, {}).status != 200:
            time.sleep(0.05)
        self.seen.clear()

    def ask(self, method: str, path: str, body: Any, headers: dict[str, str]) -> Recorded:
        """Ask it as soon as somebody listens."""
        content = None if body is None else json.dumps(body, ensure_ascii=False).encode()
        kept = {name: value for name, value in headers.items() if name.lower() in ("content-type", "authorization")}
        while True:
            connection = http.client.HTTPConnection("127.0.0.1", self.port)
            try:
                connection.request(method, path, content, kept)
                break
            except ConnectionRefusedError:
                time.sleep(0.002)
        response = connection.getresponse()
        chunks = []
        while part := response.read1():  # at most a chunk of the chunked encoding
            chunks.append(part.decode())
        shown = [list(each) for each in response.getheaders()]
        self.seen.append(Recorded(method, path, body, response.status, shown, chunks))
        connection.close()
        return self.seen[-1]


@contextmanager
def running(*arguments: Any) -> Iterator[LlamaServer]:
    server = LlamaServer(*arguments)
    try:
        server.ready()
        yield server
    finally:
        server.stop()


@contextmanager
def gale_serve(upstream: str, home: Path) -> Iterator[openai.OpenAI]:
    """OpenAI's client of a ``gale serve`` that has ``upstream`` in the model's place."""
    command = [sys.executable, "-m", "gale.cli", "serve", "--port", "0", "--upstream", upstream]
    command += ["--db", f"sqlite:///{home / 'gale.db'}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"GALE_HOME": str(home)})
    try:
        assert process.stdout is not None
        url = process.stdout.readline().split()[4]
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            yield client
    finally:
        process.terminate()
        process.communicate()


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("binary", type=Path)
    arguments.add_argument("model", type=Path, help="the built-in model as GGUF")
    asked = arguments.parse_args()
    binary, model = asked.binary.resolve(), asked.model.resolve()
    cases: dict[str, list[Recorded]] = {}
    for name, case in ENGINE.items():  # each by a fresh server, since prompts seen before are cached
        with running(binary, model) as server, relaying(server.ask) as url, suppress(GaleError):
            on(url, case)
        cases[name] = server.seen
    with (
        running(binary, model) as server,
        relaying(server.ask) as url,
        tempfile.TemporaryDirectory() as home,
        gale_serve(url, Path(home)) as client,
    ):
        ask_all(client)
    cases[GALE_SERVE] = server.seen
    with running(binary, model, "--api-key", "right") as server, relaying(server.ask) as url, suppress(GaleError):
        on(url, chat(), key="wrong")
    cases[WRONG_KEY] = server.seen
    with running(binary, model) as server, relaying(server.ask) as url:

        async def restart(engine: Any) -> Any:
            server.stop()
            server.start()
            return await chat()(engine)

        on(url, restart)
    cases[RESTARTED] = server.seen
    said = subprocess.run([binary, "--version"], capture_output=True, text=True, check=True)
    version = re.search(r"version: (.*)", said.stdout + said.stderr)
    about = {"software": "llama.cpp llama-server", "source": "github.com/ggml-org/llama.cpp (MIT)"}
    about |= {"version": version[1] if version else "", "arguments": ARGUMENTS}
    store("llama_cpp", about | {"model": "gale-0, bf16, by gale model export"}, cases)


if __name__ == "__main__":
    main()
