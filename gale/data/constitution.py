"""Constitutional feedback: a model's own critiques or comparisons under written principles become preferences.

After Bai et al. 2022 ("Constitutional AI"). For each prompt the model answers; then, under each principle, it
criticises and revises its answer, or says which of two answers is the better one. Rows are in the format preference of
data preparation, and each names its principle and model. How good they are is how good the model's judgement is.

The file of rows grows prompt by prompt. ``FILE.progress`` beside it says how far it is whole, so a run that was killed
goes on where it was, and refuses to go on with other principles or another model.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gale.core import files
from gale.core.errors import DataError
from gale.core.progress import Bar
from gale.data.principles import Constitution, Principle
from gale.engine.local import LocalEngine
from gale.engine.request import ContextLengthError, Engine, PromptScores, SamplingParams, TextDelta
from gale.model.checkpoint import weight_files
from gale.text.template import PLAIN_CHAT_TEMPLATE, ChatTemplate, Message
from gale.text.tokenizer import Tokenizer

_AT_ONCE = 4  # prompts in work together, so that the engine has something to batch
_ROLES = ("system", "user", "assistant")


def constitutional_feedback(
    constitution: Constitution, model: Path, prompts: Path, out: Path, *, seed: int = 0
) -> dict[str, int]:
    """Append a row to ``out`` for each preference of the model folder ``model`` on the prompts of a file.

    Returns counts: prompts that were done already and now, and of now pairs, equal answers, narrow leads and what was
    too long. Raises :class:`DataError` for prompts that cannot be read, and where ``out`` belongs to another run.
    """
    conversations = read_prompts(prompts)
    identity = _digest(
        [constitution.model_dump(mode="json"), files.sha256_of_all(weight_files(model)), seed],
    )
    progress = _Progress(out, identity)
    busy = DataError(f"Another process is writing {out}.", hint="Wait until it has ended, or choose another --out.")
    with files.locked(out.with_name(f"{out.name}.lock"), busy=busy):
        done = progress.read()
        left = [messages for messages in conversations if _digest(messages) not in done]
        counts = Counter({"done_before": len(conversations) - len(left), "prompts": 0, "pairs": 0})
        asyncio.run(_run(constitution, model, left, progress, counts, seed))
    return dict(counts)


def read_prompts(path: Path) -> list[list[Message]]:
    """Conversations that wait for an answer, each once: a line of text each, or JSON lines with the key ``prompt``.

    Raises :class:`DataError` naming the file and the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # splitlines knows ends that stand within JSON texts
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"The prompts {path} cannot be read: {error}") from error
    found: dict[str, list[Message]] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        prompt: Any = line.strip()
        try:
            if path.suffix == ".jsonl":
                prompt = json.loads(line)["prompt"]
            if isinstance(prompt, str):
                prompt = [{"role": "user", "content": prompt}]
            messages = [Message(role=message["role"], content=message["content"]) for message in prompt]
            if not messages or messages[-1]["role"] != "user":
                raise ValueError("the last message is not the user's")
            if wrong := [m for m in messages if m["role"] not in _ROLES or not isinstance(m["content"], str)]:
                raise ValueError(f"not a message: {wrong[0]}")
            found.setdefault(_digest(messages), messages)
        except (KeyError, TypeError, ValueError, RecursionError) as error:  # among them half a surrogate pair
            reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise DataError(f"{path}, line {number}: not a prompt: {reason}.") from error
    if not found:
        raise DataError(f"{path} holds no prompts.", hint="One a line in a .txt, or {prompt} a line in a .jsonl.")
    return list(found.values())


