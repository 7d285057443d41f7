"""Files to rows: packed JSON lines and Parquet row by row, text, Markdown and HTML one row a file.

Reading is split in two. :func:`read_rows` only takes files apart, so that one process can feed many; what costs time
(JSON, HTML) is done by :meth:`Row.parse`, wherever the row has got to.
"""

from __future__ import annotations

import gzip
import json
import logging
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zstandard

from gale.core.errors import DataError
from gale.data.source_files import FileKind, SourceFile

_READ = 2**20
_ZSTD_READ = 2**12  # three bytes can stand for 128 KiB, and all that one call unpacks is held at once
_MOST_BYTES = 2**30  # of a line, or of a file that is one document
_PARQUET_ROWS = 16  # at once, of which each can be as large as the largest column chunk
# YAML between two lines of dashes, as static site generators have it: about the page, not of it.
# Each line can be read in one way only: with two, a page without the closing dashes would take for ever.
_FRONT_MATTER = re.compile(r"\A---[ \t]*\n(?:[A-Za-z_][\w -]*:.*\n|[ \t].*\n|- .*\n|\n)*?---[ \t]*\n")

OnRead = Callable[[int], None]


def _uncounted(_: int) -> None: ...


class BrokenRowError(ValueError):
    """A row that cannot be used; the message says why."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row as it lies in a file; ``place`` names file and line, and bytes are yet to be parsed."""

    place: str
    kind: FileKind
    content: bytes | dict[str, Any]
    encoding: str = "utf-8"

    def parse(self) -> dict[str, Any]:
        """The row's keys and values; a file of text is a row with the key ``text``. Raises :class:`BrokenRowError`."""
        if isinstance(self.content, dict):
            return self.content
        if self.kind == "html":
            return {"text": html_text(self.content)}
        if self.kind in ("text", "markdown"):
            try:
                text = self.content.decode(self.encoding).removeprefix("\ufeff")
            except UnicodeError as error:
                raise BrokenRowError(f"{error} (another `encoding`, such as gb18030?)") from error
            return {"text": markdown_text(text) if self.kind == "markdown" else text}
        try:
            row = json.loads(self.content.decode("utf-8"))
        except (ValueError, RecursionError) as error:  # includes broken UTF-8
            raise BrokenRowError(str(error)) from error
        if not isinstance(row, dict):
            raise BrokenRowError("not a JSON object.")
        return row

    @property
    def size(self) -> int:
        """About how large the row is, in bytes of a file or characters of its values."""
        if isinstance(self.content, bytes):
            return len(self.content)
        return sum(len(value) for value in self.content.values() if isinstance(value, str))


def read_rows(
    file: SourceFile,
    *,
    columns: tuple[str, ...] | None = None,
    optional: tuple[str, ...] = (),
    encoding: str = "utf-8",
    on_read: OnRead = _uncounted,
) -> Iterator[Row]:
    """All rows of a file in order. ``columns`` are all that is needed of Parquet, with those of ``optional`` that it
    has; ``on_read`` is told of bytes read.

    Raises :class:`DataError` for a file that is damaged as a whole.
    """
    if file.kind == "parquet":
        yield from _parquet_rows(file.path, columns, optional, on_read)
        return
    line = 0
    try:
        if file.kind == "jsonl":
            for line, raw in enumerate(_lines(file.path, _chunks(file.path, on_read)), start=1):
                if raw.strip():
                    yield Row(f"{file.path}, line {line}", file.kind, raw)
        else:
            document = _Pieces(file.path)
            for chunk in _chunks(file.path, on_read):
                document.add(chunk)
            yield Row(str(file.path), file.kind, document.take(), encoding)
    except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
        after = f" after line {line}" if file.kind == "jsonl" else ""
        raise DataError(f"{file.path} is damaged{after}: {error}", hint="Copy or download the file again.") from error


def html_text(page: bytes) -> str:
    """The main text of a page without its navigation, as plain text; empty where there is none.

    trafilatura (Barbaresi 2021) finds it, and the page's encoding too. Raises :class:`BrokenRowError`.
    """
    try:
        import trafilatura
    except ImportError as error:
        raise DataError(f"HTML cannot be read, because trafilatura does not load: {error}") from error
    logging.getLogger("trafilatura").setLevel(logging.CRITICAL)  # a page without text is counted, not logged
    try:
        return trafilatura.extract(page, include_comments=False, include_tables=True) or ""
    except Exception as error:  # it promises nothing about what broken pages make it raise
        raise BrokenRowError(f"not a page that can be read: {error}") from error


