"""Who may speak to a Gale without accounts.

On a loopback address, as long as no account exists, any API key (or none) is accepted: whoever can run a program on
this machine owns it anyway. But web pages run here too. Two things keep a page that the owner happens to visit from
using their model and reading their conversations:

* *DNS rebinding*: evil.example answers first with its own address and then with 127.0.0.1, so that the browser takes
  our replies for evil.example's own. Such a request names evil.example in its ``Host`` header; only loopback names
  are served.
* *Cross-site requests*: a page may send requests to 127.0.0.1 even where it may not read the reply. A browser then
  sends ``Origin`` or ``Sec-Fetch-Site``, which pages cannot forge; anything but our own origin is refused. Following
  a link to the chat page is allowed, as it changes nothing and shows the other site nothing.

Programs other than browsers send neither header and are served. Bodies must be declared as JSON (see ``json_body``),
which an HTML form cannot do.

Not only pages are dangerous: *a proxy on this machine* connects from here whoever asks. What says that it was forwarded
is refused until there are keys; a proxy that says nothing of itself cannot be told from a program.

Pages that are allowed by name (CORS) use the API and do not administer: without keys nothing else would keep them from
making themselves some, or from reading the chat page's conversations.
"""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import Scope

from gale.server.errors import ApiError
from gale.server.origins import Origins, foreign_page

ADMINISTRATION = "/v1/organization"
_OWN_PAGE_ONLY = (ADMINISTRATION, "/api/")
# Forwarded is RFC 7239's, Via RFC 9110's and CDN-Loop RFC 8586's; the others are habits of proxies and of networks.
_OF_PROXIES = frozenset(
    ("forwarded", "via", "cdn-loop", "x-real-ip", "x-client-ip", "x-cluster-client-ip", "true-client-ip")
)
_OF_PROXIES_BEGIN = ("x-forwarded", "x-original-", "x-envoy-", "cf-", "fly-")


def is_loopback(host: str) -> bool:
    """Whether ``host`` (without port; IPv6 with or without brackets) can only mean this machine."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.removeprefix("[").removesuffix("]")).is_loopback
    except ValueError:
        return False


def check(scope: Scope, origins: Origins) -> None:
    """Raises :class:`ApiError` 403 for foreign hosts, foreign pages, other machines and proxies."""
    headers = Headers(scope=scope)
    if any(name in _OF_PROXIES or name.startswith(_OF_PROXIES_BEGIN) for name in headers):
        raise ApiError(
            403,
            "This request came through a proxy, and without keys this Gale serves programs on its own machine only. "
            "Make an owner and a key first: `gale admin init`.",
            code="keys_required",
            type="permission_error",
        )
    # More than one Host is not HTTP; the first and the last might name different sites.
    hosts = headers.getlist("host")
    client = scope.get("client")
    if len(hosts) != 1 or not is_loopback(_host_name(hosts[0])) or (client and not is_loopback(client[0])):
        raise foreign_page("This Gale is for this machine only; open it as http://localhost or http://127.0.0.1.")
    origin = headers.get("origin")
    if origin is not None and origin.lower() != f"{scope['scheme']}://{hosts[0].lower()}":
        if origin.lower() in origins.allowed and not scope["path"].startswith(_OWN_PAGE_ONLY):
            return
        raise foreign_page()
    site = headers.get("sec-fetch-site", "none")
    if site not in ("none", "same-origin") and not _follows_link(scope, headers):
        raise foreign_page()


def asks_from_here(scope: Scope) -> bool:
    """Whether a program on this machine asks, and neither a page nor a proxy on it that asks for somebody else."""
    if scope.get("client") is None:
        return False
    try:
        check(scope, Origins())
    except ApiError:
        return False
    return True


def _follows_link(scope: Scope, headers: Headers) -> bool:
    return (
        scope["method"] == "GET"
        and headers.get("sec-fetch-mode") == "navigate"
        and headers.get("sec-fetch-dest") == "document"
    )


def _host_name(host: str) -> str:
    try:
        parts = urlsplit(f"//{host}")
        # A user name or path would make the text mean another host to another reader.
        return (parts.hostname or "") if parts.netloc == host and "@" not in host else ""
    except ValueError:
        return ""
