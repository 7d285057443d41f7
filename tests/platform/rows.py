"""Work for a database under test: rows written and read in the plainest way."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from sqlalchemy import Connection, text

Result = TypeVar("Result")


def run(work: Coroutine[Any, Any, Result]) -> Result:
    return asyncio.run(work)


def insert(connection: Connection, name: str = "conv_1") -> None:
    connection.execute(
        text("INSERT INTO conversations (id, title, created_at, updated_at) VALUES (:id, '', 0, 0)"), {"id": name}
    )


def count(connection: Connection) -> int:
    return int(connection.execute(text("SELECT count(*) FROM conversations")).scalar_one())


def number(connection: Connection) -> int:
    return int(connection.execute(text("SELECT created_at FROM conversations")).scalar_one())


def increment(connection: Connection) -> None:
    """Not in one statement, on purpose: what was read has to hold until it is written."""
    connection.execute(text("UPDATE conversations SET created_at = :n"), {"n": number(connection) + 1})
