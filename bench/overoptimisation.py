"""How far can a reward model be trusted? Gold reward and reward-model reward against the distance from the base model.

    OMP_NUM_THREADS=1 .venv/bin/python -m bench.overoptimisation [--quick] [--work FOLDER]

After Gao, Schulman & Hilton 2023, on the postcards of bench/postcards.py, whose true (gold) reward is a program. A base
model learns to write cards; pairs of its cards are labelled by the gold reward, one label in ten wrong; a reward model
is trained on them. PPO and GRPO then optimise the reward model, DPO learns from the pairs, and the best of n is picked
by the reward model. Each policy is measured on the same prompts: both rewards, and KL(policy || base).

Prints a Markdown table; writes bench/results/overoptimisation.json and docs/images/overoptimisation.svg. `--quick` is a
rehearsal of three minutes that writes into FOLDER only; `--redraw` makes table and picture again from the results.
The matrices are so small that a second thread only waits for the first.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file

from bench.postcards import CONTEXT, NAMES, TOPICS, asked, gold, write_rows, write_world
from gale.core.charts import COLOURS, SOFT, standalone_figure
from gale.core.device import choose_compute
from gale.data.prepare import prepare
from gale.data.recipe import DataRecipe
from gale.data.verifiers import VERIFIERS
from gale.engine.request import SamplingParams
from gale.engine.rollouts import Rollout, end_tokens_of, generate
from gale.model.checkpoint import load_model
from gale.model.transformer import Decoder
from gale.text.tokenizer import Tokenizer
from gale.train.best_of_n import best_of_n_divergence, expected_best
from gale.train.dpo import dpo
from gale.train.losses import trained_logprobs
from gale.train.pretrain import pretrain
from gale.train.prompts import Prompt, read_prompts
from gale.train.recipe import DpoRecipe, PretrainRecipe, RewardRecipe
from gale.train.reward import reward as train_reward
from gale.train.rewards import ModelJudge, answers_batch
from gale.train.rl import rl
from gale.train.rl_recipe import RlRecipe

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROOT = Path(__file__).parents[1]
RESULTS, RESULT = ROOT / "bench" / "results", "overoptimisation.json"
IMAGES, PICTURE = ROOT / "docs" / "images", "overoptimisation.svg"
ANSWER_TOKENS = 40
WRONG_LABELS = 0.1
SEED = 1
# A program of this world, beside those that Gale brings along.
VERIFIERS["postcard"] = lambda answer, expected, _: gold(answer, expected)


@dataclass(frozen=True)
class Scale:
    """How much of everything."""

    base_steps: int
    pairs: int
    reward_steps: int
    rl_steps: int
    rl_seeds: int
    rl_points: int
    dpo_steps: int
    dpo_points: int
    best_of: int
    samples: int  # answers to each prompt when a policy is measured


FULL = Scale(
    base_steps=600, pairs=1500, reward_steps=300, rl_steps=300, rl_seeds=2, rl_points=15, dpo_steps=400,
    dpo_points=8, best_of=512, samples=16,
)  # fmt: skip
QUICK = Scale(
    base_steps=400, pairs=400, reward_steps=60, rl_steps=24, rl_seeds=1, rl_points=4, dpo_steps=40,
    dpo_points=2, best_of=32, samples=4,
)  # fmt: skip
DPO_BETAS = (0.3, 0.1, 0.03)


@dataclass(frozen=True)
class Point:
    """A policy: how far from the base (nats), and both rewards; each with its standard error."""

    method: str
    strength: str
    kl: float
    kl_error: float
    proxy: float
    proxy_error: float
    gold: float
    gold_error: float
    tokens: float | None = None
    example: str = ""


class World:
    """The base model, the reward model and the prompts on which everything is measured."""

    def __init__(self, folder: Path, scale: Scale) -> None:
        self.folder, self.scale = folder, scale
        self.paths = write_world(folder / "world", cards=6000, prompts=1024, seed=SEED)
        tasks = [(name, topic) for name in NAMES for topic in TOPICS]
        rows = [{"messages": asked(task), "expected": " ".join(task)} for task in tasks]
        self.tasks = write_rows(folder / "tasks.jsonl", rows)
        self.compute = choose_compute("fp32")
        self.tokenizer = Tokenizer.load(self.paths["tokenizer"])
        prompts = read_prompts(self.tasks, self.tokenizer, most_tokens=CONTEXT - ANSWER_TOKENS, seed=0)
        assert not prompts.left_out
        self.prompts = prompts.prompts

    def train_base(self) -> None:
        """A model that writes cards as this world does."""
        data = self._prepare("cards-data", "chat", self.paths["cards"], self.paths["held_out_cards"])
        recipe = PretrainRecipe.model_validate(
            {
                **_run(data, self.scale.base_steps, rows=32, rate=0.01, algorithm="muon"),
                "model": {
                    "hidden_size": 64,
                    "intermediate_size": 192,
                    "layers": 2,
                    "heads": 4,
                    "kv_heads": 2,
                    "head_dim": 16,
                    "context_length": CONTEXT,
                },
            }
        )
        pretrain(recipe, self.folder / "base")
        self.base_folder = self.folder / "base" / "model"
        self.base = load_model(self.base_folder, dtype=torch.float32)

    def train_reward_model(self) -> dict[str, float]:
        """Pairs of the base model's cards, and a model of what the labels prefer."""
        chance = random.Random(SEED)
        pairs = self.scale.pairs + 200
        asked_for = [chance.choice(self.prompts) for _ in range(pairs) for _ in range(2)]
        asked_for[1::2] = asked_for[::2]
        texts = [self.text(answer) for answer in self.answer(self.base, asked_for, seed=SEED)]
        rows, wrong, ties = [], 0, 0
        for place in range(0, len(texts), 2):
            prompt, (first, second) = asked_for[place], texts[place : place + 2]
            worth = [gold(text, prompt.expected or "") for text in (first, second)]
            better = first, second
            ties += worth[0] == worth[1]
            mistaken = chance.random() < WRONG_LABELS
            wrong += mistaken and worth[0] != worth[1]
            if (worth[1] > worth[0]) != mistaken:
                better = second, first
            rows.append({"prompt": prompt.source["messages"], "chosen": better[0], "rejected": better[1]})
        written = [
            write_rows(self.folder / name, part)
            for name, part in (("pairs.jsonl", rows[200:]), ("held_out_pairs.jsonl", rows[:200]))
        ]
        self.pairs = self._prepare("pairs-data", "preference", *written)
        recipe = RewardRecipe.model_validate(
            {
                **_run(self.pairs, self.scale.reward_steps, rows=32, rate=0.001),
                "base": self.base_folder,
                "evaluate_rows": 200,
            }
        )
        held_out = train_reward(recipe, self.folder / "reward")["final"]["held_out"]
        self.reward_folder = self.folder / "reward" / "model"
        self.judge = ModelJudge.load(self.reward_folder, self.tokenizer, self.compute, row_tokens=CONTEXT, rows=64)
        return {"wrong_labels": wrong, "ties": ties, "held_out_accuracy": held_out["held_out_accuracy"]}

    def answer(self, policy: Decoder, prompts: Sequence[Prompt], *, seed: int) -> list[Rollout]:
        """One card to each prompt."""
        sampling = [SamplingParams(max_tokens=ANSWER_TOKENS, seed=seed * 10**6 + n) for n in range(len(prompts))]
        ends = end_tokens_of(self.tokenizer)
        return generate(policy, [prompt.ids for prompt in prompts], sampling, end_tokens=ends)

    def text(self, answer: Rollout) -> str:
        """What a card says."""
        return self.tokenizer.decode(answer.tokens)

    def gold(self, prompts: Sequence[Prompt], answers: Sequence[Rollout]) -> list[float]:
        """What cards are truly worth."""
        return [gold(self.text(a), p.expected or "") for p, a in zip(prompts, answers, strict=True)]

    @torch.no_grad()
    def measure(self, policy: Decoder, method: str, strength: str) -> Point:
        """Where a policy stands, over answers to every prompt."""
        asked_for = [prompt for prompt in self.prompts for _ in range(self.scale.samples)]
        answers = self.answer(policy, asked_for, seed=99)
        away: list[float] = []
        for low in range(0, len(answers), 64):
            part = answers[low : low + 64]
            batch = answers_batch(part)
            gaps = trained_logprobs(policy, batch) - trained_logprobs(self.base, batch)
            away += [float(piece.sum()) for piece in gaps.split([len(answer.tokens) for answer in part])]
        figures = [_mean(away), _mean(self.judge(asked_for, answers)), _mean(self.gold(asked_for, answers))]
        tokens = statistics.mean(len(answer.tokens) for answer in answers)
        return Point(method, strength, *figures[0], *figures[1], *figures[2], tokens, self.text(answers[0]))

    def _prepare(self, name: str, form: str, training: Path, held_out: Path) -> Path:
        common = {"format": form, "licence": "Apache-2.0", "origin": "bench/postcards.py"}
        sources = ({"path": training, **common}, {"path": held_out, **common, "split": "held_out"})
        prepare(
            DataRecipe.model_validate({"tokenizer": self.paths["tokenizer"], "sources": sources}), self.folder / name
        )
        return self.folder / name


