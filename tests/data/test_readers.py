"""Every kind of file is read alike from one file, a folder or a pattern; what cannot be read is named and counted."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from pydantic import ValidationError

from gale.core.errors import DataError
from gale.data import readers
from gale.data.recipe import Source
from gale.data.source_files import find_files
from gale.data.sources import BrokenRows, Document, read_documents
from tests.tiny_data import SENTENCES, write_jsonl

PAGE = """<!doctype html><html><head><title>Herons</title><script>track()</script></head><body>
<nav><ul><li><a href="/">Home</a></li><li><a href="/a">About us</a></li></ul></nav>
<article><h1>Herons</h1>
<p>The heron stood in the shallow water for an hour and waited, quite still, for a fish to come by.</p>
<p>白鹭站在浅水里，等着一条鱼，一个小时都没有动。这就是它全部的本领，也是它每天要做的事情。</p>
<p>When the fish came at last, the heron was faster, as herons have been for some fifty million years.</p></article>
<footer>Copyright. All rights reserved. <a href="/terms">Terms</a></footer></body></html>"""


def needs_html() -> None:
    """Skip where trafilatura does not load, but not in CI."""
    if os.environ.get("CI") != "true":
        pytest.importorskip("lxml_html_clean", reason="trafilatura does not load without lxml_html_clean")


def make(path: Path, **fields: Any) -> Source:
    return Source.model_validate({"path": str(path), "licence": "CC0", "origin": "test", **fields})


def read(path: Path, **fields: Any) -> list[Document]:
    return list(read_documents(make(path, **fields), replace={}, seed=0))


def texts(path: Path, **fields: Any) -> list[str | None]:
    return [document.text for document in read(path, **fields)]


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=3)
    return path


def test_parquet_holds_the_same_documents_as_json_lines(tmp_path: Path) -> None:
    rows = [{"text": f"{i} {SENTENCES[i % 8]}", "source": "a" if i % 2 else "b", "n": i} for i in range(700)]
    table, lines = write_parquet(tmp_path / "a.parquet", rows), write_jsonl(tmp_path / "a.jsonl", rows)
    assert read(table) == read(lines)
    assert read(table, only=["a"]) == read(lines, only=["a"])
    chats = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}] * 3
    assert read(write_parquet(tmp_path / "c.parquet", chats), format="chat") == read(
        write_jsonl(tmp_path / "c.jsonl", chats), format="chat"
    )


def test_columns_that_a_format_does_not_need_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A time in nanoseconds, as pandas writes it, can be no Python object without pandas."""
    rows = {"ask": ["a", "b"], "output": ["c", "d"], "source": ["s", "t"], "tools": [None, "x"]}
    table = pa.table({**rows, "at": pa.array([1, 2], pa.timestamp("ns"))})
    pq.write_table(table, tmp_path / "a.parquet")
    asked: list[Any] = []
    read_batches = pq.ParquetFile.iter_batches

    def iter_batches(*arguments: Any, columns: Any) -> Any:
        asked.append(columns)
        return read_batches(*arguments, columns=columns)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", iter_batches)
    options: dict[str, Any] = {"format": "instruction", "fields": {"instruction": "ask"}}
    assert len(read(tmp_path / "a.parquet", **options)) == 2
    assert len(read(tmp_path / "a.parquet", only=["t"], **options)) == 1
    assert asked == [["ask", "output", "source", "tools"], ["ask", "output", "source", "tools"]]


def test_parquet_without_the_column_and_a_damaged_one_are_named(tmp_path: Path) -> None:
    table = write_parquet(tmp_path / "a.parquet", [{"content": "x"}])
    with pytest.raises(DataError, match="no column 'text'") as caught:
        read(table)
    assert "content" in str(caught.value.hint)
    assert texts(table, text_key="content") == ["x"]
    table.write_bytes(table.read_bytes()[:-30])
    with pytest.raises(DataError, match=r"a\.parquet is damaged"):
        read(table, text_key="content")


@pytest.mark.parametrize("dictionary", [True, False])
def test_a_small_parquet_file_whose_rows_are_huge_is_refused_by_the_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dictionary: bool
) -> None:
    """As a dictionary of one value, which each row has again, or as pages that unpack to a thousand times as much."""
    monkeypatch.setattr(readers, "_MOST_BYTES", 2**20)
    path, small = tmp_path / "a.parquet", ["words"] * 40
    options: dict[str, Any] = {"compression": "zstd", "use_dictionary": dictionary}
    pq.write_table(pa.table({"text": [*small, *["x" * 2**21] * 20]}), path, **options)
    assert path.stat().st_size < 2**16
    with pytest.raises(DataError, match=r"a\.parquet, row 41, holds more than 1,048,576 bytes"):
        read(path)
    pq.write_table(pa.table({"text": [*small, *["x" * 2**17] * 20]}), path, **options)
    assert len(read(path)) == 60


