"""A stored file as an answer: always something to save, never something that a browser shows or runs.

Asking for a part of it (``Range``) is answered with the whole, as HTTP allows: there is nothing to overwhelm then.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import BinaryIO
from urllib.parse import quote

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gale.server.disconnect import cancel, client_gone

_PIECE_BYTES = 256 * 1024


class FileAnswer(Response):
    """The bytes of ``file``, which is open, of ``size``, and closed at the end."""

    def __init__(self, file: BinaryIO, size: int, filename: str) -> None:
        plain = "".join(c if c.isascii() and c.isprintable() and c not in '"\\%' else "_" for c in filename)
        super().__init__(
            media_type="application/octet-stream",
            headers={
                "content-disposition": f"attachment; filename=\"{plain}\"; filename*=UTF-8''{quote(filename, safe='')}",
                "content-length": str(size),
            },
        )
        self._file = file
        self._size = size

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it, as far as somebody takes it."""
        leaving = asyncio.create_task(client_gone(receive))
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            left = self._size
            while True:
                piece = await asyncio.to_thread(self._file.read, min(left, _PIECE_BYTES))
                left -= len(piece)
                # The last piece says so itself: the client asks for the next thing as soon as it has that.
                await send({"type": "http.response.body", "body": piece, "more_body": left > 0})
                if left <= 0 or not piece or leaving.done():
                    return
        finally:
            self._file.close()
            await cancel(leaving)


async def open_file(path: Path) -> BinaryIO:
    """``path`` for reading. It can be read to its end even if it is deleted meanwhile."""
    return await asyncio.to_thread(path.open, "rb")
