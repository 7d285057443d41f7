"""Both databases for tests: an SQLite file, and a real PostgreSQL server that is started once a session.

The server is Debian's (or any that ``pg_config`` leads to), of a user who is not root, on a free loopback port, in a
folder of its own. Every test gets a database of its own, copied from one that was migrated once.
"""

from __future__ import annotations

import asyncio
import os
import pwd
import secrets
import shutil
import signal
import socket
import sqlite3
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from sqlalchemy import make_url

PASSWORD = "geheim"
REASON = "PostgreSQL is not installed (scripts/need-postgresql)"


def programs() -> Path | None:
    """The folder of PostgreSQL's programs, of the newest version found."""
    if (tool := shutil.which("pg_config")) is not None:
        folder = Path(subprocess.run([tool, "--bindir"], capture_output=True, text=True, check=True).stdout.strip())
        if (folder / "initdb").exists():
            return folder
    found = [path.parent for path in Path("/usr/lib/postgresql").glob("*/bin/initdb")]
    return max(found, key=lambda folder: int(folder.parent.name), default=None)


class PostgresqlServer:
    """A server without fsync: a test's machine that loses power starts over anyway."""

    def __init__(self, folder: Path) -> None:
        self._programs = folder
        self.home = Path(tempfile.mkdtemp(prefix="gale-postgresql-"))
        self._as_user: dict[str, Any] = {"cwd": self.home}
        password = self.home / "password"
        password.write_text(PASSWORD)
        if (user := _user()) is not None:
            self._as_user |= {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
            for path in (self.home, password):
                os.chown(path, user.pw_uid, user.pw_gid)
        self.port = _free_port()
        options = ["--username=gale", "--auth=scram-sha-256", f"--pwfile={password}", "--encoding=UTF8", "--locale=C"]
        self._run("initdb", "--no-sync", *options)
        (self.home / "data" / "postgresql.conf").open("a").write(
            f"port = {self.port}\nlisten_addresses = '127.0.0.1'\nunix_socket_directories = '{self.home}'\n"
            "fsync = off\nfull_page_writes = off\nshared_buffers = 16MB\n"
        )

        # Ends the server and removes its folder when our end of the pipe closes, even because this process was killed.
        self._guard = subprocess.Popen(
            [
                "sh",
                "-c",
                'read _; "$0" stop --mode=immediate --pgdata="$1/data"; cd /; rm -r "$1"',
                folder / "pg_ctl",
                self.home,
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            **self._as_user,
        )

    def start(self) -> None:
        """Start it and wait until it answers."""
        self._run("pg_ctl", "start", "--wait", "--silent", f"--log={self.home / 'log'}")

    def stop(self, mode: str = "immediate") -> None:
        """Stop it: ``immediate`` as a crash does, ``fast`` as an orderly restart does."""
        self._run("pg_ctl", "stop", "--wait", "--silent", f"--mode={mode}")

    def remove(self) -> None:
        """Stop it for good."""
        self._guard.communicate()

    def url(self, name: str = "postgres") -> str:
        """The address of one of its databases."""
        return f"postgresql+asyncpg://gale:{PASSWORD}@127.0.0.1:{self.port}/{name}"

    @contextmanager
    def database(self, template: str = "template1") -> Iterator[str]:
        """The address of a database that exists only inside this block."""
        name = f"test_{secrets.token_hex(6)}"
        execute(self.url(), f"CREATE DATABASE {name} TEMPLATE {template}")
        try:
            yield self.url(name)
        finally:
            execute(self.url(), f"DROP DATABASE {name} WITH (FORCE)")

    def _run(self, program: str, *arguments: str) -> None:
        # To a file: the server inherits where pg_ctl writes to, and a pipe would never be at its end.
        with (self.home / "output").open("a+") as output:
            done = subprocess.run(
                [self._programs / program, f"--pgdata={self.home / 'data'}", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                timeout=600,
                **self._as_user,
            )
            output.seek(0)
            assert done.returncode == 0, output.read()


def execute(url: str, statement: str) -> list[tuple[Any, ...]]:
    """Run one statement past Gale and commit it."""
    parsed = make_url(url)
    if parsed.get_backend_name() == "sqlite":
        with closing(sqlite3.connect(str(parsed.database), isolation_level=None)) as connection:
            return connection.execute(statement).fetchall()

    async def run() -> list[tuple[Any, ...]]:
        plain = parsed.set(drivername="postgresql").render_as_string(hide_password=False)
        connection = await asyncpg.connect(plain)
        try:
            return [tuple(row) for row in await connection.fetch(statement)]
        finally:
            await connection.close()

    return asyncio.run(run())


@contextmanager
def address(request: pytest.FixtureRequest, folder: Path) -> Iterator[str]:
    """For a fixture with the parameters "sqlite" and "postgresql": a database without tables of the kind at hand."""
    if request.param == "sqlite":
        yield f"sqlite:///{folder / 'gale.db'}"
        return
    server: PostgresqlServer = request.getfixturevalue("postgresql")
    with server.database() as url:
        yield url


def kill_once(process: BaseProcess, reached: Path) -> None:
    """Kill a process as soon as it has made the file ``reached``."""
    while not reached.exists():
        assert process.is_alive()
        time.sleep(0.01)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()


def _user() -> pwd.struct_passwd | None:
    """Whom the server belongs to; None for ourselves. PostgreSQL refuses root."""
    if os.geteuid() != 0:
        return None
    users = {entry.pw_name: entry for entry in pwd.getpwall()}
    return users.get("postgres") or users["nobody"]


def _free_port() -> int:
    with closing(socket.socket()) as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
