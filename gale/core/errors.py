"""Errors a person can act on.

Anything that is the fault of the input, the machine's state or the surroundings (a missing file, a full
disk, a port in use) is raised as a :class:`GaleError`; the command line prints its message and hint and exits
with ``exit_code``. A traceback therefore always means a bug in Gale.
"""

from __future__ import annotations

from typing import Any


class GaleError(Exception):
    """What was wrong and, in ``hint``, what to do next."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __reduce__(self) -> tuple[Any, ...]:
        """Errors travel between processes, whatever a subclass is made from."""
        return _again, (type(self), self.args, self.__dict__)


def _again(kind: type[GaleError], arguments: tuple[Any, ...], state: dict[str, Any]) -> GaleError:
    error = kind.__new__(kind, *arguments)
    error.__dict__.update(state)
    return error


class RecipeError(GaleError):
    """A recipe that cannot be used; ``problems`` lists every fault found, not only the first."""

    exit_code = 2

    def __init__(self, message: str, problems: list[str]) -> None:
        super().__init__("\n".join([message, *(f"  - {problem}" for problem in problems)]))
        self.problems = problems


class ModelError(GaleError):
    """A model folder that is missing, damaged or of an unsupported architecture."""


class DataError(GaleError):
    """Training data that is missing, damaged or not what its manifest says."""


class CheckpointError(GaleError):
    """A training checkpoint that cannot be resumed from."""


class StoreError(GaleError):
    """A database that cannot be opened, migrated or written."""