def _run(data: Path, steps: int, *, rows: int, rate: float, algorithm: str = "adamw") -> dict[str, Any]:
    return {
        "data": data,
        "steps": steps,
        "batch_rows": rows,
        "micro_rows": rows,
        "row_tokens": CONTEXT,
        "precision": "fp32",
        "export": "fp32",
        "seed": SEED,
        "evaluate_every": 10**6,
        "checkpoint_every": 10**6,
        "optimiser": {"algorithm": algorithm, "learning_rate": rate, "warmup_steps": 10, "spike_factor": 0.0},
    }


def optimise(world: World, algorithm: str, seed: int) -> list[Point]:
    """A policy that PPO or GRPO trains against the reward model, measured on its way."""
    scale = world.scale
    ppo = algorithm == "ppo"
    every = scale.rl_steps // scale.rl_points
    recipe = RlRecipe.model_validate(
        {
            **_run(world.paths["prompts"], scale.rl_steps, rows=128, rate=0.0007),
            "base": world.base_folder,
            "seed": seed,
            "algorithm": algorithm,
            "reward": {"model": world.reward_folder},
            "gold": {"verifier": "postcard"},
            "answer_tokens": ANSWER_TOKENS,
            "answers_per_prompt": 1 if ppo else 8,
            "kl_coefficient": 0.0,
            "checkpoint_every": every,
            "keep_checkpoints": 10**6,
            "optimiser": {"learning_rate": 0.0007, "schedule": "wsd", "decay_share": 0.0, "warmup_steps": 10,
                          "weight_decay": 0.0, "spike_factor": 0.0},
        }
    )  # fmt: skip
    out = world.folder / f"{algorithm}-{seed}"
    rl(recipe, out)
    return [
        world.measure(policy, algorithm.upper(), f"step {step}")
        for step, policy in _along_the_way(world, out, "policy.")
    ]


