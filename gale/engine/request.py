"""What a caller asks of an engine and what it gets back.

This is the whole face of the engine: the same few types hold for the in-process engine, for a remote
OpenAI-compatible server and for replicas, so nothing above this room knows which one answers.
"""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

from gale.core.errors import GaleError
from gale.text.template import Message

FinishReason = Literal["stop", "length", "cancelled"]
Pooling = Literal["mean", "last"]


class ContextLengthError(GaleError):
    """The prompt does not leave room for one new token within the model's context."""

    def __init__(self, prompt_tokens: int, context_length: int, *, at_least: bool = False) -> None:
        super().__init__(
            f"This model's maximum context length is {context_length} tokens. However, your messages resulted in "
            f"{'at least ' * at_least}{prompt_tokens} tokens. Please reduce the length of the messages."
        )
        self.prompt_tokens = prompt_tokens
        self.context_length = context_length
        self.at_least = at_least


class PromptError(GaleError):
    """Raw tokens that the model cannot read: none at all, or a number outside of its vocabulary."""


class UnknownAdapterError(GaleError):
    """A request for an adapter that is not loaded, or not any more."""

    def __init__(self, name: str) -> None:
        super().__init__(f"There is no adapter `{name[:200]}`.")


class GrammarError(GaleError):
    """A grammar that is malformed, too costly, or allows no answer; the request is at fault."""


