"""The one training loop. Stages hand it a model and rows; it does everything else.

Each step: read a batch, compute the loss and its gradient in pieces of ``micro_rows``, step the optimiser, and now and
then evaluate, log and save. Row g of the run is a pure function of g, so the whole state of a run is the weights, the
optimiser's moments and the number of steps done.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gale.core import files
from gale.core.device import Compute, choose_compute
from gale.core.errors import CheckpointError, GaleError
from gale.core.progress import Bar
from gale.data.shards import read_manifest, verify
from gale.model.attention import PackedAttention
from gale.model.checkpoint import save_model
from gale.model.config import ModelConfig
from gale.model.transformer import Decoder
from gale.text.tokenizer import END_OF_TEXT, END_OF_TURN, Tokenizer
from gale.train.batches import IGNORED, Batch, PackedRows
from gale.train.optim import MasterWeightAdamW, learning_rate
from gale.train.recipe import StageRecipe
from gale.train.report import plot_curves
from gale.train.state import load_checkpoint, save_checkpoint

METRICS = "metrics.jsonl"
_LOCK = "run.lock"


@dataclass(frozen=True, slots=True)
class Stage:
    """What one stage adds to the loop; ``data`` is the folder of prepared data that the rows come from."""

    name: str
    recipe: StageRecipe
    data: Path
    config: ModelConfig
    initial_weights: Callable[[torch.dtype], Decoder]
    training: PackedRows
    held_out: dict[str, PackedRows] = field(default_factory=dict)


def run(stage: Stage, out: Path, *, resume: bool, extra_facts: dict[str, Any] | None = None) -> dict[str, Any]:
    """Train to the last step; returns the final metrics. The model stands in ``out/model``.

    Raises :class:`CheckpointError` where ``out`` holds a run and ``resume`` was not asked for, or belongs to another,
    :class:`DataError` where the data is damaged, and :class:`GaleError` where the loss is no longer a number or
    another process is training in ``out``.
    """
    busy = GaleError(f"Another process is training in {out}.", hint="Wait until it has ended, or choose another --out.")
    with files.locked(out / _LOCK, busy=busy):
        return _run(stage, out, resume, extra_facts or {})


def _run(stage: Stage, out: Path, resume: bool, extra_facts: dict[str, Any]) -> dict[str, Any]:
    recipe = stage.recipe
    compute = choose_compute(recipe.precision)
    verify(stage.data)
    manifest = read_manifest(stage.data)
    # What must be the same for a resumed run to be the same run. Where files lie may change, what they hold may not.
    facts = {
        "stage": stage.name,
        "recipe": recipe.model_dump(mode="json", exclude={"data", "base", "keep_checkpoints"}),
        "data_fingerprint": manifest["fingerprint"],
        "dtype": str(compute.dtype).removeprefix("torch."),
        **extra_facts,
    }
    # What may change, at the price of the last bits.
    machine = {"device": compute.unit, "threads": torch.get_num_threads(), "torch": str(torch.__version__)}
    torch.manual_seed(recipe.seed)
    model = stage.initial_weights(compute.dtype).to(compute.device).train()
    optimiser = MasterWeightAdamW(model, recipe.optimiser)
    start = _start(out, resume, facts, machine, optimiser)
    files.write_json(out / "recipe.json", recipe.model_dump(mode="json"))
    metrics = _MetricsLog(out / METRICS, keep_until=start)
    loss_of = _compiled(_summed_loss) if recipe.compile else _summed_loss
    tokens_per_step = recipe.batch_rows * recipe.row_tokens
    flops_per_step = stage.config.flops_per_token(recipe.row_tokens) * tokens_per_step
    result: dict[str, Any] = {}

    with Bar(stage.name, recipe.steps, start) as bar:
        bar.say(f"{compute.reason}; {stage.config.body_parameters / 1e6:.2f}M body parameters; {out}")
        if resume:
            bar.say(
                f"Going on after step {start}." if start else "There is no checkpoint yet; starting at the beginning."
            )
        for step in range(start, recipe.steps):
            began = time.perf_counter()

            # Compute: the gradient of the mean loss over all trained tokens of the step, one micro-batch at a time.
            loss_sum, trained = 0.0, 0
            for first in range(0, recipe.batch_rows, recipe.micro_rows):
                batch = stage.training.batch(step * recipe.batch_rows + first, recipe.micro_rows)
                loss = loss_of(model, *_tensors(batch, stage.config, compute))
                loss.backward()
                optimiser.collect()
                loss_sum += float(loss.detach())
                trained += batch.trained_tokens
            mean_loss = loss_sum / max(1, trained)

            # Step, unless the weights would be lost by it; the last checkpoint is then still sound.
            rate = learning_rate(recipe.optimiser, step, recipe.steps)
            norm = optimiser.step(rate, gradient_scale=1.0 / max(1, trained))
            if not (math.isfinite(mean_loss) and math.isfinite(norm)):
                raise GaleError(
                    f"Training broke down at step {step + 1}: loss {mean_loss}, gradient norm {norm}.",
                    hint="Start anew, in another --out, with a lower optimiser.learning_rate or a longer warm-up.",
                )

            # Log.
            done = step + 1
            seconds = time.perf_counter() - began
            row: dict[str, Any] = {
                "step": done,
                "tokens": done * tokens_per_step,
                "loss": mean_loss,
                "learning_rate": rate,
                "gradient_norm": norm,
                "tokens_per_second": round(tokens_per_step / seconds, 1),
                "seconds": round(seconds, 4),
            }

            # Evaluate.
            if done % recipe.evaluate_every == 0 or done == recipe.steps:
                row["held_out"] = evaluate(model, stage, compute)
                losses = "  ".join(f"{name} {value:.4f}" for name, value in row["held_out"].items())
                bar.say(f"step {done}: loss {mean_loss:.4f}  {losses}")
            metrics.append(row)
            bar.advance(f"loss {mean_loss:.4f}  {row['tokens_per_second']:,.0f} tok/s")

            # Save.
            if done % recipe.checkpoint_every == 0 or done == recipe.steps:
                metrics.sync()
                save_checkpoint(out, done, optimiser.state(), facts, machine, keep=recipe.keep_checkpoints)
            result = row

    if not result:
        result = metrics.last() or {}
    _export(stage, model, optimiser, out)
    summary = {
        "stage": stage.name,
        "final": result,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "flops": flops_per_step * recipe.steps,
        "train_seconds": round(metrics.total("seconds"), 1),
        "compute": compute.reason,
        "data_fingerprint": manifest["fingerprint"],
    }
    files.write_json(out / "summary.json", summary)
    plot_curves(out / METRICS, out / "curves.svg", title=stage.name)
    return summary


def evaluate(model: Decoder, stage: Stage, compute: Compute) -> dict[str, float]:
    """Mean loss in nats per trained token over the first ``evaluate_rows`` rows of each held-out split."""
    losses = {}
    micro_rows = stage.recipe.micro_rows
    with torch.no_grad():
        for name, rows in stage.held_out.items():
            total, trained = 0.0, 0
            end = min(stage.recipe.evaluate_rows, rows.rows_of_epoch(0))
            for first in range(0, end, micro_rows):
                batch = rows.batch(first, min(micro_rows, end - first))
                total += float(_summed_loss(model, *_tensors(batch, stage.config, compute)))
                trained += batch.trained_tokens
            losses[name] = total / max(1, trained)
    return losses


def _tensors(batch: Batch, config: ModelConfig, compute: Compute) -> tuple[Tensor, Tensor, Tensor, PackedAttention]:
    device = compute.device
    attend = PackedAttention(
        batch.lengths,
        device,
        sliding_window=config.sliding_window,
        sliding_from_layer=config.sliding_from_layer,
    )
    return batch.ids_N.to(device), batch.targets_N.to(device), batch.positions_N.to(device), attend


def _summed_loss(
    model: Decoder, ids_N: Tensor, targets_N: Tensor, positions_N: Tensor, attend: PackedAttention
) -> Tensor:
    """Cross-entropy in nats, summed over the trained tokens; the softmax is in fp32."""
    logits_NV = model.logits(model(ids_N, positions_N, attend))
    return F.cross_entropy(logits_NV.float(), targets_N, ignore_index=IGNORED, reduction="sum")


def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    compilers = (os.environ.get("CXX", ""), "c++", "g++", "clang++")
    if not any(map(shutil.which, compilers)):
        raise GaleError(
            "compile = true needs a C++ compiler, and there is none.", hint="Install g++, or set compile=false."
        )
    compiled: Callable[..., Tensor] = torch.compile(function)
    return compiled


def _start(
    out: Path, resume: bool, facts: dict[str, Any], machine: dict[str, Any], optimiser: MasterWeightAdamW
) -> int:
    """Put back what ``out`` holds of this run, and return how many steps are done."""
    if resume:
        if found := load_checkpoint(out, facts, machine):
            optimiser.load_state(found[1])
            return found[0]
    elif (out / "checkpoints").exists() or (out / METRICS).exists():
        raise CheckpointError(f"{out} already holds a run.", hint="Continue it with --resume, or choose another --out.")
    return 0


def _export(stage: Stage, model: Decoder, optimiser: MasterWeightAdamW, out: Path) -> None:
    """Write ``out/model``: everything a model folder in Hugging Face layout has."""
    dtype = torch.bfloat16 if stage.recipe.export == "bf16" else torch.float32
    model.to(dtype)
    optimiser.refresh()  # from the masters, so that an fp32 export is as exact as they are
    tokenizer = Tokenizer.load(stage.data / "tokenizer")
    tokenizer.settings["model_max_length"] = stage.config.context_length
    ends = [token for name in (END_OF_TURN, END_OF_TEXT) if (token := tokenizer.token_id(name)) is not None]
    with files.new_directory(out / "model", marker="config.json") as folder:
        save_model(model, folder, dtype=dtype)
        tokenizer.save(folder)
        files.write_json(folder / "generation_config.json", {"eos_token_id": ends, "pad_token_id": ends[-1]})


class _MetricsLog:
    """One JSON object a line and a step; lines past a resumed step are dropped, they will be computed again."""

    def __init__(self, path: Path, keep_until: int) -> None:
        self._rows: list[dict[str, Any]] = []
        if keep_until and path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    row = json.loads(line)
                except ValueError:
                    break  # a killed run may leave half a line
                if row["step"] > keep_until:
                    break
                self._rows.append(row)
        self._path = path
        files.write_text(path, "".join(json.dumps(row) + "\n" for row in self._rows))

    def append(self, row: dict[str, Any]) -> None:
        self._rows.append(row)
        with files.explain_disk_errors(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def sync(self) -> None:
        """Make what was appended survive a power cut."""
        with self._path.open("rb") as file:
            os.fsync(file.fileno())

    def last(self) -> dict[str, Any] | None:
        return self._rows[-1] if self._rows else None

    def total(self, key: str) -> float:
        return float(sum(row[key] for row in self._rows))
