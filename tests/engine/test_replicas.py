"""What a request goes through when replicas die under it, with a scripted handle in Ray Serve's place.

That real replicas die on a real cluster is in tests/server/test_replicas_on_ray.py.
"""

from __future__ import annotations

import asyncio
import pickle
import warnings
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

pytest.importorskip("ray", reason="Ray is an optional extra")
with warnings.catch_warnings(action="ignore"):  # of its own use of pydantic
    from ray.exceptions import ActorDiedError, RayTaskError
    from ray.serve.exceptions import BackPressureError

from gale.core.errors import GaleError
from gale.core.settings import settings
from gale.engine.prompts import Prompts
from gale.engine.replicas import MOST_LOST, ReplicaEngine, _require
from gale.engine.request import (
    ContextLengthError,
    Decision,
    Embeddings,
    EngineFailedError,
    EngineOverloadedError,
    Finished,
    PromptError,
    Reader,
    SamplingError,
    SamplingParams,
    TextDelta,
    TokenScore,
    UnknownAdapterError,
    Usage,
)
from gale.text.template import ChatTemplate, Message
from gale.text.tokenizer import Tokenizer

END = Finished("stop", Usage(3, 2))
WORDS = [TextDelta("one "), TextDelta("two ")]
HI = [Message(role="user", content="hi")]


def front(handle: Handle, tokenizer: Tokenizer, **more: Any) -> ReplicaEngine:
    prompts = Prompts(tokenizer, vocabulary_size=tokenizer.vocabulary_size, context_length=700)
    sizes = {"context_length": 700, "embedding_size": 48}
    return ReplicaEngine(handle, "gale-test", prompts, model_id="m", **sizes, **more)


class Handle:
    """Each call is answered by the next of ``scripts``: events, an exception that ends it, or None to stay silent."""

    def __init__(self, *scripts: list[Any]) -> None:
        self.scripts = list(scripts)
        self.asked: list[tuple[Any, ...]] = []
        self.cancelled = 0

    @property
    def ask(self) -> Handle:
        return self

    def remote(self, method: str, *asked: Any, **more: Any) -> Response:
        self.asked.append((method, *asked))
        return Response(self, self.scripts.pop(0))


class Response:
    def __init__(self, handle: Handle, script: list[Any]) -> None:
        self._handle, self._script = handle, iter(script)

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        await asyncio.sleep(0)
        event = next(self._script, StopAsyncIteration())
        if event is None:
            await asyncio.Event().wait()
        if isinstance(event, BaseException) and not isinstance(event, GaleError):
            raise event
        return event

    def cancel(self) -> None:
        self._handle.cancelled += 1


@pytest.fixture
def ask(tokenizer: Tokenizer) -> Callable[..., list[Any]]:
    def ask(handle: Handle, sampling: SamplingParams | None = None) -> list[Any]:
        engine = front(handle, tokenizer)

        async def events() -> list[Any]:
            return [event async for event in engine.chat(HI, sampling or SamplingParams())]

        return asyncio.run(events())

    return ask


def lost() -> Exception:
    return ActorDiedError()


def test_a_request_whose_replica_dies_is_answered_by_another_and_says_nothing_twice(ask: Callable[..., Any]) -> None:
    for said in ([], WORDS[:1], WORDS):
        handle = Handle([*said, lost()], [*WORDS, END])
        assert ask(handle) == [*WORDS, END]
        # The same seed both times, or the answers would part.
        assert handle.asked[0][2].seed is not None
        assert handle.asked[0] == handle.asked[1]


def test_a_seed_of_the_caller_s_own_is_kept(ask: Callable[..., Any]) -> None:
    handle = Handle([END])
    ask(handle, SamplingParams(seed=5))
    assert handle.asked[0][2].seed == 5


def test_an_answer_that_would_go_on_differently_is_a_clean_error(ask: Callable[..., Any]) -> None:
    for other in (TextDelta("eins "), END, TextDelta("one ", TokenScore(5, -1.0))):
        with pytest.raises(EngineFailedError, match="differently"):
            ask(Handle([WORDS[0], lost()], [other, END]))


def test_scores_may_differ_in_their_last_digits(ask: Callable[..., Any]) -> None:
    first, second = (TextDelta("one ", TokenScore(5, value)) for value in (-1.0, -1.0000001))
    assert ask(Handle([first, lost()], [second, END])) == [first, END]


def test_a_request_that_kills_every_replica_is_given_up(ask: Callable[..., Any]) -> None:
    handle = Handle(*[[lost()]] * (1 + MOST_LOST), [END])
    with pytest.raises(EngineFailedError, match="were lost"):
        ask(handle)
    assert handle.scripts == [[END]]