class SamplingError(GaleError):
    """A parameter that this model cannot honour; ``param`` is its name."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param = param


class EngineOverloadedError(GaleError):
    """The queue is full; trying again later may work."""


class EngineFailedError(GaleError):
    """The engine broke while answering; the request is lost, later ones may work."""


@dataclass(frozen=True, slots=True)
class Grammar:
    """What an answer must look like, whole and from its first character on.

    ``value`` is a JSON Schema (as JSON text), a regular expression (in the syntax of Rust's ``regex``, matched whole)
    or a Lark grammar (in llguidance's dialect); for "choice" the options, one of which is the answer; for "spans" the
    passages, of one of which the answer is a piece, word for word and made of whole words, ``least`` characters long
    or longer.
    """

    kind: Literal["json_schema", "regex", "lark", "choice", "spans"]
    value: str | tuple[str, ...]
    least: int = 1


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one request. ``cached_tokens`` of the prompt had been read before; they say nothing about the
    answer, so two counts are equal without them.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = field(default=0, compare=False)


@dataclass(slots=True)
class Progress:
    """How far an answer came, for those who must know it of one that was stopped: told by the engine at its end.

    None where it does not know. Of a prompt only what was read counts.
    """

    usage: Usage | None = None


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen and when to stop.

    ``max_tokens`` None means "as many as the context leaves". ``temperature`` 0 is greedy decoding. A ``seed`` makes
    the answer reproducible regardless of what else runs in the batch. ``stop`` strings and ``stop_token_ids`` end the
    answer and are never part of its text.

    ``top_k`` keeps so many likeliest tokens (0: all), ``top_p`` of those the smallest set whose share reaches it
    (Holtzman et al. 2020), ``min_p`` what is at least that fraction as likely as the likeliest (Nguyen et al. 2024).
    Before all that the scores are changed as :mod:`gale.engine.penalties` says: ``logit_bias`` holds (token, what is
    added) once a token, ``repetition_penalty`` divides, ``frequency_penalty`` and ``presence_penalty`` are taken off.

    ``logprobs`` N asks for each token's log-probability and for the N likeliest tokens beside it (0 for none);
    ``prompt_logprobs`` asks the same of the prompt's tokens, for :meth:`Engine.complete` only. They are the model's
    own, whatever temperature and top-p do.

    A lower ``priority`` is served first, and takes memory from a higher one where there is too little.

    ``adapter`` names the adapter over the model that is to answer.

    A ``grammar`` leaves only tokens that it allows, and ends the answer (with reason "stop") where it allows no more.
    A model whose template has it think first does so freely. An answer cut by its length is the beginning of one that
    the grammar allows.

    ``progress`` is told, however the answer ends, what was done for it.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    prompt_logprobs: bool = False
    adapter: str | None = None
    priority: int = 0
    grammar: Grammar | None = None
    progress: Progress | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Tools:
    """The functions that an answer may call, each as OpenAI describes one: ``name``, and ``description``,
    ``parameters`` (a JSON Schema) and ``strict`` where given.

    With ``required`` it must call at least one, held to the schemas by a grammar; ``strict`` holds every call of that
    function so, required or not. ``only`` names those that may be called, if not all. Without ``parallel`` there is at
    most one call.
    """

    functions: tuple[dict[str, Any], ...]
    required: bool = False
    only: frozenset[str] | None = None
    parallel: bool = True

    @property
    def callable(self) -> list[dict[str, Any]]:
        """Those that may be called."""
        return [function for function in self.functions if self.only is None or function["name"] in self.only]


@dataclass(frozen=True, slots=True)
class TokenScore:
    """One token with its natural log-probability given all before it; None for a first token, which nothing predicts.

    ``top`` holds the likeliest tokens in its place as (id, log-probability), best first.
    """

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class PromptScores:
    """The scores of all tokens of the prompt; comes once, before anything of the answer."""

    scores: tuple[TokenScore, ...]


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """More of what the model thinks before it answers."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """More of a call of a tool. The first of a call has its ``id`` and the function's ``name``, the later ones neither;
    the ``arguments`` of all together are the text of a JSON object, or the beginning of one in an answer cut short.

    ``index`` counts the calls of an answer.
    """

    index: int
    id: str | None
    name: str | None
    arguments: str


@dataclass(frozen=True, slots=True)
class TextDelta:
    """More text of the answer: whole characters only, stop strings held back.

    Where log-probabilities are asked for, each token brings one of these with its ``score``, and its text may be
    empty or come later. Without them there is none for a token that shows nothing.
    """

    text: str
    score: TokenScore | None = None


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event of every answer; ``stop`` is the stop string that ended it, if one did."""

    reason: FinishReason
    usage: Usage
    stop: str | None = None


Event = TextDelta | ReasoningDelta | ToolCallDelta | Finished


@dataclass(frozen=True, slots=True)
class Embeddings:
    """A vector for each text, in their order, and how many tokens were read for all."""

    vectors: list[list[float]]
    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Decision:
    """The natural log-probability of each label as what follows the prompt, and how many tokens were read."""

    logprobs: list[float]
    prompt_tokens: int

    @property
    def probabilities(self) -> list[float]:
        """Of each label, if the answer is one of them: they sum to 1."""
        best = max(self.logprobs)
        weights = [math.exp(logprob - best) for logprob in self.logprobs]
        return [weight / sum(weights) for weight in weights]


@dataclass(frozen=True, slots=True)
class EngineStats:
    """How busy an engine is: requests that wait and that run, and tokens whose keys and values it holds for those that
    run, keeps in case that they are of use, and has room for.
    """

    waiting: int
    running: int
    cached_tokens: int
    kept_tokens: int
    most_cached_tokens: int


@runtime_checkable
class Watched(Protocol):
    """An engine that can say how busy it is."""

    def stats(self) -> EngineStats:
        """As of its last step; from any thread."""


class Engine(Protocol):
    """A model that answers.

    ``chat``, ``complete`` and ``close`` are called from one asyncio event loop; the others from any thread.
    """

    @property
    def model_id(self) -> str:
        """The name under which the model is served."""

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the adapters over the model, for ``SamplingParams.adapter``."""

    @property
    def context_length(self) -> int:
        """Most tokens of prompt and answer together."""

    def count_prompt_tokens(
        self, messages: list[Message], tools: Tools | None = None, *, adapter: str | None = None
    ) -> int:
        """Tokens the model would read before answering ``messages`` with ``tools`` to call.

        Raises :class:`ContextLengthError` instead of counting what is far too long, since counting costs time, and
        :class:`UnknownAdapterError`.
        """

    def chat(
        self, messages: list[Message], sampling: SamplingParams, tools: Tools | None = None
    ) -> AsyncGenerator[Event, None]:
        """Answer a conversation: any number of deltas, then one :class:`Finished`.

        Closing the generator (``aclose``, or cancelling the task that reads it) stops the generation within one
        step. Raises :class:`ContextLengthError`, :class:`UnknownAdapterError`, :class:`EngineOverloadedError` or
        :class:`GrammarError` (also where the model's template has no tools) before the first event, and
        :class:`EngineFailedError` at any time.
        """

    def encode(self, text: str) -> list[int]:
        """The tokens of a raw prompt, in which control tokens that are spelled out count as such; none are added.

        Raises :class:`ContextLengthError` as :meth:`count_prompt_tokens` does.
        """

    def encode_chat(self, messages: list[Message]) -> list[int]:
        """The tokens that :meth:`chat` answers. Raises as :meth:`count_prompt_tokens` does."""

    def token_bytes(self, token: int, *, control_tokens: bool = False) -> bytes:
        """What one token adds to a text, which may be part of a character; control tokens add nothing unless shown.

        A number without a token adds nothing: some models have more scores than their vocabulary has tokens.
        """

    def complete(self, prompt: list[int], sampling: SamplingParams) -> AsyncGenerator[PromptScores | Event, None]:
        """Continue raw tokens, as :meth:`chat` answers a conversation.

        ``max_tokens`` 0 generates nothing, for those who want the scores of a prompt, which may then fill the whole
        context. Raises as :meth:`chat` does, and :class:`PromptError` for tokens that are none.
        """

    async def close(self) -> None:
        """Stop all requests and free the model."""


@runtime_checkable
class SelfTested(Engine, Protocol):
    """An engine whose scores can be checked against its model."""

    def log_likelihood(self, tokens: list[int]) -> float:
        """The natural log-probability of all tokens but the first, by one pass over the model that has no cache, no
        batch and no pieces. For before the first request: it does not wait for others.
        """


@runtime_checkable
class Reader(Engine, Protocol):
    """An engine that can also answer by reading alone. ``embed`` and ``decide`` are called as ``chat`` is."""

    @property
    def embedding_size(self) -> int:
        """Numbers of a whole vector."""

    def encode_chat(self, messages: list[Message], *, adapter: str | None = None) -> list[int]:
        """The tokens the model reads before it answers ``messages``. Raises :class:`ContextLengthError`."""

    def encode_text(self, text: str) -> list[int]:
        """The tokens of a text to embed, with what the tokenizer puts around a text; none of it is taken for control.

        Raises :class:`ContextLengthError` for what is far too long.
        """

    async def embed(
        self,
        inputs: Sequence[str | list[int]],
        *,
        pooling: Pooling | None = None,
        normalise: bool = True,
        dimensions: int | None = None,
        adapter: str | None = None,
    ) -> Embeddings:
        """A vector for each text: the mean of its tokens' last hidden states, or the last token's.

        Without ``pooling`` it is what the model's folder names, else the mean. ``dimensions`` keeps the first so many
        numbers, before vectors are scaled to length 1. Raises as :meth:`Engine.complete` does, and
        :class:`PromptError` for more dimensions than there are.
        """

    async def decide(self, prompt: list[int], labels: Sequence[str], *, adapter: str | None = None) -> Decision:
        """How likely the model goes on with each label, of one or more tokens; the prompt is read once.

        A label's tokens are those of its text alone, right behind the prompt: a space between them is the caller's to
        write. Nothing is said of what follows: of the labels "a" and "ab", the first includes part of the second.
        Raises as :meth:`Engine.complete` does, :class:`PromptError` for no labels, equal ones or an empty one.
        """
