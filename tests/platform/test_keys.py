"""What a key looks like, and that the secret it is hashed with is this server's alone."""

from __future__ import annotations

import multiprocessing
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gale.core.errors import GaleError
from gale.core.settings import settings
from gale.platform.keys import is_well_formed, new_key, shown
from gale.platform.secret import SECRET_BYTES, Secret, read_secret


@pytest.mark.parametrize("admin", [False, True])
def test_a_new_key_is_well_formed_and_no_two_are_alike(admin: bool) -> None:
    keys = {new_key(admin=admin) for _ in range(100)}
    assert len(keys) == 100
    for key in keys:
        assert is_well_formed(key)
        assert key.startswith("sk-gale-admin-" if admin else "sk-gale-")


@given(st.integers(0, 53), st.characters(codec="ascii"))
def test_one_wrong_character_is_noticed(position: int, character: str) -> None:
    key = new_key()
    wrong = key[:position] + character + key[position + 1 :]
    assert is_well_formed(wrong) is (wrong == key)


@pytest.mark.parametrize(
    "text",
    ["", "x", "' OR '1'='1", "sk-gale-", "sk-" + "a" * 48, "密钥", "sk-gale-" + "０" * 46, "a" * 1_000_000, "\0" * 54],
)
def test_what_is_no_key_is_told_at_once(text: str) -> None:
    assert not is_well_formed(text)
    assert not is_well_formed(new_key() + text[:1] if text else new_key()[:-1])


def test_what_is_shown_of_a_key_leaves_its_secret() -> None:
    for admin in (False, True):
        key = new_key(admin=admin)
        prefix, last4 = shown(key)
        assert key.startswith(prefix)
        assert key.endswith(last4)
        assert len(key) - len(prefix) - len(last4) == 38


def test_a_digest_depends_on_the_secret_and_on_what_it_is_for() -> None:
    mine, other = Secret(b"m" * 32), Secret(b"o" * 32)
    digests = [mine.digest("key", "a"), other.digest("key", "a"), mine.digest("session", "a"), mine.digest("key", "b")]
    assert len(set(digests)) == 4
    assert mine.digest("key", "a") == digests[0]


def test_the_secret_is_made_once_private_and_whole(gale_home: Path) -> None:
    secret = read_secret()
    file = gale_home / "secret.key"
    assert len(secret) == SECRET_BYTES
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert read_secret() == secret == file.read_bytes()


def _read(results: multiprocessing.Queue[bytes]) -> None:
    results.put(read_secret())


def test_processes_that_begin_together_share_one_secret(gale_home: Path) -> None:
    context = multiprocessing.get_context("fork")
    results: multiprocessing.Queue[bytes] = context.Queue()
    processes = [context.Process(target=_read, args=(results,)) for _ in range(6)]
    for process in processes:
        process.start()
    assert len({results.get(timeout=30) for _ in processes}) == 1
    for process in processes:
        process.join()
    assert {path.name for path in gale_home.iterdir()} == {"secret.key", "secret.key.lock"}


def test_the_environment_s_secret_is_used_and_no_file_made(gale_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GALE_SECRET", "s" * 40)
    settings.cache_clear()
    assert read_secret() == b"s" * 40
    assert not gale_home.exists()
    assert "ssss" not in repr(settings())
    monkeypatch.setenv("GALE_SECRET", "short")
    settings.cache_clear()
    with pytest.raises(GaleError, match="GALE_SECRET") as caught:
        read_secret()
    assert "short" not in caught.value.message.replace("shorter", "")


def test_a_secret_that_others_may_read_or_that_is_damaged_is_refused(gale_home: Path) -> None:
    read_secret()
    file = gale_home / "secret.key"
    file.chmod(0o640)
    with pytest.raises(GaleError, match="read by others"):
        read_secret()
    file.chmod(0o600)
    file.write_bytes(b"half")
    with pytest.raises(GaleError, match="damaged"):
        read_secret()
    file.unlink()
    file.mkdir()
    with pytest.raises(GaleError):
        read_secret()
