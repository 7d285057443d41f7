"""The connections to an upstream: what is tried again, how long is waited, and how much is taken in.

Answers come through aiohttp, which takes a quarter of the processor time of httpx2 for them (measured; LOG.md) but has
no face for threads; the small questions that threads ask go through httpx2.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from functools import cached_property
from typing import Any
from urllib.request import getproxies, proxy_bypass

import aiohttp
import httpx2
import structlog

from gale.core.errors import GaleError
from gale.core.settings import settings
from gale.engine.request import ContextLengthError, EngineFailedError
from gale.engine.upstream_wire import as_error, malformed, parse_json, refused_fields

RETRIES = 2
MOST_ANSWER_BYTES = 64 * 1024 * 1024
_FIRST_PAUSE_S = 0.25
_MOST_ERROR_BYTES = 64 * 1024
_PASSING = (502, 503, 504)  # statuses that may be gone in a moment

log = structlog.get_logger()


class UpstreamHttp:
    """HTTP to one server: ``base`` is where its API begins, ``root`` where what stands beside it does.

    Requests are tried again, up to :data:`RETRIES` times, while nothing of the answer has come and the fault may pass.
    Raises :class:`GaleError` for a ``url`` that is none.
    """

    def __init__(self, url: str, key: str | None) -> None:
        self.base, self.root = _addresses(url)
        self.context_length = 0  # what errors are to tell, once it is known
        self._headers = {"accept-encoding": "identity"}  # so that what is measured is what is held in memory
        if key is not None:
            self._headers["authorization"] = f"Bearer {key}"
        patience = httpx2.Timeout(settings().upstream_read_s, connect=settings().upstream_connect_s)
        # Both clients go the same way; aiohttp by itself would look for proxies and passwords at every request.
        self._proxy = _proxy_of(self.base)
        self._blocking = httpx2.Client(headers=self._headers, timeout=patience, proxy=self._proxy, trust_env=False)
        self._unwanted: set[str] = set()  # optional fields that this upstream has refused before

    @cached_property
    def _http(self) -> aiohttp.ClientSession:
        """Made in the event loop that it belongs to."""
        return aiohttp.ClientSession(
            headers=self._headers,
            timeout=aiohttp.ClientTimeout(
                total=None, sock_connect=settings().upstream_connect_s, sock_read=settings().upstream_read_s
            ),
            # As many connections as requests: how many there may be is the server's business, on either side.
            connector=aiohttp.TCPConnector(limit=0),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            proxy=self._proxy,
        )

    @asynccontextmanager
    async def open(self, path: str, body: dict[str, Any], optional: set[str]) -> AsyncIterator[aiohttp.ClientResponse]:
        """A response of status 2xx whose content is still to come. Faults of the connection, then and later, are raised
        as :class:`EngineFailedError`, refusals as :func:`as_error` says.
        """
        failures = 0
        while True:
            sent = {name: value for name, value in body.items() if name not in self._unwanted & optional}
            try:
                async with _silence(sending=True):
                    response = await self._http.post(f"{self.base}/{path}", json=sent, allow_redirects=False)
            except aiohttp.ClientError as error:
                if failures == RETRIES:
                    raise _failed(error) from error
            else:
                try:
                    if 200 <= response.status < 300:
                        yield response
                        return
                    said = _parsed(await content_of(response, _MOST_ERROR_BYTES, cut=True))
                except aiohttp.ClientError as error:
                    raise _failed(error) from error
                finally:
                    response.release()  # closes the connection where the answer was not read to its end
                refused = refused_fields(response.status, said, optional) - self._unwanted
                if refused:
                    self._unwanted |= refused
                    log.info("upstream_refused_defaults", fields=sorted(refused))
                    continue
                if "max_tokens" in body and refused_fields(response.status, said, {"max_completion_tokens"}):
                    body = {**body, "max_completion_tokens": body["max_tokens"]}
                    del body["max_tokens"]
                    continue
                refusal = as_error(response.status, said, self.context_length)
                fits = isinstance(refusal, ContextLengthError) and refusal.prompt_tokens < refusal.context_length
                if fits and "max_tokens" in body:  # the answer's limit alone is too long: then the context is the limit
                    body = {name: value for name, value in body.items() if name != "max_tokens"}
                    continue
                passing = response.status in _PASSING and isinstance(refusal, EngineFailedError)
                if failures == RETRIES or not passing:
                    raise refusal
            await asyncio.sleep(_FIRST_PAUSE_S * 2**failures)
            failures += 1

    async def post(self, url: str, body: dict[str, Any]) -> dict[str, Any]:
        """A small question from the event loop, answered by a JSON object."""
        try:
            async with (
                _silence(sending=True),
                self._http.post(url, json=body, allow_redirects=False) as response,
            ):
                return self._object(response.status, await content_of(response, MOST_ANSWER_BYTES))
        except aiohttp.ClientError as error:
            raise _failed(error) from error

    def ask(self, method: str, url: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """A small question, answered by a JSON object; from any thread."""
        try:
            with self._blocking.stream(method, url, json=body) as response:
                content = bytearray()
                for part in response.iter_raw():
                    content += part
                    if len(content) > MOST_ANSWER_BYTES:
                        raise malformed("it is too long")
        except httpx2.TransportError as error:
            raise _failed(error) from error
        return self._object(response.status_code, bytes(content))

    def _object(self, status: int, content: bytes) -> dict[str, Any]:
        if not 200 <= status < 300:
            raise as_error(status, _parsed(content[:_MOST_ERROR_BYTES]), self.context_length)
        return parse_json(content)

    async def close(self) -> None:
        """End all requests and their connections."""
        await self._http.close()
        self._blocking.close()

    def give_up(self) -> None:
        """Close what was opened before there was an event loop."""
        self._blocking.close()


def _addresses(url: str) -> tuple[str, str]:
    """Where the API begins, and where what stands beside it does. Raises :class:`GaleError` for what is no URL."""
    try:
        parsed = httpx2.URL(url)
    except httpx2.InvalidURL as error:
        raise GaleError(f"The upstream's address cannot be read: {error}.") from error
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise GaleError("The upstream's address must be like http://127.0.0.1:8001 or https://host/v1.")
    if parsed.userinfo or parsed.query or parsed.fragment:
        raise GaleError(
            "The upstream's address must not hold a user, a key or a query.", hint="Use --upstream-key-env for a key."
        )
    base = str(parsed.copy_with(path=parsed.path.rstrip("/") or "/v1", query=None))
    return base, base.removesuffix("/v1")


async def events_of(response: aiohttp.ClientResponse, most: int) -> AsyncGenerator[str, None]:
    """The data of each server-sent event (WHATWG HTML, section 9.2), of at most so many bytes; what else an event may
    have is left aside. Lines end with LF or CR LF."""
    held, size = b"", 0
    lines: list[bytes] = []
    async for part in _parts(response):
        *whole, held = (held + part).split(b"\n")
        for line in whole:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                lines.append(line[5:].removeprefix(b" "))
                size += len(line)
            elif not line and lines:
                yield b"\n".join(lines).decode("utf-8", "replace")
                lines, size = [], 0
        if size + len(held) > most:
            raise malformed("an event is too long")


async def content_of(response: aiohttp.ClientResponse, most: int, *, cut: bool = False) -> bytes:
    """The body, of which at most so much is taken in: what is more is an error, or cut off."""
    content = bytearray()
    async for part in _parts(response):
        content += part
        if len(content) > most:
            if cut:
                break
            raise malformed("it is too long")
    return bytes(content[:most])


async def _parts(response: aiohttp.ClientResponse) -> AsyncGenerator[bytes, None]:
    """The body as it comes. Waits no longer than the settings say, also where aiohttp's own time-out is off: a chunk
    whose head cannot be read closes the connection without telling whoever reads."""
    while True:
        async with _silence():
            part = await response.content.readany()
        if not part:
            return
        yield part


@asynccontextmanager
async def _silence(*, sending: bool = False) -> AsyncIterator[None]:
    """Raises :class:`EngineFailedError` where an upstream says nothing for too long, or takes nothing that is sent."""
    longest = settings().upstream_read_s
    if sending:  # connects, sends and waits for the head
        longest = settings().upstream_connect_s + 2 * longest
    try:
        async with asyncio.timeout(longest):
            yield
    except aiohttp.ConnectionTimeoutError:
        raise
    except TimeoutError as error:
        raise _silent() from error


def _parsed(content: bytes) -> Any:
    """The body of a refusal: JSON, or whatever text a proxy puts in its place."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return content.decode("utf-8", "replace")


def _failed(error: aiohttp.ClientError | httpx2.TransportError) -> EngineFailedError:
    if isinstance(error, httpx2.ReadTimeout | httpx2.WriteTimeout):
        return _silent()
    connecting = aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError
    if isinstance(error, connecting | httpx2.ConnectError | httpx2.ConnectTimeout):
        return EngineFailedError("The upstream cannot be reached.", hint="Is it running, and is its address right?")
    return EngineFailedError("The upstream broke off.")


def _silent() -> EngineFailedError:
    return EngineFailedError("The upstream has been silent for too long.", hint="See GALE_UPSTREAM_READ_S.")


def _proxy_of(url: str) -> str | None:
    """The proxy that the environment names for ``url``. Raises :class:`GaleError` for one that cannot be used."""
    parsed, proxies = httpx2.URL(url), getproxies()
    proxy = proxies.get(parsed.scheme) or proxies.get("all")
    if not proxy or proxy_bypass(parsed.host):
        return None
    if not proxy.startswith("http://"):
        raise GaleError(
            "The proxy for the upstream must be like http://host:port.", hint="Or name the host in NO_PROXY."
        )
    return proxy
