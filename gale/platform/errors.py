"""What the store answers where it has no answer."""

from __future__ import annotations

from gale.core.errors import GaleError


class NotFoundError(GaleError):
    """An id that names nothing here, or nothing of this tenant's."""


class CursorError(GaleError):
    """A place in a list that this store did not give out; ``param`` is the name it was asked for by."""

    def __init__(self, message: str, *, param: str = "cursor") -> None:
        super().__init__(message)
        self.param = param


class ConflictError(GaleError):
    """What is asked for does not fit the state that the thing is in, such as cancelling what has ended."""


class LeaseLostError(GaleError):
    """A worker's job that another has taken up, because its lease was over, or that has ended."""


class FileTooLargeError(GaleError):
    """A file, or a part of one, of more bytes than are taken."""


class StorageQuotaError(GaleError):
    """A file for which the project's share of the disk does not suffice."""


class NoSpaceError(GaleError):
    """The disk is full."""


class PurposeError(GaleError):
    """A file that was uploaded for something else."""
