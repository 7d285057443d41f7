"""``gale serve --ray``: replicas on a real two-node Ray cluster are killed under load, and no request is lost."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from openai import AsyncOpenAI

from gale.assistant.rerank import rerank
from gale.engine.local import LocalEngine
from gale.engine.request import SamplingParams, TextDelta
from gale.text.template import Message
from gale.text.tokenizer import Tokenizer
from tests.tiny_model import save_adapter_folder, save_folder

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    # So wide that an answer in bf16 does not depend on its batch even without the kernels.
    shape = {"hidden_size": 128, "intermediate_size": 256, "heads": 4, "head_dim": 32}
    return save_folder(tokenizer, tmp_path_factory.mktemp("replicas") / "tiny", **shape)


@pytest.fixture(scope="module")
def adapter(folder: Path) -> Path:
    return save_adapter_folder(folder, folder.parent / "poems", seed=1)


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a cluster of two machines with one processor each."""
    pytest.importorskip("ray", reason="Ray is an optional extra")
    from ray.cluster_utils import Cluster

    small = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        started = Cluster(initialize_head=True, head_node_args={**small, "include_dashboard": False})
        started.add_node(**small)
        try:
            yield started.address
        finally:
            started.shutdown()


def start(cluster: str, folder: Path, home: Path, *more: str, stderr: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "gale.cli", "serve", "--ray", cluster, "--model", str(folder), "--port", "0"]
    command += ["--replicas", "2", "--replica-cpus", "0.5", "--db", f"sqlite:///{home / 'gale.db'}", *more]
    environment = {**os.environ, "GALE_HOME": str(home), "PYTHONPATH": str(ROOT), "GALE_LOG_LEVEL": "WARNING"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment, cwd=ROOT)


class Front:
    """``gale serve --ray`` in a process of its own."""

    def __init__(self, cluster: str, folder: Path, adapter: Path, home: Path) -> None:
        self.log = (home / "log").open("w+")
        self.process = start(cluster, folder, home, "--adapter", f"poems={adapter}", stderr=self.log)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith("Gale is ready at "), (home / "log").read_text()
        self.url = line.split()[4]

    def replicas(self) -> list[int]:
        """Process ids of the replicas that run."""
        found = []
        for process in Path("/proc").iterdir():
            try:
                command = (process / "cmdline").read_bytes() if process.name.isdigit() else b""
            except OSError:  # gone meanwhile
                continue
            # Ray names a replica's process after its application, which is named after the front's port.
            if b"ServeReplica:gale-" in command and f"-{self.url.rsplit(':', 1)[1]}:".encode() in command:
                found.append(int(process.name))
        return found

    def wait_for_replicas(self, count: int) -> list[int]:
        deadline = time.monotonic() + 300
        while len(found := self.replicas()) != count:
            assert time.monotonic() < deadline, f"{len(found)} replicas in place of {count}"
            time.sleep(0.1)
        return found


@pytest.fixture(scope="module")
def front(cluster: str, folder: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    started = Front(cluster, folder, adapter, tmp_path_factory.mktemp("front"))
    yield started
    started.process.kill()
    started.process.communicate()
    started.log.close()


@pytest.fixture(scope="module")
def local(folder: Path, adapter: Path) -> Iterator[LocalEngine]:
    """The same model in this process: what answers have to be."""
    engine = LocalEngine.load(folder)
    engine.load_adapter("poems", adapter)
    yield engine
    asyncio.run(engine.close())


REQUESTS: list[dict[str, Any]] = [
    {"temperature": 0.0, "max_tokens": 400},
    {"temperature": 0.9, "max_tokens": 400, "seed": 7},
    {"temperature": 0.9, "max_tokens": 400},  # unseeded: there is nothing to compare it with
]


async def here(engine: LocalEngine, text: str, options: dict[str, Any]) -> str:
    events = engine.chat([Message(role="user", content=text)], SamplingParams(**options))
    return "".join([event.text async for event in events if isinstance(event, TextDelta)])


async def under_load(
    front: Front, strike: Callable[[], None], *, streams: int
) -> list[tuple[str, dict[str, Any], str]]:
    """Many answers at once, with ``strike`` done when every stream has begun: (question, options, answer) of each."""
    begun = [asyncio.Event() for _ in range(streams)]

    async def one(client: AsyncOpenAI, number: int, options: dict[str, Any]) -> tuple[str, dict[str, Any], str]:
        text, parts = f"Where does river {number} go?", []
        # The model's name is its folder's.
        stream = await client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": text}], stream=True, **options
        )
        async for chunk in stream:
            parts.append(chunk.choices[0].delta.content or "")
            begun[number].set()
        assert chunk.choices[0].finish_reason in ("stop", "length")
        return text, options, "".join(parts)

    async with AsyncOpenAI(base_url=f"{front.url}/v1", api_key="k", max_retries=0, timeout=300) as client:
        running = [asyncio.create_task(one(client, number, REQUESTS[number % 3])) for number in range(streams)]
        await asyncio.gather(*(each.wait() for each in begun))
        await asyncio.to_thread(strike)
        return await asyncio.gather(*running)