def markdown_text(text: str) -> str:
    """Markdown as it is, without front matter."""
    return _FRONT_MATTER.sub("", text.replace("\r\n", "\n"))


def _parquet_rows(
    path: Path, columns: tuple[str, ...] | None, optional: tuple[str, ...], on_read: OnRead
) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as table:
            names = table.schema_arrow.names
            if missing := [name for name in columns or () if name not in names]:
                raise DataError(
                    f"{path} has no column {missing[0]!r}.",
                    hint=f"It has {', '.join(names)}; name the right one with `text_key` or `fields`.",
                )
            per_row = path.stat().st_size / max(1, table.metadata.num_rows)
            wanted = None if columns is None else [*columns, *(name for name in optional if name in names)]
            for batch in table.iter_batches(_rows_at_once(table.metadata), columns=wanted):
                if batch.nbytes > _MOST_BYTES:
                    rows = f"row {number + 1}" + (f" to {number + batch.num_rows}" if batch.num_rows > 1 else "")
                    raise DataError(
                        f"{path}, {rows}, holds more than {_MOST_BYTES:,} bytes.",
                        hint="Cut it into documents of a row each.",
                    )
                for row in batch.to_pylist():
                    number += 1
                    yield Row(f"{path}, row {number}", "parquet", row)
                on_read(round(per_row * batch.num_rows))
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        raise DataError(
            f"{path} is damaged after row {number}: {error}", hint="Copy or download the file again."
        ) from error


def _rows_at_once(metadata: Any) -> int:
    """One where a value may be very large: a chunk of kilobytes can hold one such and say that each row has it."""
    groups = (metadata.row_group(i) for i in range(metadata.num_row_groups))
    sizes = (group.column(i).total_uncompressed_size for group in groups for i in range(group.num_columns))
    return _PARQUET_ROWS if max(sizes, default=0) <= _MOST_BYTES // _PARQUET_ROWS else 1


def _chunks(path: Path, on_read: OnRead) -> Iterator[bytes]:
    """Content of a plain, gzip or zstd file, unpacked."""
    with path.open("rb") as file:
        packing = path.suffix.lower()
        if packing == ".zst":
            yield from _zstd_chunks(iter(lambda: file.read(_ZSTD_READ), b""), on_read)
            return
        unpacked = gzip.GzipFile(fileobj=file) if packing == ".gz" else file
        done = 0
        while chunk := unpacked.read(_READ):
            on_read(file.tell() - done)
            done = file.tell()
            yield chunk


def _zstd_chunks(packed_chunks: Iterator[bytes], on_read: OnRead) -> Iterator[bytes]:
    # Not the library's stream reader: it ends without a word where a file is cut short, and after the first frame.
    decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)
    frame = decompressor.decompressobj()
    for packed in packed_chunks:
        on_read(len(packed))
        while packed:
            if frame.eof:
                frame = decompressor.decompressobj()
            yield frame.decompress(packed)
            packed = frame.unused_data if frame.eof else b""
    if not frame.eof:
        raise EOFError("the last frame is cut short")


class _Pieces:
    """Pieces of one line or document; a packed file of kilobytes can hold one that no memory does."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._pieces: list[bytes] = []
        self._size = 0

    def add(self, piece: bytes) -> None:
        """Append a piece. Raises :class:`DataError` where it is one too many."""
        self._pieces.append(piece)
        self._size += len(piece)
        if self._size > _MOST_BYTES:
            raise DataError(
                f"{self._path} holds a document of more than {_MOST_BYTES:,} bytes.",
                hint="Cut it into documents, such as one a line of a JSON lines file.",
            )

    def take(self) -> bytes:
        """All pieces in one, which are then forgotten."""
        whole = b"".join(self._pieces)
        self._pieces, self._size = [], 0
        return whole


def _lines(path: Path, chunks: Iterator[bytes]) -> Iterator[bytes]:
    pending = _Pieces(path)
    for chunk in chunks:
        *lines, rest = chunk.split(b"\n")
        for line in lines:
            pending.add(line)
            yield pending.take()
        pending.add(rest)
    if last := pending.take():
        yield last
