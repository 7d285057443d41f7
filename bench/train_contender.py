"""One contender of bench/train.py in a process of its own, so that imports, threads and memory are apart.

Every contender gets the same rows in the same order and calls ``round_.step()`` before each optimiser step, which is
where the parent starts and stops it. nanoGPT and minimind bring their own model classes, optimisers and settings from
their checkouts; their loops here do what their training scripts do on a CPU. Gale is driven through its own loop.
"""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Logits = Callable[[Tensor], Tensor]  # ids [B, T] -> scores [B, T, V]

# Layers, width, heads, key heads, head size and feed-forward width. nanoGPT has no gate, so a feed-forward of 4C has as
# many parameters as a gated one of 8C/3; "mini" is what minimind makes of this depth and width.
SHAPES: dict[str, dict[str, Any]] = {
    "small": {"layers": 6, "hidden_size": 384, "heads": 6, "kv_heads": 6, "head_dim": 64, "intermediate_size": 1024},
    "mini": {"layers": 6, "hidden_size": 384, "heads": 8, "kv_heads": 4, "head_dim": 48, "intermediate_size": 1216},
    "134M": {"layers": 12, "hidden_size": 768, "heads": 12, "kv_heads": 12, "head_dim": 64, "intermediate_size": 2048}
    | {"tied_embeddings": False},
}


@dataclass
class Job:
    """What the parent asks for: who runs in which shape on which rows [R, T + 1], and whether to save and score."""

    contender: str
    shape: str
    data: str
    vocabulary: int
    batch_rows: int
    steps: int
    seed: int
    peer: str = ""
    bf16: bool = False
    options: dict[str, Any] | None = None
    score: bool = False

    def rows(self, name: str) -> Tensor:
        """The rows of ``train`` or ``validation`` as int64."""
        return torch.from_numpy(np.load(Path(self.data) / f"{name}.npy").astype(np.int64))


class Round:
    """Runs as many steps as the parent says, then tells it what they cost and waits for the next number."""

    def __init__(self, out: int) -> None:
        self._out, self._left, self._began = out, 0, (0.0, 0.0)
        self._running = False

    def step(self) -> None:
        """Call before each step."""
        if self._left == 0:
            self.tell()
            self._left = int(sys.stdin.readline() or sys.exit(0))
            self._began, self._running = (time.perf_counter(), time.process_time()), True
        self._left -= 1

    def tell(self, **figures: Any) -> None:
        """Report what the round just run took."""
        if self._running:
            wall, cpu = self._began
            figures |= {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
        os.write(self._out, (json.dumps(figures) + "\n").encode())


def bits_per_byte(job: Job, logits: Logits) -> float:
    """The one judge: nats of all validation targets, in bits over the bytes that those targets stand for."""
    rows, token_bytes = job.rows("validation"), torch.from_numpy(np.load(Path(job.data) / "token_bytes.npy"))
    nats, size = 0.0, 0
    with torch.no_grad():
        for batch in rows.split(job.batch_rows):
            ids, targets = batch[:, :-1].contiguous(), batch[:, 1:]  # nanoGPT takes a view of what it is given
            nats += float(F.cross_entropy(logits(ids).float().flatten(0, 1), targets.flatten(), reduction="sum"))
            size += int(token_bytes[targets].sum())
    return nats / math.log(2) / size


def batches(job: Job) -> Callable[[int], Tensor]:
    """Rows [B, T + 1] of a step: the training rows in an order that only the seed decides, again and again."""
    rows = job.rows("train")
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(job.seed))
    return lambda step: rows[order[torch.arange(step * job.batch_rows, (step + 1) * job.batch_rows) % len(order)]]


def peer_loop(
    job: Job,
    round_: Round,
    model: torch.nn.Module,
    optimiser: torch.optim.Optimizer,
    loss: Callable[[Tensor], Tensor],
    rate: Callable[[int], float],
) -> None:
    """What train.py (nanoGPT), train_pretrain.py (minimind) and a plain loop over Hugging Face all do in a step."""
    batch = batches(job)
    model.train()
    for step in range(job.steps):
        round_.step()
        for group in optimiser.param_groups:
            group["lr"] = rate(step)
        with torch.autocast("cpu", torch.bfloat16) if job.bf16 else nullcontext():
            value = loss(batch(step))
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
    model.eval()


def nanogpt(job: Job, round_: Round) -> Logits:
    """config/train_shakespeare_char.py, which has this shape, with the changes its README makes for a CPU."""
    sys.path.insert(0, job.peer)
    from model import GPT, GPTConfig

    shape, length = SHAPES[job.shape], job.rows("train").shape[1] - 1
    config = GPTConfig(
        block_size=length,
        vocab_size=job.vocabulary,
        n_layer=shape["layers"],
        n_head=shape["heads"],
        n_embd=shape["hidden_size"],
        dropout=0.0,
        bias=False,
    )
    model = GPT(config)
    optimiser = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), "cpu")
    warmup, peak, least = 100, 1e-3, 1e-4

    def rate(step: int) -> float:
        if step < warmup:
            return peak * (step + 1) / (warmup + 1)
        share = (step - warmup) / max(1, job.steps - warmup)
        return least + 0.5 * (1 + math.cos(math.pi * share)) * (peak - least)

    def loss(rows: Tensor) -> Tensor:
        value: Tensor = model(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())[1]
        return value

    peer_loop(job, round_, model, optimiser, loss, rate)
    # Given targets it returns the scores of every position, not only of the last.
    return lambda ids: model(ids, ids)[0]