def check(answers: list[tuple[str, dict[str, Any], str]], local: LocalEngine) -> None:
    async def all_here() -> None:
        for text, options, answer in answers:
            if options["temperature"] == 0 or "seed" in options:
                assert answer == await here(local, text, options)

    asyncio.run(all_here())


def test_replicas_answer_as_the_engine_alone_and_refuse_alike(front: Front, local: LocalEngine) -> None:
    body = {"model": "tiny", "prompt": "The wind 风", "max_tokens": 20, "temperature": 0, "logprobs": 2, "echo": True}
    answer = httpx2.post(f"{front.url}/v1/completions", json=body, timeout=60).json()["choices"][0]
    prompt = local.encode("The wind 风")
    sampling = SamplingParams(max_tokens=20, temperature=0, logprobs=2, prompt_logprobs=True)

    async def alone() -> list[Any]:
        return [event async for event in local.complete(prompt, sampling)]

    scores, *deltas, _ = asyncio.run(alone())
    logprobs = [score.logprob for score in (*scores.scores, *(delta.score for delta in deltas))]
    assert answer["logprobs"]["token_logprobs"] == logprobs
    assert answer["text"] == "The wind 风" + "".join(delta.text for delta in deltas)
    long = {"model": "tiny", "messages": [{"role": "user", "content": "风 " * 800}]}
    refused = httpx2.post(f"{front.url}/v1/chat/completions", json=long, timeout=60)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "context_length_exceeded")


def test_replicas_embed_rerank_decide_and_answer_under_adapters_as_the_engine_alone(
    front: Front, local: LocalEngine
) -> None:
    texts = ["Where does the river go?", "风 wind", "a"]

    def post(path: str, **body: Any) -> Any:
        response = httpx2.post(f"{front.url}/v1/{path}", json=body, timeout=60)
        assert response.status_code == 200, response.text
        return response.json()

    for model, adapter in (("tiny", None), ("poems", "poems")):
        vectors = [item["embedding"] for item in post("embeddings", model=model, input=texts)["data"]]
        assert vectors == asyncio.run(local.embed(texts, adapter=adapter)).vectors
        labels = post("decisions", model=model, prompt="The wind", labels=[" came", " went"])["labels"]
        alone = asyncio.run(local.decide(local.encode("The wind"), [" came", " went"], adapter=adapter))
        assert [label["logprob"] for label in labels] == alone.logprobs
        ranking = asyncio.run(rerank(local, texts[0], texts, adapter=adapter))
        results = post("rerank", model=model, query=texts[0], documents=texts)["results"]
        assert [(each["index"], each["relevance_score"]) for each in results] == ranking.scores
        messages = [{"role": "user", "content": texts[0]}]
        answer = post("chat/completions", model=model, messages=messages, temperature=0, max_tokens=20)
        expected = asyncio.run(here(local, texts[0], {"temperature": 0, "max_tokens": 20, "adapter": adapter}))
        assert answer["choices"][0]["message"]["content"] == expected


def test_a_replica_is_killed_under_load_and_every_answer_is_whole_and_right(front: Front, local: LocalEngine) -> None:
    first, _ = front.wait_for_replicas(2)
    check(asyncio.run(under_load(front, lambda: os.kill(first, signal.SIGKILL), streams=18)), local)
    assert first not in front.wait_for_replicas(2)  # and another one takes its place


def test_all_replicas_are_killed_at_once_and_requests_wait_for_new_ones(front: Front, local: LocalEngine) -> None:
    killed = front.wait_for_replicas(2)

    def strike() -> None:
        for process in killed:
            os.kill(process, signal.SIGKILL)

    check(asyncio.run(under_load(front, strike, streams=9)), local)
    front.wait_for_replicas(2)


def test_a_front_that_is_told_to_stop_takes_its_replicas_along(front: Front) -> None:
    front.wait_for_replicas(2)
    front.process.send_signal(signal.SIGTERM)
    assert front.process.wait(60) == 0
    front.wait_for_replicas(0)


def test_replicas_that_cannot_start_are_said_so_and_leave_nothing_behind(
    cluster: str, folder: Path, tmp_path: Path
) -> None:
    broken = shutil.copytree(folder, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"no weights")
    process = start(cluster, broken, tmp_path, stderr=subprocess.PIPE)
    out, err = process.communicate(timeout=300)
    assert (process.returncode, out) == (1, "")
    assert "The replicas do not start: " in err
    assert "model.safetensors" in err
    assert "Traceback" not in err
