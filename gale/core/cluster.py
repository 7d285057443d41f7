"""A Ray cluster: joined by its address, left again where we were the one to join it."""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from gale.core.errors import GaleError

_HINT = "Start one with `ray start`."


@contextmanager
def joined_ray(address: str, *, show_workers: bool = False) -> Iterator[None]:
    """Be connected to the cluster at ``address`` (``host:port``, ``auto`` or ``local``), or stay so where we are.

    ``show_workers`` lets what its workers print appear here. Raises :class:`GaleError` where Ray is not installed or
    there is no such cluster.

    A ``local`` one listens on every address of this machine, as Ray's programs do, and whoever may talk to it runs what
    they like: it asks for a token (in ``~/.ray``) unless ``RAY_AUTH_MODE`` says otherwise, and has no dashboard. Where
    Ray was imported before, its version decides: those that do not ask by themselves would need the variable by then.
    """
    own: dict[str, Any] = {}
    if address == "local":
        own["include_dashboard"] = False
        if "ray" not in sys.modules:  # it is read once, then; newer versions ask for a token by themselves
            os.environ.setdefault("RAY_AUTH_MODE", "token")
    try:
        import ray
    except ImportError as error:
        raise GaleError("Ray is not installed.", hint="Install it with: pip install 'gale-llm[ray]'") from error
    if ray.is_initialized():
        yield
        return
    _reach(address)
    try:
        ray.init(address=address, log_to_driver=show_workers, logging_level=logging.ERROR, **own)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise GaleError(f"There is no Ray cluster at {address}: {error}", hint=_HINT) from error
    try:
        yield
    finally:
        ray.shutdown()


def _reach(address: str) -> None:
    """Raise :class:`GaleError` where nobody listens at host:port; Ray itself would try for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdecimal():
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except (OSError, OverflowError) as error:
            raise GaleError(f"There is no Ray cluster at {address}: {error}", hint=_HINT) from error
