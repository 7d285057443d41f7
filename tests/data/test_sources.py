"""Sources to documents: every format is read, and a damaged file is named with the place."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from gale.core.errors import DataError
from gale.data import readers
from gale.data.clean import normalise
from gale.data.recipe import Source
from gale.data.sources import BrokenRows, Document, _window, read_documents
from tests.tiny_data import SENTENCES, write_jsonl

LINES = "".join(json.dumps({"text": sentence}, ensure_ascii=False) + "\n" for sentence in SENTENCES).encode()
PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "a.jsonl": bytes,
    "a.jsonl.gz": gzip.compress,
    "a.jsonl.zst": zstandard.ZstdCompressor().compress,
}
QUESTIONS: dict[str, Any] = {
    "prompts": ["{context}\n\n{question}"],
    "unanswerable_reply": "It does not say.",
    "closed_book_reply": "I don't know.",
    "context_characters": [20, 60],
}


def read(path: Path, replace: dict[str, str] | None = None, seed: int = 0, **fields: Any) -> list[Document]:
    source = Source.model_validate({"path": str(path), "licence": "CC0", "origin": "test", **fields})
    return list(read_documents(source, replace=replace or {}, seed=seed))


@pytest.mark.parametrize("name", PACKERS)
def test_plain_gzip_and_zstd_files_hold_the_same_documents(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(PACKERS[name](LINES))
    assert [document.text for document in read(tmp_path / name)] == list(SENTENCES)


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.ZstdCompressor().compress])
def test_packed_files_that_were_joined_are_read_to_the_end(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    path = tmp_path / ("a.gz" if pack is gzip.compress else "a.zst")
    path.write_bytes(pack(LINES) + pack(LINES))
    assert len(read(path)) == 2 * len(SENTENCES)


@pytest.mark.parametrize("name", PACKERS)
def test_the_suffix_may_be_in_capitals(tmp_path: Path, name: str) -> None:
    (tmp_path / name.upper()).write_bytes(PACKERS[name](LINES))
    assert [document.text for document in read(tmp_path / name.upper())] == list(SENTENCES)


def test_lines_longer_than_what_is_read_at_once_are_whole(tmp_path: Path) -> None:
    long = "word " * 700_000
    write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}, {"text": long}, {"text": "b"}])
    assert [document.text for document in read(tmp_path / "a.jsonl")] == ["a", long, "b"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
@pytest.mark.parametrize("packing", [".gz", ".zst"])
def test_a_small_file_that_unpacks_without_end_is_refused(
    tmp_path: Path, name: str, packing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "_MOST_BYTES", 2**24)
    content = bytes(2**25)
    path = tmp_path / (name + packing)
    path.write_bytes(gzip.compress(content) if packing == ".gz" else zstandard.ZstdCompressor().compress(content))
    assert path.stat().st_size < 2**16
    with pytest.raises(DataError, match=r"a document of more than 16,777,216 bytes"):
        read(path)


def test_zstandard_is_unpacked_in_small_pieces(tmp_path: Path) -> None:
    """One MiB of it can stand for 32 GiB."""
    (tmp_path / "a.zst").write_bytes(zstandard.ZstdCompressor().compress(bytes(2**28)))
    assert (tmp_path / "a.zst").stat().st_size > 2 * readers._ZSTD_READ
    assert max(map(len, readers._chunks(tmp_path / "a.zst", lambda _: None))) < 2**27 + 2**18


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
@pytest.mark.parametrize("share", [0.1, 0.6, 0.95])
def test_a_packed_file_that_was_cut_short_is_named(tmp_path: Path, name: str, share: float) -> None:
    packed = PACKERS[name](LINES * 50)
    (tmp_path / name).write_bytes(packed[: int(len(packed) * share)])
    with pytest.raises(DataError, match=rf"{name} is damaged after line \d+"):
        read(tmp_path / name)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_a_packed_file_with_a_wrong_byte_is_named(tmp_path: Path, name: str) -> None:
    packed = bytearray(PACKERS[name](LINES * 50))
    packed[len(packed) // 2] ^= 0xFF
    (tmp_path / name).write_bytes(packed)
    with pytest.raises(DataError, match=name):
        read(tmp_path / name)


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (b'{"text": "x"', "line 3"),
        (b'{"text": "\xff"}', "line 3.*utf-8"),
        (b"[1]", "line 3: not a JSON object"),
        (b'{"txt": "x"}', "line 3.*'text' is missing"),
        (b'{"text": 5}', "line 3.*'text' is not text"),
        (b"[" * 100_000, "line 3"),
    ],
)
def test_a_broken_line_is_named_by_its_number(tmp_path: Path, bad: bytes, says: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "one"}\n\n' + bad + b"\n" + LINES)
    with pytest.raises(DataError, match=f"a.jsonl, {says}"):
        read(tmp_path / "a.jsonl")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no data file .*nowhere\.jsonl"):
        read(tmp_path / "nowhere.jsonl")


def test_placeholders_are_filled_and_rows_chosen(tmp_path: Path) -> None:
    rows = [{"text": "I am {{name}}.", "source": "mine"}, {"text": "x", "source": "other"}]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    assert read(path, {"{{name}}": "Gale"}, only=["mine"]) == [Document(text="I am Gale.")]


def test_conversations_and_parallel_text_are_read(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": None}]
    chats = write_jsonl(tmp_path / "a.jsonl", [{"messages": messages}, {"messages": messages, "tools": [{}]}])
    (chat,) = read(chats, format="chat")
    assert chat.messages == ({"role": "user", "content": "hi"}, {"role": "assistant", "content": ""})
    pairs = write_jsonl(tmp_path / "b.jsonl", [{"en": "sea", "zh": "海"}])
    assert read(pairs, format="parallel") == [Document(text="sea\n海")]


@pytest.mark.parametrize("role", ["narrator", "end", "<|end|>", 3, None])
def test_an_unknown_role_is_refused(tmp_path: Path, role: object) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": [{"role": role, "content": "x"}]}])
    with pytest.raises(DataError, match=r"line 1.*unknown role"):
        read(path, format="chat")


def question_rows(count: int) -> list[dict[str, Any]]:
    rows = []
    for i in range(count):
        context = (
            f"Intro number {i}. " + "Some filler stands here. " * 5 + f"The code of box {i} is {i}.75 exactly. End."
        )
        answer = f"{i}.75"
        rows.append(
            {
                "context": context,
                "question": f"What is the code of box {i}?",
                "answers": [{"text": answer, "start": context.index(answer)}],
            }
        )
    return rows


def test_a_window_holds_the_answer_and_an_unanswerable_one_does_not(tmp_path: Path) -> None:
    rows = question_rows(200)
    kinds = {"grounded": 0, "unanswerable": 0, "closed_book": 0}
    documents = read(write_jsonl(tmp_path / "a.jsonl", rows), format="qa", questions=QUESTIONS)
    by_question = {row["question"]: row["answers"][0]["text"] for row in rows}
    for document in documents:
        prompt, reply = (message["content"] for message in document.messages)
        answer = by_question[prompt.rpartition("\n\n")[2]]
        if reply == QUESTIONS["closed_book_reply"]:
            kinds["closed_book"] += 1
            assert prompt in by_question
        elif reply == QUESTIONS["unanswerable_reply"]:
            kinds["unanswerable"] += 1
            assert answer not in prompt
        else:
            kinds["grounded"] += 1
            assert reply == f"{answer}."
            assert answer in prompt
    assert kinds["grounded"] > kinds["unanswerable"] > 0 < kinds["closed_book"]


def test_questions_are_drawn_the_same_each_time_and_otherwise_with_another_seed(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", question_rows(40))
    first, again, other = (read(path, seed=seed, format="qa", questions=QUESTIONS) for seed in (1, 1, 2))
    assert first == again != other


@settings(max_examples=200, deadline=None)
@given(st.text(st.sampled_from("ab 1.!?。！？\n中")), st.data())
def test_a_window_always_holds_its_span_and_grows_only_within_the_limit(text: str, data: st.DataObject) -> None:
    if not text:
        return
    start = data.draw(st.integers(0, len(text) - 1))
    end = data.draw(st.integers(start + 1, len(text)))
    window = _window(text, start, end, 10)
    assert text[start:end].strip() in window
    assert window in text
    assert len(_window(text, start, end, len(text))) == len(text.strip())


def test_a_window_ends_between_sentences_not_within_a_number() -> None:
    text = "It cost 3.50 in all. Then it rose to 4.75 at www.gale.org today. Nobody knew why."
    assert _window(text, 0, 2, 30) == "It cost 3.50 in all."


def test_normalising_gives_one_form_and_is_done_at_once() -> None:
    assert normalise("e\u0301\r\nb \t\r\n\n\n\nc\x00\u200b\ufeff\ud800 ") == "é\nb\n\nc"


@settings(max_examples=100, deadline=None)
@given(st.text())
def test_normalising_twice_changes_nothing_more(text: str) -> None:
    assert normalise(normalise(text)) == normalise(text)


def test_a_question_without_text_is_named(tmp_path: Path) -> None:
    rows = question_rows(3)
    del rows[1]["context"]
    with pytest.raises(DataError, match=r"a.jsonl, line [123].*context"):
        read(
            write_jsonl(tmp_path / "a.jsonl", rows),
            format="qa",
            questions={**QUESTIONS, "closed_book": 0.0, "grounded": 0.85},
        )


@pytest.mark.parametrize("context", [None, 5, ["x"]])
def test_a_passage_that_is_no_text_is_blamed_on_its_own_row(tmp_path: Path, context: object) -> None:
    """Though others draw passages to ask what they do not say."""
    rows = question_rows(30)
    rows[7]["context"] = context
    source = Source.model_validate(
        {
            **{"path": str(write_jsonl(tmp_path / "a.jsonl", rows)), "licence": "CC0", "origin": "test"},
            **{"format": "qa", "max_broken_lines": 1},
            "questions": {**QUESTIONS, "grounded": 0.0, "unanswerable": 1.0, "closed_book": 0.0},
        }
    )
    broken = BrokenRows(source)
    assert len(list(read_documents(source, replace={}, seed=0, broken=broken))) > 20
    assert broken.count == 1
    assert "a.jsonl, line 8: " in broken.first[0]
    assert "'context' is not text" in broken.first[0]


def test_variants_draw_each_row_anew_and_spans_only_leaves_out_what_the_passage_lacks(tmp_path: Path) -> None:
    rows = question_rows(30)
    rows[4]["answers"][0]["start"] = -1
    rows[5]["source"] = "other"
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    grounded = {**QUESTIONS, "grounded": 1.0, "unanswerable": 0.0, "closed_book": 0.0}
    one = read(path, format="qa", questions=grounded)
    three = read(path, format="qa", questions={**grounded, "variants": 3})
    assert len(one) == 30
    assert three[:30] == one
    assert len(three) == 90
    assert three[30:60] != one
    assert len(read(path, format="qa", questions={**grounded, "spans_only": True})) == 29
    assert len(read(path, format="qa", questions=grounded, only=["other"])) == 1
