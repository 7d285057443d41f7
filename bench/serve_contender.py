"""One engine of bench/serve.py in a process of its own. It also runs under another Python, where the peers live.

Reads requests from stdin, a JSON line each: {"streams": B, "prompt": tokens, "new": tokens}; answers with the seconds
and processor seconds from handing over B fresh random prompts until each has so many new tokens, chosen greedily, and
with the process's resident memory, now and at most meanwhile. With "beside": tokens in it, Gale measures `latency`.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Generate = Callable[[list[list[int]], int], None]
Waiting = Callable[[list[list[int]], list[int], int], dict[str, float]]


def gale(folder: Path, weights: Any, threads: int) -> tuple[Generate, Waiting]:
    """The engine that `gale serve` runs, asked through its own face. It does not guess ahead, as nobody else does:
    random models repeat themselves, so that guesses would come true far more often than with a trained one.
    """
    from gale.engine.local import LocalEngine
    from gale.engine.options import EngineOptions
    from gale.engine.request import Finished, SamplingParams

    resident = resident_bytes()[0]
    engine = LocalEngine.load(folder, EngineOptions(ngram_drafts=False), weights=weights)
    ABOUT.update(model_bytes(engine._model), resident_before=resident)
    engine._end_tokens = frozenset()
    loop = asyncio.new_event_loop()

    async def one(prompt: list[int], new: int) -> None:
        sampling = SamplingParams(max_tokens=new, temperature=0)
        async for event in engine.complete(prompt, sampling):
            if isinstance(event, Finished):
                assert event.usage.completion_tokens == new

    async def latency(running: list[list[int]], prompt: list[int], new: int) -> dict[str, float]:
        """What people wait while others are answered.

        `running` prompts are answered with `new` tokens each; half-way `prompt` comes. Seconds until its first token,
        alone and then, and the gaps between the tokens of those that run, before and after it came.
        """
        began = time.perf_counter()
        await one(prompt[::-1], 1)
        figures = {"first_alone": time.perf_counter() - began}
        gaps: list[tuple[float, float]] = []
        half = asyncio.Event()

        async def watch(each: list[int]) -> None:
            last, sampling = 0.0, SamplingParams(max_tokens=new, temperature=0, logprobs=0)
            async for event in engine.complete(each, sampling):
                now = time.perf_counter()
                if last and not isinstance(event, Finished):
                    gaps.append((now, now - last))
                    if len(gaps) == len(running) * new // 2:
                        half.set()
                last = now

        watchers = [asyncio.create_task(watch(each)) for each in running]
        await half.wait()
        came = time.perf_counter()
        await one(prompt, 1)
        figures["first_beside"] = time.perf_counter() - came
        there = time.perf_counter()
        await asyncio.gather(*watchers)
        quiet = sorted(gap for now, gap in gaps if now < came or now > there)
        everything = sorted(gap for _, gap in gaps)
        return figures | {"gap_median": quiet[len(quiet) // 2], "gap_p99": everything[int(len(everything) * 0.99)]}

    async def every(prompts: list[list[int]], new: int) -> None:
        await asyncio.gather(*(one(prompt, new) for prompt in prompts))

    def generate(prompts: list[list[int]], new: int) -> None:
        loop.run_until_complete(every(prompts, new))

    def waiting(prompts: list[list[int]], prompt: list[int], new: int) -> dict[str, float]:
        return loop.run_until_complete(latency(prompts, prompt, new))

    return generate, waiting


def transformers(folder: Path, weights: str, threads: int) -> Generate:
    """generate(), as its documentation shows it."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()

    def generate(prompts: list[list[int]], new: int) -> None:
        ids = torch.tensor(prompts)
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
        )
        assert out.shape[1] == len(prompts[0]) + new

    return generate


