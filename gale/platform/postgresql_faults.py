"""What PostgreSQL's refusals mean, and what to do about them.

The codes are SQLSTATE (https://www.postgresql.org/docs/current/errcodes-appendix.html).
"""

from __future__ import annotations

import socket
from dataclasses import dataclass

from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

_UNREACHABLE = "Start PostgreSQL, or look at the host and port given with --db."
_HINTS = {
    "28": "Look at the user and password given with --db (or PGPASSWORD), and at the server's pg_hba.conf.",
    "3D": "Make it once: createdb --owner=USER NAME",
    "40": "Others write to the same rows; try again.",
    "42501": "Let the user own the database: ALTER DATABASE name OWNER TO user.",
    "53100": "Free some space on the server; nothing that was stored is lost.",
    "53200": "The server has no memory left.",
    "53300": "Raise max_connections on the server, or start fewer processes.",
    "54000": "A name or an id is longer than an index of the database can hold; give a shorter one.",
    "55P03": "Another process holds it for a long time; try again.",
    "25006": "The server only reads, as a standby does; give --db the one that also writes.",
    "57014": "The statement took too long.",
    "57P": _UNREACHABLE,
    "08": _UNREACHABLE,
    "58": "The server's disk or memory fails; its log says how.",
    "XX": "The server reports damage; its log says what.",
}
_LOST = ("08", "57P")
_PASSING = (*_LOST, "40001", "40P01", "53300")


@dataclass(frozen=True, slots=True)
class Fault:
    """A state of the surroundings that keeps a transaction from being done.

    ``lost``: the connection is gone. ``passing``: the same may work in a moment.
    """

    reason: str
    hint: str | None
    lost: bool = False
    passing: bool = False


BUSY = Fault("it has more to do than it can", "Try again.")


def fault_of(error: DBAPIError | PoolTimeoutError | OSError) -> Fault | None:
    """What ``error`` says of the surroundings; None where a statement was wrong, which is a bug."""
    match error:
        case PoolTimeoutError():
            return BUSY
        case TimeoutError():
            return Fault("it does not answer", _UNREACHABLE, lost=True)
        case socket.gaierror():
            return Fault(f"its host is not known ({error.strerror})", _UNREACHABLE)
        case ConnectionError():
            return Fault(f"the server cannot be reached ({error})", _UNREACHABLE, lost=True, passing=True)
        case OSError():
            return Fault(f"the server cannot be reached ({error})", _UNREACHABLE, passing=True)
    # SQLAlchemy wraps the driver's error twice.
    cause = getattr(error.orig, "__cause__", None) or error.orig
    state = getattr(cause, "sqlstate", None) or ""
    if error.connection_invalidated and not state:
        return Fault(f"the connection to it broke ({cause})", _UNREACHABLE, lost=True, passing=True)
    if "cached statement plan is invalid" in str(cause):  # another process changed the tables' shape
        return Fault(str(cause), None, passing=True)
    hint = next((hint for prefix, hint in _HINTS.items() if state.startswith(prefix)), None)
    if hint is None:
        return None
    return Fault(str(cause), hint, lost=state.startswith(_LOST), passing=state.startswith(_PASSING))
