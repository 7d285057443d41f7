"""Tokens and text: nothing is lost on the way there and back, and people's text never becomes control."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gale.core.errors import ModelError
from gale.text.tokenizer import CONTROL_TOKENS, END_OF_TURN, Tokenizer

BILINGUAL = st.text(
    st.one_of(
        st.characters(exclude_categories=["Cs"]),
        st.sampled_from("的一是不了人我在有他 abc XYZ 0123456789\n\t🎉👩‍👩‍👧🇨🇳é，。！"),
    ),
    max_size=60,
)


@settings(max_examples=150, deadline=None)
@given(BILINGUAL)
def test_decoding_what_was_encoded_gives_the_text_back(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode_batch([text]) == [tokenizer.encode(text)]


@pytest.mark.parametrize("number", ["7", "1987", "3.14159", "二零二四2024年"])
def test_every_digit_is_a_token_of_its_own(tokenizer: Tokenizer, number: str) -> None:
    pieces = [tokenizer.decode([token]) for token in tokenizer.encode(number)]
    assert all(len(piece) == 1 for piece in pieces if any(c.isascii() and c.isdigit() for c in piece))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.one_of(BILINGUAL, st.sampled_from(CONTROL_TOKENS)), max_size=6).map("".join))
def test_plain_text_never_holds_control_ids(tokenizer: Tokenizer, text: str) -> None:
    control = {tokenizer.token_id(token) for token in CONTROL_TOKENS}
    assert not control & set(tokenizer.encode(text))
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_added_tokens_that_are_not_flagged_special_are_control_too(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    new = tokenizer.vocabulary_size
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["added_tokens"].append({**content["added_tokens"][0], "id": new, "content": "<tool>", "special": False})
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    loaded = Tokenizer.load(tmp_path)
    assert loaded.encode("<tool>", control_tokens=True) == [new]
    assert new not in loaded.encode("a <tool> b")
    assert loaded.decode(loaded.encode("a <tool> b")) == "a <tool> b"


def test_half_a_surrogate_pair_is_read_as_the_replacement_character(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("a\ud83cb")) == "a\ufffdb"
    assert tokenizer.encode_batch(["\ud800"]) == [tokenizer.encode("\ufffd")]


@settings(max_examples=150, deadline=None)
@given(BILINGUAL)
def test_streamed_text_is_the_whole_text_and_shows_no_broken_character(tokenizer: Tokenizer, text: str) -> None:
    text = text.replace("\ufffd", "")
    stream = tokenizer.stream()
    parts = [stream.push(token) for token in tokenizer.encode(text)]
    assert "".join(parts) == text
    assert not any("\ufffd" in part for part in parts)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 340), max_size=40))
def test_a_stream_survives_any_tokens(tokenizer: Tokenizer, ids: list[int]) -> None:
    stream = tokenizer.stream()
    streamed = "".join(stream.push(token) for token in ids)
    assert tokenizer.decode(ids).startswith(streamed)


def test_transformers_opens_what_we_save_and_agrees(tokenizer: Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ("Hello  world\n\n 42 don't", "你好，世界🎉", " leading", f"a{END_OF_TURN}b"):
        assert theirs.encode(text, add_special_tokens=False) == tokenizer.encode(text, control_tokens=True)
        assert theirs.decode(theirs.encode(text)) == tokenizer.decode(theirs.encode(text), control_tokens=True)
    assert theirs.eos_token == END_OF_TURN
    assert len(theirs) == tokenizer.vocabulary_size


def test_saving_and_loading_changes_nothing(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "a")
    Tokenizer.load(tmp_path / "a").save(tmp_path / "b")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_template_in_a_file_of_its_own_is_found(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert Tokenizer.load(tmp_path).chat_template == "{{ messages }}"


def test_of_named_templates_the_default_one_is_taken(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    named = [{"name": "rag", "template": "a"}, {"name": "default", "template": "b"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert Tokenizer.load(tmp_path).chat_template == "b"


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("tokenizer.json", None, "no tokenizer.json"),
        ("tokenizer.json", '{"version": "1.0", "model"', "cannot be read"),
        ("tokenizer_config.json", "{", "cannot be read"),
        ("tokenizer_config.json", "[]", "JSON object"),
        ("tokenizer_config.json", '{"a": ' * 100_000, "cannot be read"),
        ("tokenizer_config.json", '{"eos_token": 5}', "no token as eos_token"),
        ("tokenizer_config.json", '{"eos_token": ["<|end|>"]}', "no token as eos_token"),
        ("tokenizer_config.json", '{"bos_token": {"text": "<s>"}}', "no token as bos_token"),
        ("tokenizer_config.json", '{"chat_template": [{"name": "default"}]}', "without its text"),
        ("tokenizer_config.json", '{"chat_template": ["{{ messages }}"]}', "without its text"),
        ("tokenizer_config.json", '{"chat_template": 5}', "no text"),
        ("chat_template.jinja", "\udcff", r"chat_template.jinja cannot be read"),
    ],
)
def test_damaged_files_are_named(
    tokenizer: Tokenizer, tmp_path: Path, name: str, content: str | None, says: str
) -> None:
    tokenizer.save(tmp_path)
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_text(content, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(ModelError, match=says):
        Tokenizer.load(tmp_path)


def test_training_twice_gives_the_same_tokenizer() -> None:
    texts = ["the same text 同样的文字 again and again 一次又一次"] * 3
    first, second = (Tokenizer.train(texts, vocabulary_size=300, chat_template="") for _ in range(2))
    assert first._backend.to_str() == second._backend.to_str()
