"""Usage events on disk from the moment they happen until they are in the database.

Each event is a line of JSON in a file of this process. A written line survives the process (the system has it), and is
flushed to the disk where the database cannot take it. Of lines with one id the last holds. A file of a process that is
no more is found by its lock, which the system lets go with the process, however that ends.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
from dataclasses import asdict
from pathlib import Path

import structlog
from sqlalchemy import make_url

from gale.core import files
from gale.core.settings import settings
from gale.platform.usage import UsageEvent

log = structlog.get_logger("gale.platform.journal")


def journal_folder(url: str) -> Path | None:
    """Where usage waits for the database at ``url``: beside its file; None for one in memory."""
    parsed = make_url(url)
    if parsed.get_backend_name() != "sqlite":
        name = hashlib.sha256(f"{parsed.host}:{parsed.port}/{parsed.database}".encode()).hexdigest()[:16]
        return settings().home / "usage" / name
    if parsed.database in (None, "", ":memory:"):
        return None
    path = files.expand(parsed.database or "").absolute()
    return path.with_name(f"{path.name}-usage")


class Segment:
    """Some events, in memory unless there are too many, and on disk unless that has no place."""

    def __init__(self, folder: Path | None) -> None:
        self.events: dict[str, UsageEvent] | None = {}
        self.count = 0
        self._path = folder and folder / f"{secrets.token_hex(8)}.jsonl"
        self._handle: int | None = None
        self._whole = folder is not None  # whether all of it is on disk
        self._synced = 0

    def add(self, event: UsageEvent) -> bool:
        """Keep ``event``, in place of one with its id. False where it is in memory only for want of disk."""
        assert self.events is not None, "one that was forgotten takes no more"
        self.events[event.id] = event
        self.count = len(self.events)
        if self._path is None:
            return True
        try:
            if self._handle is None:
                self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                self._handle = _open_locked(self._path)
            line = json.dumps(asdict(event), separators=(",", ":")).encode() + b"\n"
            if os.write(self._handle, line) != len(line):
                raise OSError("the disk took part of a line only")
        except OSError as error:
            if self._whole:
                log.error("usage_journal_cannot_be_written", path=str(self._path), error=str(error))
            self._whole = False
        return self._whole

    def sync(self) -> None:
        """Flush what is on disk, so that it outlives a power cut."""
        if self._handle is not None and self._synced < self.count:
            try:
                os.fsync(self._handle)
                self._synced = self.count
            except OSError as error:
                self._whole = False
                log.error("usage_journal_cannot_be_flushed", path=str(self._path), error=str(error))

    def forget(self) -> bool:
        """Free the memory of what is on disk as well. False where it is not."""
        if self._path is not None and self._whole:
            self.events = None
        return self.events is None

    def read(self) -> list[UsageEvent]:
        """All events, from memory or else from the disk."""
        if self.events is not None:
            return list(self.events.values())
        assert self._path is not None
        return read_events(self._path)

    def drop(self) -> None:
        """Its events are in the database."""
        if self._handle is not None and self._path is not None:
            self._path.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Leave what is on disk to whoever comes next."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


class Orphans:
    """The files of processes that are no more, each locked while it is read, so that one process at a time does."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def next(self) -> tuple[Path, int] | None:
        """A file that nobody holds, and its lock."""
        for path in sorted(self._folder.glob("*.jsonl")) if self._folder and self._folder.is_dir() else ():
            try:
                handle = os.open(path, os.O_RDWR)
            except OSError:  # just dropped
                continue
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if path.exists():
                    return path, handle
            except OSError:  # a living process's
                pass
            os.close(handle)
        return None


def read_events(path: Path) -> list[UsageEvent]:
    """The events in a file. A last line that was cut when its process was killed was never told to anybody."""
    events: dict[str, UsageEvent] = {}
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            try:
                event = UsageEvent(**json.loads(line))
            except (ValueError, TypeError) as error:
                log.warning("usage_journal_line_skipped", path=str(path), line=number, error=str(error))
                continue
            events[event.id] = event
    return list(events.values())


def _open_locked(path: Path) -> int:
    """A new file, which nobody meets before it is locked."""
    beginning = path.with_suffix(".new")
    handle = os.open(beginning, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        beginning.rename(path)
    except OSError:
        os.close(handle)
        raise
    return handle
