"""What growing a trained model saves, against training the larger one from nothing: every cost counted.

    .venv/bin/python -m bench.warm_start [--edition quick|short|night|gpu] [--work FOLDER] [--workers N]

A small source is trained until twice the tokens improve its held-out loss by less than a threshold. Then, for three
larger shapes (deeper, wider, a mixture of experts):

* cold: the shape from fresh weights, to the end of its schedule. Its last held-out loss is the target.
* grown: the source made that large (`gale train grow`), trained on until it has reached the target.
* continued: the source itself, trained on for the operations that the grown model was given.
* experts random: the mixture with the source's attention, and every expert drawn anew.

All of it with three seeds, each of which has a source of its own. Every arm has the best of three learning rates,
chosen by its first seed. The schedule is warm-up, stable, decay, and a learning rate that has not fallen yet hides what
a model has learned; so a grown model is trained at several lengths, each a run of its own that decays to its end: half
the tokens of the cold start, then a quarter where that sufficed for every seed, or as many as the cold start where it
did not. What it took to reach the target is read from whichever run reached it first, at an evaluation.

Not counted, for any arm: the search for the learning rate, lengths that were tried and not needed, evaluations. CPU
seconds are the process's own (not the wall's), so a busy machine matters less.

Prints Markdown tables; writes bench/results/warm_start.json and docs/images/warm_start.svg (edition `short`; `night`
and `gpu` write beside them under their own names, `quick` is a rehearsal of a few minutes that writes nothing). Runs
that are finished are kept in FOLDER, and a second start goes on from there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.warm_start_report import plot, tables
from gale.core import files
from gale.core.settings import settings
from gale.train.ledger import Cost, Curve, entry, reach, read_curve

ROOT = Path(__file__).parents[1]
TEXTS = ROOT.parent / "shared" / "data" / "pretrain"
SEEDS = (1, 2, 3)
EVALUATIONS = 8  # of a cold start; a shorter run has fewer, as far apart


@dataclass(frozen=True)
class Edition:
    """How large everything is. Tokens of ``cold`` are of one cold start, of ``source`` where its doubling begins."""

    hidden_size: int
    layers: int
    vocabulary: int
    text_share: float
    row_tokens: int
    batch_rows: int
    source: int
    most_source: int
    evaluate_rows: int
    flat: float  # nats: twice the tokens must improve the source by less
    cold: int
    head_dim: int = 16
    learning_rates: tuple[float, float, float] = (0.01, 0.02, 0.04)


EDITIONS = {
    "quick": Edition(32, 2, 512, 0.02, 64, 8, 16_384, 32_768, 16, 0.5, 32_768),
    "short": Edition(32, 2, 512, 0.12, 128, 16, 1_000_000, 4_000_000, 10**6, 0.15, 2_000_000, 16, (0.005, 0.01, 0.02)),
    "night": Edition(64, 2, 1024, 0.3, 128, 16, 4_000_000, 16_000_000, 10**6, 0.05, 12_000_000),
    "gpu": Edition(
        512, 6, 6400, 1.0, 512, 64, 25_000_000, 100_000_000, 10**6, 0.05, 100_000_000, 64, (2e-3, 4e-3, 8e-3)
    ),
}
# What is grown, as multiples of the source's shape.
SHAPES: dict[str, dict[str, int]] = {"deeper": {"layers": 2}, "wider": {"width": 2}, "experts": {"experts": 4}}
EXPERTS_PER_TOKEN = 2
ARMS = {  # name: shape, share of each expert that is drawn anew
    "deeper": ("deeper", None),
    "wider": ("wider", None),
    "upcycled": ("experts", 0.0),
    "drop-upcycled": ("experts", 0.5),
    "experts random": ("experts", 1.0),
}


@dataclass(frozen=True)
class Done:
    """A finished run."""

    folder: Path
    learning_rate: float
    curve: Curve


class Bench:
    """The runs of one edition, on a pool of processes."""

    def __init__(self, edition: Edition, work: Path, data: Path, pool: ProcessPoolExecutor) -> None:
        self.edition, self.work, self.data, self.pool = edition, work, data, pool
        self.began = time.perf_counter()
        self.runs = 0
        self.started: dict[Path, Future[Done]] = {}
        self.lock = threading.Lock()

    def shape(self, name: str | None = None) -> dict[str, Any]:
        """The table ``model`` of the source, or of a larger shape."""
        edition, factor = self.edition, SHAPES.get(name or "", {})
        width = edition.hidden_size * factor.get("width", 1)
        heads = width // edition.head_dim
        shape: dict[str, Any] = {
            "hidden_size": width,
            "intermediate_size": 3 * width,
            "layers": edition.layers * factor.get("layers", 1),
            "heads": heads,
            "kv_heads": heads // 2,
            "head_dim": edition.head_dim,
            "context_length": edition.row_tokens,
        }
        if "experts" in factor:
            shape["experts"] = {
                "count": factor["experts"],
                "per_token": EXPERTS_PER_TOKEN,
                "intermediate_size": 3 * width,
            }
        return shape

    def growth(self, arm: str) -> dict[str, Any]:
        """The table ``grow`` of an arm."""
        name, redrawn = ARMS[arm]
        if name == "experts":
            experts = {"count": SHAPES[name]["experts"], "per_token": EXPERTS_PER_TOKEN, "redrawn": redrawn}
            return {"experts": experts}
        target, source = self.shape(name), self.shape()
        return {key: value for key, value in target.items() if value != source[key]}

    def start(self, name: str, seed: int, tokens: int, rate: float, **kind: Any) -> Future[Done]:
        """Train a run in the pool; ``kind`` is ``model=`` or ``base=`` and ``grow=``."""
        edition = self.edition
        step_tokens = edition.row_tokens * edition.batch_rows
        steps = max(4, round(tokens / step_tokens))
        every = max(1, round(edition.cold / step_tokens / EVALUATIONS))
        recipe = {
            "data": str(self.data),
            "steps": steps,
            "batch_rows": edition.batch_rows,
            "micro_rows": edition.batch_rows,
            "row_tokens": edition.row_tokens,
            # A grown model reads its source's text in another order.
            "seed": seed + (1000 if "grow" in kind else 0),
            "evaluate_every": min(every, steps),
            "evaluate_rows": edition.evaluate_rows,
            "checkpoint_every": steps,
            "export": "fp32",
            "optimiser": {"algorithm": "muon", "learning_rate": rate, "warmup_steps": max(2, steps // 20)},
            **kind,
        }
        key = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:8]
        folder = self.work / f"{name.replace(' ', '-')}-seed{seed}-{steps}steps-{rate}-{key}"
        with self.lock:  # arms of one shape share the source that is trained on beside them
            if folder in self.started:
                return self.started[folder]
            future = self.started[folder] = Future()

        def report(inner: Future[tuple[Curve, bool]]) -> None:
            if error := inner.exception():
                future.set_exception(error)
                return
            curve, fresh = inner.result()
            self.runs += fresh
            minutes = (time.perf_counter() - self.began) / 60
            print(
                f"[{minutes:5.1f} min] {name}, seed {seed}, {curve.tokens[-1]:,} tokens, rate {rate}: "
                f"{curve.final:.4f} nats, {curve.total.cpu_seconds:.0f} CPU s{'' if fresh else ' (kept)'}",
                flush=True,
            )
            future.set_result(Done(folder, rate, curve))

        self.pool.submit(train, recipe, folder).add_done_callback(report)
        return future

    def search(self, name: str, tokens: int, **kind: Any) -> Done:
        """The best of three learning rates, by the first seed's last held-out loss."""
        futures = [self.start(name, SEEDS[0], tokens, rate, **kind) for rate in self.edition.learning_rates]
        return min((future.result() for future in futures), key=lambda done: done.curve.final)

    def others(self, name: str, tokens: int, rate: float, seeds: Sequence[int], **kind: Any) -> list[Done]:
        """The same run with other seeds; a ``bases`` among ``kind`` gives each seed its base."""
        bases: Mapping[int, Path] | None = kind.pop("bases", None)
        futures = [
            self.start(name, seed, tokens, rate, **kind, **({"base": str(bases[seed])} if bases else {}))
            for seed in seeds
        ]
        return [future.result() for future in futures]


