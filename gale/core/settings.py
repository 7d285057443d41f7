"""Where Gale keeps things, and the few switches read from the environment."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from platformdirs import user_data_path
from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from gale.core import files
from gale.core.errors import GaleError


class Settings(BaseSettings):
    """Environment settings; every one is ``GALE_`` plus its name in capitals."""

    model_config = SettingsConfigDict(env_prefix="GALE_", extra="ignore")

    home: Path = Field(
        default_factory=lambda: user_data_path("gale", appauthor=False),
        description="Folder for everything Gale keeps: runs, models, the database.",
    )
    threads: int = Field(default=0, ge=0, description="CPU threads for the model; 0 means one per available core.")
    kernels: bool = Field(default=True, description="Whether to use the native kernels; off means torch alone.")
    kept_weights_gb: float = Field(
        default=50, ge=0, description="Most that rounded weights of models opened before may take on disk."
    )
    upstream_connect_s: float = Field(default=10, gt=0, description="Seconds until an upstream has to be reached.")
    upstream_read_s: float = Field(
        default=300, gt=0, description="Longest silence of an upstream or a replica, in seconds."
    )
    secret: SecretStr | None = Field(
        default=None,
        min_length=32,
        description="What keys and sessions are hashed with; one file in the home folder if not given. Several "
        "processes over one database need the same.",
    )
    currency: str = Field(
        default="usd", pattern="^[a-z]{3}$", description="What prices and budgets are counted in, as three letters."
    )
    usage_days: int = Field(
        default=400,
        ge=1,
        description="Days for which usage is kept request by request; by the hour it is kept for good.",
    )
    tuning_jobs: int = Field(
        default=20, ge=1, description="Most fine-tuning jobs of a project that have not ended; more are refused."
    )
    log_level: str = Field(default="INFO", description="DEBUG, INFO, WARNING or ERROR.")

    @field_validator("home")
    @classmethod
    def _expand(cls, home: Path) -> Path:
        try:
            return files.expand(home)
        except GaleError as error:
            raise ValueError(error.message) from error

    @property
    def runs(self) -> Path:
        """Default parent of training runs (``--out`` overrides it)."""
        return self.home / "runs"

    @property
    def files(self) -> Path:
        """Default folder of uploaded files."""
        return self.home / "files"

    @property
    def database_url(self) -> str:
        """Default SQLAlchemy URL of the store."""
        path = str(self.home / "gale.db").replace("%", "%25").replace("?", "%3F")  # what a URL reads otherwise
        return f"sqlite:///{path}"


@cache
def settings() -> Settings:
    """The settings of this process, read once. Raises :class:`GaleError` naming every wrong variable."""
    try:
        return Settings()
    except ValidationError as error:
        problems = [f"GALE_{str(detail['loc'][0]).upper()}: {detail['msg']}" for detail in error.errors()]
        raise GaleError("\n".join(["The environment holds settings that cannot be used:", *problems])) from error