def minimind(job: Job, round_: Round) -> Logits:
    """trainer/train_pretrain.py: AdamW as it comes, 5e-4 falling along a cosine to a tenth, no warm-up."""
    sys.path.insert(0, job.peer)
    from model.model_minimind import MiniMindConfig, MiniMindForCausalLM

    shape = SHAPES[job.shape]
    config = MiniMindConfig(
        hidden_size=shape["hidden_size"], num_hidden_layers=shape["layers"], vocab_size=job.vocabulary
    )
    model = MiniMindForCausalLM(config)
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-4)

    def rate(step: int) -> float:
        return 5e-4 * (0.1 + 0.45 * (1 + math.cos(math.pi * (step + 1) / job.steps)))

    def loss(rows: Tensor) -> Tensor:
        # It shifts the labels itself, so it reads T + 1 tokens to predict T.
        out = model(rows, labels=rows)
        value: Tensor = out.loss + out.aux_loss
        return value

    peer_loop(job, round_, model, optimiser, loss, rate)
    return lambda ids: model(ids).logits


def huggingface(job: Job, round_: Round) -> Logits:
    """The loop one writes first: Qwen3 of transformers, torch's AdamW."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    shape, length = SHAPES[job.shape], job.rows("train").shape[1] - 1
    config = Qwen3Config(
        vocab_size=job.vocabulary,
        hidden_size=shape["hidden_size"],
        intermediate_size=shape["intermediate_size"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"],
        head_dim=shape["head_dim"],
        max_position_embeddings=length,
        tie_word_embeddings=shape.get("tied_embeddings", True),
        use_cache=False,
    )
    model = Qwen3ForCausalLM(config)
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=0.1)

    def loss(rows: Tensor) -> Tensor:
        ids = rows[:, :-1]
        value: Tensor = model(ids, labels=ids).loss
        return value

    peer_loop(job, round_, model, optimiser, loss, lambda step: 5e-4)
    return lambda ids: model(ids).logits


def gale(job: Job, round_: Round) -> Logits:
    """Gale's own loop, checkpoints, log and all; every row is one document, so no attention is saved by packing."""
    from gale.model.attention import PackedAttention
    from gale.model.checkpoint import save_model
    from gale.model.config import ModelConfig
    from gale.model.transformer import Decoder
    from gale.train.batches import Batch
    from gale.train.loop import run
    from gale.train.losses import trained_logprobs
    from gale.train.recipe import PretrainRecipe
    from gale.train.stage import Loss, Objective, Stage

    length = job.rows("train").shape[1] - 1
    fields = {"data": "rows", "steps": job.steps, "batch_rows": job.batch_rows, "micro_rows": job.batch_rows}
    fields |= {"row_tokens": length, "seed": job.seed, "evaluate_every": 10**6, "checkpoint_every": 10**6}
    fields |= {"model": {**SHAPES[job.shape], "context_length": length}, **(job.options or {})}
    recipe = PretrainRecipe.model_validate(fields)
    shape = recipe.model.model_dump(exclude={"experts"}, exclude_none=True)
    config = ModelConfig(family="qwen3", vocabulary_size=job.vocabulary, **shape)
    trained: list[Decoder] = []

    def build(dtype: torch.dtype) -> Decoder:
        model = Decoder(config)
        model.initialise(job.seed)
        trained.append(model.to(dtype))
        return trained[0]

    class Rows(Objective[Decoder]):
        _batch = staticmethod(batches(job))

        def begin_step(self, model: Decoder, step: int) -> dict[str, Any]:
            round_.step()
            return {}

        def loss(self, model: Decoder, first_row: int, rows: int) -> Loss:
            step, low = divmod(first_row, job.batch_rows)
            both = self._batch(step)[low : low + rows]
            positions = torch.arange(length).repeat(rows)
            batch = Batch(both[:, :-1].flatten(), both[:, 1:].flatten(), positions, [length] * rows)
            return Loss(-trained_logprobs(model, batch).sum(), rows * length, rows * length)

        def describe(self, first_row: int, rows: int) -> str:
            return f"rows {first_row} to {first_row + rows - 1}"

    def export(model: Decoder, folder: Path, dtype: torch.dtype) -> None:
        save_model(model, folder, dtype=dtype)

    with tempfile.TemporaryDirectory() as out:
        stage = Stage("bench", recipe, (), {}, build, Rows(), export, config.flops_per_token(length))
        run(stage, Path(out), resume=False)
    model = trained[0].eval()

    def logits(ids: Tensor) -> Tensor:
        rows = len(ids)
        x_NC = model(ids.flatten(), torch.arange(length).repeat(rows), PackedAttention([length] * rows))
        return model.logits(x_NC).view(rows, length, -1)

    return logits


CONTENDERS = {"nanoGPT": nanogpt, "minimind": minimind, "Hugging Face": huggingface, "Gale": gale}


def main() -> None:
    """Run the job of the first argument; numbers of steps come in on stdin, figures go out on stdout as JSON."""
    job = Job(**json.loads(sys.argv[1]))
    out = os.dup(1)
    os.dup2(2, 1)  # contenders print what they like, the parent reads figures only
    torch.manual_seed(job.seed)
    round_ = Round(out)
    logits = CONTENDERS[job.contender](job, round_)
    round_.tell(**({"bits_per_byte": bits_per_byte(job, logits)} if job.score else {}))


if __name__ == "__main__":
    main()