def train(recipe: dict[str, Any], folder: Path) -> tuple[Curve, bool]:
    """Train one run in this process, unless it is there already; its curve, and whether it was trained now."""
    import torch

    from gale.train.grow import grow
    from gale.train.pretrain import pretrain
    from gale.train.recipe import GrowRecipe, PretrainRecipe

    kept = folder / "cpu_seconds.json"
    if kept.is_file():
        return read_curve(folder, json.loads(kept.read_text())), False
    shutil.rmtree(folder, ignore_errors=True)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    wall, cpu = time.perf_counter(), time.process_time()
    if "grow" in recipe:
        summary = grow(GrowRecipe.model_validate(recipe), folder)
    else:
        summary = pretrain(PretrainRecipe.model_validate(recipe), folder)
    share = summary["train_seconds"] / (time.perf_counter() - wall)  # the rest is evaluation, growing and writing
    seconds = (time.process_time() - cpu) * min(1.0, share)
    files.write_json(kept, seconds)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return read_curve(folder, seconds), True


def train_source(bench: Bench) -> tuple[dict[int, Done], list[dict[str, Any]]]:
    """A source for each seed, as long as the first seed says: until doubling the tokens improves little."""
    edition, tokens = bench.edition, bench.edition.source
    best = bench.search("source", tokens, model=bench.shape())
    series = [{"tokens": best.curve.tokens[-1], "loss": best.curve.final, "improvement": None, "flat": False}]
    while not series[-1]["flat"] and 2 * tokens <= edition.most_source:
        tokens *= 2
        last, best = best, bench.start("source", SEEDS[0], tokens, best.learning_rate, model=bench.shape()).result()
        better = last.curve.final - best.curve.final
        series.append(
            {
                "tokens": best.curve.tokens[-1],
                "loss": best.curve.final,
                "improvement": better,
                "flat": better < edition.flat,
            }
        )
    rest = bench.others("source", tokens, best.learning_rate, SEEDS[1:], model=bench.shape())
    return dict(zip(SEEDS, [best, *rest], strict=True)), series


