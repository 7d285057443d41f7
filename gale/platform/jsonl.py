"""Files of JSON lines as people make them: with a byte order mark, with CRLF, with empty lines, with one huge line."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from pathlib import Path


def numbered_lines(path: Path, most_bytes: int) -> Iterator[tuple[int, bytes | None]]:
    """Each line that is not empty, with its number from 1; None for one longer than ``most_bytes``, which is never
    held in memory. Blocks."""
    number = 0
    with path.open("rb") as file:
        if file.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:
            file.seek(0)
        while line := file.readline(most_bytes + 2):
            number += 1
            too_long = not line.endswith(b"\n") and len(line) > most_bytes
            while too_long and (rest := file.readline(most_bytes)):
                if rest.endswith(b"\n"):
                    break
            if too_long:
                yield number, None
            elif content := line.strip(b" \t\r\n"):
                yield number, content
