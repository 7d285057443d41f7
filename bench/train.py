"""Training beside nanoGPT, minimind and a plain Hugging Face loop: speed, memory, and what is learnt from equal tokens.

    OMP_NUM_THREADS=2 .venv/bin/python bench/train.py --nanogpt DIR --minimind DIR

DIR is a checkout of the peer; without one it is left out, and the table says so. Every contender runs in a process of
its own (bench/train_contender.py) on the same rows; they take turns round by round, so that a busy machine slows all
alike, and ratios are medians of the rounds' ratios. Prints Markdown; writes it and the figures to --out.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from train_contender import Job

from gale.data.recipe import Source
from gale.data.sources import read_documents
from gale.text.template import GALE_CHAT_TEMPLATE
from gale.text.tokenizer import Tokenizer

HERE = Path(__file__).parent
PRETRAINING = HERE.parent.parent / "shared" / "data" / "pretrain"
# Small shape: 8 rows of 256 tokens a step. Large shape: 8 rows of 512.
ROWS, SMALL_TOKENS, LARGE_TOKENS = 8, 256, 512
SMALL_VOCABULARY, LARGE_VOCABULARY = 6_400, 32_000

ADAMW = {"optimiser": {"learning_rate": 2.5e-3, "warmup_steps": 30, "decay_share": 0.5}}
MUON = {"optimiser": {"algorithm": "muon", "learning_rate": 5e-3, "warmup_steps": 30, "decay_share": 0.5}}
COMPILED = {"compile": True}


@dataclass
class Contender:
    """A row of the table and the process behind it."""

    label: str
    job: Job
    process: subprocess.Popen[str] | None = None
    rounds: list[dict[str, float]] = field(default_factory=list)
    peak_gib: float = 0.0

    def start(self) -> None:
        """Start the process; :meth:`read` returns once it waits for its first step."""
        command = [sys.executable, str(HERE / "train_contender.py"), json.dumps(asdict(self.job))]
        quiet = subprocess.DEVNULL if not os.environ.get("BENCH_SHOW") else None
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=quiet, text=True, bufsize=1
        )
        self.read()

    def run(self, steps: int) -> dict[str, float]:
        """Let it take ``steps`` steps; returns what they cost."""
        assert self.process and self.process.stdin
        self.process.stdin.write(f"{steps}\n")
        return self.read()

    def read(self) -> dict[str, float]:
        """The next figures it reports."""
        assert self.process and self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.label} broke down; BENCH_SHOW=1 shows what it says.")
        figures: dict[str, float] = json.loads(line)
        return figures

    def end(self) -> None:
        """Wait until it is done and take down how much memory it had at most."""
        assert self.process
        _, status, usage = os.wait4(self.process.pid, 0)
        self.process.returncode = os.waitstatus_to_exitcode(status)
        self.peak_gib = usage.ru_maxrss / 2**20

    def per_second(self, tokens: int) -> float:
        """Median tokens per second."""
        return tokens / statistics.median(each["seconds"] for each in self.rounds)

    def per_cpu_second(self, tokens: int) -> float:
        """Median tokens per second of one processor."""
        return tokens / statistics.median(each["cpu_seconds"] for each in self.rounds)


def main() -> None:
    """Measure what was asked for, print it and write it down."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--nanogpt", type=Path, help="checkout of nanoGPT")
    arguments.add_argument("--minimind", type=Path, help="checkout of minimind")
    parts = ["speed", "large", "quality"]
    arguments.add_argument("--parts", nargs="+", choices=parts, default=parts)
    arguments.add_argument(
        "--text", nargs="+", type=Path, default=[PRETRAINING / f"{n}.jsonl.zst" for n in ("en_textbooks", "zh_wiki")]
    )
    arguments.add_argument("--rounds", type=int, default=7, help="rounds of 4 steps of the small shape")
    arguments.add_argument("--large-rounds", type=int, default=3, help="rounds of 1 step of the large shape")
    arguments.add_argument("--steps", type=int, default=600, help="steps of 2,048 tokens for quality")
    arguments.add_argument("--seeds", type=int, default=3, help="runs of each contender for quality")
    arguments.add_argument("--out", type=Path, default=HERE / "results", help="folder for train.json and train.md")
    asked = arguments.parse_args()
    peers = {"nanoGPT": asked.nanogpt, "minimind": asked.minimind}
    asked.out.mkdir(parents=True, exist_ok=True)
    kept = asked.out / "train.json"
    # A part that is not measured now stays as it was, with the machine, date and commit of its own.
    results: dict[str, Any] = json.loads(kept.read_text()) if kept.is_file() else {}
    with tempfile.TemporaryDirectory() as folder:
        small, large = Path(folder) / "small", Path(folder) / "large"
        text = write_text_rows(small, asked.text)
        write_random_rows(large)
        earlier = results.get("quality", {})
        alike = (earlier.get("text"), earlier.get("steps")) == (text, asked.steps)
        known: dict[str, list[float]] = earlier["rows"] if alike else {}
        scored = len(next(iter(known.values()), []))
        # Each seed keeps the commit that it was scored at.
        commits = (earlier.get("commits") or [earlier["about"]["commit"]] * scored) if alike else []
        measures = {
            "speed": lambda: speed(small, peers, asked.rounds),
            "large": lambda: large_shape(large, asked.large_rounds),
            "quality": lambda: quality(small, peers, asked.steps, asked.seeds, known),
        }
        for part in asked.parts:
            results[part] = {"about": about(peers), "text": text, "steps": asked.steps, "rows": measures[part]()}
            if part == "quality":
                results[part]["commits"] = [*commits, *[commit(HERE)] * (asked.seeds - scored)]
    print(markdown(results))
    kept.write_text(json.dumps(results, indent=2) + "\n")
    (asked.out / "train.md").write_text(markdown(results))


