"""Near-duplicates are found as exact Jaccard similarity finds them, and evaluation n-grams wherever they stand."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from rensa import RMinHash

from gale.core.errors import DataError
from gale.data import near_duplicates
from gale.data.cleaning_recipe import Decontamination, NearDuplicates
from gale.data.decontamination import index_evaluations
from gale.data.near_duplicates import NearDeduplicator, bands_for, sketch
from gale.data.text_units import TextUnits
from tests.tiny_data import SENTENCES, write_jsonl

WORDS = [f"{a}{b}" for a in "bcdfghklmnprstvw" for b in ("ato", "ine", "uro", "esk", "omi")]
CHARACTERS = [chr(0x4E00 + i) for i in range(300)]


def jaccard(first: str, second: str, recipe: NearDuplicates) -> float:
    """Exact similarity of the two texts' sets of n-grams, counted with strings."""
    sets = []
    for text in (first, second):
        units = TextUnits(text)
        n = recipe.characters if units.spaceless else recipe.words
        sets.append({tuple(units.units[i : i + n]) for i in range(len(units.units) - n + 1)})
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def sketched(text: str, recipe: NearDuplicates) -> RMinHash:
    minhash = sketch(TextUnits(text), recipe)
    assert minhash is not None
    return minhash


def changed(units: list[str], changes: int, draw: random.Random) -> list[str]:
    units = list(units)
    for at in draw.sample(range(len(units)), changes):
        units[at] = draw.choice(units)
    return units


@pytest.mark.parametrize(("alphabet", "space"), [(WORDS, " "), (CHARACTERS, "")])
@pytest.mark.parametrize("threshold", [0.6, 0.8])
def test_pairs_above_the_threshold_are_found_and_pairs_below_are_kept(
    alphabet: list[str], space: str, threshold: float
) -> None:
    recipe, draw = NearDuplicates(threshold=threshold), random.Random(3)
    wrong, judged = 0, 0
    for _ in range(150):
        units = [draw.choice(alphabet) for _ in range(400)]
        first, second = space.join(units), space.join(changed(units, draw.randint(1, 30), draw))
        similarity = jaccard(first, second, recipe)
        if abs(similarity - threshold) < 0.1:
            continue  # an estimate from 128 minima may fall on either side
        index = NearDeduplicator(recipe)
        assert index.place_of_like(sketched(first, recipe), "first") is None
        found = index.place_of_like(sketched(second, recipe), "second") == "first"
        judged += 1
        wrong += found != (similarity > threshold)
    assert judged > 60
    assert wrong <= judged * 0.02


def test_texts_that_share_nothing_are_all_kept_and_sketches_are_the_same_everywhere() -> None:
    recipe = NearDuplicates()
    index = NearDeduplicator(recipe)
    for sentence in SENTENCES:
        assert index.place_of_like(sketched(sentence, recipe), sentence) is None
    for sentence in SENTENCES:
        assert index.place_of_like(sketched(sentence.upper() + "!!", recipe), "again") == sentence
    assert sketched("the heron stood in the water", recipe).digest()[:2] == [3276989368, 4121637736]
    assert len(TextUnits("Don't go—去吧").units) == 4
    assert sketch(TextUnits("..."), recipe) is None  # or all texts without letters would be one


def test_documents_from_one_form_are_kept_without_comparing_each_with_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near_duplicates, "_MOST_IN_A_BAND", 20)
    recipe, draw = NearDuplicates(threshold=0.8), random.Random(7)
    form = [draw.choice(WORDS) for _ in range(400)]
    filled = [" ".join(form + [draw.choice(WORDS) for _ in range(160)]) for _ in range(300)]  # two share about 0.55
    sketches = [sketched(text, recipe) for text in filled]

    def kept() -> list[int]:
        index = NearDeduplicator(recipe)
        left = [i for i, each in enumerate(sketches) if index.place_of_like(each, str(i)) is None]
        candidates = max(len(index._index.query(each)) for each in sketches)
        assert 20 <= candidates <= 20 * bands_for(0.8, 128)
        assert len(index._sketches) < 300
        assert index.place_of_like(sketches[0], "again") == "0"
        return left

    assert kept() == kept()
    assert len(kept()) == 300


def test_enough_bands_are_chosen_to_find_nine_of_ten_at_the_threshold() -> None:
    for threshold in (0.3, 0.5, 0.7, 0.8, 0.9, 1.0):
        bands = bands_for(threshold, 128)
        assert 1 - (1 - threshold ** (128 // bands)) ** bands >= 0.9
        assert bands == 1 or 1 - (1 - threshold ** (256 // bands)) ** (bands // 2) < 0.9


def test_ngram_hashes_are_equal_just_where_the_ngrams_are() -> None:
    draw = random.Random(5)
    units = TextUnits(" ".join(draw.choice(WORDS[:6]) for _ in range(2000)))
    for n in (1, 2, 5):
        grams = [tuple(units.units[i : i + n]) for i in range(len(units) - n + 1)]
        assert len(np.unique(units.ngrams(n))) == len(set(grams))
        assert len({(gram, int(h)) for gram, h in zip(grams, units.ngrams(n), strict=True)}) == len(set(grams))
    assert len(TextUnits("one two").ngrams(3)) == 0


def test_evaluation_ngrams_are_found_within_longer_texts_of_either_language(tmp_path: Path) -> None:
    question = "Which of the two herons that stood in the shallow water by the old mill was the faster one?"
    passage = "一九八七年的春天，小安和同学们在老学校后面的山坡上种下了十二棵苹果树。"
    write_jsonl(tmp_path / "a.jsonl", [{"q": question, "choices": [{"text": "the first"}], "n": 3}])
    (tmp_path / "b.txt").write_text(passage)
    recipe = Decontamination.model_validate(
        {"against": [{"path": str(tmp_path / "a.jsonl")}, {"path": str(tmp_path / "b.txt")}]}
    )
    index, reports = index_evaluations(recipe)

    def found(text: str) -> str | None:
        overlap = index.overlap(TextUnits(text))
        assert overlap is None or overlap[1].replace(" ", "") in text.lower().replace(" ", "")
        return overlap and overlap[0]

    assert [(report["texts"], report["too_short"]) for report in reports] == [(2, 1), (1, 0)]
    assert found(f"Some words before. {question.upper()} And after.") == "a.jsonl"
    assert found(f"他写道：{passage}大家都笑了。") == "b.txt"
    assert found(f"{'An English page that quotes it: ' * 9}{passage}") == "b.txt"
    assert found("Which of the two herons that stood in the shallow water was it?") is None
    assert found(passage[:15]) is None
    assert all(found(sentence) is None for sentence in SENTENCES)


def test_evaluations_that_cannot_be_looked_for_are_named(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"q": "too short"}])
    for against, says in (
        ({"path": str(path)}, "no text that is long enough"),
        ({"path": str(path), "keys": ["question"]}, "'question' is missing"),
        ({"path": str(tmp_path / "b.jsonl")}, "no data file"),
    ):
        with pytest.raises(DataError, match=says):
            index_evaluations(Decontamination.model_validate({"against": [against]}))