@pytest.mark.parametrize(
    ("event", "kind"),
    [
        (ContextLengthError(9, 5), ContextLengthError),
        (BackPressureError(1, 1), EngineOverloadedError),
        (RayTaskError("chat", "Traceback", ValueError("secret")), EngineFailedError),
        (StopAsyncIteration(), EngineFailedError),
        (None, EngineFailedError),
    ],
)
def test_what_is_no_loss_is_not_tried_again(
    ask: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, event: Any, kind: type[GaleError]
) -> None:
    monkeypatch.setattr(settings(), "upstream_read_s", 0.05)
    handle = Handle([WORDS[0], event], [END])
    with pytest.raises(kind) as caught:
        ask(handle)
    assert type(caught.value) is kind
    assert "secret" not in caught.value.message
    assert (len(handle.scripts), handle.cancelled) == (1, 1)


def test_closing_an_answer_or_cancelling_its_reader_cancels_it_at_the_replica(
    tokenizer: Tokenizer,
) -> None:
    async def check() -> None:
        handle = Handle([WORDS[0], None], [None])
        engine = front(handle, tokenizer)
        events = engine.chat(HI, SamplingParams())
        assert await anext(events) == WORDS[0]
        await events.aclose()
        assert handle.cancelled == 1
        reading = asyncio.create_task(anext(engine.chat(HI, SamplingParams())))
        await asyncio.sleep(0.01)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        assert (handle.cancelled, handle.scripts) == (2, [])

    asyncio.run(check())


def test_a_replica_that_is_told_to_stop_counts_as_lost(ask: Callable[..., Any]) -> None:
    assert ask(Handle([WORDS[0], asyncio.CancelledError()], [*WORDS, END])) == [*WORDS, END]


def test_prompts_are_checked_and_counted_at_the_front(tokenizer: Tokenizer) -> None:
    engine = front(Handle(), tokenizer)
    for prompt in ([], [-1], [10**6]):
        with pytest.raises(PromptError):
            engine.complete(prompt, SamplingParams())
    assert engine.count_prompt_tokens(HI) == len(engine.encode_chat(HI))
    assert b"".join(map(engine.token_bytes, engine.encode("风 wind"))).decode() == "风 wind"
    with pytest.raises(ContextLengthError):
        engine.encode("x" * 1_000_000)


def test_what_is_read_alone_is_read_by_another_replica_where_one_dies(tokenizer: Tokenizer) -> None:
    async def check() -> None:
        vectors, decision = Embeddings([[1.0]], 3), Decision([-0.5, -1.0], 4)
        handle = Handle([lost()], [vectors], [lost()], [decision], [PromptError("no")])
        engine = front(handle, tokenizer)
        assert await engine.embed(["a", [5]], pooling="last") == vectors
        assert await engine.decide([5], ("a", "b")) == decision
        assert [asked[0] for asked in handle.asked] == ["embed", "embed", "decide", "decide"]
        with pytest.raises(PromptError, match="no"):
            await engine.embed(["a"], dimensions=10**6)

    asyncio.run(check())


def test_an_adapter_s_own_template_is_the_front_s_too(tokenizer: Tokenizer) -> None:
    own = ChatTemplate("{{ messages[0]['content'] }}", tokenizer)
    engine = front(Handle(), tokenizer, templates={"own": own, "plain": None})
    assert isinstance(engine, Reader) and engine.adapters == ("own", "plain")
    assert engine.encode_chat(HI, adapter="own") == tokenizer.encode("hi") != engine.encode_chat(HI)
    assert engine.encode_chat(HI, adapter="plain") == engine.encode_chat(HI)
    with pytest.raises(UnknownAdapterError):
        engine.encode_chat(HI, adapter="other")


def test_errors_travel_between_processes_whole() -> None:
    error = pickle.loads(pickle.dumps(ContextLengthError(9, 5, at_least=True)))
    assert (error.prompt_tokens, error.context_length, "at least 9" in error.message) == (9, 5, True)
    assert pickle.loads(pickle.dumps(EngineFailedError("no", hint="yes"))).hint == "yes"
    for made in (SamplingError("logit_bias", "no"), UnknownAdapterError("a")):
        again = pickle.loads(pickle.dumps(made))
        assert (type(again), again.message, vars(again)) == (type(made), made.message, vars(made))


def test_a_cluster_that_is_too_small_is_said_so() -> None:
    with pytest.raises(GaleError, match="need 4 CPUs, and the cluster has 2"):
        _require({"CPU": 2.0}, {"CPU": 4.0, "GPU": 0.0})
    with pytest.raises(GaleError, match="GPU"):
        _require({"CPU": 2.0}, {"CPU": 1.0, "GPU": 0.5})