async def _run(
    constitution: Constitution,
    model: Path,
    conversations: list[list[Message]],
    progress: _Progress,
    counts: Counter[str],
    seed: int,
) -> None:
    if not conversations:
        return
    tokenizer = Tokenizer.load(model)
    engine = LocalEngine.load(model)
    judge = _Judge(engine, tokenizer, constitution, seed)
    try:
        with Bar("Constitution", len(conversations)) as bar:
            bar.say(f"{engine.model_id}: {constitution.method} under {len(constitution.principles)} principles")
            for low in range(0, len(conversations), _AT_ONCE):
                together = conversations[low : low + _AT_ONCE]
                results = await asyncio.gather(*(judge.preferences(messages) for messages in together))
                for messages, (rows, found) in zip(together, results, strict=True):
                    progress.append(_digest(messages), rows)
                    counts.update(found)
                    counts["prompts"] += 1
                    bar.advance(f"{counts['pairs']} pairs")
    finally:
        await engine.close()


class _Judge:
    """Asks one model for answers, critiques, revisions and comparisons."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, constitution: Constitution, seed: int) -> None:
        self._engine, self._tokenizer, self._constitution, self._seed = engine, tokenizer, constitution, seed
        self._template = ChatTemplate(tokenizer.chat_template or PLAIN_CHAT_TEMPLATE, tokenizer)

    async def preferences(self, messages: list[Message]) -> tuple[list[dict[str, Any]], Counter[str]]:
        """The rows of one prompt, and what became of what made none."""
        constitution, counts = self._constitution, Counter[str]()
        # A generator of its own for each prompt, so that the others change nothing about it.
        draw = random.Random(f"{self._seed}/{_digest(messages)}")  # noqa: S311
        principles: Sequence[Principle] = constitution.principles
        if 0 < constitution.principles_per_prompt < len(principles):
            principles = draw.sample(principles, constitution.principles_per_prompt)
        seeds = [draw.getrandbits(32) for _ in range(constitution.answers)]
        try:
            answers = await asyncio.gather(*(self._answer(messages, constitution.temperature, seed) for seed in seeds))
        except ContextLengthError:
            return [], Counter(too_long=1)
        if constitution.method == "revise":
            tasks = [self._revised(messages, answer, p, counts) for answer in answers for p in principles]
        else:
            pairs = list(zip(answers[::2], answers[1::2], strict=False))
            tasks = [self._compared(messages, pair, p, counts) for pair in pairs for p in principles]
        rows = [row for row in await asyncio.gather(*tasks) if row is not None]
        counts["pairs"] += len(rows)
        return rows, counts

    async def _revised(
        self, messages: list[Message], answer: str, principle: Principle, counts: Counter[str]
    ) -> dict[str, Any] | None:
        questions = self._constitution.prompts[principle.language]
        known = {"prompt": _transcript(messages), "answer": answer, "principle": principle.text}
        try:
            critique = await self._answer(_asked(questions.critique.format(**known)))
            revision = await self._answer(_asked(questions.revision.format(**known, critique=critique)))
        except ContextLengthError:
            counts["too_long"] += 1
            return None
        if not revision or not answer or revision == answer:
            counts["equal"] += 1
            return None
        return self._row(messages, revision, answer, principle, critique=critique)

    async def _compared(
        self, messages: list[Message], answers: tuple[str, str], principle: Principle, counts: Counter[str]
    ) -> dict[str, Any] | None:
        first, second = answers
        if not first or not second or first == second:
            counts["equal"] += 1
            return None
        try:
            # Models favour a place (Wang et al. 2023), so both orders are asked for and count alike.
            forwards, backwards = await asyncio.gather(
                self._prefers_a(messages, first, second, principle), self._prefers_a(messages, second, first, principle)
            )
        except ContextLengthError:
            counts["too_long"] += 1
            return None
        likelihood = (forwards + 1 - backwards) / 2
        if abs(likelihood - 0.5) * 2 <= self._constitution.least_lead:
            counts["narrow"] += 1
            return None
        chosen, rejected = (first, second) if likelihood > 0.5 else (second, first)
        return self._row(messages, chosen, rejected, principle, probability=max(likelihood, 1 - likelihood))

    async def _answer(self, messages: list[Message], temperature: float = 0.0, seed: int | None = None) -> str:
        # Critiques and revisions are greedy: there is one best judgement, while answers should differ.
        sampling = SamplingParams(max_tokens=self._constitution.max_tokens, temperature=temperature, seed=seed)
        parts = [event.text async for event in self._engine.chat(messages, sampling) if isinstance(event, TextDelta)]
        return "".join(parts).strip()

    async def _prefers_a(self, messages: list[Message], a: str, b: str, principle: Principle) -> float:
        """How likely the model answers A rather than B when asked which is better."""
        question = self._constitution.prompts[principle.language].comparison
        asked = question.format(prompt=_transcript(messages), principle=principle.text, a=a, b=b)
        prompt = self._template.prompt(_asked(asked))
        for_a, for_b = await asyncio.gather(*(self._logprob(prompt, self._tokenizer.encode(x)) for x in "AB"))
        return 1 / (1 + math.exp(min(700.0, for_b - for_a)))

    async def _logprob(self, prompt: list[int], continuation: list[int]) -> float:
        sampling = SamplingParams(max_tokens=0, logprobs=0, prompt_logprobs=True)
        async for event in self._engine.complete([*prompt, *continuation], sampling):
            if isinstance(event, PromptScores):
                return sum(score.logprob or 0.0 for score in event.scores[len(prompt) :])
        raise AssertionError("the scores of a prompt always come")

    def _row(
        self, messages: list[Message], chosen: str, rejected: str, principle: Principle, **more: Any
    ) -> dict[str, Any]:
        return {
            "prompt": messages,
            "chosen": chosen,
            "rejected": rejected,
            "source": "constitution",
            "principle": principle.name,
            "model": self._engine.model_id,
            "method": self._constitution.method,
            **more,
        }


@dataclass(frozen=True)
class _Progress:
    """The rows in ``out``, and beside them, line by line, which prompt is done and where its rows end."""

    out: Path
    identity: str

    @property
    def _beside(self) -> Path:
        return self.out.with_name(f"{self.out.name}.progress")

    def read(self) -> set[str]:
        """Digests of the prompts that are done; what a killed run wrote beyond them is removed."""
        if not self._beside.is_file():
            if self.out.exists():
                raise DataError(f"{self.out} exists already and is not replaced.", hint="Choose another --out.")
            files.write_text(self.out, "")
            files.write_text(self._beside, json.dumps({"run": self.identity}) + "\n")
            return set()
        lines: list[dict[str, Any]] = []
        whole, size = 0, self.out.stat().st_size if self.out.is_file() else 0
        for line in self._beside.read_bytes().splitlines(keepends=True):
            try:
                entry = json.loads(line)
            except ValueError:
                break  # the half line of a killed run
            if entry.get("end", 0) > size:
                break  # rows that a power cut took
            lines.append(entry)
            whole += len(line)
        if not lines or lines[0].get("run") != self.identity:
            raise DataError(
                f"{self.out} was begun with other principles, another model or another seed.",
                hint="Choose another --out, or go on with the same ones.",
            )
        with files.explain_disk_errors(self.out):
            with self.out.open("ab") as file:
                file.truncate(lines[-1].get("end", 0))
            with self._beside.open("r+b") as file:
                file.truncate(whole)
        return {line["prompt"] for line in lines[1:]}

    def append(self, prompt: str, rows: list[dict[str, Any]]) -> None:
        """Write the rows of a prompt, then that it is done."""
        with files.explain_disk_errors(self.out):
            with self.out.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
                file.flush()
                end = file.tell()
            with self._beside.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"prompt": prompt, "end": end}) + "\n")


def _asked(question: str) -> list[Message]:
    return [Message(role="user", content=question)]


def _transcript(messages: list[Message]) -> str:
    """A conversation as text inside a question; one message stands alone."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in messages)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, ensure_ascii=False, sort_keys=True).encode()).hexdigest()[:24]