def prefer(world: World, beta: float) -> list[Point]:
    """A policy that DPO trains on the pairs, measured on its way."""
    scale = world.scale
    recipe = DpoRecipe.model_validate(
        {
            **_run(world.pairs, scale.dpo_steps, rows=32, rate=0.0005),
            "base": world.base_folder,
            "beta": beta,
            "checkpoint_every": scale.dpo_steps // scale.dpo_points,
            "keep_checkpoints": 10**6,
        }
    )
    out = world.folder / f"dpo-{beta}"
    dpo(recipe, out)
    return [
        world.measure(policy, "DPO", f"beta {beta}, step {step}") for step, policy in _along_the_way(world, out, "")
    ]


def pick(world: World) -> list[Point]:
    """The best of n cards of the base model, by the reward model; its distance is known exactly."""
    samples = world.scale.best_of
    proxies, golds = [], []
    for place, prompt in enumerate(world.prompts[:: 1 if samples <= 32 else 2]):
        asked_for = [prompt] * samples
        answers = world.answer(world.base, asked_for, seed=1000 + place)
        proxies.append(world.judge(asked_for, answers))
        golds.append(world.gold(asked_for, answers))
    points = []
    n = 1
    while n <= samples // 2:
        found = [_mean(expected_best(torch.tensor(proxies), torch.tensor(x), n).tolist()) for x in (proxies, golds)]
        points.append(Point("best of n", f"n = {n}", best_of_n_divergence(n), 0.0, *found[0], *found[1]))
        n *= 2
    return points


def _along_the_way(world: World, run: Path, prefix: str) -> list[tuple[int, Decoder]]:
    """The policy of each checkpoint of a run; the checkpoints are removed, as they are large."""
    found = []
    for folder in sorted((run / "checkpoints").glob("step-*")):
        tensors = load_file(folder / "state.safetensors")
        policy = load_model(world.base_folder, dtype=torch.float32)
        with torch.no_grad():
            for name, parameter in policy.named_parameters():
                parameter.copy_(tensors[f"master/{prefix}{name}"])
        found.append((int(folder.name.removeprefix("step-")), policy))
    shutil.rmtree(run / "checkpoints")
    return found