@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstandard.ZstdCompressor().compress])
def test_text_markdown_and_html_are_one_document_a_file(tmp_path: Path, pack: Any) -> None:
    ending = {bytes: "", gzip.compress: ".gz"}.get(pack, ".zst")
    (tmp_path / f"a.txt{ending}").write_bytes(pack("\ufeff第一行\nsecond line".encode()))
    (tmp_path / f"b.md{ending}").write_bytes(pack(b"---\ntitle: Notes\ntags:\n  - x\n---\n# Notes\n\nText\n---\nmore"))
    assert texts(tmp_path / f"a.txt{ending}") == ["第一行\nsecond line"]
    assert texts(tmp_path / f"b.md{ending}") == ["# Notes\n\nText\n---\nmore"]
    needs_html()
    (tmp_path / f"c.html{ending}").write_bytes(pack(PAGE.encode()))
    (page,) = texts(tmp_path / f"c.html{ending}")
    assert page is not None
    assert "fifty million years" in page
    assert "一个小时都没有动" in page
    assert not any(word in page for word in ("About us", "rights reserved", "track", "<p>"))


def test_a_page_is_read_in_the_encoding_it_declares(tmp_path: Path) -> None:
    needs_html()
    page = PAGE.replace("<head>", '<head><meta charset="gb18030">')
    (tmp_path / "a.html").write_bytes(page.encode("gb18030"))
    assert "一个小时都没有动" in str(texts(tmp_path / "a.html")[0])


def test_a_text_in_another_encoding_is_broken_until_the_recipe_names_it(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("白鹭站在浅水里。".encode("gb18030"))
    with pytest.raises(DataError, match=r"a\.txt: .*utf-8.*gb18030"):
        read(tmp_path / "a.txt")
    assert texts(tmp_path / "a.txt", encoding="gb18030") == ["白鹭站在浅水里。"]
    for encoding, says in (("klingon", "unknown encoding"), ("rot13", "not a text encoding")):
        with pytest.raises(ValidationError, match=says):
            make(tmp_path / "a.txt", encoding=encoding)
    with pytest.raises(DataError, match=r"a\.txt: .*undefined"):
        read(tmp_path / "a.txt", encoding="undefined")


def test_a_folder_and_a_pattern_are_read_in_sorted_order(tmp_path: Path) -> None:
    folder = tmp_path / "notes"
    (folder / "b").mkdir(parents=True)
    (folder / ".git").mkdir()
    for name, text in (("c.txt", "3"), ("b/a.md", "2"), ("a.txt", "1"), (".git/x.txt", "no"), (".hidden.txt", "no")):
        (folder / name).write_text(text)
    (folder / "picture.png").write_bytes(b"\x89PNG")
    write_jsonl(folder / "d.jsonl", [{"text": "4"}, {"text": "5"}])
    assert texts(folder) == ["1", "2", "3", "4", "5"]
    assert texts(folder / "*.txt") == ["1", "3"]
    assert texts(folder / "**" / "*.[mt]*") == ["1", "2", "3"]
    assert [path.name for path in find_files(folder).ignored] == ["picture.png"]
    assert texts(folder / "b", kind="text") == ["2"]


def test_links_that_lead_out_of_the_folder_are_passed_over_and_counted(tmp_path: Path) -> None:
    private, folder = tmp_path / "private", tmp_path / "data"
    private.mkdir()
    (folder / "sub").mkdir(parents=True)
    (private / "diary.txt").write_text("mine")
    (folder / "sub" / "a.txt").write_text("a")
    (folder / "b.txt").symlink_to("sub/a.txt")
    (folder / "c.txt").symlink_to("../private/diary.txt")
    (folder / "d").symlink_to(private)
    for path in (folder, folder / "*.txt"):
        assert "mine" not in texts(path, kind="text")
        assert [link.name for link in find_files(path).outside] == ["c.txt"]
    assert texts(folder) == ["a", "a"]
    assert texts(folder / "*" / "*.txt") == ["a"]
    (folder / "b.txt").unlink()
    with pytest.raises(DataError, match=r"1 links lead out of the folder, such as .*c\.txt"):
        read(folder / "*.txt")
    (tmp_path / "link").symlink_to(folder)
    assert texts(tmp_path / "link") == ["a"]  # what the recipe itself names may be a link
    assert texts(folder / "c.txt") == ["mine"]


def test_what_can_not_be_read_yet_or_is_not_there_is_said(tmp_path: Path) -> None:
    (tmp_path / "papers").mkdir()
    with pytest.raises(DataError, match=r"papers holds no file of a known kind"):
        read(tmp_path / "papers")
    (tmp_path / "papers" / "letter.docx").write_bytes(b"PK")
    (tmp_path / "papers" / "a.pdf").write_bytes(b"%PDF")
    with pytest.raises(DataError, match=r"a\.pdf is a \.pdf file, which Gale cannot read yet \(nor the 1 others"):
        read(tmp_path / "papers")
    with pytest.raises(DataError, match=r"letter\.docx is a \.docx file"):
        read(tmp_path / "papers" / "letter.docx")
    with pytest.raises(DataError, match="matches no file of a known kind"):
        read(tmp_path / "*.jsonl")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match=r"a\.txt holds running text, not rows of the format 'chat'"):
        read(tmp_path / "a.txt", format="chat")


