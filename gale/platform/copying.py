"""A whole store from one database into another, of either kind: all of it, or nothing.

Every table that there is goes in the order of its references, row for row and to the letter: ids, times and JSON are
what they were. The source is read on one view of it and not changed; the target is written in one transaction, so that
a copy which ends early, however it ends, leaves it as empty as it was.

The two connections live in threads of their own (see :mod:`gale.platform.database`), so rows go through a queue.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
import threading
from collections.abc import Sequence
from pathlib import Path
from queue import Empty, Full, Queue
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Column,
    ColumnElement,
    Connection,
    Integer,
    LargeBinary,
    MetaData,
    Select,
    String,
    Table,
    Text,
    cast,
    delete,
    func,
    insert,
    literal,
    make_url,
    select,
)
from sqlalchemy.exc import ArgumentError, IntegrityError, OperationalError
from sqlalchemy.types import TypeDecorator

from gale.core.errors import StoreError
from gale.core.progress import Bar
from gale.platform.database import Database
from gale.platform.sqlite import path_from
from gale.platform.tables import metadata

# Rows can be long: a whole answer with what it was asked.
BATCH_ROWS = 200
_WAITING_BATCHES = 2
# A connection that was just closed is listed by PostgreSQL for a moment.
_OTHERS_LEAVE_S = 2.0
_PAUSE_S = 0.1

Counts = dict[str, int]
_Batch = tuple[Table, Sequence[tuple[Any, ...]]]


def check_addresses(source: str, target: str) -> None:
    """Refuse what would be a mistake, before a database that is not there is made: raises :class:`StoreError`."""
    try:
        urls = make_url(source), make_url(target)
    except ArgumentError:  # which is said where they are opened
        return
    places: list[object] = []
    for url in urls:
        if url.get_backend_name() != "sqlite":
            places.append((url.host, url.port or 5432, url.database, url.query.get("host")))
        elif (path := path_from(url)) is not None:
            places.append(path.resolve())
        else:
            raise StoreError("A database in memory cannot be copied.", hint="Give --db and --to files, or PostgreSQL.")
    if isinstance(places[0], Path) and not places[0].exists():
        raise StoreError(f"There is no database {places[0]}.", hint="--db names the one to copy from.")
    if places[0] == places[1]:
        raise StoreError("The source and the target are the same database.", hint="--to names the one to copy into.")


async def copy(source: Database, target: Database) -> Counts:
    """Fill ``target`` with what ``source`` holds; how many rows each table has, counted on both sides.

    Both must have been opened ``exclusive``. Raises :class:`StoreError`, having changed nothing: where a process of
    Gale is connected to one of them, where the target holds anything but what a new store does, and for a row that
    the target cannot take, which is named.
    """
    for database, name in ((source, "source"), (target, "target")):
        await _refuse_others(database, name)
    fresh = await _fresh_rows()
    pipe = _Pipe()
    try:
        _, counts = await asyncio.gather(
            source.read(lambda connection: _send(connection, pipe)),
            target.write(lambda connection: _receive(connection, pipe, fresh), durable=True),
        )
    finally:
        pipe.close()  # whichever side is still at work ends
    return counts


class _Pipe:
    """Batches on their way, a few at a time, from one thread to another."""

    def __init__(self) -> None:
        self._queue: Queue[Counts | _Batch | None] = Queue(_WAITING_BATCHES)
        self._closed = threading.Event()
        self._begun: set[str] = set()

    def begin(self, side: str) -> None:
        """A transaction that is tried again would find half of the rows gone."""
        if side in self._begun:
            raise StoreError(f"The {side} was lost or changed by others in the middle of the copy.", hint="Try again.")
        self._begun.add(side)

    def put(self, item: Counts | _Batch | None) -> None:
        while not self._closed.is_set():
            try:
                return self._queue.put(item, timeout=_PAUSE_S)
            except Full:
                continue
        raise _StoppedError

    def get(self) -> Any:
        while not self._closed.is_set():
            try:
                return self._queue.get(timeout=_PAUSE_S)
            except Empty:
                continue
        raise _StoppedError

    def close(self) -> None:
        self._closed.set()


class _StoppedError(Exception):
    """The other side has failed, and says why."""


class _Written(TypeDecorator[str]):
    """JSON as it is written. Read and written anew, no value would become null, and numbers others."""

    impl = JSON
    cache_ok = True

    def column_expression(self, column: ColumnElement[str]) -> ColumnElement[str]:
        return cast(column, Text)

    def bind_processor(self, dialect: Any) -> None:
        return None

    def result_processor(self, dialect: Any, coltype: Any) -> None:
        return None


def _as_written(table: Table) -> Table:
    """``table`` without defaults and with JSON as text."""
    columns = (
        Column(each.name, _Written() if isinstance(each.type, JSON) else each.type, primary_key=each.primary_key)
        for each in table.columns
    )
    return Table(table.name, MetaData(), *columns)


def _send(connection: Connection, pipe: _Pipe) -> None:
    pipe.begin("source")
    pipe.put(_count(connection))
    for table in metadata.sorted_tables:
        plain = _as_written(table)
        try:
            rows = connection.execute(_parents_first(table, plain), execution_options={"yield_per": BATCH_ROWS})
            for batch in rows.partitions():
                pipe.put((plain, [tuple(row) for row in batch]))
        except OperationalError as error:
            if isinstance(error.orig, sqlite3.OperationalError) and "decode" in str(error.orig):
                raise StoreError(f"The table {table.name} holds what is no text: {error.orig}") from error
            raise
    pipe.put(None)


def _parents_first(table: Table, plain: Table) -> Select[Any]:
    """All rows; of a table that refers to itself, none before the one that it refers to."""
    own = [each for each in table.foreign_keys if each.column.table is table]
    if not own:
        return select(plain)
    (reference,) = own
    parent, row = plain.c[reference.parent.name], plain.c[reference.column.name]
    depths = select(row.label("row"), literal(0).label("depth")).where(parent.is_(None)).cte(recursive=True)
    depths = depths.union_all(select(row, depths.c.depth + 1).where(parent == depths.c.row))
    return select(plain).join(depths, row == depths.c.row).order_by(depths.c.depth)


def _receive(connection: Connection, pipe: _Pipe, fresh: dict[str, list[tuple[Any, ...]]]) -> Counts:
    pipe.begin("target")
    if connection.dialect.name == "postgresql":  # SQLite has locked all of it already
        names = ", ".join(table.name for table in metadata.sorted_tables)
        connection.exec_driver_sql(f"LOCK TABLE {names} IN EXCLUSIVE MODE")
    if _first_rows(connection, {name: len(rows) + 1 for name, rows in fresh.items()}) != fresh:
        raise StoreError(
            "The target holds data already.",
            hint="Copy into a new, empty database; Gale makes its tables. Nothing was changed.",
        )
    for table in reversed(metadata.sorted_tables):
        if fresh[table.name]:
            connection.execute(delete(table))
    counts: Counts = pipe.get()
    with Bar("Copying", sum(counts.values())) as bar:
        while (batch := pipe.get()) is not None:
            table, rows = batch
            _insert(connection, table, rows)
            bar.advance(table.name, len(rows))
    arrived = _count(connection)
    if wrong := [name for name in counts if arrived[name] != counts[name]]:
        name = wrong[0]
        raise StoreError(
            f"Of {counts[name]:,} rows of {name} {arrived[name]:,} arrived, so none were kept.",
            hint="The source refers to rows that it does not have; on SQLite see PRAGMA foreign_key_check.",
        )
    return counts


def _insert(connection: Connection, table: Table, rows: Sequence[tuple[Any, ...]]) -> None:
    names = table.columns.keys()
    for row in rows:
        for column, value in zip(table.columns, row, strict=True):
            if (problem := _problem(column, value)) is not None:
                key = [f"{each.name} {row[names.index(each.name)]!r}" for each in table.primary_key]
                raise StoreError(
                    f"A row of {table.name} ({', '.join(key)}) cannot be copied: its {column.name} {problem}.",
                    hint="Mend or delete that row, and try again. Nothing was changed.",
                )
    try:
        connection.execute(insert(table), [dict(zip(names, row, strict=True)) for row in rows])
    except IntegrityError as error:
        raise StoreError(f"The rows of {table.name} do not fit together: {error.orig}") from error


def _problem(column: Column[Any], value: Any) -> str | None:
    """Why not every database can keep ``value``: SQLite takes anything anywhere."""
    match column.type:
        case _ if value is None:
            return None
        case _Written():
            return None if isinstance(value, str) and _is_json(value) else "is not JSON"
        case Integer():
            bits = 63 if isinstance(column.type, BigInteger) else 31
            fits = isinstance(value, int) and -(2**bits) <= value < 2**bits
            return None if fits else "is not a whole number of its size"
        case LargeBinary():
            return None if isinstance(value, bytes) else "is not bytes"
        case String():
            if not isinstance(value, str):
                return "is not text"
            return "holds a NUL character, for which PostgreSQL has no place" if "\0" in value else None
    return None


def _is_json(text: str) -> bool:
    try:
        json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return False
    return True


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _count(connection: Connection) -> Counts:
    return {
        table.name: int(connection.execute(select(func.count()).select_from(table)).scalar_one())
        for table in metadata.sorted_tables
    }


async def _fresh_rows() -> dict[str, list[tuple[Any, ...]]]:
    """What a new store holds: an organisation, a project, and who owns them."""
    new = await asyncio.to_thread(Database.open, "sqlite://")
    try:
        return await new.read(_first_rows)
    finally:
        await asyncio.to_thread(new.close)


def _first_rows(connection: Connection, most: Counts | None = None) -> dict[str, list[tuple[Any, ...]]]:
    """Rows of each table, ``most`` or all, without the time at which they were made."""
    found = {}
    for table in metadata.sorted_tables:
        query = select(*(column for column in table.columns if column.name != "created_at"))
        rows = connection.execute(query if most is None else query.limit(most[table.name]))
        found[table.name] = sorted((tuple(row) for row in rows), key=repr)
    return found


async def _refuse_others(database: Database, name: str) -> None:
    """On PostgreSQL, where no lock says that a server has it; raises :class:`StoreError`."""

    def others(connection: Connection) -> int:
        if connection.dialect.name != "postgresql":
            return 0
        query = (
            "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'gale' "
            "AND datname = current_database() AND pid <> pg_backend_pid()"
        )
        return int(connection.exec_driver_sql(query).scalar_one())

    for _ in range(round(_OTHERS_LEAVE_S / _PAUSE_S)):
        if not await database.read(others):
            return
        await asyncio.sleep(_PAUSE_S)
    raise StoreError(f"Another process of Gale is connected to the {name}.", hint="Stop its servers and commands.")
