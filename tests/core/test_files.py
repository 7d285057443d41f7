"""Files are wholly there or not there at all."""

from __future__ import annotations

import json
import math
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from gale.core import files
from gale.core.errors import GaleError


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.json"
    files.write_json(path, {"name": "Gale 大风"})
    files.write_json(path, {"b": 1})
    assert json.loads(path.read_text()) == {"b": 1}
    assert [entry.name for entry in path.parent.iterdir()] == ["a.json"]


def test_numbers_that_json_lacks_are_refused_and_the_old_file_stays(tmp_path: Path) -> None:
    files.write_json(tmp_path / "a.json", 1)
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(tmp_path / "a.json", math.nan)
    assert (tmp_path / "a.json").read_text() == "1\n"


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    files.write_text(tmp_path / "a.txt", "old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(GaleError, match=r"No space left while writing .*a\.txt") as caught:
            files.write_bytes(tmp_path / "a.txt", b"x" * 5000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "Free some space" in str(caught.value.hint)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a.txt": "old"}


def test_a_file_written_piece_by_piece_appears_only_when_it_is_complete(tmp_path: Path) -> None:
    (tmp_path / f".a.{2**30}-new").write_text("left by a process that was killed")
    with files.new_file(tmp_path / "a") as temporary:
        temporary.write_text("1")
        assert not (tmp_path / "a").exists()
    with pytest.raises(KeyError), files.new_file(tmp_path / "a") as temporary:
        temporary.write_text("2")
        raise KeyError
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "1"}


def test_two_who_write_the_same_file_at_once_do_not_meet_even_with_one_process_number(tmp_path: Path) -> None:
    with files.new_file(tmp_path / "a") as one:
        one.write_text("1")
        with files.new_file(tmp_path / "a") as other:
            other.write_text("2")
        assert (tmp_path / "a").read_text() == "2"
    assert (tmp_path / "a").read_text() == "1"
    files.write_text(tmp_path / "b", "")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_a_folder_appears_only_when_it_is_complete(tmp_path: Path) -> None:
    with files.new_directory(tmp_path / "out") as folder:
        (folder / "a").write_text("1")
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "out" / "a").read_text() == "1"
    with pytest.raises(KeyError), files.new_directory(tmp_path / "out") as folder:
        (folder / "a").write_text("2")
        raise KeyError
    assert (tmp_path / "out" / "a").read_text() == "1"
    with files.new_directory(tmp_path / "out") as folder:
        (folder / "b").write_text("3")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["b"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_with_a_marker_only_our_own_folders_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "photo").write_text("")
    with pytest.raises(GaleError, match="not replaced"), files.new_directory(tmp_path / "theirs", marker="m"):
        pass
    for _ in range(2):
        with files.new_directory(tmp_path / "ours", marker="m") as folder:
            (folder / "m").write_text("")
    (tmp_path / "file").write_text("")
    with pytest.raises(GaleError, match="stands in its place"), files.new_directory(tmp_path / "file", marker="m"):
        pass


def test_what_a_dead_process_left_is_removed_and_what_a_living_one_writes_stays(tmp_path: Path) -> None:
    with subprocess.Popen(["true"]) as ended:
        pass
    others = [f".a.{os.getpid()}-x", f".ab.{ended.pid}-x", ".a.local", ".a.old-copy", f".a.{ended.pid}"]
    for name in (f".a.{ended.pid}-x", *others):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").write_text("")
        os.utime(tmp_path / name, (0, 0))  # however old they are
    (tmp_path / f".a.{ended.pid}-y").write_text("half a file")
    with files.new_directory(tmp_path / "a"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*others, "a"])


def test_a_killed_write_leaves_nothing_once_the_same_is_written_again(tmp_path: Path) -> None:
    write = (
        "import os, pathlib, sys; from gale.core import files\n"
        "with files.new_directory(pathlib.Path(sys.argv[1])): os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", write, str(tmp_path / "a")], check=False)
    assert len(list(tmp_path.iterdir())) == 1
    with files.new_directory(tmp_path / "a"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_lock_refuses_a_second_holder_until_the_first_has_ended(tmp_path: Path) -> None:
    hold = (
        "import pathlib, sys; from gale.core import files\n"
        "with files.locked(pathlib.Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    lock, busy = tmp_path / "new" / "lock", GaleError("taken")
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(GaleError, match="taken"), files.locked(lock, busy=busy):
            pass
        holder.kill()
    with files.locked(lock, busy=busy):
        pass


def test_homes_are_found_and_a_home_of_nobody_is_a_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert files.expand("~/a") == files.resolve("~/a") == tmp_path / "a"
    assert files.resolve("a", tmp_path / "b" / "..") == tmp_path / "a"
    with pytest.raises(GaleError, match="~nobody-at-all/a cannot be followed"):
        files.expand("~nobody-at-all/a")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    with pytest.raises(GaleError, match="cannot be followed"):
        files.resolve(tmp_path / "circle")


def test_a_file_where_a_folder_is_needed_is_a_message(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")
    with pytest.raises(GaleError, match="something else stands in its place"):
        files.write_text(tmp_path / "a" / "b", "")
    (tmp_path / "d").mkdir()
    with pytest.raises(GaleError, match="something else stands in its place"):
        files.write_text(tmp_path / "d", "")