def about(peers: dict[str, Path | None]) -> dict[str, Any]:
    """Machine, date and commits."""
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    return {
        "date": datetime.now(tz=UTC).date().isoformat(),
        "machine": f"{os.cpu_count()} cores of {model}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "bf16": {"avx512": torch.cpu._is_avx512_bf16_supported(), "amx": torch.cpu._is_amx_tile_supported()},
        "commit": commit(HERE),
        "peers": {name: commit(folder) if folder else "skipped: no folder given" for name, folder in peers.items()},
    }


def commit(folder: Path) -> str:
    """The commit that is checked out in ``folder``."""
    return subprocess.run(
        ["git", "-C", str(folder), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()


def write_text_rows(folder: Path, sources: list[Path]) -> dict[str, Any]:
    """Train a tokenizer on the text and write rows of it; every 20th document is for validation.

    A row is a stretch of one document, so it is read alike by those who keep documents apart and those who do not.
    """
    folder.mkdir()
    texts: list[str] = []
    for path in sources:
        read = read_documents(Source(path=path, licence="-", origin="-"), replace={}, seed=0)
        size, budget = 0, 12_000_000 // len(sources)
        for document in read:
            texts.append(document.text or "")
            size += len(texts[-1].encode())
            if size > budget:
                break
    held_out, training = texts[::20], [text for index, text in enumerate(texts) if index % 20]
    tokenizer = Tokenizer.train(training, vocabulary_size=SMALL_VOCABULARY, chat_template=GALE_CHAT_TEMPLATE)
    counts = {}
    for name, documents in (("train", training), ("validation", held_out)):
        rows = [
            ids[low : low + SMALL_TOKENS + 1]
            for ids in tokenizer.encode_batch(documents)
            for low in range(0, len(ids) - SMALL_TOKENS, SMALL_TOKENS)
        ]
        rows = rows[: len(rows) // ROWS * ROWS] if name == "train" else rows[:: max(1, len(rows) // 256)][:256]
        np.save(folder / f"{name}.npy", np.array(rows, np.uint16))
        counts[name] = len(rows)
    token_bytes = [len(tokenizer.token_bytes(token)) for token in range(tokenizer.vocabulary_size)]
    np.save(folder / "token_bytes.npy", np.array(token_bytes, np.int64))
    return {"files": [path.name for path in sources], "rows": counts, "vocabulary": tokenizer.vocabulary_size}


def write_random_rows(folder: Path) -> None:
    """Rows for timing alone: what they say changes no time."""
    folder.mkdir()
    rows = np.random.default_rng(0).integers(0, LARGE_VOCABULARY, (ROWS * 4, LARGE_TOKENS + 1))
    np.save(folder / "train.npy", rows.astype(np.uint16))


def speed(rows: Path, peers: dict[str, Path | None], rounds: int) -> list[dict[str, Any]]:
    """The small shape: each peer as it comes and in bf16, Gale in the same shape in four ways."""
    warmup, steps = 4, 4
    base = Job("Gale", "small", str(rows), SMALL_VOCABULARY, ROWS, warmup + rounds * steps + 1, seed=1)
    table = []
    for name, shape in (("nanoGPT", "small"), ("minimind", "mini")):
        if not peers[name]:
            continue
        peer = replace(base, contender=name, shape=shape, peer=str(peers[name]))
        gale = replace(base, shape=shape)
        contenders = [
            Contender(f"{name}, as it comes (fp32)", peer),
            Contender(f"{name}, bf16 autocast", replace(peer, bf16=True)),
            *gale_ways(gale),
        ]
        alternate(contenders, warmup, rounds, steps)
        table += rows_of(contenders, peers=2, tokens=steps * ROWS * SMALL_TOKENS)
    return table


def large_shape(rows: Path, rounds: int) -> list[dict[str, Any]]:
    """134M parameters beside a Hugging Face loop, two processes at a time; memory is that of whole runs with saving."""
    table = []
    base = Job("Gale", "134M", str(rows), LARGE_VOCABULARY, ROWS, rounds + 3, seed=1)
    for gale in gale_ways(base):
        gale.job.options = {**(gale.job.options or {}), "micro_rows": 2}
        other = replace(base, contender="Hugging Face", bf16=True)
        contenders = [Contender("Hugging Face loop, bf16 autocast", other), gale]
        alternate(contenders, warmup=2, rounds=rounds, steps=1)
        table += rows_of(contenders, peers=1, tokens=ROWS * LARGE_TOKENS)
    return table


def gale_ways(job: Job) -> list[Contender]:
    """Gale with either optimiser, compiled or not."""
    return [
        Contender(f"Gale, {optimiser}{how}", replace(job, options={**settings, **extra}))
        for how, extra in (("", {}), (", compiled", COMPILED))
        for optimiser, settings in (("AdamW", ADAMW), ("Muon", MUON))
    ]


def alternate(contenders: list[Contender], warmup: int, rounds: int, steps: int) -> None:
    """Start all, warm each up, let them take turns; the last step is for saving and is not timed."""
    for contender in contenders:
        contender.start()
        contender.run(warmup)
    for _ in range(rounds):
        for contender in contenders:
            contender.rounds.append(contender.run(steps))
    for contender in contenders:
        contender.run(1)
        contender.end()


def rows_of(contenders: list[Contender], *, peers: int, tokens: int) -> list[dict[str, Any]]:
    """Figures of each contender; the first ``peers`` are what the others are compared with."""
    table = []
    for contender in contenders:
        ratios = {
            peer.label: statistics.median(
                theirs["seconds"] / ours["seconds"] for theirs, ours in zip(peer.rounds, contender.rounds, strict=True)
            )
            for peer in contenders[:peers]
        }
        table.append(
            {
                "contender": contender.label,
                "tokens_per_second": round(contender.per_second(tokens)),
                "tokens_per_cpu_second": round(contender.per_cpu_second(tokens)),
                "ratios": {label: round(ratio, 2) for label, ratio in ratios.items()},
                "peak_gib": round(contender.peak_gib, 2),
            }
        )
    return table


def quality(
    rows: Path, peers: dict[str, Path | None], steps: int, seeds: int, known: dict[str, list[float]]
) -> dict[str, list[float]]:
    """Bits per byte of held-out text after ``steps`` steps, each contender at its own settings, a figure a seed.

    Seeds that an earlier run of the same text and length scored are ``known``, and not run again. Each figure is
    printed when there is one, so that a run that is cut off leaves what it found.
    """
    base = Job("Gale", "small", str(rows), SMALL_VOCABULARY, ROWS, steps, seed=0, score=True)
    contenders = [
        Contender(f"Gale, {name}, compiled", replace(base, options={**settings, **COMPILED}))
        for name, settings in (("AdamW", ADAMW), ("Muon", MUON))
    ]
    for name, shape in (("nanoGPT", "small"), ("minimind", "mini")):
        if peers[name]:
            contenders.append(Contender(name, replace(base, contender=name, shape=shape, peer=str(peers[name]))))
    scores: dict[str, list[float]] = {contender.label: known.get(contender.label, [])[:] for contender in contenders}
    for seed in range(1, seeds + 1):
        for contender in contenders:
            if len(scores[contender.label]) >= seed:
                continue
            again = Contender(contender.label, replace(contender.job, seed=seed))
            again.start()
            scores[contender.label].append(round(again.run(steps)["bits_per_byte"], 4))
            again.end()
            print(f"seed {seed}, {contender.label}: {scores[contender.label][-1]} bits per byte", flush=True)
    return scores


def markdown(results: dict[str, Any]) -> str:
    """The tables."""
    lines = ["Training beside the peers: tokens, and what is learnt from them."]
    for part in ("speed", "large", "quality"):
        if part not in results:
            continue
        facts, rows = results[part]["about"], results[part]["rows"]
        peers = ", ".join(f"{name} {commit}" for name, commit in facts["peers"].items())
        lines += ["", f"{facts['machine']}; {facts['date']}, commit {facts['commit']}; {peers}."]
        if part == "quality":
            tokens = results[part]["steps"] * ROWS * SMALL_TOKENS
            seeds = " | ".join(f"seed {n} ({at})" for n, at in enumerate(results[part]["commits"], start=1))
            lines += ["", f"| bits per byte after {tokens:,} tokens | {seeds} | mean |"]
            lines += ["|---" * (seeds.count("|") + 3) + "|"]
            for label, values in rows.items():
                cells = " | ".join(f"{value:.4f}" for value in values)
                lines += [f"| {label} | {cells} | {statistics.mean(values):.4f} |"]
            continue
        head = None
        for row in rows:
            if list(row["ratios"]) != head:
                head = list(row["ratios"])
                lines += [
                    "",
                    f"| | tokens/s | tokens per CPU second | {' | '.join(f'x {h}' for h in head)} | peak GiB |",
                ]
                lines += ["|---" * (4 + len(head)) + "|"]
            ratios = " | ".join(f"{ratio:.2f}" for ratio in row["ratios"].values())
            speeds = f"{row['tokens_per_second']:,} | {row['tokens_per_cpu_second']:,}"
            lines += [f"| {row['contender']} | {speeds} | {ratios} | {row['peak_gib']:.2f} |"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
