"""Preparing with cleaning tables: what is dropped is counted with its reason, and workers do not change the shards."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from gale.core.errors import DataError, GaleError, RecipeError
from gale.core.recipe import load_recipe
from gale.data import workers
from gale.data.mixing import resolve_epochs
from gale.data.prepare import prepare, ready_data
from gale.data.recipe import DataRecipe, Source
from gale.text.tokenizer import Tokenizer
from tests.data.test_prepare import source, texts
from tests.data.test_quality import CHINESE, ENGLISH, MENU
from tests.tiny_data import SENTENCES, write_jsonl

GERMAN = "Der Reiher stand im flachen Wasser und wartete auf einen Fisch, den ganzen Morgen lang, ganz still."
TABLES: dict[str, Any] = {
    "personal_data": {},
    "languages": {"keep": ["en", "zh"]},
    "quality": {},
    "near_duplicates": {},
}


# Prepares data, and stops for good at the first result, having printed its workers.
STUCK = """
import json, multiprocessing, sys, time
from pathlib import Path
from gale.data import prepare
from gale.data.recipe import DataRecipe

def take(run, result):
    print(*(process.pid for process in multiprocessing.active_children()), flush=True)
    time.sleep(600)

if __name__ == "__main__":
    prepare._Run.take = take
    prepare.prepare(DataRecipe.model_validate(json.loads(Path(sys.argv[1]).read_text())), Path(sys.argv[2]))