def train_cold(bench: Bench, name: str) -> list[Done]:
    """A shape from fresh weights, once for each seed."""
    tokens, model = bench.edition.cold, bench.shape(name)
    best = bench.search(f"cold {name}", tokens, model=model)
    return [best, *bench.others(f"cold {name}", tokens, best.learning_rate, SEEDS[1:], model=model)]


def train_arm(
    bench: Bench, arm: str, bases: Mapping[int, Path], cold: Future[list[Done]]
) -> tuple[float, list[list[Done]], list[Done]]:
    """A grown arm: target, all runs of each seed, and those of the length at which it is compared."""
    kind: dict[str, Any] = {"grow": bench.growth(arm)}
    half, whole = bench.edition.cold // 2, bench.edition.cold
    best = bench.search(arm, half, base=str(bases[SEEDS[0]]), **kind)
    target = statistics.fmean(done.curve.final for done in cold.result())
    runs = [[best]] + [[] for _ in SEEDS[1:]]
    reached = reach([best.curve], target) is not None
    if reached:
        compared = [best, *bench.others(arm, half, best.learning_rate, SEEDS[1:], bases=bases, **kind)]
        reached = all(reach([done.curve], target) for done in compared)
        for run, done in zip(runs[1:], compared[1:], strict=True):
            run.append(done)
    if not reached:
        compared = bench.others(arm, whole, best.learning_rate, SEEDS, bases=bases, **kind)
    extra = bench.others(arm, half // 2, best.learning_rate, SEEDS, bases=bases, **kind) if reached else compared
    for run, done in zip(runs, extra, strict=True):
        run.append(done)
    return target, runs, compared


def train_continued(bench: Bench, bases: Mapping[int, Path], source: Curve, flops: float, rate: float) -> list[Done]:
    """The source trained on for ``flops``, once for each seed."""
    tokens = round(source.tokens[-1] * flops / source.total.flops)
    return bench.others("continued", tokens, rate, SEEDS, bases=bases, grow={})


def measure(bench: Bench) -> dict[str, Any]:
    """Everything, as a table of what came out."""
    with ThreadPoolExecutor(16) as threads:  # each arm waits for its runs in a thread of its own
        source_future = threads.submit(train_source, bench)
        cold = {name: threads.submit(train_cold, bench, name) for name in SHAPES}
        sources, series = source_future.result()
        bases = {seed: done.folder / "model" for seed, done in sources.items()}
        source = sources[SEEDS[0]].curve
        arms = {arm: threads.submit(train_arm, bench, arm, bases, cold[shape]) for arm, (shape, _) in ARMS.items()}
        best = bench.search("continued", bench.edition.cold, base=str(bases[SEEDS[0]]), grow={})
        continued: dict[str, Future[list[Done]]] = {}
        for arm, future in arms.items():
            flops = future.result()[2][0].curve.total.flops
            continued[arm] = threads.submit(train_continued, bench, bases, source, flops, best.learning_rate)
        table: dict[str, Any] = {}
        for arm, (shape, _) in ARMS.items():
            target, runs, compared = arms[arm].result()
            alongside = continued[arm].result()
            costs = [reach([done.curve for done in seed_runs], target) for seed_runs in runs]
            table[arm] = {
                "shape": shape,
                "target": target,
                "learning_rate": compared[0].learning_rate,
                "compared_tokens": compared[0].curve.tokens[-1],
                "compared_flops": compared[0].curve.total.flops,
                "reached": [cost and asdict(cost) for cost in costs],
                "grown_losses": [done.curve.final for done in compared],
                "continued_losses": [done.curve.final for done in alongside],
                "start": growth_of(compared[0].folder),
                **entry(
                    warm=costs,
                    cold=[done.curve.total for done in cold[shape].result()],
                    source=[done.curve.total for done in sources.values()],
                    grown_losses=[done.curve.final for done in compared],
                    continued_losses=[done.curve.final for done in alongside],
                ),
                "curves": {"grown": drawn(compared), "continued": drawn(alongside)},
            }
        return {
            "source": {
                "series": series,
                "flat_below": bench.edition.flat,
                "learning_rate": sources[SEEDS[0]].learning_rate,
                "losses": [done.curve.final for done in sources.values()],
                "cost": asdict(mean_cost(list(sources.values()))),
                "tokens": source.tokens[-1],
            },
            "cold": {
                name: {
                    "learning_rate": future.result()[0].learning_rate,
                    "losses": [done.curve.final for done in future.result()],
                    "cost": asdict(mean_cost(future.result())),
                    "tokens": future.result()[0].curve.tokens[-1],
                    "curve": drawn(future.result()),
                }
                for name, future in cold.items()
            },
            "continued_learning_rate": best.learning_rate,
            "arms": table,
        }


def growth_of(run: Path) -> dict[str, Any]:
    """Where a grown run began."""
    report = json.loads((run / "model" / "growth.json").read_text())
    keys = ("parameters", "function_preserving", "max_logit_difference", "held_out")
    return {key: report[key] for key in keys}


def mean_cost(runs: Sequence[Done]) -> Cost:
    """Of several seeds."""
    costs = [done.curve.total for done in runs]
    return Cost(statistics.fmean(cost.flops for cost in costs), statistics.fmean(cost.cpu_seconds for cost in costs))


def drawn(runs: Sequence[Done]) -> list[list[tuple[float, float]]]:
    """The curve of each seed: operations and loss."""
    return [[(done.curve.cost(index).flops, loss) for index, loss in enumerate(done.curve.losses)] for done in runs]


def prepare_texts(edition: Edition, work: Path) -> tuple[Path, str]:
    """Prepared text, and what it is."""
    from gale.data.prepare import prepare, ready_data
    from gale.data.recipe import DataRecipe, TokenizerRecipe
    from gale.data.tokenizer_training import train_tokenizer

    if not TEXTS.is_dir():
        print(f"There is no {TEXTS}; taking the few texts of recipes/smoke, which every arm will learn by heart.\n")
        return ready_data(ROOT / "recipes" / "smoke" / "data.toml"), "recipes/smoke"
    shares = {
        "en_stories": min(1.0, edition.text_share * 8),
        "en_textbooks": edition.text_share,
        "en_books": edition.text_share * 0.7,
    }
    common = {"licence": "see SOURCES.md of the data", "origin": "see SOURCES.md of the data"}
    sources = [
        {"path": str(TEXTS / f"{name}.jsonl.zst"), "epochs": epochs, **common} for name, epochs in shares.items()
    ]
    held_out = {
        "path": str(TEXTS / "val_en.jsonl.gz"),
        "split": "english",
        "only": list(shares),
        "epochs": 0.2,
        **common,
    }
    about = {"tokenizer": str(work / "tokenizer"), "sources": [*sources, held_out]}
    if not (work / "data" / "manifest.json").is_file():
        tokenizer = {"vocabulary_size": edition.vocabulary, "max_bytes_per_source": 1_000_000, "sources": sources}
        train_tokenizer(TokenizerRecipe.model_validate(tokenizer), work / "tokenizer")
        prepare(DataRecipe.model_validate(about), work / "data")
    return work / "data", ", ".join(f"{epochs:.2f} of {name}" for name, epochs in shares.items())


def main() -> None:
    """Train everything, print the tables, write results and plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edition", choices=EDITIONS, default="short")
    parser.add_argument(
        "--quick", action="store_const", const="quick", dest="edition", help="The same as --edition quick."
    )
    parser.add_argument("--work", type=Path, help="Folder for the runs.  [default: under GALE_HOME/runs]")
    parser.add_argument("--workers", type=int, default=2, help="Processes side by side, one thread each.")
    options = parser.parse_args()
    edition = EDITIONS[options.edition]
    work = files.resolve(options.work or settings().runs / f"warm-start-{options.edition}")
    if options.edition == "quick":
        shutil.rmtree(work, ignore_errors=True)
    os.environ["OMP_NUM_THREADS"] = os.environ["GALE_THREADS"] = "1"
    began = time.perf_counter()
    data, texts = prepare_texts(edition, work)
    # Fresh processes: a forked one would inherit threads that are not there.
    with ProcessPoolExecutor(options.workers, multiprocessing.get_context("spawn"), initializer=_quiet) as pool:
        bench = Bench(edition, work, data, pool)
        result = measure(bench)
    minutes = (time.perf_counter() - began) / 60
    spent = sum(future.result().curve.total.cpu_seconds for future in bench.started.values())
    header = json.loads(next(work.glob("cold-deeper*/metrics.jsonl")).read_text().splitlines()[0])["header"]
    about = {
        "edition": options.edition,
        "settings": asdict(edition),
        "shapes": {name: bench.shape(name) for name in ("source", *SHAPES)},
        "seeds": list(SEEDS),
        "texts": texts,
        "commit": header["commit"],
        "date": datetime.now(tz=UTC).date().isoformat(),
        "compute": header["compute"],
        "machine": {**header["machine"], "processor": platform.processor() or platform.machine()},
        "cpu_seconds": round(spent),
        "workers": options.workers,
        "runs": len(bench.started),
    }
    print(f"\n{about['compute']}, {options.workers} processes of one thread; {texts}")
    print(
        f"{about['runs']} runs, {spent:,.0f} CPU seconds of training; {bench.runs} of them now, in {minutes:.1f} "
        "minutes\n"
    )
    print(tables(result))
    if options.edition != "quick":
        name = "warm_start" if options.edition == "short" else f"warm_start_{options.edition}"
        files.write_json(ROOT / "bench" / "results" / f"{name}.json", {**about, **result})
        plot(result, ROOT / "docs" / "images" / f"{name}.svg")


def _quiet() -> None:
    """Let runs keep their progress to themselves."""
    from gale.core.progress import console

    console.quiet = True


if __name__ == "__main__":
    main()
