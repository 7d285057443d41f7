"""The platform without a model's cost: what Gale adds to an answer, beside LiteLLM's proxy before the same upstream.

    .venv/bin/python bench/gateway.py [--litellm FOLDER/bin/litellm] [--parts latency streams soak kill]

latency: both gateways stand before one upstream that answers at once; they take turns, 150 requests a second, and what
is reported is the time beyond that of the upstream alone. throughput comes with it: requests for each CPU second of the
gateway. streams: 500 open streams of 20 words a second on one core. soak: memory over ten minutes of mixed work.
kill: rounds of kill -9 in the middle of writes, and what was lost of what had been acknowledged.
Prints Markdown; writes it and the figures to bench/results.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import secrets
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx2
import psutil
from http_load import Target, as_many, at_rate, streams
from serve import about

HERE = Path(__file__).parent
RATE = 150
SECONDS = 8.0
MANY = 2_000
AT_ONCE = 16


def main() -> None:
    """Measure, print, write down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--litellm", type=Path, help="its command, in an environment of its own")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=["latency", "streams"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--soak-seconds", type=float, default=600)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "platform.json")
    asked = parser.parse_args()
    results = json.loads(asked.out.read_text()) if asked.out.exists() else {}
    for part in asked.parts:
        results[part] = {"about": about(1, None), **PARTS[part](asked)}
        print(json.dumps(results[part], indent=2), flush=True)
    asked.out.write_text(json.dumps(results, indent=2) + "\n")


