"""Which language a text is in, by py3langid (Lui and Baldwin 2012; its model ships with it)."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from functools import cache
from typing import Any

from gale.core.errors import DataError
from gale.data.cleaning_recipe import Languages

UNDETERMINED = "und"
_SAMPLE = 1000
# Written Chinese that the model tells apart by a word or two; who keeps "zh" means these too.
_FOLDED = {"wuu": "zh", "yue": "zh"}
# What is often written in place of a code; with codes alone "cn" would be nearest to Shona (sn).
_TAKEN_FOR = {
    "zh": ("cn", "tw", "hk", "chinese", "mandarin", "cmn", "zho", "chi"),
    "en": ("us", "gb", "english"),
    "ja": ("jp", "japanese", "jpn"),
    "ko": ("kr", "korean", "kor"),
    "de": ("german", "deu", "ger"),
    "fr": ("french", "fra", "fre"),
    "es": ("spanish", "spa"),
    "uk": ("ua", "ukrainian", "ukr"),
    "el": ("gr", "greek", "ell", "gre"),
}


def identify(text: str) -> tuple[str, float]:
    """ISO 639 code of the language and the confidence in [0, 1]; ``und`` where there are no letters to tell by."""
    sample = text[:_SAMPLE]
    if not any(character.isalpha() for character in sample):
        return UNDETERMINED, 0.0
    language, confidence = _identifier().classify(sample)
    return _FOLDED.get(language, language), confidence


def rejected(recipe: Languages, language: str, confidence: float) -> str | None:
    """Why a text is dropped for its language, or None."""
    if language not in recipe.keep:
        return "other_language"
    return "unsure_language" if confidence < recipe.min_confidence else None


def check_languages(recipe: Languages) -> None:
    """Raise :class:`DataError` for a language that is never found, which would drop all of its documents."""
    known = {_FOLDED.get(label, label) for label in _identifier().labels}
    if unknown := [language for language in recipe.keep if language not in known]:
        raise DataError(
            f"languages.keep: there is no language {unknown[0]!r}.",
            hint=f"The nearest are {', '.join(_nearest(unknown[0], known))}; an ISO 639 code is meant, one of "
            f"{', '.join(sorted(known))}.",
        )


def _nearest(language: str, known: Iterable[str]) -> list[str]:
    """Codes of the language whose country or English name was written, then codes that are spelt nearly so."""
    written = language.strip().lower().replace("_", "-")
    meant = [code for code, names in _TAKEN_FOR.items() if written.partition("-")[0] in names]
    return list(dict.fromkeys([*meant, *get_close_matches(written, sorted(known), n=3, cutoff=0.0)]))[:3]


@cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