def _mean(values: list[float]) -> tuple[float, float]:
    """Mean and standard error."""
    return statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5


def main() -> None:
    """Run everything, print the table, write results and plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--work", type=Path, help="Folder for everything in between.  [default: a temporary one]")
    parser.add_argument("--redraw", action="store_true")
    options = parser.parse_args()
    if options.redraw:
        points = [Point(**point) for point in json.loads((RESULTS / RESULT).read_text())["points"]]
        draw(points, IMAGES / PICTURE)
        print(table(points))
        return
    scale = QUICK if options.quick else FULL
    folder = options.work or Path(tempfile.mkdtemp(prefix="overoptimisation-"))
    began = time.perf_counter()
    world = World(folder, scale)
    world.train_base()
    about = world.train_reward_model()
    points = [world.measure(world.base, "base", "")]
    points += pick(world)
    for beta in DPO_BETAS:
        points += prefer(world, beta)
    for algorithm in ("grpo", "ppo"):
        for seed in range(SEED, SEED + scale.rl_seeds):
            points += [
                Point(**{**asdict(p), "strength": f"seed {seed}, {p.strength}"})
                for p in optimise(world, algorithm, seed)
            ]
    result = {
        "date": f"{datetime.now(tz=UTC):%Y-%m-%d}",
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT
        ).stdout.strip(),
        "machine": world.compute.unit,
        "threads": torch.get_num_threads(),
        "seconds": round(time.perf_counter() - began),
        "scale": asdict(scale),
        "reward_model": about,
        "points": [asdict(point) for point in points],
    }
    results, images = (folder, folder) if options.quick else (RESULTS, IMAGES)
    results.mkdir(parents=True, exist_ok=True)
    (results / RESULT).write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    draw(points, images / PICTURE)
    print(table(points))
    print(f"\n{result['seconds']} s; {about}; in between: {folder}")


METHODS = ("best of n", "GRPO", "PPO", "DPO")


def runs(points: list[Point], method: str) -> dict[str, list[Point]]:
    """The points of a method by run (its seed or beta), in the order of training."""
    found: dict[str, list[Point]] = {}
    for point in points:
        if point.method == method:
            name = point.strength.split(", ")[0] if ", " in point.strength else method
            found.setdefault(name, []).append(point)
    return found


def table(points: list[Point]) -> str:
    """The base; and for each run where the gold reward peaks, and where it ends."""
    base = points[0]
    lines = [
        "| method | run | peak of gold: sqrt KL | gold | reward model | at the end: sqrt KL | gold | reward model "
        "| gold lost |",
        "|---|---|---|---|---|---|---|---|---|",
        f"| base | | 0 | {base.gold:.3f} | {base.proxy:.2f} | | | | |",
    ]
    for method in METHODS:
        for name, several in runs(points, method).items():
            best, last = max(several, key=lambda p: p.gold), several[-1]
            error = (best.gold_error**2 + last.gold_error**2) ** 0.5
            lines.append(
                f"| {method} | {'' if name == method else name} | {max(0, best.kl) ** 0.5:.2f} | {best.gold:.3f} | "
                f"{best.proxy:.2f} | {max(0, last.kl) ** 0.5:.2f} | {last.gold:.3f} | {last.proxy:.2f} | "
                f"{best.gold - last.gold:.3f} ± {1.96 * error:.3f} |"
            )
    return "\n".join(lines)


def draw(points: list[Point], path: Path) -> None:
    """Both rewards against the square root of the divergence."""
    colours = dict(zip(METHODS, COLOURS, strict=False))
    base = points[0]

    def panels(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        for axes, key, title in ((left, "gold", "gold reward"), (right, "proxy", "reward of the reward model")):
            axes.axhline(getattr(base, key), color=SOFT, linewidth=0.8, linestyle=":")
            for method in METHODS:
                for number, several in enumerate(runs(points, method).values()):
                    axes.errorbar(
                        [max(0, p.kl) ** 0.5 for p in several],
                        [getattr(p, key) for p in several],
                        [1.96 * getattr(p, f"{key}_error") for p in several],
                        color=colours[method],
                        label=method if number == 0 else None,
                        alpha=1 / (1 + 0.35 * number),
                        marker="o",
                        markersize=2.5,
                        linewidth=1.1,
                        elinewidth=0.6,
                    )
            axes.set(xlabel="sqrt of KL(policy || base), nats", ylabel=title)
        left.legend()

    path.write_bytes(standalone_figure(panels, width=9, height=4))


if __name__ == "__main__":
    main()