def llama_cpp(folder: Path, weights: str, threads: int) -> Generate:
    """llama.cpp's own calls, with all streams in one batch each step, as its server does."""
    import ctypes

    import llama_cpp as lib
    import numpy as np

    lib.llama_log_set(_silent := lib.llama_log_callback(lambda *_: None), ctypes.c_void_p(0))
    globals()["_silent"] = _silent  # kept alive
    model = lib.llama_model_load_from_file(str(folder / f"{weights}.gguf").encode(), lib.llama_model_default_params())
    vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    params = lib.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = 8192, 512, 512, 32
    params.n_threads = params.n_threads_batch = threads
    if hasattr(params, "kv_unified"):
        params.kv_unified = True
    context = lib.llama_init_from_model(model, params)
    batch = lib.llama_batch_init(512, 0, 1)

    def decode(rows: list[tuple[int, int, int, bool]]) -> list[int]:
        """Rows of (token, position, stream, wanted); the likeliest next tokens of those wanted."""
        batch.n_tokens = len(rows)
        for row, (token, position, stream, wanted) in enumerate(rows):
            batch.token[row], batch.pos[row], batch.logits[row] = token, position, wanted
            batch.n_seq_id[row], batch.seq_id[row][0] = 1, stream
        assert lib.llama_decode(context, batch) == 0
        scores = (lib.llama_get_logits_ith(context, row) for row, each in enumerate(rows) if each[3])
        return [int(np.ctypeslib.as_array(each, (vocabulary,)).argmax()) for each in scores]

    def generate(prompts: list[list[int]], new: int) -> None:
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        everything = [
            (token, place, stream, place == len(prompt) - 1)
            for stream, prompt in enumerate(prompts)
            for place, token in enumerate(prompt)
        ]
        tokens: list[int] = []
        for low in range(0, len(everything), 512):
            tokens += decode(everything[low : low + 512])
        for step in range(new - 1):
            place = len(prompts[0]) + step
            tokens = decode([(token, place, stream, True) for stream, token in enumerate(tokens)])

    return generate


def openvino(folder: Path, weights: str, threads: int) -> Generate:
    """OpenVINO GenAI's continuous batching."""
    import numpy as np
    import openvino
    import openvino_genai

    scheduler = openvino_genai.SchedulerConfig()
    scheduler.enable_prefix_caching = False
    scheduler.cache_size = 2  # GB
    scheduler.max_num_seqs, scheduler.max_num_batched_tokens = 64, 512
    pipeline = openvino_genai.ContinuousBatchingPipeline(
        str(folder / f"openvino-{weights}"), scheduler, "CPU", {"INFERENCE_NUM_THREADS": threads}
    )

    def generate(prompts: list[list[int]], new: int) -> None:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = new, True, False
        ids = [openvino.Tensor(np.array([prompt], np.int64)) for prompt in prompts]
        for result in pipeline.generate(ids, [config] * len(ids)):
            assert len(result.m_generation_ids[0]) == new

    return generate


ENGINES = {"Gale": gale, "transformers": transformers, "llama.cpp": llama_cpp, "OpenVINO": openvino}


# What the engine says of itself beside how long it took to start.
ABOUT: dict[str, int] = {}


def model_bytes(model: Any) -> dict[str, int]:
    """Bytes of the weights as they are served, and of a token's keys and values."""
    from gale.model.packed import PackedLinear

    layers = [layer for layer in model.modules() if isinstance(layer, PackedLinear)]
    weights = sum(layer.packed.nbytes + layer.scales.nbytes for layer in layers)
    weights += sum(parameter.nbytes for parameter in model.parameters())
    config, embedding = model.config, model.embed_tokens.weight
    if config.tied_embeddings and model.lm_head.bits == 16:
        weights -= embedding.nbytes  # the very same numbers, packed
    token = 2 * config.layers * config.kv_heads * config.head_dim * embedding.element_size()
    return {"weight_bytes": weights, "token_bytes": token}


def most_resident_bytes(*, forget: bool = False) -> int:
    """The most resident memory since the process began or since this was told to ``forget``."""
    if forget:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def resident_bytes() -> tuple[int, int]:
    """Resident memory, and how much of it is files that are only mapped."""
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(fields["VmRSS"].split()[0]) * 1024, int(fields["RssFile"].split()[0]) * 1024


def main() -> None:
    """Serve requests until stdin ends."""
    name, folder, weights, threads, vocabulary = sys.argv[1:6]
    out = os.dup(1)
    os.dup2(2, 1)  # engines print what they like, the parent reads figures only
    began = time.perf_counter()
    opened: Any = ENGINES[name](Path(folder), weights, int(threads))
    generate, waiting = opened if isinstance(opened, tuple) else (opened, None)
    ready = time.perf_counter() - began
    os.write(out, (json.dumps({"ready": ready, **ABOUT}) + "\n").encode())
    draw = random.Random(0)
    for line in sys.stdin:
        asked = json.loads(line)
        prompts = [
            [draw.randrange(10, int(vocabulary)) for _ in range(asked["prompt"])] for _ in range(asked["streams"])
        ]
        if "beside" in asked:
            figures = waiting(
                prompts, [draw.randrange(10, int(vocabulary)) for _ in range(asked["beside"])], asked["new"]
            )
            os.write(out, (json.dumps(figures) + "\n").encode())
            continue
        most_resident_bytes(forget=True)
        wall, cpu = time.perf_counter(), time.process_time()
        generate(prompts, asked["new"])
        figures = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
        resident, mapped = resident_bytes()
        figures |= {"resident": resident, "mapped": mapped, "most_resident": most_resident_bytes()}
        os.write(out, (json.dumps(figures) + "\n").encode())


if __name__ == "__main__":
    main()