def latency(asked: argparse.Namespace) -> dict[str, Any]:
    """Added milliseconds, and requests for each CPU second."""
    with ExitStack() as running:
        upstream = running.enter_context(null("upstream", {}))
        gateways = {"Gale": running.enter_context(gale(upstream[0]))}
        if asked.litellm:
            gateways["LiteLLM"] = running.enter_context(litellm(asked.litellm, upstream[0]))
        targets = {"upstream": upstream[0], **{name: target for name, (target, _) in gateways.items()}}
        for target in targets.values():
            asyncio.run(as_many(target, 200, 4))
        took: dict[str, list[tuple[float, float]]] = {name: [] for name in targets}
        per_cpu_second: dict[str, list[float]] = {name: [] for name in gateways}
        for _ in range(asked.rounds):
            for name, target in targets.items():
                times = sorted(asyncio.run(at_rate(target, RATE, SECONDS)))
                took[name].append((times[len(times) // 2] * 1e3, times[int(len(times) * 0.99)] * 1e3))
            for name, (target, process) in gateways.items():
                before = cpu_seconds(process)
                asyncio.run(as_many(target, MANY, AT_ONCE))
                per_cpu_second[name].append(MANY / (cpu_seconds(process) - before))
    rows = {}
    for name in gateways:
        added = [
            (ours[0] - plain[0], ours[1] - plain[1]) for ours, plain in zip(took[name], took["upstream"], strict=True)
        ]
        rows[name] = {
            "added_p50_ms": round(statistics.median(each[0] for each in added), 2),
            "added_p99_ms": round(statistics.median(each[1] for each in added), 2),
            "requests_per_cpu_second": round(statistics.median(per_cpu_second[name])),
        }
    if "LiteLLM" in rows:
        pairs = zip(per_cpu_second["Gale"], per_cpu_second["LiteLLM"], strict=True)
        rows["ratio"] = {"requests_per_cpu_second": round(statistics.median(a / b for a, b in pairs), 1)}
    return {"rate": RATE, "rounds": asked.rounds, "rows": rows}


def open_streams(asked: argparse.Namespace) -> dict[str, Any]:
    """500 streams of 20 words a second: how many were whole, and how much of its one core the server needed."""
    count, tokens, rate = 500, 600, 20
    with null("serve", {"GALE_NULL_RATE": str(rate)}, core=0) as (target, process):
        os.sched_setaffinity(0, {1})
        before, began = cpu_seconds(process), time.perf_counter()
        words = asyncio.run(streams(target, count, tokens))
        seconds = time.perf_counter() - began
        used = cpu_seconds(process) - before
    whole = sum(each == tokens for each in words)
    return {
        "streams": count,
        "whole": whole,
        "words_per_second": round(tokens / seconds, 1),
        "asked_per_second": rate,
        "share_of_one_core": round(used / seconds, 2),
    }


def soak(asked: argparse.Namespace) -> dict[str, Any]:
    """Growth of resident memory from the second tenth of the time to its end, under streams and short requests."""
    with null("serve", {"GALE_NULL_RATE": "50"}) as (target, process):

        async def work() -> list[int]:
            memory: list[int] = []
            until = time.perf_counter() + asked.soak_seconds
            while time.perf_counter() < until:
                await asyncio.gather(streams(target, 40, 100), at_rate(target, 50, 3.0))
                memory.append(psutil.Process(process.pid).memory_info().rss)
            return memory

        memory = asyncio.run(work())
    begin = statistics.median(memory[len(memory) // 10 : len(memory) // 5 + 1])
    end = statistics.median(memory[-max(1, len(memory) // 10) :])
    growth = end / begin - 1
    return {"seconds": asked.soak_seconds, "mib": round(end / 2**20), "growth_percent": round(growth * 100, 2)}


def kill(asked: argparse.Namespace) -> dict[str, Any]:
    """Kill the server in the middle of writes, over and over: what it had acknowledged must be there afterwards."""
    lost = acknowledged = 0
    with tempfile.TemporaryDirectory() as home:
        for round_number in range(asked.kills):
            done: list[str] = []
            with null("serve", {}, home=home) as (target, process):
                writers = [threading.Thread(target=keep_writing, args=(target, done)) for _ in range(4)]
                for writer in writers:
                    writer.start()
                time.sleep(random.Random(round_number).uniform(0.05, 0.5))
                process.kill()
                for writer in writers:
                    writer.join()
            with null("serve", {}, home=home) as (target, _), httpx2.Client(base_url=f"{target.url}/v1") as http:
                lost += sum(http.get(path).status_code != 200 for path in done)
            acknowledged += len(done)
            with sqlite3.connect(Path(home) / "gale.db") as database:
                assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    return {"kills": asked.kills, "acknowledged_writes": acknowledged, "lost": lost}


def keep_writing(target: Target, done: list[str]) -> None:
    """Make conversations, answers and files until the server is gone; ``done``: the paths of what it acknowledged."""
    with httpx2.Client(base_url=f"{target.url}/v1", timeout=10) as http:
        try:
            while True:
                made = http.post("/conversations", json={"metadata": {"a": "b"}})
                done.append(f"/conversations/{made.raise_for_status().json()['id']}")
                made = http.post("/responses", json={"model": "null", "input": "Is it?", "max_output_tokens": 16})
                done.append(f"/responses/{made.raise_for_status().json()['id']}")
                made = http.post("/files", files={"file": ("a.jsonl", b"{}\n")}, data={"purpose": "user_data"})
                done.append(f"/files/{made.raise_for_status().json()['id']}")
        except (httpx2.TransportError, httpx2.HTTPStatusError):
            return


@contextmanager
def null(
    kind: str, environment: dict[str, str], core: int | None = None, home: str | None = None
) -> Iterator[tuple[Target, Any]]:
    """A process of null_model.py, ready; it keeps its things in ``home``, else in a folder that ends with it."""
    port = free_port()
    with tempfile.TemporaryDirectory() as own:
        home = home or own
        command = [sys.executable, str(HERE / "null_model.py"), kind, str(port)]
        if core is not None:
            command = ["taskset", "-c", str(core), *command]
        settings = {**os.environ, "GALE_HOME": home, "GALE_LOG_LEVEL": "WARNING", **environment}
        with started(command, settings, port) as process:
            yield Target(port), process


@contextmanager
def gale(upstream: Target) -> Iterator[tuple[Target, Any]]:
    """``gale serve`` before the upstream, with accounts: every request is authorised, limited and metered."""
    port = free_port()
    with tempfile.TemporaryDirectory() as home:
        settings = {**os.environ, "GALE_HOME": home, "GALE_LOG_LEVEL": "WARNING"}
        command = [str(Path(sys.executable).parent / "gale"), "serve", "--port", str(port)]
        command += ["--upstream", f"http://127.0.0.1:{upstream.port}/v1", "--upstream-model", "null"]
        command += ["--upstream-context", "100000"]
        with started(command, settings, port) as process:
            yield Target(port), process


@contextmanager
def litellm(command: Path, upstream: Target) -> Iterator[tuple[Target, Any]]:
    """LiteLLM's proxy before the upstream, one worker, with its master key."""
    port, key = free_port(), f"sk-{secrets.token_hex(8)}"
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.yaml"
        model = {"model": "openai/null", "api_base": f"http://127.0.0.1:{upstream.port}/v1", "api_key": "none"}
        listed = {"model_list": [{"model_name": "null", "litellm_params": model}]}
        config.write_text(json.dumps({**listed, "general_settings": {"master_key": key}}))
        settings = {**os.environ, "LITELLM_LOG": "ERROR", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
        line = [str(command), "--config", str(config), "--port", str(port), "--host", "127.0.0.1", "--num_workers", "1"]
        line += ["--telemetry", "False"]
        with started(line, settings, port) as process:
            yield Target(port, key), process


@contextmanager
def started(command: list[str], environment: dict[str, str], port: int) -> Iterator[subprocess.Popen[bytes]]:
    """A process that listens on ``port``, ended with the context."""
    shown = None if os.environ.get("BENCH_SHOW") else subprocess.DEVNULL
    process = subprocess.Popen(command, env=environment, stdout=shown, stderr=shown)
    try:
        for _ in range(1200):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            if process.poll() is not None:
                raise SystemExit(f"{command[0]} broke down; BENCH_SHOW=1 shows what it says.")
            time.sleep(0.1)
        yield process
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


def cpu_seconds(process: subprocess.Popen[bytes]) -> float:
    """Of a process and its children so far."""
    root = psutil.Process(process.pid)
    return sum(sum(each.cpu_times()[:2]) for each in [root, *root.children(recursive=True)])


def free_port() -> int:
    """One that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


PARTS = {"latency": latency, "streams": open_streams, "soak": soak, "kill": kill}

if __name__ == "__main__":
    main()
