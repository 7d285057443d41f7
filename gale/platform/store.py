"""Everything the service keeps, in one object."""

from __future__ import annotations

import hashlib
from pathlib import Path

from sqlalchemy import make_url

from gale.core import files
from gale.core.settings import settings
from gale.platform.access import Actor
from gale.platform.conversations import Conversations
from gale.platform.database import Database
from gale.platform.metering import Metering


class Store:
    """The open store. Close it when the service ends."""

    def __init__(self, database: Database, usage_folder: Path | None = None) -> None:
        self._database = database
        self.metering = Metering(database, usage_folder)

    def conversations(self, actor: Actor) -> Conversations:
        """The chat page's conversations of ``actor``."""
        return Conversations(self._database, actor)

    @classmethod
    def open(cls, url: str) -> Store:
        """Open and migrate the database at ``url`` (``sqlite:///...``). Blocks. Raises ``StoreError``."""
        return cls(Database.open(url), _usage_folder(url))

    def close(self) -> None:
        """Finish pending writes and close the database. Blocks."""
        self.metering.close()
        self._database.close()


def _usage_folder(url: str) -> Path | None:
    """Where usage waits for the database at ``url``: beside its file; None for one in memory."""
    parsed = make_url(url)
    if parsed.get_backend_name() != "sqlite":
        name = hashlib.sha256(f"{parsed.host}:{parsed.port}/{parsed.database}".encode()).hexdigest()[:16]
        return settings().home / "usage" / name
    if parsed.database in (None, "", ":memory:"):
        return None
    path = files.expand(parsed.database or "").absolute()
    return path.with_name(f"{path.name}-usage")
