"""A server's store with accounts, and a client that has the right key for each path."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import httpx2

from gale.platform import tables
from gale.platform.access import LOCAL_OWNER
from gale.platform.api_keys import NewKey
from gale.platform.store import Store


@dataclass(frozen=True, slots=True)
class Keys:
    """A project's key and an administration key; httpx takes this as its ``auth``."""

    project: str
    admin: str

    def headers(self, path: str) -> dict[str, str]:
        """What to send with a request for ``path``."""
        key = self.admin if path.startswith("/v1/organization") else self.project
        return {"authorization": f"Bearer {key}"}

    def __call__(self, request: httpx2.Request) -> httpx2.Request:
        """Add the key to a request."""
        request.headers.update(self.headers(request.url.path))
        return request


def make_keys(store: Store) -> Keys:
    """Keys of the default project and organisation, which end the store's local mode."""
    made = [
        asyncio.run(store.api_keys(LOCAL_OWNER, scope).create(NewKey("test")))[1]
        for scope in (tables.DEFAULT_PROJECT, None)
    ]
    return Keys(*made)
