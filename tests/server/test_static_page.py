"""The page's files, and the page that says how to build them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.server.live import Live


@pytest.fixture
def built(launch: Callable[..., Live], tmp_path: Path) -> Live:
    (tmp_path / "secret.txt").write_text("secret")
    static = tmp_path / "static"
    (static / "assets").mkdir(parents=True)
    (static / "index.html").write_text("<title>Gale page</title>")
    (static / "assets" / "index-3fd0.js").write_text("export {}")
    (static / "favicon.svg").write_text("<svg/>")
    (static / "assets" / "link.txt").symlink_to(tmp_path / "secret.txt")
    return launch(static=static)


@pytest.mark.parametrize("path", ["/", "/c/conv_1", "/c/conv_1?x=1"])
def test_the_page(built: Live, path: str) -> None:
    response = built.http.get(path)
    assert (response.status_code, response.text) == (200, "<title>Gale page</title>")
    assert response.headers["content-type"].startswith("text/html")
    assert response.headers["cache-control"] == "no-cache"
    assert built.http.head(path).status_code == 200


def test_assets_never_grow_old(built: Live) -> None:
    response = built.http.get("/assets/index-3fd0.js")
    assert response.text == "export {}"
    assert "javascript" in response.headers["content-type"]
    assert response.headers["cache-control"] == "public, max-age=31536000, immutable"
    assert built.http.get("/favicon.svg").headers["cache-control"] == "no-cache"


@pytest.mark.parametrize(
    "path",
    ["/../secret.txt", "/assets/../../secret.txt", "/assets/%2e%2e/%2e%2e/secret.txt", "/assets/..%2f..%2fsecret.txt",
     "/assets/link.txt", "/assets//etc/passwd", "/assets/%00", "/secret.txt", "/c/..%2f..%2fsecret.txt",
     "/assets/..\\..\\secret.txt", "/assets/" + "a" * 5000],
)  # fmt: skip
def test_nothing_outside_is_served(built: Live, path: str) -> None:
    response = built.http.get(path)
    assert response.status_code in (400, 404)
    assert "secret" not in response.text.replace("secret.txt", "")
    assert response.json()["error"]["message"]


def test_a_missing_page_says_how_to_build_it(launch: Callable[..., Live], tmp_path: Path) -> None:
    for static in (None, tmp_path / "nothing"):
        response = launch(static=static).http.get("/")
        assert response.status_code == 503
        assert "npm --prefix web run build" in response.text
