"""Identifiers: random, url-safe, with a prefix that says what they name."""

from __future__ import annotations

import secrets


def new_id(prefix: str) -> str:
    """For example ``conv_3q2-7w...``: 128 random bits, so that ids can neither be guessed nor collide."""
    return f"{prefix}_{secrets.token_urlsafe(16)}"
