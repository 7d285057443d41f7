"""The server's own secret, without which nothing that the database keeps of a key or a session is of any use.

Keys have 238 random bits, so that a plain digest of one could not be turned back either. The secret adds that whoever
can write to the database (and cannot read this file) cannot make a key of their own.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import stat
from pathlib import Path
from typing import Literal

from gale.core import files
from gale.core.errors import GaleError
from gale.core.settings import settings

SECRET_BYTES = 32
Kind = Literal["key", "link", "session"]


class Secret:
    """HMAC-SHA256 under the secret, which is read (or made) when it is first needed."""

    def __init__(self, value: bytes | None = None) -> None:
        self._value = value

    def digest(self, kind: Kind, text: str) -> bytes:
        """The 32 bytes that are kept of ``text``; of another kind they are others. Raises :class:`GaleError`."""
        if self._value is None:
            self._value = read_secret()
        return hmac.digest(self._value, f"{kind}\0{text}".encode(), hashlib.sha256)


def read_secret() -> bytes:
    """``GALE_SECRET``, or else the file ``secret.key`` in GALE_HOME, which is made if it is not there yet.

    Raises :class:`GaleError` where it cannot be read or made, is not what it should be, or may be read by others.
    """
    if (given := settings().secret) is not None:
        return given.get_secret_value().encode()
    path = settings().home / "secret.key"
    with files.explain_disk_errors(path):
        if not path.exists():
            _make(path)
        mode, value = path.stat().st_mode, path.read_bytes()
    if stat.S_IMODE(mode) & 0o077:
        raise GaleError(f"{path} may be read by others.", hint=f"Make it yours alone: chmod 600 {path}")
    if len(value) != SECRET_BYTES:
        raise GaleError(
            f"{path} is damaged: it should have {SECRET_BYTES} bytes and has {len(value)}.",
            hint="Restore it from a backup. Without it every key and sign-in has to be made anew; to do so, delete it.",
        )
    return value


def _make(path: Path) -> None:
    """Make it whole or not at all; of two processes that would do so at once, the second finds it there."""
    with files.locked(path.with_name(f"{path.name}.lock")):
        if path.exists():
            return
        with files.new_file(path, private=True) as temporary:
            temporary.write_bytes(secrets.token_bytes(SECRET_BYTES))
