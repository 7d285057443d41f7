"""Forms with one file (RFC 7578), read piece by piece to the disk: how much memory one takes does not depend on it.

The fields beside the file are few and short, so what has very many, or an endless one, is refused while it comes.
"""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass, field

from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect

from gale.platform.file_folder import IncomingFile
from gale.server.errors import ApiError, invalid

MOST_PARTS = 16
MOST_FIELD_BYTES = 4096
MOST_NAME_CHARACTERS = 255
_PIECE_BYTES = 1024 * 1024
_CLOSE = {"connection": "close"}
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


@dataclass
class Form:
    """What stood beside the file, whose own name is ``filename``."""

    filename: str
    fields: dict[str, str]


async def read_form(request: Request, file_field: str, incoming: IncomingFile) -> Form:
    """Write the file of the form in ``request`` to ``incoming``; the rest is returned.

    Raises :class:`ApiError` 400 or 415, and what ``incoming`` raises.
    """
    media_type, options = parse_options_header(request.headers.get("content-type", ""))
    if media_type != b"multipart/form-data":
        raise ApiError(415, "Send a form: 'Content-Type: multipart/form-data'.", code="unsupported_media_type")
    if not 1 <= len(boundary := options.get(b"boundary", b"")) <= 70:
        raise _malformed("its Content-Type has no boundary of 1 to 70 characters")
    reader = _Reader(boundary, file_field, incoming)
    waiting = bytearray()
    try:
        async for piece in request.stream():
            waiting += piece
            if len(waiting) >= _PIECE_BYTES:
                await asyncio.to_thread(reader.feed, bytes(waiting))
                waiting.clear()
    except ClientDisconnect as error:
        raise ApiError(400, "The client left before its request was complete.", code="client_disconnected") from error
    await asyncio.to_thread(reader.feed, bytes(waiting))
    return reader.form()


@dataclass
class _Part:
    """The part at hand: its header at hand, its name, and its value unless it is the file."""

    header: bytearray = field(default_factory=bytearray)
    value: bytearray = field(default_factory=bytearray)
    disposition: str = ""
    name: str = ""
    is_file: bool = False
    content: bytearray = field(default_factory=bytearray)


class _Reader:
    """Told of each piece by the parser. Blocks: for a thread."""

    def __init__(self, boundary: bytes, file_field: str, incoming: IncomingFile) -> None:
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin,
                "on_header_field": self._header_name,
                "on_header_value": self._header_value,
                "on_header_end": self._header_end,
                "on_headers_finished": self._headers_finished,
                "on_part_data": self._data,
                "on_part_end": self._end,
                "on_end": self._finish,
            },
        )
        self._file_field = file_field
        self._incoming = incoming
        self._fields: dict[str, str] = {}
        self._filename: str | None = None
        self._part = _Part()
        self._parts = 0
        self._finished = False

    def feed(self, data: bytes) -> None:
        """The next piece. Raises :class:`ApiError` 400."""
        try:
            self._parser.write(data)
        except FormParserError as error:
            raise _malformed(str(error)[:200]) from error

    def form(self) -> Form:
        """When all has come. Raises :class:`ApiError` 400."""
        if not self._finished:
            raise _malformed("it ends before its last boundary")
        if self._filename is None:
            name = self._file_field
            raise ApiError(400, f"Missing required parameter: '{name}'.", code="missing_required_parameter", param=name)
        return Form(self._filename, self._fields)

    def _begin(self) -> None:
        self._part = _Part()
        self._parts += 1
        if self._parts > MOST_PARTS:
            raise _malformed(f"it has more than {MOST_PARTS} parts")

    def _header_name(self, data: bytes, start: int, end: int) -> None:
        self._part.header += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._part.value += data[start:end]

    def _header_end(self) -> None:
        if self._part.header.lower() == b"content-disposition":
            self._part.disposition = self._part.value.decode("latin-1")
        self._part.header.clear()
        self._part.value.clear()

    def _headers_finished(self) -> None:
        kind, options = parse_options_header(self._part.disposition)
        if kind != b"form-data" or b"name" not in options:
            raise _malformed("a part does not name its field")
        self._part.name = name = options[b"name"].decode("utf-8", "replace")
        self._part.is_file = b"filename" in options
        if name in self._fields or (name == self._file_field and self._filename is not None):
            raise _malformed(f"the field {name[:64]!r} occurs twice")
        if self._part.is_file != (name == self._file_field):
            raise invalid(name[:64], "it must not be a file" if self._part.is_file else "it must be a file")
        if self._part.is_file:
            self._filename = _plain_name(options[b"filename"].decode("utf-8", "replace"))

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._part.is_file:
            self._incoming.write(memoryview(data)[start:end])
            return
        self._part.content += data[start:end]
        if len(self._part.content) > MOST_FIELD_BYTES:
            raise invalid(self._part.name[:64], f"it is longer than {MOST_FIELD_BYTES} bytes")

    def _end(self) -> None:
        if not self._part.is_file:
            self._fields[self._part.name] = self._part.content.decode("utf-8", "replace")

    def _finish(self) -> None:
        self._finished = True


def _plain_name(name: str) -> str:
    """The name without folders and without characters that are no text: it is shown and never opened."""
    last = re.split(r"[/\\]", name)[-1]
    return _UNPRINTABLE.sub("", last)[-MOST_NAME_CHARACTERS:] or "file"


def _malformed(reason: str) -> ApiError:
    return ApiError(400, f"The form cannot be read: {reason}.", code="invalid_form", headers=_CLOSE)
