"""What somebody who watches the service is told of answers as they are given."""

from __future__ import annotations

from typing import Protocol

from gale.engine.request import Usage


class Watch(Protocol):
    """Told from the event loop; must not wait."""

    def first_token(self, seconds: float) -> None:
        """An answer began so long after it was asked for."""

    def gap(self, seconds: float) -> None:
        """An answer went on after so long."""

    def used(self, kind: str, usage: Usage) -> None:
        """A question to the engine has ended and used this."""


class Nobody:
    """Implements :class:`Watch`."""

    def first_token(self, seconds: float) -> None:
        """Nothing."""

    def gap(self, seconds: float) -> None:
        """Nothing."""

    def used(self, kind: str, usage: Usage) -> None:
        """Nothing."""
