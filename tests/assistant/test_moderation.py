"""Texts are judged as the classifier alone judges them, in turns, and no more wait than there is room for."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch

from gale.assistant import moderation
from gale.assistant.moderation import Moderator
from gale.core.errors import ModelError
from gale.engine.request import EngineOverloadedError
from gale.model.classifier import load_classifier
from gale.text.tokenizer import Tokenizer
from tests.tiny_classifier import save_tiny_classifier

TEXTS = ["The sea goes nowhere.", "风从山上吹来。" * 30, "a", "The wind came over the hill."]


@pytest.fixture(scope="module")
def folder(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_classifier(tokenizer, tmp_path_factory.mktemp("classifier"))


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moderation, "_BATCH_TOKENS", 50)


async def begun(moderator: Moderator) -> None:
    """Return when texts are waiting."""
    while moderator._waiting == 0:  # noqa: ASYNC110 (nobody announces it)
        await asyncio.sleep(0.001)


def near(scores: dict[str, float]) -> object:
    return pytest.approx(scores, abs=0.02)  # the moderator may compute in bf16


@pytest.mark.usefixtures("small_batches")
def test_many_requests_at_once_get_what_each_would_get_alone(folder: Path) -> None:
    classifier = load_classifier(folder, dtype=torch.float32)
    alone = classifier.probabilities(TEXTS)

    async def ask() -> None:
        moderator = Moderator(folder)
        turns = [moderator.judge([[text] for text in TEXTS[: n % 4 + 1]]) for n in range(12)]
        for n, found in enumerate(await asyncio.gather(*turns)):
            assert len(found) == n % 4 + 1
            for one, wanted in zip(found, alone, strict=False):
                assert one.scores == near(wanted)
                assert one.given == {label for label, score in one.scores.items() if classifier.gives(label, score)}
        assert moderator._waiting == 0

    asyncio.run(ask())


def test_of_several_parts_the_highest_counts(folder: Path) -> None:
    async def ask() -> None:
        moderator = Moderator(folder)
        [together] = await moderator.judge([TEXTS])
        apart = await moderator.judge([[text] for text in TEXTS])
        for label, score in together.scores.items():
            assert score == pytest.approx(max(each.scores[label] for each in apart), abs=0.02)
        assert await moderator.judge([]) == []
        [nothing] = await moderator.judge([[""]])
        assert set(nothing.scores.values()) == {0.0}

    asyncio.run(ask())


@pytest.mark.usefixtures("small_batches")
def test_a_short_text_does_not_wait_for_all_of_a_long_one(folder: Path) -> None:
    async def ask() -> None:
        moderator = Moderator(folder)
        ended: list[str] = []

        async def judge(name: str, text: str) -> None:
            await moderator.judge([[text]])
            ended.append(name)

        long = asyncio.create_task(judge("long", "The sea and the hill. " * 400))
        await asyncio.wait_for(begun(moderator), 20)
        await judge("short", "The sea.")
        await long
        assert ended == ["short", "long"]

    asyncio.run(ask())


@pytest.mark.usefixtures("small_batches")
def test_whoever_leaves_makes_room_and_too_much_is_refused(folder: Path) -> None:
    async def ask() -> None:
        moderator = Moderator(folder, most_waiting=4000)
        long = asyncio.create_task(moderator.judge([["The sea and the hill. " * 400]]))
        await asyncio.wait_for(begun(moderator), 20)
        with pytest.raises(EngineOverloadedError):
            await moderator.judge([["The sea and the hill. " * 400]])
        assert not long.done()
        long.cancel()
        await asyncio.gather(long, return_exceptions=True)
        assert moderator._waiting == 0
        [found] = await moderator.judge([["The sea."]])
        assert found.scores

    asyncio.run(ask())


def test_a_folder_that_is_not_there_is_said_each_time(tmp_path: Path) -> None:
    async def ask() -> None:
        moderator = Moderator(tmp_path / "absent")
        for _ in range(2):
            with pytest.raises(ModelError, match="holds no classifier"):
                await moderator.judge([["The sea."]])

    asyncio.run(ask())


def test_a_failure_ends_its_own_request_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def ask() -> None:
        moderator = Moderator(folder)
        await moderator.judge([["warm"]])
        assert moderator._classifier is not None
        real = moderator._classifier.piece_probabilities

        def breaks(pieces: list[list[int]]) -> torch.Tensor:
            if len(pieces) == 2:
                raise RuntimeError("no memory")
            return real(pieces)

        monkeypatch.setattr(moderator._classifier, "piece_probabilities", breaks)
        good, bad = await asyncio.gather(
            moderator.judge([["The sea."]]), moderator.judge([["a"], ["b"]]), return_exceptions=True
        )
        assert isinstance(good, list)
        assert isinstance(bad, RuntimeError)

    asyncio.run(ask())
