"""Adapters over HTTP: each is a model of its own to the official client, and `gale serve --adapter` loads them."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx2
import openai
import pytest
from openai import OpenAI

from gale.engine.local import LocalEngine
from gale.model.checkpoint import load_model
from gale.platform.store import Store
from gale.text.tokenizer import Tokenizer
from tests.engine.conftest import answer
from tests.server.live import Live, start
from tests.tiny_model import save_adapter_folder, save_folder

QUESTION = "Where does the river go?"


@pytest.fixture(scope="module")
def folder(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and an adapter in one folder."""
    path = tmp_path_factory.mktemp("models")
    save_folder(tokenizer, path / "base")
    save_adapter_folder(path / "base", path / "poems", seed=3)
    return path


@pytest.fixture(scope="module")
def engine(folder: Path, tokenizer: Tokenizer) -> LocalEngine:
    import torch

    model = load_model(folder / "base", dtype=torch.float32)
    return LocalEngine(model, tokenizer, model_id="tiny", folder=folder / "base")


@pytest.fixture(scope="module")
def server(store: Store, engine: LocalEngine) -> Iterator[Live]:
    live = start(store, engine=engine)
    yield live
    live.stop()
    asyncio.run(engine.close())


def test_an_adapter_is_a_model_that_comes_and_goes(server: Live, engine: LocalEngine, folder: Path) -> None:
    client = OpenAI(base_url=f"{server.url}/v1", api_key="anything at all", max_retries=0)

    def ask(model: str) -> str | None:
        reply = client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": QUESTION}], temperature=0, max_tokens=12
        )
        assert reply.model == model
        return reply.choices[0].message.content

    assert [model.id for model in client.models.list()] == ["tiny", "gale-moderation"]
    with pytest.raises(openai.NotFoundError):
        ask("poems")
    engine.load_adapter("poems", folder / "poems")
    assert [model.id for model in client.models.list()] == ["tiny", "poems", "gale-moderation"]
    assert client.models.retrieve("poems").parent == "tiny"  # type: ignore[attr-defined]
    for model, adapter in (("tiny", None), ("poems", "poems")):
        expected, _ = asyncio.run(answer(engine, QUESTION, temperature=0, max_tokens=12, adapter=adapter))
        assert ask(model) == expected
    assert ask("poems") != ask("tiny")
    texts = [client.completions.create(model=name, prompt="The sea", temperature=0) for name in ("tiny", "poems")]
    assert [text.model for text in texts] == ["tiny", "poems"]
    assert texts[0].choices[0].text != texts[1].choices[0].text
    chunks = list(client.completions.create(model="poems", prompt="The sea", temperature=0, stream=True))
    assert {chunk.model for chunk in chunks} == {"poems"}
    assert "".join(chunk.choices[0].text for chunk in chunks) == texts[1].choices[0].text
    engine.unload_adapter("poems")
    with pytest.raises(openai.NotFoundError) as caught:
        ask("poems")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    assert [model.id for model in client.models.list()] == ["tiny", "gale-moderation"]


def run_serve(folder: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "gale.cli", "serve", "--model", str(folder / "base"), "--port", "0", *options]
    environment = {**os.environ, "GALE_HOME": str(folder / "home")}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def test_gale_serve_loads_the_adapters_it_is_given(folder: Path) -> None:
    save_adapter_folder(folder / "base", folder / "letters", seed=4)
    process = run_serve(folder, "--adapter", f"poems={folder / 'poems'}", "--adapter", f"letters={folder / 'letters'}")
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("Gale is ready at "), line + process.communicate()[1]
        models = httpx2.get(f"{line.split()[4]}/v1/models").json()["data"]
        assert [model["id"] for model in models] == ["base", "poems", "letters", "gale-moderation"]
        process.send_signal(signal.SIGTERM)
        assert process.wait(300) == 0
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("options", "code", "reason"),
    [
        (["--adapter", "poems"], 2, "NAME=DIR"),
        (["--adapter", "x={}/poems", "--adapter", "x={}/poems"], 2, "names of their own"),
        (["--adapter", "x={}/nothing"], 1, "holds no adapter"),
    ],
)
def test_what_is_wrong_with_an_adapter_is_said_at_the_start(
    folder: Path, options: list[str], code: int, reason: str
) -> None:
    process = run_serve(folder, *(option.format(folder) for option in options))
    _, errors = process.communicate(timeout=300)
    assert process.returncode == code
    assert reason in " ".join(errors.replace("│", " ").split())