def test_broken_lines_are_skipped_and_counted_up_to_the_limit(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"line {i}"}) for i in range(10)]
    lines[2], lines[5], lines[7] = "{", '{"txt": "x"}', '{"text": 5}'
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    source = make(tmp_path / "a.jsonl", max_broken_lines=3)
    broken = BrokenRows(source)
    assert len(list(read_documents(source, replace={}, seed=0, broken=broken))) == 7
    assert broken.count == 3
    assert [place.partition(": ")[0][-7:] for place in broken.first] == [" line 3", " line 6", " line 8"]
    with pytest.raises(DataError, match=r"more than 2 broken rows(?s:.*)line 3(?s:.*)line 6(?s:.*)line 8"):
        read(tmp_path / "a.jsonl", max_broken_lines=2)
    with pytest.raises(DataError, match=r"a\.jsonl, line 3"):
        read(tmp_path / "a.jsonl")


def test_a_broken_question_counts_once_however_many_variants_are_drawn(tmp_path: Path) -> None:
    rows = [{"context": "The sea is blue.", "question": "What?", "answers": [{"text": "sea", "start": 4}]}, {"q": 1}]
    questions = {
        **{"prompts": ["{context}{question}"], "unanswerable_reply": "no", "closed_book_reply": "no", "variants": 3},
        **{"grounded": 1.0, "unanswerable": 0.0, "closed_book": 0.0},
    }
    source = make(write_jsonl(tmp_path / "a.jsonl", rows), format="qa", questions=questions, max_broken_lines=1)
    broken = BrokenRows(source)
    assert len(list(read_documents(source, replace={}, seed=0, broken=broken))) == 3
    assert broken.count == 1


def test_fields_read_common_data_sets_as_they_come(tmp_path: Path) -> None:
    chat = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]
    (document,) = read(
        write_jsonl(tmp_path / "sharegpt.jsonl", [{"conversations": chat}]),
        format="chat",
        fields={"messages": "conversations", "role": "from", "content": "value"},
    )
    expected = ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"})
    assert document.messages == expected
    alpaca = [{"instruction": "Say it", "input": "loudly", "output": "ho"}, {"instruction": "hi", "output": "ho"}]
    first, second = read(write_jsonl(tmp_path / "alpaca.jsonl", alpaca), format="instruction")
    assert first.messages[0]["content"] == "Say it\n\nloudly"
    assert second.messages == expected
    nested = write_jsonl(tmp_path / "n.jsonl", [{"data": {"body": "x"}, "meta": {"set": "a"}}])
    assert texts(nested, text_key="data.body", fields={"source": "meta.set"}, only=["a"]) == ["x"]
    with pytest.raises(DataError, match=r"line 1.*'data.title' is missing"):
        read(nested, text_key="data.title")


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"fields": {"txt": "body"}}, "the format text has no 'txt'"),
        ({"text_key": "body", "format": "chat"}, "text_key belongs to the format text"),
        ({"kind": "html", "format": "chat"}, "hold running text"),
        ({"weight": 1.0, "epochs": 2.0}, "in place of epochs"),
        ({"weight": 1.0, "split": "held"}, "only where split is train"),
        ({"max_epochs": 2.0}, "belongs to weight"),
    ],
)
def test_keys_that_do_not_go_together_are_refused(tmp_path: Path, fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        make(tmp_path / "a.jsonl", **fields)
