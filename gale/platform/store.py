"""Everything the service keeps, in one object."""

from __future__ import annotations

from gale.platform.access import Actor
from gale.platform.conversations import Conversations
from gale.platform.database import Database
from gale.platform.jobs import Jobs
from gale.platform.responses import ItemConversations, Responses


class Store:
    """The open store. Close it when the service ends."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.jobs = Jobs(database)

    def conversations(self, actor: Actor) -> Conversations:
        """The chat page's conversations of ``actor``."""
        return Conversations(self.database, actor)

    def responses(self, actor: Actor) -> Responses:
        """The Responses API's answers of ``actor``'s project."""
        return Responses(self.database, actor)

    def item_conversations(self, actor: Actor) -> ItemConversations:
        """The Responses API's conversations of ``actor``'s project."""
        return ItemConversations(self.database, actor)

    @classmethod
    def open(cls, url: str) -> Store:
        """Open and migrate the database at ``url`` (``sqlite:///...``). Blocks. Raises ``StoreError``."""
        return cls(Database.open(url))

    def close(self) -> None:
        """Finish pending writes and close the database. Blocks."""
        self.database.close()
