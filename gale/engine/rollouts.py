"""Many answers at once, here and now: what reinforcement learning trains on and what a training run shows as samples.

The same batcher that serves people generates them, over the very module that is trained, so training sees what serving
would do.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from collections.abc import Set
from dataclasses import dataclass

from gale.engine.batcher import Batcher
from gale.engine.kv_cache import cached_tokens_that_fit
from gale.engine.request import (
    ContextLengthError,
    EngineFailedError,
    Event,
    Finished,
    FinishReason,
    PromptScores,
    SamplingParams,
)
from gale.engine.sequence import Sequence
from gale.engine.slots import SlotCaches
from gale.model.transformer import Decoder
from gale.text.template import ChatTemplate, Message
from gale.text.tokenizer import END_OF_TEXT, END_OF_TURN, Tokenizer

MAX_RUNNING = 256
_PREFILL_CHUNK = 4096


@dataclass(frozen=True, slots=True)
class Rollout:
    """An answer: its token ids, an end token among them, and their natural log-probabilities where asked for."""

    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]
    reason: FinishReason


def generate(
    model: Decoder,
    prompts: Many[list[int]],
    sampling: SamplingParams | Many[SamplingParams],
    *,
    end_tokens: Set[int],
    max_running: int = MAX_RUNNING,
) -> list[Rollout]:
    """Continue each prompt, at most ``max_running`` at once; answers in the order of prompts.

    The model's training mode and gradients stay as they are. Without ``logprobs`` in ``sampling`` there are none.
    An answer with a ``seed`` is the same whatever is generated beside it, but for the last bits of its scores.
    Raises :class:`ContextLengthError` where a prompt leaves no room for an answer, ``ValueError`` for an empty prompt
    or for stop strings and grammars, which belong to text, and :class:`EngineFailedError` where an answer failed.
    """
    each = [sampling] * len(prompts) if isinstance(sampling, SamplingParams) else list(sampling)
    answers = [_Answer(model, prompt, params, end_tokens) for prompt, params in zip(prompts, each, strict=True)]
    if not answers:
        return []
    most_tokens = max(answer.sequence.most_tokens for answer in answers)
    running = max(1, min(max_running, len(answers), cached_tokens_that_fit(model) // most_tokens))
    weight = model.embed_tokens.weight
    batcher = Batcher(
        model,
        max_running=running,
        max_cached_tokens=running * most_tokens,
        prefill_chunk=_PREFILL_CHUNK,
        caches=SlotCaches(model.config, weight.dtype, weight.device, slots=running, capacity=most_tokens),
    )
    for answer in answers:
        batcher.add(answer.sequence)
    training = model.training
    model.eval()
    try:
        while not batcher.idle:
            batcher.step()
    finally:
        model.train(training)
    return [answer.rollout() for answer in answers]


def continue_texts(
    model: Decoder, tokenizer: Tokenizer, prompts: Many[str], max_tokens: int, *, chat: bool
) -> list[dict[str, str]]:
    """What the model greedily makes of each prompt: ``{"prompt", "text"}``.

    With ``chat`` a prompt is a person's turn in the tokenizer's own template, else the beginning of a document.
    Raises :class:`ContextLengthError` where a prompt is too long.
    """
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0)
    encoded = prompt_tokens(tokenizer, prompts, chat=chat)
    rollouts = generate(model, encoded, sampling, end_tokens=end_tokens_of(tokenizer))
    return [
        {"prompt": prompt, "text": tokenizer.decode(rollout.tokens)}
        for prompt, rollout in zip(prompts, rollouts, strict=True)
    ]


def prompt_tokens(tokenizer: Tokenizer, prompts: Many[str], *, chat: bool) -> list[list[int]]:
    """Token ids of prompts as the model met such text in training, see :func:`continue_texts`."""
    if chat and tokenizer.chat_template is not None:
        template = ChatTemplate(tokenizer.chat_template, tokenizer)
        return [template.prompt([Message(role="user", content=prompt)]) for prompt in prompts]
    start = tokenizer.token_id(END_OF_TEXT)
    return [([] if start is None else [start]) + tokenizer.encode(prompt) for prompt in prompts]


def end_tokens_of(tokenizer: Tokenizer) -> frozenset[int]:
    """The tokens that end a document or a turn."""
    ids = (tokenizer.token_id(name) for name in (END_OF_TEXT, END_OF_TURN))
    return frozenset(token for token in ids if token is not None)


class _Answer:
    """One prompt on its way through the batcher."""

    def __init__(self, model: Decoder, prompt: list[int], params: SamplingParams, end_tokens: Set[int]) -> None:
        room = model.config.context_length - len(prompt)
        if room < 1:
            raise ContextLengthError(len(prompt), model.config.context_length)
        if not prompt or params.stop or params.grammar:
            raise ValueError("a rollout needs a prompt of at least one token, and knows no stop strings or grammars")
        self._prompt = prompt
        self._last: PromptScores | Event | Exception | None = None
        self.sequence = Sequence(
            list(prompt), params, room=room, end_tokens=end_tokens, stream=_NoText(), emit=self._take
        )

    def _take(self, event: PromptScores | Event | Exception) -> None:
        self._last = event

    def rollout(self) -> Rollout:
        """What has become of it."""
        if not isinstance(self._last, Finished):
            raise EngineFailedError("The engine failed while generating.") from (
                self._last if isinstance(self._last, Exception) else None
            )
        return Rollout(self._prompt, self.sequence.generated, self.sequence.logprobs, self._last.reason)


class _NoText:
    """Rollouts are tokens; whoever wants the text decodes it once, at the end."""

    def push(self, token: int) -> str:
        """No text."""
        return ""
