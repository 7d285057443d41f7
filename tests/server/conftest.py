"""Real servers on free loopback ports, with the scripted engine and a real store."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator

import pytest
import structlog

from gale.engine.local import LocalEngine
from gale.model.transformer import Decoder
from gale.platform.store import Store
from gale.server.body_limit import BodyLimit
from gale.server.edge import EdgeLimits
from gale.server.sse import StreamLimits
from gale.text.tokenizer import Tokenizer
from tests.databases import PostgresqlServer
from tests.server.live import Live, start


@pytest.fixture(scope="session", autouse=True)
def quiet_logs() -> None:
    """No lines from the servers' threads between the tests' own; structlog's capture_logs still sees them."""
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory(), processors=[])


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "both_databases: runs on SQLite and on PostgreSQL")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "store" in metafunc.fixturenames and metafunc.definition.get_closest_marker("both_databases"):
        metafunc.parametrize("store", ["sqlite", "postgresql"], indirect=True, scope="session")


@pytest.fixture(scope="session")
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """SQLite's; in tests marked ``both_databases`` PostgreSQL's too."""
    with contextlib.ExitStack() as stack:
        folder = tmp_path_factory.mktemp("store")
        if getattr(request, "param", "sqlite") == "sqlite":
            url = f"sqlite:///{folder / 'gale.db'}"
        else:
            server: PostgresqlServer = request.getfixturevalue("postgresql")
            url = stack.enter_context(server.database())
        yield stack.enter_context(contextlib.closing(Store.open(url, files=folder / "files")))


@pytest.fixture(scope="session")
def live(store: Store) -> Iterator[Live]:
    """The server with its ordinary limits."""
    server = start(store)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def engine(model: Decoder, tokenizer: Tokenizer, store: Store) -> LocalEngine:
    """Gale's own engine over the tiny model, a new one for each store, since ``tiny`` ends with its store."""
    return LocalEngine(model, tokenizer, model_id="tiny")


@pytest.fixture(scope="module")
def tiny(store: Store, engine: LocalEngine) -> Iterator[Live]:
    """A server of it."""
    server = start(store, engine=engine)
    yield server
    server.stop()
    asyncio.run(engine.close())


@pytest.fixture(scope="session")
def strict(store: Store) -> Iterator[Live]:
    """A server whose patience and sizes are small, so that tests need not wait or send much."""
    edge = EdgeLimits(requests=4, body=BodyLimit(size=64 * 1024, patience_s=0.3, linger_s=1.0))
    server = start(store, edge_limits=edge, stream_limits=StreamLimits(keep_alive_s=0.1, send_timeout_s=0.5))
    yield server
    server.stop()


@pytest.fixture
def launch(store: Store) -> Iterator[Callable[..., Live]]:
    """Start further servers with the arguments of ``start``; they end with the test."""
    started: list[Live] = []

    def launch_one(**arguments: object) -> Live:
        started.append(start(**{"store": store, **arguments}))  # type: ignore[arg-type]
        return started[-1]

    yield launch_one
    for server in started:
        server.stop()
