"""Documents that say almost the same: MinHash (Broder 1997) with locality-sensitive hashing, by rensa.

A document's n-grams are sketched to a row of minima; the share of equal minima in two rows estimates the Jaccard
similarity of their n-grams. Rows are cut into bands, and only documents with an equal band are compared at all.
"""

from __future__ import annotations

from rensa import RMinHash, RMinHashLSH

from gale.data.cleaning_recipe import NearDuplicates
from gale.data.text_units import TextUnits

_SEED = 42
_RECALL = 0.9
_MOST_IN_A_BAND = 1000


def sketch(units: TextUnits, recipe: NearDuplicates) -> RMinHash | None:
    """The MinHash of a text's n-grams; a shorter text is one n-gram, and one without units has none."""
    if not len(units):
        return None
    n = recipe.characters if units.spaceless else recipe.words
    hashes = units.ngrams(min(n, len(units))).tobytes()
    minhash = RMinHash(recipe.permutations, _SEED)
    minhash.update([hashes[i : i + 8] for i in range(0, len(hashes), 8)])
    return minhash


def bands_for(threshold: float, permutations: int) -> int:
    """The fewest bands that still find at least nine in ten of the pairs that are just at the threshold.

    With ``b`` bands of ``r`` rows a pair of similarity ``s`` shares a band with probability ``1 - (1 - s^r)^b``.
    """
    bands = 1
    while bands < permutations and 1 - (1 - threshold ** (permutations // bands)) ** bands < _RECALL:
        bands *= 2
    return bands


class NearDeduplicator:
    """Remembers documents by their sketches; about 2 KB of memory a document.

    Where 1,000 documents that are not alike share bands with the next one, as those filled in from one long form may,
    the next one is compared and kept but not remembered: no band then ever holds more, and a document costs no more
    than that many comparisons a band, however many came before. The price is that likes of it are not found later. As
    documents come in the order of their files, the same ones are kept each time.
    """

    def __init__(self, recipe: NearDuplicates) -> None:
        self._threshold = recipe.threshold
        bands = bands_for(recipe.threshold, recipe.permutations)
        self._index = RMinHashLSH(recipe.threshold, recipe.permutations, bands)
        self._sketches: list[RMinHash] = []
        self._places: list[str] = []

    def place_of_like(self, minhash: RMinHash, place: str) -> str | None:
        """Where a document like this one was first met; otherwise None, and this one is remembered from then on.

        See the class for the one case in which it is not.
        """
        candidates: list[int] = sorted(self._index.query(minhash))
        for key in candidates:
            if self._sketches[key].jaccard(minhash) >= self._threshold:
                return self._places[key]
        if len(candidates) >= _MOST_IN_A_BAND:
            return None
        self._index.insert(len(self._sketches), minhash)
        self._sketches.append(minhash)
        self._places.append(place)
        return None
