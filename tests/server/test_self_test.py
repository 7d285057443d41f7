"""The test at the start finds scores that are not the model's."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from gale.core.errors import GaleError
from gale.engine.local import LocalEngine
from gale.engine.request import PromptScores
from gale.server.self_test import check_scores
from tests.server.scripted_engine import ScriptedEngine


def test_true_scores_pass(engine: LocalEngine) -> None:
    apart = asyncio.run(check_scores(engine))
    assert apart is not None
    assert apart < 1e-4


def test_false_scores_are_found(engine: LocalEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    complete = engine.complete

    async def lowered(*arguments: Any) -> Any:
        async for event in complete(*arguments):
            if isinstance(event, PromptScores):
                event = PromptScores(
                    tuple(replace(each, logprob=each.logprob and each.logprob - 1) for each in event.scores)
                )
            yield event

    monkeypatch.setattr(engine, "complete", lowered)
    with pytest.raises(GaleError, match="nats a token apart"):
        asyncio.run(check_scores(engine))


def test_an_engine_elsewhere_is_not_tested() -> None:
    assert asyncio.run(check_scores(ScriptedEngine())) is None  # type: ignore[arg-type]
