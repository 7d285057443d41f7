"""Everything the service keeps, in one object."""

from __future__ import annotations

from gale.platform.access import Actor
from gale.platform.conversations import Conversations
from gale.platform.database import Database
from gale.platform.jobs import Jobs


class Store:
    """The open store. Close it when the service ends."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.jobs = Jobs(database)

    def conversations(self, actor: Actor) -> Conversations:
        """The chat page's conversations of ``actor``."""
        return Conversations(self._database, actor)

    @classmethod
    def open(cls, url: str) -> Store:
        """Open and migrate the database at ``url`` (``sqlite:///...``). Blocks. Raises ``StoreError``."""
        return cls(Database.open(url))

    def close(self) -> None:
        """Finish pending writes and close the database. Blocks."""
        self._database.close()
