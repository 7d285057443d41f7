"""What the store answers where it has no answer."""

from __future__ import annotations

from gale.core.errors import GaleError


class NotFoundError(GaleError):
    """An id that names nothing here, or nothing of this tenant's."""


class CursorError(GaleError):
    """A page cursor that this store did not give out."""


class ConflictError(GaleError):
    """What is asked for does not fit the state that the thing is in, such as cancelling what has ended."""
