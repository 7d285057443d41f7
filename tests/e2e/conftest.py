"""The whole product as a person meets it: `gale serve` in a process of its own, and a real browser."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from gale.registry.models import BUILTIN
from gale.server.app import STATIC

SLOWLY = Path(__file__).with_name("serve_slowly.py")
CHROMIUM = shutil.which("chromium")
# Chromium looks up hosts of its own at every start; a test must not.
QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


class Served:
    """A running `gale serve`."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self.process: subprocess.Popen[str] | None = None
        self.url = ""

    def start(self, port: int = 0) -> None:
        """Start the server and wait for the line with its address."""
        self.process = subprocess.Popen(
            [sys.executable, SLOWLY, "serve", "--port", str(port)],
            env={**os.environ, "GALE_HOME": str(self._home), "GALE_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=(self._home / "serve.log").open("a"),
            text=True,
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert "http://127.0.0.1:" in line, (self._home / "serve.log").read_text()
        self.url = next(word for word in line.split() if word.startswith("http://"))

    def stop(self) -> int:
        """Ctrl-C; the exit code."""
        assert self.process is not None
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(timeout=30)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    if not (BUILTIN / "model.safetensors").is_file():
        pytest.fail(f"the built-in model is missing from {BUILTIN}")
    if not (STATIC / "index.html").is_file():
        pytest.fail("the page is not built; run `make test`, or `npm --prefix web run build`")
    server = Served(tmp_path)
    server.start()
    yield server
    if server.process is not None and server.process.poll() is None:
        server.process.kill()
        server.process.wait()


# Closed after this folder: Playwright runs an event loop in this thread, beside which no other test can run its own.
@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        reason = "Chromium is not installed; `scripts/need-chromium` installs it or says how"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: Browser, served: Served) -> Iterator[Page]:
    context = browser.new_context(
        viewport={"width": 1280, "height": 800}, device_scale_factor=2, locale="en-GB", color_scheme="light"
    )
    context.set_default_timeout(20_000)
    page = context.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(f"page error: {error}"))
    page.on("console", lambda line: problems.append(f"console: {line.text}") if line.type == "error" else None)
    page.on("request", lambda r: None if r.url.startswith(served.url) else problems.append(f"foreign: {r.url}"))
    yield page
    context.close()
    assert problems == []