"""


@pytest.fixture
def recipe(tokenizer: Tokenizer, tmp_path: Path) -> dict[str, Any]:
    """All cleaning tables over a source in which every kind of fault is met once."""
    tokenizer.save(tmp_path / "tokenizer")
    held = "The lighthouse keeper wrote down the weather each evening, and in forty years he never missed a single day."
    rows = [
        ENGLISH,
        CHINESE,
        ENGLISH.replace("quite still", "very still"),  # nearly the first
        CHINESE,  # exactly the second
        "Bread rises because the yeast in it breathes out gas, and the oven then fixes the shape that it has taken. "
        "Ask anna@example.org or 13800138000 for the rest of the recipe, which is that of a baker in the old town.",
        GERMAN,
        MENU,
        "",
        f"He told us once: {held.lower()} We believed him, and so would you have done.",
        held + " That was all.",  # nearly the held-out text
    ]
    write_jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in rows])
    with (tmp_path / "texts.jsonl").open("a") as file:
        file.write("{broken\n")
    write_jsonl(tmp_path / "held.jsonl", [{"text": held}])
    return {
        "tokenizer": str(tmp_path / "tokenizer"),
        **TABLES,
        "decontamination": {"against": [{"path": str(tmp_path / "held.jsonl")}]},
        "near_duplicates": {"threshold": 0.6},
        "sources": [
            source(tmp_path / "texts.jsonl", max_broken_lines=1),
            source(tmp_path / "held.jsonl", split="held", skip=["quality"]),
        ],
    }


@pytest.fixture
def many(tokenizer: Tokenizer, tmp_path: Path) -> dict[str, Any]:
    """All cleaning tables over some thousand documents of several formats: batches enough for several workers."""
    tokenizer.save(tmp_path / "tokenizer")
    lines = [f"{ENGLISH} {i % 400} {SENTENCES[i % 8]} {'word ' * (i % 11)}{i % 650}" for i in range(800)]
    lines += [
        f"{CHINESE}{SENTENCES[i % 8]}第{i % 500}页，电话1380013{i % 1000:04}。{CHINESE[i % 50 :]}" for i in range(800)
    ]
    chats = [
        {"messages": [{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": lines[i]}]}
        for i in range(300)
    ]
    write_jsonl(tmp_path / "texts.jsonl", [{"text": line} for line in lines])
    write_jsonl(tmp_path / "chats.jsonl", chats)
    write_jsonl(tmp_path / "held.jsonl", [{"text": line + " held"} for line in lines[::300]])
    return {
        "tokenizer": str(tmp_path / "tokenizer"),
        "shard_tokens": 65536,
        **TABLES,
        "near_duplicates": {"threshold": 0.9},
        "decontamination": {"words": 60, "against": [{"path": str(tmp_path / "held.jsonl")}]},
        "sources": [
            source(tmp_path / "texts.jsonl", weight=3.0, max_epochs=2.5),
            source(tmp_path / "chats.jsonl", weight=1.0, format="chat"),
            source(tmp_path / "held.jsonl", split="held", epochs=1.5),
        ],
    }


def run(recipe: dict[str, Any], out: Path, ray: str | None = None) -> dict[str, Any]:
    return prepare(DataRecipe.model_validate(recipe), out, ray=ray)


def without_workers(manifest: dict[str, Any]) -> dict[str, Any]:
    return {**manifest, "recipe": {**manifest["recipe"], "workers": None}}


def test_every_dropped_document_is_counted_with_its_reason(recipe: dict[str, Any], tmp_path: Path) -> None:
    manifest = run(recipe, tmp_path / "out")
    held, row = manifest["sources"]
    assert held["kept"] == 1
    assert row["read"] == 10
    assert row["dropped"] == {"other_language": 1, "stop_words": 1, "contaminated": 2}
    assert row["contaminated"] == {"held.jsonl": 2}
    assert manifest["evaluations"][0]["dropped"] == 2
    assert (row["empty"], row["duplicates"], row["near_duplicates"], row["broken_lines"]) == (1, 1, 1, 1)
    assert "line 11" in row["first_broken_lines"][0]
    assert row["redacted"] == {"email": 1, "phone": 1}
    assert row["languages"] == {"en": 6, "zh": 2, "de": 1}
    went = sum(row["dropped"].values()) + row["empty"] + row["duplicates"] + row["near_duplicates"]
    assert row["read"] - went == row["kept"] == row["documents"] == 3
    assert sum(row["sizes_before"].values()) == row["read"]
    assert sum(row["sizes_after"].values()) == row["kept"]
    kept = texts(tmp_path / "out")
    assert kept[:2] == [ENGLISH, CHINESE]
    assert "Ask <email> or <phone> for" in kept[2]


def test_what_is_like_a_held_out_text_is_dropped_from_training(recipe: dict[str, Any], tmp_path: Path) -> None:
    del recipe["decontamination"]
    manifest = run(recipe, tmp_path / "out")
    assert manifest["sources"][1]["near_duplicates"] == 2
    samples = [json.loads(line) for line in (tmp_path / "out" / "dropped.jsonl").read_text().splitlines()]
    like = {sample["like"].rpartition("/")[2] for sample in samples if sample["reason"] == "near_duplicates"}
    assert like == {"texts.jsonl, line 1", "held.jsonl, line 1"}


def test_a_source_may_skip_a_step(recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe["sources"][0]["skip"] = ["quality", "languages", "personal_data", "near_duplicates", "decontamination"]
    row = run(recipe, tmp_path / "out")["sources"][1]
    assert (row["dropped"], row["redacted"], row["near_duplicates"], row["kept"]) == ({}, {}, 0, 8)


def test_samples_show_no_personal_data_even_where_the_recipe_keeps_it(recipe: dict[str, Any], tmp_path: Path) -> None:
    del recipe["personal_data"]
    write_jsonl(tmp_path / "texts.jsonl", [{"text": f"{GERMAN} anna@example.org"}, {"text": ENGLISH}])
    recipe["sources"][0]["max_broken_lines"] = 0
    run(recipe, tmp_path / "out")
    for name in ("dropped.jsonl", "report.html"):
        page = (tmp_path / "out" / name).read_text()
        assert "anna@example.org" not in page
        assert GERMAN[:40] in page


def test_the_report_is_one_page_with_the_manifests_numbers(recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe["sources"][0]["origin"] = "<script>alert(1)</script>"
    manifest = run(recipe, tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    assert manifest["fingerprint"] in page
    assert not re.search(r'(?:src|href)="(?!#)', page.replace("xlink:href", ""))
    assert "<script>" not in page
    drawn = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)]
    words = "".join(word for svg in drawn for word in svg.itertext()) + "".join(
        re.findall("<figcaption>.*?</figcaption>", page)
    )
    for word in ("texts.jsonl", "other_language", "near_duplicates", "contaminated", "zh", "kB of text"):
        assert word in words
    assert "alert(1)" in page
    for word in ("<td>2</td>", "line 11", "share of split", "held.jsonl"):
        assert word in page


def test_file_names_of_any_kind_cost_no_report(recipe: dict[str, Any], tmp_path: Path) -> None:
    """Names from old archives are not UTF-8, and two dollar signs are no formula."""
    folder = tmp_path / "$x_{$"
    folder.mkdir()
    for name, text in ((b"caf\xe9.txt", MENU), (b"<script>.txt", ENGLISH)):
        (folder / os.fsdecode(name)).write_text(text)
    manifest = run({**recipe, "sources": [source(folder)]}, tmp_path / "out")
    assert manifest["sources"][0]["kept"] == 1
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "$x_{$" in re.sub(r"<svg.*</svg>", "", page, flags=re.DOTALL)
    assert "<script>" not in page
    assert "caf?.txt" in (tmp_path / "out" / "dropped.jsonl").read_text(encoding="utf-8")


def test_a_page_of_nothing_but_notices_is_empty(recipe: dict[str, Any], tmp_path: Path) -> None:
    rows = [{"text": "This site uses cookies.\nPlease enable JavaScript."}, {"text": ENGLISH}]
    write_jsonl(tmp_path / "pages.jsonl", rows)
    quality = {"min_words": 0, "min_characters": 0}
    manifest = run({**recipe, "quality": quality, "sources": [source(tmp_path / "pages.jsonl")]}, tmp_path / "out")
    assert [manifest["sources"][0][key] for key in ("empty", "kept")] == [1, 1]


def test_weights_are_shares_of_the_training_tokens(many: dict[str, Any], tmp_path: Path) -> None:
    manifest = run(many, tmp_path / "out")
    _, first, second = manifest["sources"]
    assert (first["weight"], second["weight"]) == (3.0, 1.0)
    assert first["tokens"] / second["tokens"] == pytest.approx(3, rel=0.15)  # whole documents
    assert second["epochs"] == pytest.approx(1.0) or first["epochs"] == pytest.approx(2.5)
    assert first["epochs"] <= 2.5
    assert second["epochs"] <= 1.0
    assert manifest["splits"]["train"]["tokens"] == first["tokens"] + second["tokens"]
    assert not (tmp_path / "out" / "spool").exists()


def test_weights_resolve_to_the_largest_mixture_within_the_most_epochs() -> None:
    def make(weight: float, most: float) -> Source:
        return Source.model_validate(
            {"path": "/a", "licence": "x", "origin": "x", "weight": weight, "max_epochs": most}
        )

    for weights, most, tokens in (
        ((1, 1), (1, 4), (1000, 100)),
        ((70, 20, 10), (2, 1, 3), (50, 500, 9)),
        ((2,), (3,), (7,)),
    ):
        epochs = resolve_epochs([make(w, m) for w, m in zip(weights, most, strict=True)], tokens)
        taken = [times * count for times, count in zip(epochs, tokens, strict=True)]
        for share, weight in zip(taken, weights, strict=True):
            assert share / sum(taken) == pytest.approx(weight / sum(weights))
        assert max(times / limit for times, limit in zip(epochs, most, strict=True)) == pytest.approx(1)
    assert resolve_epochs([make(1, 1), make(1, 1)], [0, 5]) == [0, 1]


def test_any_number_of_workers_gives_the_same_files(many: dict[str, Any], tmp_path: Path) -> None:
    one, two = (run({**many, "workers": n}, tmp_path / str(n)) for n in (1, 2))
    assert without_workers(one) == without_workers(two)
    names = sorted(path.name for path in (tmp_path / "1").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "2").iterdir())
    for name in names:
        if (tmp_path / "1" / name).is_file() and name != "manifest.json":
            assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes(), name
    rows = one["sources"][1]
    assert rows["near_duplicates"] > 0 < rows["dropped"]["contaminated"]


def test_little_data_starts_no_processes_and_much_one_a_core(monkeypatch: pytest.MonkeyPatch) -> None:
    assert workers.workers_for(0, 1000) == 1
    assert workers.workers_for(3, 1000) == 3
    monkeypatch.setattr(workers, "settings", lambda: type("Settings", (), {"threads": 5}))
    assert workers.workers_for(0, 10**9) == 5


def test_a_broken_line_met_by_a_worker_is_named_and_nothing_old_is_lost(many: dict[str, Any], tmp_path: Path) -> None:
    fingerprint = run(many, tmp_path / "out")["fingerprint"]
    with (tmp_path / "texts.jsonl").open("a") as file:
        file.write('{"text": 5}\n')
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(DataError, match=r"texts\.jsonl, line 1601: .*'text' is not text"):
        run({**many, "workers": 2}, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["fingerprint"] == fingerprint
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_no_worker_outlives_a_killed_parent(many: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text(json.dumps({**many, "workers": 2}))
    (tmp_path / "program.py").write_text(STUCK)
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "program.py"), str(tmp_path / "recipe.json"), str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert process.stdout is not None
    children = [int(number) for number in process.stdout.readline().split()]
    assert len(children) == 2
    process.send_signal(signal.SIGKILL)
    process.wait()
    for _ in range(200):
        if not any(_alive(child) for child in children):
            break
        time.sleep(0.05)
    assert not any(_alive(child) for child in children)
    assert not (tmp_path / "out").exists()


def test_a_worker_that_dies_is_a_message(many: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_work", _die)
    with pytest.raises(DataError, match="process that cleaned data has died"):
        run({**many, "workers": 2}, tmp_path / "out")


def _die(_: object) -> None:
    os._exit(9)


def _alive(process: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def test_wrong_keys_of_the_cleaning_tables_are_all_named(tmp_path: Path) -> None:
    (tmp_path / "data.toml").write_text(
        'tokenizer = "t"\n[quality]\nmin_word = 3\nskip = ["short"]\n[languages]\nkeep = []\n'
        "[personal_data]\nmail = true\n"
        '[[sources]]\npath = "a"\nlicence = "x"\norigin = "x"\nskip = ["quality"]\nweight = 0\n'
    )
    with pytest.raises(RecipeError) as caught:
        load_recipe(tmp_path / "data.toml", DataRecipe)
    for word in ("quality.min_word: no such key; did you mean 'min_words'", "personal_data.mail", "quality.skip.1"):
        assert word in caught.value.message
    for word in ("languages.keep", "sources.1.weight"):
        assert word in caught.value.message


def test_a_split_from_which_all_is_dropped_says_why(recipe: dict[str, Any], tmp_path: Path) -> None:
    write_jsonl(tmp_path / "texts.jsonl", [{"text": GERMAN + str(i)} for i in range(3)] + [{"text": ""}])
    with pytest.raises(DataError, match="Nothing is left for the split 'train'") as caught:
        run(recipe, tmp_path / "out")
    assert "Of 4 documents 3 were other_language, 1 were empty" in str(caught.value.hint)


def test_without_ray_the_message_says_what_to_install(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(GaleError) as caught:
        run(recipe, tmp_path / "out", ray="auto")
    assert "pip install 'gale-llm[ray]'" in str(caught.value.hint)


def test_a_language_that_does_not_exist_is_named_before_anything_is_dropped(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    recipe["languages"] = {"keep": ["en", "cn"]}
    with pytest.raises(DataError, match="no language 'cn'") as caught:
        run(recipe, tmp_path / "out")
    assert "The nearest are zh, " in str(caught.value.hint)
    for written, nearest in (("zh-CN", "zh"), ("EN", "en"), ("jp", "ja"), ("English", "en"), ("fra", "fr"), ("x", "")):
        recipe["languages"] = {"keep": [written]}
        with pytest.raises(DataError, match=f"no language '{written}'") as caught:
            run(recipe, tmp_path / "out")
        assert str(caught.value.hint).startswith(f"The nearest are {nearest}")


def test_a_folder_of_a_recipe_that_changes_is_prepared_anew(
    gale_home: Path, recipe: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text(ENGLISH)
    lines = f'tokenizer = "{recipe["tokenizer"]}"\n'
    for path in ("notes", "note*/*.txt"):
        lines += f'[[sources]]\npath = "{path}"\nlicence = "CC0"\norigin = "us"\n'
    (tmp_path / "data.toml").write_text(lines)
    folder = ready_data(tmp_path / "data.toml")
    assert texts(folder) == [ENGLISH]
    assert ready_data(tmp_path / "data.toml") == folder
    (tmp_path / "notes" / "b.txt").write_text(CHINESE)
    assert texts(ready_data(tmp_path / "data.toml")) == [ENGLISH, CHINESE]


def test_a_ray_cluster_that_is_not_there_is_named_at_once(recipe: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is an optional extra")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(GaleError, match=f"no Ray cluster at {address}"):
        run(recipe, tmp_path / "out", ray=address)


@pytest.mark.slow
def test_a_ray_cluster_of_two_nodes_gives_the_same_shards(many: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is an optional extra")
    from ray.cluster_utils import Cluster

    here = run({**many, "workers": 1}, tmp_path / "here")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=1)
        there = run({**many, "workers": 1}, tmp_path / "there", ray=cluster.address)
        assert here == there  # fingerprint and counts
        with (tmp_path / "texts.jsonl").open("a") as file:
            file.write('{"text": 5}\n')
        with pytest.raises(DataError, match="line 1601"):
            run(many, tmp_path / "again", ray=cluster.address)
    finally:
        cluster.shutdown()
