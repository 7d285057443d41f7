"""The engine beside transformers, llama.cpp and OpenVINO GenAI on a CPU: prefill, one stream, 8 and 32 at once.

    .venv/bin/python bench/serve.py [--peers PYTHON] [--shapes 134M 473M] [--threads 2]
    .venv/bin/python bench/serve.py --latency | --memory | --neighbour

The models have random weights, which cost as much as trained ones. PYTHON is an interpreter that has
llama-cpp-python (built from its source distribution), openvino-genai and optimum-intel; without one Gale is compared
with transformers alone, and the table says so. Every engine runs in a process of its own (bench/serve_contender.py);
they take turns round by round, so that a busy machine slows all alike, and ratios are medians of the rounds' ratios.

Decoding is the time for N tokens less the time for one, so reading the prompt is not in it. Prints Markdown; writes it
and the figures to --out.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
VOCABULARY = 32_000
SHAPES: dict[str, dict[str, Any]] = {
    "134M": {"hidden_size": 768, "intermediate_size": 2048, "layers": 12, "heads": 12, "kv_heads": 12, "head_dim": 64}
    | {"tied_embeddings": False},
    "473M": {"hidden_size": 1024, "intermediate_size": 3072, "layers": 28, "heads": 16, "kv_heads": 8, "head_dim": 128},
}
# (streams, prompt tokens, new tokens), and what is read from it: a prompt's tokens a second, or the answers'.
COLUMNS = {"prefill 512": (1, 512, 1), "1 stream": (1, 16, 33), "8 streams": (8, 16, 33), "32 streams": (32, 16, 17)}
CONTENDERS = {
    "transformers bf16": ("transformers", "bf16"),
    "Gale bf16": ("Gale", "bf16"),
    "Gale int8": ("Gale", "int8"),
    "Gale int4": ("Gale", "int4"),
    "llama.cpp Q8_0": ("llama.cpp", "q8_0"),
    "llama.cpp Q4_0": ("llama.cpp", "q4_0"),
    "OpenVINO int8": ("OpenVINO", "int8"),
}


@dataclass
class Contender:
    """A row of the table and the process behind it."""

    label: str
    process: subprocess.Popen[str]
    ready: float = 0.0
    speeds: dict[str, list[float]] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)

    def ask(self, streams: int, prompt: int, new: int, **more: int) -> dict[str, float]:
        """Let it generate; what that cost."""
        assert self.process.stdin
        self.process.stdin.write(json.dumps({"streams": streams, "prompt": prompt, "new": new, **more}) + "\n")
        self.process.stdin.flush()
        return self.read()

    def read(self) -> dict[str, float]:
        """The next figures it reports."""
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.label} broke down; BENCH_SHOW=1 shows what it says.")
        figures: dict[str, float] = json.loads(line)
        return figures

    def measure(self, column: str) -> None:
        """One figure of a column, in tokens a second."""
        streams, prompt, new = COLUMNS[column]
        self.figures = self.ask(streams, prompt, new)
        seconds, tokens = self.figures["seconds"], prompt
        if new > 1:
            seconds, tokens = seconds - self.ask(streams, prompt, 1)["seconds"], streams * (new - 1)
        self.speeds.setdefault(column, []).append(tokens / seconds)


def main() -> None:
    """Measure, print, write down."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--peers", type=Path, help="Python that has the peers")
    arguments.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    arguments.add_argument("--only", nargs="+", choices=CONTENDERS, help="these rows alone")
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--latency", action="store_true", help="only what people wait while others are answered")
    arguments.add_argument("--memory", action="store_true", help="only what stays in memory, and how soon it is there")
    arguments.add_argument("--neighbour", action="store_true", help="only its speed beside a process that computes")
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--work", type=Path, default=HERE.parent / "runs" / "bench-serve", help="folder for models")
    arguments.add_argument("--out", type=Path, default=HERE / "results", help="folder for serve.json and serve.md")
    asked = arguments.parse_args()
    for part, chosen in ((waiting, asked.latency), (memory, asked.memory), (neighbour, asked.neighbour)):
        if chosen:
            part(asked)
            return
    results: dict[str, Any] = {"about": about(asked.threads, asked.peers)}
    for shape in asked.shapes:
        folder = asked.work / shape
        make_models(folder, shape, asked.peers)
        results[shape] = compare(folder, asked)
        print(table(shape, results[shape]), flush=True)
    asked.out.mkdir(parents=True, exist_ok=True)
    (asked.out / "serve.json").write_text(json.dumps(results, indent=2) + "\n")
    lines = [results["about"]["machine"] + f"; {results['about']['date']}, commit {results['about']['commit']}.", ""]
    (asked.out / "serve.md").write_text("\n".join([*lines, *(table(shape, results[shape]) for shape in asked.shapes)]))


