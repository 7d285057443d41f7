"""Settings from the environment: one meaning everywhere, and wrong ones named."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import make_url

from gale.core.errors import GaleError
from gale.core.settings import settings


@pytest.fixture(autouse=True)
def _read_anew() -> Iterator[None]:
    settings.cache_clear()
    yield
    settings.cache_clear()


@pytest.mark.parametrize(("name", "value"), [("GALE_THREADS", "many"), ("GALE_HOME", "~nobody-at-all/x")])
def test_wrong_environment_settings_are_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(GaleError, match=name):
        settings()


def test_a_tilde_means_home_for_everything(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("GALE_HOME", "~/gale")
    assert settings().home == tmp_path / "gale"
    assert settings().runs == tmp_path / "gale" / "runs"
    assert make_url(settings().database_url).database == str(tmp_path / "gale" / "gale.db")


@pytest.mark.parametrize("name", ["what?", "50%", "%41", "a b", "大风", "a@b:c", "#1", "\udcff"])
def test_the_database_is_found_in_a_folder_of_any_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    monkeypatch.setenv("GALE_HOME", str(tmp_path / name))
    url = make_url(settings().database_url)
    assert url.database == str(tmp_path / name / "gale.db")
    assert not url.query
