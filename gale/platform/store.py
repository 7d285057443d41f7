"""Everything the service keeps, in one object."""

from __future__ import annotations

from pathlib import Path

from gale.core.settings import settings
from gale.platform.access import Actor
from gale.platform.api_keys import ApiKeys
from gale.platform.audit import AuditLog
from gale.platform.conversations import Conversations
from gale.platform.database import Database
from gale.platform.file_folder import ABANDONED_S, FileFolder
from gale.platform.files import FileLimits, Files, sweep
from gale.platform.fine_tuning import FineTuning
from gale.platform.idempotency import Idempotency
from gale.platform.identities import Identities
from gale.platform.jobs import Jobs
from gale.platform.journal import journal_folder
from gale.platform.metering import Metering
from gale.platform.organisations import Organisations, Projects
from gale.platform.people import People, ServiceAccounts
from gale.platform.pruning import prune
from gale.platform.quotas import Quotas
from gale.platform.responses import ItemConversations, Responses
from gale.platform.secret import Secret
from gale.platform.sessions import Sessions
from gale.platform.storage_quota import release_expired
from gale.platform.uploads import Uploads
from gale.platform.usage_report import UsageReport


class Store:
    """The open store. Close it when the service ends."""

    def __init__(
        self,
        database: Database,
        *,
        folder: FileFolder | None = None,
        file_limits: FileLimits | None = None,
        secret: Secret | None = None,
        metering: Metering | None = None,
    ) -> None:
        self.database = database
        self.metering = metering or Metering(database)
        self._secret = secret or Secret()
        self.organisations = Organisations(database)
        self.sessions = Sessions(database, self._secret)
        self.jobs = Jobs(database)
        self.idempotency = Idempotency(database)
        self.file_folder = folder or FileFolder(settings().files)
        self.file_limits = file_limits or FileLimits()

    def conversations(self, actor: Actor) -> Conversations:
        """The chat page's conversations of ``actor``."""
        return Conversations(self.database, actor)

    def responses(self, actor: Actor) -> Responses:
        """The Responses API's answers of ``actor``'s project."""
        return Responses(self.database, actor)

    def item_conversations(self, actor: Actor) -> ItemConversations:
        """The Responses API's conversations of ``actor``'s project."""
        return ItemConversations(self.database, actor)

    def identities(self) -> Identities:
        """Who keys and sessions stand for; one for each application, which it belongs to."""
        return Identities(self.database, self._secret)

    def projects(self, actor: Actor) -> Projects:
        """The projects of the organisation that ``actor`` administers."""
        return Projects(self.database, actor)

    def people(self, actor: Actor) -> People:
        """Its people."""
        return People(self.database, actor)

    def service_accounts(self, actor: Actor, project_id: str) -> ServiceAccounts:
        """The accounts of one of its projects that have keys only."""
        return ServiceAccounts(self.database, actor, project_id)

    def api_keys(self, actor: Actor, project_id: str | None) -> ApiKeys:
        """The keys of one of its projects, or (None) those that administer it."""
        return ApiKeys(self.database, self._secret, actor, project_id)

    def audit_log(self, actor: Actor) -> AuditLog:
        """What was done to it."""
        return AuditLog(self.database, actor)

    def quotas(self, actor: Actor, *, operator: bool = False) -> Quotas:
        """What it, its projects and keys may use; an ``operator`` has the machine's shell."""
        return Quotas(self.database, self.metering, actor, operator=operator)

    def usage_report(self, actor: Actor) -> UsageReport:
        """What it has used."""
        return UsageReport(self.database, actor)

    def files(self, actor: Actor) -> Files:
        """The files of ``actor``'s project."""
        return Files(self.database, self.file_folder, self.file_limits, actor)

    def fine_tuning(self, actor: Actor) -> FineTuning:
        """The fine-tuning jobs of ``actor``'s project."""
        return FineTuning(self.jobs, self.files(actor), self.metering, actor)

    def uploads(self, actor: Actor) -> Uploads:
        """The uploads of ``actor``'s project."""
        return Uploads(self.database, self.file_folder, self.file_limits, actor)

    async def sweep(self, abandoned_s: float = ABANDONED_S) -> None:
        """Remove what is over: files, kept answers and old usage, and what killed processes left of files."""
        await release_expired(self.database, self.file_folder, abandoned_s=abandoned_s)
        await sweep(self.database, self.file_folder, abandoned_s)
        await self.idempotency.sweep()
        await prune(self.database, settings().usage_days)

    @classmethod
    def open(
        cls,
        url: str,
        *,
        exclusive: bool = False,
        files: Path | None = None,
        file_limits: FileLimits | None = None,
        secret: Secret | None = None,
    ) -> Store:
        """Open and migrate the database at ``url`` as :meth:`Database.open` does, with the bytes of files in the folder
        ``files`` (one in GALE_HOME if not given). Blocks. Raises ``StoreError``."""
        database = Database.open(url, exclusive=exclusive)
        folder = FileFolder(files) if files else None
        # No other server has an SQLite file that is ours alone.
        metering = Metering(database, journal_folder(url), alone=exclusive and url.startswith("sqlite"))
        return cls(database, folder=folder, file_limits=file_limits, metering=metering, secret=secret)

    def close(self) -> None:
        """Finish pending writes and close the database. Blocks."""
        self.metering.close()
        self.database.close()
