"""Prepared data: complete or absent, the same from the same recipe, and honest about where it comes from."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gale.core.errors import DataError, GaleError
from gale.data.cache import made_once
from gale.data.prepare import prepare, ready_data
from gale.data.recipe import DataRecipe
from gale.data.shards import TokenSplit, read_manifest, verify
from gale.data.tokenizer_training import ready_tokenizer
from gale.text.tokenizer import END_OF_TEXT, Tokenizer
from tests.tiny_data import SENTENCES, write_jsonl


@pytest.fixture
def recipe(tokenizer: Tokenizer, tmp_path: Path) -> dict[str, Any]:
    """A recipe of one file of running text; tests add to it."""
    tokenizer.save(tmp_path / "tokenizer")
    write_jsonl(tmp_path / "texts.jsonl", [{"text": sentence} for sentence in SENTENCES])
    return {"tokenizer": str(tmp_path / "tokenizer"), "sources": [source(tmp_path / "texts.jsonl")]}


def source(path: Path, **fields: Any) -> dict[str, Any]:
    return {"path": str(path), "licence": "CC0-1.0", "origin": "our own", **fields}


def run(recipe: dict[str, Any], out: Path) -> dict[str, Any]:
    return prepare(DataRecipe.model_validate(recipe), out)


def texts(folder: Path, split: str = "train") -> list[str]:
    tokenizer, rows = Tokenizer.load(folder / "tokenizer"), TokenSplit(folder, split)
    return [tokenizer.decode(rows.document(i)[0].tolist()) for i in range(len(rows))]


def test_documents_stand_between_two_end_tokens_and_come_back_as_they_were(
    recipe: dict[str, Any], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    run(recipe, tmp_path / "out")
    assert texts(tmp_path / "out") == list(SENTENCES)
    ids, trained = TokenSplit(tmp_path / "out", "train").document(2)
    end = tokenizer.token_id(END_OF_TEXT)
    assert ids[0] == ids[-1] == end
    assert trained.all()


def test_the_manifest_says_where_everything_comes_from(recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe["sources"].append(source(tmp_path / "texts.jsonl", epochs=2, licence="MIT"))
    manifest = run(recipe, tmp_path / "out")
    assert manifest == read_manifest(tmp_path / "out")
    first, second = manifest["sources"]
    assert (first["file"], first["licence"], first["origin"]) == ("texts.jsonl", "CC0-1.0", "our own")
    assert (first["read"], first["duplicates"], first["documents"]) == (len(SENTENCES), 0, len(SENTENCES))
    assert (second["licence"], second["duplicates"], second["documents"]) == ("MIT", len(SENTENCES), 0)
    split = manifest["splits"]["train"]
    assert split["tokens"] == first["tokens"] == TokenSplit(tmp_path / "out", "train").lengths().sum()
    assert split["bytes"] == sum(len(sentence.encode()) for sentence in SENTENCES)
    assert len(manifest["fingerprint"]) == len(first["sha256"]) == 64


def test_the_same_recipe_gives_the_same_fingerprint_and_another_seed_or_text_another(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    first, second = (run(recipe, tmp_path / name)["fingerprint"] for name in ("a", "b"))
    assert first == second
    write_jsonl(tmp_path / "texts.jsonl", [{"text": sentence + "!"} for sentence in SENTENCES])
    assert run(recipe, tmp_path / "c")["fingerprint"] != first


def test_exact_duplicates_are_dropped_after_normalising(recipe: dict[str, Any], tmp_path: Path) -> None:
    write_jsonl(tmp_path / "texts.jsonl", [{"text": t} for t in ("cafe\u0301", "caf\u00e9 \r\n", "", "other", "other")])
    manifest = run(recipe, tmp_path / "out")
    assert texts(tmp_path / "out") == ["café", "other"]
    assert (manifest["sources"][0]["empty"], manifest["sources"][0]["duplicates"]) == (1, 2)


def test_what_is_held_out_is_never_trained_on(recipe: dict[str, Any], tmp_path: Path) -> None:
    write_jsonl(tmp_path / "held.jsonl", [{"text": SENTENCES[3]}])
    recipe["sources"].append(source(tmp_path / "held.jsonl", split="held"))
    run(recipe, tmp_path / "out")
    assert texts(tmp_path / "out", "held") == [SENTENCES[3]]
    assert SENTENCES[3] not in texts(tmp_path / "out")


@pytest.mark.parametrize(("epochs", "low", "high"), [(0.5, 60, 140), (1, 200, 200), (2.5, 460, 540)])
def test_epochs_take_a_share_of_documents_or_each_several_times(
    recipe: dict[str, Any], tmp_path: Path, epochs: float, low: int, high: int
) -> None:
    write_jsonl(tmp_path / "texts.jsonl", [{"text": f"text {i}"} for i in range(200)])
    recipe["sources"] = [source(tmp_path / "texts.jsonl", epochs=epochs)]
    manifest = run(recipe, tmp_path / "out")
    assert low <= manifest["splits"]["train"]["documents"] <= high
    assert run(recipe, tmp_path / "again")["fingerprint"] == manifest["fingerprint"]


def test_documents_are_spread_over_shards_in_order(recipe: dict[str, Any], tmp_path: Path) -> None:
    many = [f"{i}: {SENTENCES[i % 8]}" for i in range(200)]
    write_jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in many])
    manifest = run({**recipe, "shard_tokens": 1024}, tmp_path / "out")
    assert len(manifest["splits"]["train"]["shards"]) > 3
    assert texts(tmp_path / "out") == many


def test_the_folder_appears_only_when_all_is_done(recipe: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    recipe["sources"].append(source(tmp_path / "bad.jsonl"))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(DataError, match=r"bad\.jsonl, line 2"):
        run(recipe, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


def test_a_folder_with_something_else_in_it_is_left_alone(recipe: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    with pytest.raises(GaleError, match="not replaced"):
        run(recipe, tmp_path / "home")
    assert (tmp_path / "home" / "letter.txt").read_text() == "dear"
    run(recipe, tmp_path / "out")
    run(recipe, tmp_path / "out")  # what Gale prepared before, it may replace


def test_faults_of_a_recipe_that_only_the_files_show(recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe["sources"] += [source(tmp_path / "lost_a.jsonl"), source(tmp_path / "lost_b.jsonl")]
    with pytest.raises(DataError, match=r"lost_a.*lost_b"):
        run(recipe, tmp_path / "out")
    recipe["sources"] = [recipe["sources"][0], source(tmp_path / "texts.jsonl", split="held")]
    with pytest.raises(DataError, match="Nothing is left for the split 'train'"):
        run(recipe, tmp_path / "out")


def test_a_template_that_marks_nothing_cannot_prepare_conversations(recipe: dict[str, Any], tmp_path: Path) -> None:
    settings = json.loads((tmp_path / "tokenizer/tokenizer_config.json").read_text())
    settings["chat_template"] = "{% for m in messages %}{{ m.content }}{% endfor %}"
    (tmp_path / "tokenizer/tokenizer_config.json").write_text(json.dumps(settings))
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    recipe["sources"] = [source(write_jsonl(tmp_path / "chat.jsonl", [chat]), format="chat")]
    with pytest.raises(DataError, match="does not mark"):
        run(recipe, tmp_path / "out")


def test_damaged_prepared_data_is_a_message(recipe: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(recipe, out)
    shard = out / "train-00000.tokens.npy"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-20])
    with pytest.raises(DataError, match="damaged"):
        TokenSplit(out, "train")
    shard.write_bytes(whole)
    verify(out)
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    TokenSplit(out, "train")
    with pytest.raises(DataError, match="damaged"):
        verify(out)
    np.save(out / "train-00000.trained.npy", np.ones(3, np.bool_))
    with pytest.raises(DataError, match="different lengths"):
        TokenSplit(out, "train")
    manifest = json.loads((out / "manifest.json").read_text())
    for split in ({}, [], {"bytes": 1, "shards": [3]}, {"bytes": 1, "shards": None}):
        (out / "manifest.json").write_text(json.dumps({**manifest, "splits": {"train": split}}))
        with pytest.raises(DataError, match="damaged"):
            TokenSplit(out, "train")
    with pytest.raises(DataError, match=r"no split 'dev'.*") as caught:
        TokenSplit(out, "dev")
    assert "train" in str(caught.value.hint)
    for content in ("{", "{}", "[]"):
        (out / "manifest.json").write_text(content)
        with pytest.raises(DataError, match="damaged"):
            read_manifest(out)
    with pytest.raises(DataError, match="no prepared data"):
        read_manifest(tmp_path)


def test_a_recipe_may_stand_for_what_it_makes(gale_home: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "texts.jsonl", [{"text": sentence} for sentence in SENTENCES])
    lines = '[[sources]]\npath = "texts.jsonl"\nlicence = "CC0"\norigin = "us"\n'
    (tmp_path / "tokenizer.toml").write_text("vocabulary_size = 300\n" + lines)
    (tmp_path / "data.toml").write_text('tokenizer = "tokenizer.toml"\n' + lines)
    folder = ready_data(tmp_path / "data.toml")
    assert folder.parent == gale_home / "cache"
    assert texts(folder) == list(SENTENCES)
    made = (folder / "manifest.json").stat().st_mtime_ns
    assert ready_data(tmp_path / "data.toml") == folder
    assert (folder / "manifest.json").stat().st_mtime_ns == made
    # A change in what only the tokenizer reads makes both anew.
    (tmp_path / "tokenizer.toml").write_text("vocabulary_size = 301\n" + lines)
    assert ready_data(tmp_path / "data.toml") != folder
    assert ready_data(folder) == folder
    assert ready_tokenizer(folder / "tokenizer") == folder / "tokenizer"
    (tmp_path / "texts.jsonl").unlink()
    with pytest.raises(DataError, match=r"no .*texts\.jsonl"):
        ready_data(tmp_path / "data.toml")


def test_two_who_want_the_same_at_once_get_the_one_that_was_made_first(
    gale_home: Path, recipe: dict[str, Any], tmp_path: Path
) -> None:
    made: list[Path] = []

    def slowly(settings: DataRecipe, folder: Path) -> None:
        time.sleep(0.2)
        prepare(settings, folder)
        made.append(folder)

    settings = DataRecipe.model_validate(recipe)
    with ThreadPoolExecutor(2) as pool:
        folders = list(pool.map(lambda _: made_once(settings, slowly, kind="data", marker="manifest.json"), range(2)))
    assert folders == made * 2
