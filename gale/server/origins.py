"""Which web pages may speak to this Gale: its own, and those that whoever runs it names.

What a page of another site sends arrives with headers that pages cannot forge: ``Origin``, and from secure places
``Sec-Fetch-Site``. ``Host`` is compared with them and used for nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import Scope

from gale.core.errors import GaleError
from gale.server.errors import ApiError


class Origins:
    """``allowed`` are the origins of other sites' pages (CORS); ``own`` is where people reach this Gale, if known."""

    def __init__(self, allowed: Iterable[str] = (), own: str | None = None) -> None:
        self.allowed = frozenset(_origin(each) for each in allowed)
        self.own = None if own is None else _origin(own)

    @property
    def secure(self) -> bool:
        """Whether people reach this Gale by https only."""
        return self.own is not None and self.own.startswith("https:")

    def is_own(self, scope: Scope, headers: Headers) -> bool:
        """Whether what the request says of its page is our own page, or says nothing, as programs do."""
        origin, site = headers.get("origin"), headers.get("sec-fetch-site")
        if site is not None:
            return site in ("same-origin", "none")
        if origin is None:
            return True
        hosts = headers.getlist("host")
        here = f"{scope['scheme']}://{hosts[0].lower()}" if len(hosts) == 1 else None
        return origin.lower() in {here, self.own}

    def check(self, scope: Scope, headers: Headers) -> None:
        """Raises :class:`ApiError` 403 for what another site's page sends with our cookie, or to sign in."""
        if not self.is_own(scope, headers):
            raise foreign_page()


def foreign_page(message: str = "Web pages of other sites may not use this Gale.") -> ApiError:
    """What a page that may not speak to us is told."""
    return ApiError(403, message, code="forbidden_origin", type="permission_error")


def _origin(text: str) -> str:
    """``text`` as browsers write an origin. Raises :class:`GaleError`."""
    try:
        parts = urlsplit(text.strip().lower())
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    plain = f"{parts.scheme}://{parts.netloc}"
    if (
        parts.scheme not in ("http", "https")
        or not parts.hostname
        or "@" in parts.netloc
        or plain != text.strip().lower().rstrip("/")
    ):
        raise GaleError(
            f"{text!r} is not the origin of a web page.",
            hint="Write it as https://chat.example or http://localhost:3000, without a path; '*' is not taken.",
        )
    # Browsers leave the port out where it is the usual one.
    return plain.removesuffix(f":{port}") if port == {"http": 80, "https": 443}[parts.scheme] else plain
