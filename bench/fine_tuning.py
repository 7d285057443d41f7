"""A fine-tuning job from upload to answers: what it costs, and by how much it raises a simple labelling task.

    .venv/bin/python bench/fine_tuning.py

Starts `gale serve` with the built-in model in a folder of its own, uploads 200 rows of bench/routing_rows.py by the
official client, waits for the job and asks base and result for the held-out messages' desks, each held to the four
labels by `guided_choice` so that both are judged by what they choose, and the result freely as well. Prints a table.
"""

from __future__ import annotations

import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from openai import OpenAI
from routing_rows import LABELS, Row, rows

TRAINING, HELD_OUT = 200, 100


def main() -> None:
    """Print the figures."""
    sets = rows(TRAINING, HELD_OUT)
    with tempfile.TemporaryDirectory() as home:
        environment = {**os.environ, "GALE_HOME": home}
        command = [sys.executable, "-m", "gale.cli", "serve", "--port", "0"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as server:
            assert server.stdout is not None
            url = server.stdout.readline().split(" at ")[1].split(" - ")[0]
            client = OpenAI(base_url=f"{url}/v1", api_key="none", timeout=600)
            base = client.models.list().data[0].id
            before = {name: accuracy(client, base, sets[name]) for name in ("pairs", "words")}
            served_s = processor_seconds(server.pid)
            began = time.monotonic()
            content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in sets["train"]).encode()
            file = client.files.create(file=("routing.jsonl", io.BytesIO(content)), purpose="fine-tune")
            job = client.fine_tuning.jobs.create(model=base, training_file=file.id, suffix="routing", seed=1)
            while job.status not in ("succeeded", "failed"):
                time.sleep(0.5)
                job = client.fine_tuning.jobs.retrieve(job.id)
            assert job.fine_tuned_model is not None, job.error
            seconds = time.monotonic() - began
            trained_s = sum(
                json.loads(line).get("cpu_seconds", 0)
                for line in (Path(home) / "jobs" / job.id / "run" / "metrics.jsonl").read_text().splitlines()
            )
            served_s = processor_seconds(server.pid) - served_s
            after = {name: accuracy(client, job.fine_tuned_model, sets[name]) for name in ("pairs", "words")}
            free = {name: accuracy(client, job.fine_tuned_model, sets[name], free=True) for name in ("pairs", "words")}
            server.terminate()
    total = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"{TRAINING} rows, {job.trained_tokens:,} tokens, {job.hyperparameters}")
    print(f"{seconds:.0f} s from upload to a served model; {trained_s:.0f} CPU seconds of training steps,")
    print(f"{served_s:.1f} of the server meanwhile, {total.ru_utime + total.ru_stime:.0f} of all processes in all\n")
    print("| held out | chance | base | fine-tuned | fine-tuned, answering freely |")
    print("|---|---|---|---|---|")
    for name, title in (("pairs", "unseen pairs of seen words"), ("words", "unseen words")):
        print(f"| {title} | {1 / len(LABELS):.0%} | {before[name]:.0%} | {after[name]:.0%} | {free[name]:.0%} |")


def accuracy(client: OpenAI, model: str, asked: list[Row], *, free: bool = False) -> float:
    """The share of messages for which ``model`` names the right desk."""
    right = 0
    for row in asked:
        question, answer = row["messages"]
        reply = client.chat.completions.create(
            model=model,
            messages=[question],  # type: ignore[list-item]
            temperature=0,
            max_tokens=8,
            extra_body=None if free else {"guided_choice": list(LABELS)},
        )
        right += (reply.choices[0].message.content or "").strip() == answer["content"]
    return right / len(asked)


def processor_seconds(process: int) -> float:
    """What a process has computed so far, without its children."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