def about(threads: int, peers: Path | None) -> dict[str, Any]:
    """Machine, date, versions."""
    model = next(
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    )
    commit = subprocess.run(
        ["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    versions = ""
    if peers:
        script = "from importlib.metadata import version as v; print('llama-cpp-python', v('llama-cpp-python'), "
        script += "'openvino-genai', v('openvino-genai'))"
        versions = subprocess.run([str(peers), "-c", script], capture_output=True, text=True, check=True).stdout.strip()
    return {
        "date": datetime.now(tz=UTC).date().isoformat(),
        "machine": f"{os.cpu_count()} cores of {model}, {threads} threads",
        "commit": commit,
        "peers": versions or "skipped: no interpreter given",
    }


def make_models(folder: Path, shape: str, peers: Path | None) -> None:
    """The same random model in everybody's format, once."""
    import torch

    from gale.data.recipe import Source
    from gale.data.sources import read_documents
    from gale.model.checkpoint import save_model
    from gale.model.config import ModelConfig
    from gale.model.gguf_export import export_gguf
    from gale.model.transformer import Decoder
    from gale.text.template import GALE_CHAT_TEMPLATE
    from gale.text.tokenizer import Tokenizer

    if not (folder / "model.safetensors").is_file():
        config = ModelConfig(family="qwen3", vocabulary_size=VOCABULARY, context_length=4096, **SHAPES[shape])
        model = Decoder(config)
        model.initialise(1)
        # A vocabulary that has nothing to do with the model is enough: no text is read.
        read = read_documents(Source(path=HERE.parent / "README.md", licence="-", origin="-"), replace={}, seed=0)
        texts = [document.text or "" for document in read]
        Tokenizer.train(texts, vocabulary_size=2000, chat_template=GALE_CHAT_TEMPLATE).save(folder)
        save_model(model, folder, dtype=torch.bfloat16)
    if not peers:
        return
    if not (folder / "q8_0.gguf").is_file():
        export_gguf(folder, folder / "bf16.gguf", kind="bf16", name=shape)
        script = (
            "import sys, llama_cpp as l\n"
            "p = l.llama_model_quantize_default_params(); p.ftype = int(sys.argv[3])\n"
            "assert l.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), p) == 0"
        )
        for kind, file_type in (("q4_0", 2), ("q8_0", 7)):
            command = [
                str(peers),
                "-c",
                script,
                str(folder / "bf16.gguf"),
                str(folder / f"{kind}.gguf"),
                str(file_type),
            ]
            subprocess.run(command, check=True, capture_output=True)
    if not (folder / "openvino-int8").is_dir():
        export = [str(peers.parent / "optimum-cli"), "export", "openvino", "--model", str(folder)]
        export += ["--task", "text-generation-with-past", "--weight-format", "int8", str(folder / "openvino-int8")]
        subprocess.run(export, check=True, capture_output=True)


def compare(folder: Path, asked: argparse.Namespace) -> list[dict[str, Any]]:
    """All contenders, taking turns."""
    contenders = list(starting(folder, asked))
    for _ in range(asked.rounds):
        for column in COLUMNS:
            for contender in contenders:
                contender.measure(column)
    rows = []
    for contender in contenders:
        contender.process.terminate()
        rows.append(
            {
                "contender": contender.label,
                "ready": round(contender.ready, 2),
                "resident_mib": round(contender.figures["resident"] / 2**20),
                "mapped_mib": round(contender.figures["mapped"] / 2**20),
                "tokens_per_second": {
                    column: round(statistics.median(all_), 1) for column, all_ in contender.speeds.items()
                },
                "ratios": {
                    peer.label: {
                        column: round(
                            statistics.median(
                                a / b for a, b in zip(contender.speeds[column], peer.speeds[column], strict=True)
                            ),
                            2,
                        )
                        for column in COLUMNS
                    }
                    for peer in contenders
                    if peer.label.partition(" ")[0] != "Gale"
                },
            }
        )
    return rows


def starting(folder: Path, asked: argparse.Namespace) -> Iterator[Contender]:
    """All that were asked for and can run here, each started when its turn comes."""
    for label, (engine, _) in CONTENDERS.items():
        other = engine in ("llama.cpp", "OpenVINO")
        if (asked.peers or not other) and (not asked.only or label in asked.only):
            yield start(label, folder, asked)


def start(label: str, folder: Path, asked: argparse.Namespace, **variables: str) -> Contender:
    """A contender that has answered once."""
    engine, weights = CONTENDERS[label]
    python = str(asked.peers) if engine in ("llama.cpp", "OpenVINO") else sys.executable
    command = [
        python,
        str(HERE / "serve_contender.py"),
        engine,
        str(folder),
        weights,
        str(asked.threads),
        str(VOCABULARY),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": str(asked.threads), "GALE_THREADS": str(asked.threads), **variables}
    quiet = subprocess.DEVNULL if not os.environ.get("BENCH_SHOW") else None
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=quiet, text=True, env=environment
    )
    contender = Contender(label, process)
    contender.figures = contender.read()
    contender.ready = contender.figures["ready"]
    contender.ask(1, 64, 4)  # warm
    return contender


def waiting(asked: argparse.Namespace) -> None:
    """Print what one waits for a prompt of 512 tokens beside 8 answers, and those for their next token."""
    print("| | first token alone, ms | beside 8 answers | ratio | gap between tokens, median | 99% | ratio |")
    print("|---|---|---|---|---|---|---|")
    for shape in asked.shapes:
        make_models(asked.work / shape, shape, None)
        for label in ("Gale bf16", "Gale int8", "Gale int4"):
            contender = start(label, asked.work / shape, asked)
            rounds = [contender.ask(8, 16, 96, beside=512) for _ in range(asked.rounds)]
            contender.process.terminate()
            alone, beside, gap, late = (
                statistics.median(each[name] for each in rounds) * 1000
                for name in ("first_alone", "first_beside", "gap_median", "gap_p99")
            )
            print(
                f"| {shape}, {label} | {alone:.0f} | {beside:.0f} | {beside / alone:.2f} "
                f"| {gap:.1f} | {late:.1f} | {late / gap:.2f} |",
                flush=True,
            )


def memory(asked: argparse.Namespace) -> None:
    """Print what Gale has in memory while it answers 8 prompts of 512 tokens, and when it is ready.

    The first start rounds the weights and keeps them on disk. What is resident, at most, is told beside what must be:
    the weights as they are served, and the keys and values of all tokens. "Without" leaves out what the process had
    in memory before it opened the model: Python, torch and the engine's code.
    """
    from gale.core.settings import settings
    from gale.model.kernels import available

    available()  # builds them
    print("| | first start, s | ready, s | resident, MiB | weights, MiB | keys and values, MiB | ratio | without |")
    print("|---|---|---|---|---|---|---|---|")
    for shape in asked.shapes:
        make_models(asked.work / shape, shape, None)
        for label in ("Gale bf16", "Gale int8", "Gale int4"):
            with tempfile.TemporaryDirectory() as home:
                Path(home, "kernels").symlink_to(settings().home / "kernels")
                first = start(label, asked.work / shape, asked, GALE_HOME=home)
                first.process.communicate()  # and not terminated: it may be writing still
                again = start(label, asked.work / shape, asked, GALE_HOME=home)
                opened, figures = again.figures, again.ask(8, 512, 64)
                again.process.terminate()
            needed = opened["weight_bytes"] + 8 * (512 + 64) * opened["token_bytes"]
            cells = [figures["most_resident"], opened["weight_bytes"], needed - opened["weight_bytes"]]
            print(
                f"| {shape}, {label} | {first.ready:.1f} | {again.ready:.1f} "
                f"| {' | '.join(f'{each / 2**20:.0f}' for each in cells)} | {figures['most_resident'] / needed:.2f} "
                f"| {(figures['most_resident'] - opened['resident_before']) / needed:.2f} |",
                flush=True,
            )


def neighbour(asked: argparse.Namespace) -> None:
    """Print tokens a second alone and beside a process that keeps one processor busy."""
    columns = ("1 stream", "8 streams")
    print(f"| | {' | '.join(f'{column}, alone | beside | share' for column in columns)} |")
    print("|---" * (1 + 3 * len(columns)) + "|")
    for shape in asked.shapes:
        make_models(asked.work / shape, shape, asked.peers)
        for contender in starting(asked.work / shape, asked):
            beside = Contender(contender.label, contender.process)
            for _ in range(asked.rounds):
                for column in columns:
                    contender.measure(column)
                    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
                        beside.measure(column)
                        busy.kill()
            contender.process.terminate()
            contender.process.wait()
            cells = []
            for column in columns:
                pairs = list(zip(contender.speeds[column], beside.speeds[column], strict=True))
                medians = [statistics.median(speeds) for speeds in zip(*pairs, strict=True)]
                share = statistics.median(two / one for one, two in pairs)
                cells.append(f"{medians[0]:.1f} | {medians[1]:.1f} | {share:.2f}")
            print(f"| {shape}, {contender.label} | {' | '.join(cells)} |", flush=True)


def table(shape: str, rows: list[dict[str, Any]]) -> str:
    """Speeds, then Gale's ratios, as Markdown."""
    head = " | ".join(COLUMNS)
    lines = [
        f"**{shape}**, tokens a second",
        "",
        f"| | {head} | ready, s | resident MiB (mapped files) |",
        "|---" * (len(COLUMNS) + 3) + "|",
    ]
    for row in rows:
        cells = " | ".join(f"{row['tokens_per_second'][column]:,.1f}" for column in COLUMNS)
        lines.append(
            f"| {row['contender']} | {cells} | {row['ready']:.1f} | {row['resident_mib']} ({row['mapped_mib']}) |"
        )
    lines += ["", f"| ratio | {head} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for row in rows:
        if row["contender"].startswith("Gale"):
            for peer, ratios in row["ratios"].items():
                cells = " | ".join(f"{ratios[column]:.2f}" for column in COLUMNS)
                lines.append(f"| {row['contender']} : {peer} | {cells} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
