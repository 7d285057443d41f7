"""What an API key looks like: ``sk-gale-``, 40 random letters and digits, and a checksum of 6.

The beginning lets programs that look for leaked secrets find one; the checksum tells what only looks like a key, or
was copied in part, before anything is looked up. Nothing here can tell whether a key is valid: see ``identities``.
"""

from __future__ import annotations

import re
import secrets
import string
import zlib

PREFIX = "sk-gale-"
ADMIN_PREFIX = "sk-gale-admin-"
_ALPHABET = string.digits + string.ascii_uppercase + string.ascii_lowercase
_RANDOM, _CHECKSUM = 40, 6
_FORM = re.compile(rf"sk-gale-(?:admin-)?[0-9A-Za-z]{{{_RANDOM + _CHECKSUM}}}")
_SHOWN = 4


def new_key(*, admin: bool = False) -> str:
    """A new key of 238 random bits; ``admin`` marks those that administer an organisation."""
    body = (ADMIN_PREFIX if admin else PREFIX) + "".join(secrets.choice(_ALPHABET) for _ in range(_RANDOM))
    return body + _checksum(body)


def is_well_formed(text: str) -> bool:
    """Whether ``text`` could be a key of ours."""
    return _FORM.fullmatch(text) is not None and _checksum(text[:-_CHECKSUM]) == text[-_CHECKSUM:]


def shown(key: str) -> tuple[str, str]:
    """What may be shown of a key later on: its beginning and its end."""
    prefix = ADMIN_PREFIX if key.startswith(ADMIN_PREFIX) else PREFIX
    return key[: len(prefix) + _SHOWN], key[-_SHOWN:]


def _checksum(body: str) -> str:
    """CRC-32 in base 62."""
    number, digits = zlib.crc32(body.encode()), ""
    for _ in range(_CHECKSUM):
        number, digit = divmod(number, len(_ALPHABET))
        digits = _ALPHABET[digit] + digits
    return digits
