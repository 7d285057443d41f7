"""The one training loop. Stages hand it a model and an objective; it does everything else.

Each step: compute the loss and its gradient a few rows at a time, step the optimiser, and now and then evaluate,
sample, log and save. Row g of a run is a pure function of g, so the whole state of a run is the weights, the
optimiser's moments, what the objective says, and the number of steps done.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from gale.core import files
from gale.core.device import Compute, choose_compute, keep_freed_memory
from gale.core.errors import CheckpointError, GaleError
from gale.core.progress import Bar
from gale.data.shards import verify
from gale.model.experts import hide_from_compiler
from gale.model.transformer import Decoder
from gale.train.checkpoints import load_checkpoint, save_checkpoint
from gale.train.metrics import METRICS, MetricsLog, header
from gale.train.optim import MasterWeights, learning_rate
from gale.train.parallel import World, joined, let_go, shard
from gale.train.report import plot_curves, write_report
from gale.train.stage import ModelType, Stage
from gale.train.tensorboard import FOLDER as TENSORBOARD
from gale.train.tensorboard import TensorBoardLog

_LOCK = "run.lock"
_BROKEN_HINT = (
    "Look at these documents; start anew, in another --out, with a lower optimiser.learning_rate or a longer warm-up. "
    "The last checkpoint is sound."
)


def run(stage: Stage[ModelType], out: Path, *, resume: bool) -> dict[str, Any]:
    """Train to the last step; returns the summary. The model stands in ``out/model``.

    Raises :class:`CheckpointError` where ``out`` holds a run and ``resume`` was not asked for, or belongs to another,
    :class:`DataError` where the data is damaged, and :class:`GaleError` where the loss is no longer a number or
    another process is training in ``out``.
    """
    with joined() as world:
        if not world.main:
            return _run(stage, out, resume, world)
        busy = GaleError(
            f"Another process is training in {out}.", hint="Wait until it has ended, or choose another --out."
        )
        with files.locked(out / _LOCK, busy=busy):
            return _run(stage, out, resume, world)


def refuse_second_run(out: Path) -> None:
    """Raise :class:`CheckpointError` where ``out`` holds a run already; stages that work before theirs ask first."""
    if (out / "checkpoints").exists() or (out / METRICS).exists():
        raise CheckpointError(f"{out} already holds a run.", hint="Continue it with --resume, or choose another --out.")


def _run(stage: Stage[ModelType], out: Path, resume: bool, world: World) -> dict[str, Any]:
    recipe, objective = stage.recipe, stage.objective
    micro_batches = recipe.batch_rows // recipe.micro_rows
    if micro_batches % world.size:
        raise GaleError(
            f"{micro_batches} pieces of {recipe.micro_rows} rows cannot be dealt out evenly to {world.size} processes.",
            hint="Choose batch_rows / micro_rows as a multiple of the number of processes.",
        )
    compute = choose_compute(recipe.precision)
    keep_freed_memory()
    for folder in stage.data:
        verify(folder)
    # What must be the same for a resumed run to be the same run. Where files lie may change, what they hold may not.
    facts = {
        "stage": stage.name,
        "recipe": recipe.unchangeable(),
        "dtype": str(compute.dtype).removeprefix("torch."),
        **stage.facts,
    }
    # What may change, at the price of the last bits.
    machine = {
        "device": compute.unit,
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "processes": world.size,
    }
    torch.manual_seed(recipe.seed)
    model = stage.build(compute.dtype).to(compute.device).train()
    shard(model, world)
    if recipe.compile:
        _compile(model)
    optimiser = MasterWeights(model, recipe.optimiser)
    with world.together():  # nobody writes before all have looked
        start, tokens = _start(stage, out, resume, facts, machine, optimiser, silent=not world.main)
    resolved = recipe.model_dump(mode="json")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    metrics: MetricsLog | None = None
    if world.main:
        files.write_json(out / "recipe.json", resolved)
        about = header(stage.name, resolved, machine, compute=compute.reason, parameters=parameters, **stage.facts)
        metrics = MetricsLog(out / METRICS, start, about)
    board = TensorBoardLog(out / TENSORBOARD, keep_until=start) if world.main and recipe.tensorboard else None
    result: dict[str, Any] = {}

    with Bar(stage.name, recipe.steps, start, silent=not world.main) as bar:
        bar.say(f"{compute.reason}; {parameters / 1e6:.2f}M parameters; {out}")
        if recipe.optimiser.warmup_steps >= recipe.steps:
            bar.say(
                f"optimiser.warmup_steps ({recipe.optimiser.warmup_steps}) is no less than steps ({recipe.steps}): the "
                "learning rate will rise to the end and never fall. Good for a trial, not for a model."
            )
        if resume:
            bar.say(
                f"Going on after step {start}." if start else "There is no checkpoint yet; starting at the beginning."
            )
        for step in range(start, recipe.steps):
            began, began_cpu = time.perf_counter(), time.process_time()

            # Prepare: reinforcement learning lets the model answer here; other stages have nothing to do.
            row: dict[str, Any] = {"step": step + 1, **objective.begin_step(model, step)}

            # Compute: the gradient of the mean loss over all items of the step, one micro-batch at a time.
            sums: dict[str, float] = {"loss": 0.0, "items": 0.0, "tokens": 0.0, "broken": 0.0}
            broken: str | None = None
            for index in range(world.rank, micro_batches, world.size):
                first = step * recipe.batch_rows + index * recipe.micro_rows
                torch.manual_seed(_row_seed(recipe.seed, first))
                loss = objective.loss(model, first, recipe.micro_rows)
                loss.total.backward()
                optimiser.collect()
                value = float(loss.total.detach())
                if broken is None and not math.isfinite(value):
                    broken = f"loss {value} on {objective.describe(first, recipe.micro_rows)}"
                    sums["broken"] = 1.0
                for name, part in {"loss": value, "items": loss.items, "tokens": loss.tokens, **loss.sums}.items():
                    sums[name] = sums.get(name, 0.0) + part
            sums = dict(zip(sums, world.sum(list(sums.values())), strict=True))
            items, step_tokens, is_broken = max(1.0, sums.pop("items")), int(sums.pop("tokens")), sums.pop("broken") > 0

            # Step, unless the weights would be lost by it; the last checkpoint is then still sound.
            rate = learning_rate(recipe.optimiser, step, recipe.steps)
            # Sharded gradients arrive averaged over the processes.
            norm, taken = optimiser.step(rate, gradient_scale=world.size / items)
            if not is_broken and not math.isfinite(norm):
                rows = objective.describe(step * recipe.batch_rows, recipe.batch_rows)
                broken, is_broken = f"gradient norm {norm} on {rows}", True
            if is_broken:
                with world.together():
                    if broken:
                        raise GaleError(f"Training broke down at step {step + 1}: {broken}.", hint=_BROKEN_HINT)

            # Log.
            done = step + 1
            tokens += step_tokens
            seconds = time.perf_counter() - began
            [cpu_seconds] = world.sum([time.process_time() - began_cpu])
            row |= {"tokens": tokens}
            row |= {name: total / items for name, total in sums.items()}
            row |= {
                "learning_rate": rate,
                "gradient_norm": norm,
                "tokens_per_second": round(step_tokens / seconds, 1),
                "seconds": round(seconds, 4),
                "cpu_seconds": round(cpu_seconds, 4),
            }
            if not taken:
                row["skipped"] = 1
                bar.say(f"step {done}: skipped, its gradient norm {norm:.3g} is far above the usual")

            # Evaluate.
            if done % recipe.evaluate_every == 0 or done == recipe.steps:
                row |= _evaluate(stage, model, optimiser, world)
                figures = "  ".join(f"{name} {value:.4f}" for name, value in row["held_out"].items())
                bar.say(f"step {done}: loss {row['loss']:.4f}  {figures}")

            # Sample.
            if recipe.sample_every and done % recipe.sample_every == 0:
                row["samples"] = _sample(stage, model)
                for sample in row["samples"]:
                    bar.say(f"step {done}: {sample['prompt']} > {sample['text']}")
            if metrics:
                metrics.append(row)
            if board:
                board.append(row)
            bar.advance(f"loss {row['loss']:.4f}  {row['tokens_per_second']:,.0f} tok/s")

            # Save.
            if done % recipe.checkpoint_every == 0 or done == recipe.steps:
                state = {**optimiser.state(), **objective.state(), "tokens": torch.tensor(tokens)}
                with world.together():
                    if metrics:
                        metrics.sync()
                        save_checkpoint(out, done, state, facts, machine, keep=recipe.keep_checkpoints)
            result = row

    if board:
        board.close()
    return _finish(stage, model, optimiser, out, metrics, result, tokens, compute, world)


def _row_seed(seed: int, row: int) -> int:
    """The seed of what is drawn for a row, such as what LoRA drops out: whoever computes it, on whatever device."""
    return int(np.random.SeedSequence((seed, row)).generate_state(1, np.uint64)[0])


def _evaluate(
    stage: Stage[ModelType], model: ModelType, optimiser: MasterWeights, world: World
) -> dict[str, dict[str, float]]:
    """Held-out figures of the weights, and of their moving average where one is kept."""
    with torch.no_grad():
        model.eval()
        row = {"held_out": stage.objective.evaluate(model, world)}
        if optimiser.averages:
            let_go(model)
            optimiser.refresh(averaged=True)
            row["held_out_average"] = stage.objective.evaluate(model, world)
            let_go(model)
            optimiser.refresh()
        model.train()
    return row


def _sample(stage: Stage[ModelType], model: ModelType) -> list[dict[str, str]]:
    if stage.samples is None:
        return []
    model.eval()
    samples = stage.samples(model, stage.recipe.sample_prompts, stage.recipe.sample_tokens)
    model.train()
    return samples


def _compile(model: nn.Module) -> None:
    """Compile the forward pass of each decoder in ``model``; what is not a decoder is small."""
    compilers = (os.environ.get("CXX", ""), "c++", "g++", "clang++")
    if not any(map(shutil.which, compilers)):
        raise GaleError(
            "compile = true needs a C++ compiler, and there is none.", hint="Install g++, or set compile=false."
        )
    hide_from_compiler()
    for module in model.modules():
        if isinstance(module, Decoder):
            module.compile()


def _start(
    stage: Stage[ModelType],
    out: Path,
    resume: bool,
    facts: dict[str, Any],
    machine: dict[str, Any],
    optimiser: MasterWeights,
    *,
    silent: bool,
) -> tuple[int, int]:
    """Steps and tokens that are done already."""
    if not resume:
        refuse_second_run(out)
        return 0, 0
    found = load_checkpoint(out, facts, machine, silent=silent)
    if found is None:
        return 0, 0
    step, tensors = found
    tokens = int(tensors.pop("tokens", torch.tensor(0)))
    optimiser.load_state(tensors)
    stage.objective.load_state(tensors)
    return step, tokens


def _finish(
    stage: Stage[ModelType],
    model: ModelType,
    optimiser: MasterWeights,
    out: Path,
    metrics: MetricsLog | None,
    result: dict[str, Any],
    tokens: int,
    compute: Compute,
    world: World,
) -> dict[str, Any]:
    """Write the finished model, the summary and the report."""
    dtype = torch.bfloat16 if stage.recipe.export == "bf16" else torch.float32
    if world.size == 1:
        model.to(dtype)
        optimiser.refresh(averaged=True)  # from the masters, so that an fp32 export is as exact as they are
    else:
        weights = optimiser.whole_weights()
        if world.main:
            model = stage.build(dtype)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if name in weights:
                        parameter.copy_(weights[name])
        world.wait()
    result = result or (metrics.last() if metrics else None) or {}
    summary: dict[str, Any] = {"stage": stage.name, "final": result}
    if metrics:
        with files.new_directory(out / "model", marker=stage.marker) as folder:
            stage.export(model.eval(), folder, dtype)
        summary |= {
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "flops": stage.flops_per_token * tokens,
            "train_seconds": round(metrics.total("seconds"), 1),
            "compute": compute.reason,
            **stage.facts,
        }
        files.write_json(out / "summary.json", summary)
        plot_curves(out / METRICS, out / "curves.svg", title=stage.name)
        write_report(out)
    return summary
