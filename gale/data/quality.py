"""Does a text read like prose? The rules of Gopher, C4 and FineWeb, counted in words or, in Chinese, in characters.

Gopher is Rae et al. 2021 (table A1), C4 Raffel et al. 2020, FineWeb Penedo et al. 2024.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import numpy as np

from gale.data.cleaning_recipe import Quality
from gale.data.text_units import TextUnits

_STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))
_SENTENCE_END = re.compile(r"[。！？!?…]|\.(?!\w)")
_LINE_ENDS = frozenset(".!?。．！？…:：;；,，、—")  # a comma too: verse, and prose with hard line ends
_CLOSING = " \t\u3000\"'”’」』)）]】*_"
_ELLIPSIS = re.compile(r"…+|\.{3,}|。{3,}")
_BULLET = re.compile(r"\s*(?:[-*•●○▪‣·]|[0-9]{1,3}[.)])\s")
_NOTICE = re.compile(
    r"(?:enable|requires?|without|turn on|activate) javascript|javascript (?:is|must be|seems to be) "
    r"|terms of (?:use|service)|privacy policy|cookie policy|(?:uses?|use of|accept(?: all)?) cookies"
    r"|启用\s?JavaScript|(?:使用|接受)\s?cookies?",
    re.IGNORECASE,
)
_NOTICE_HINTS = ("javascript", "cookie", "privacy policy", "terms of ")
_NOTICE_CHARACTERS = 200  # a longer line speaks of these things, it is not one of a page's own
_PAGE_LINES = 5  # with fewer lines a text is no page whose lines could be judged
_TOP_COUNT = 4  # in a short text an n-gram may well stand two or three times


def without_notices(text: str) -> tuple[str, int]:
    """The text without the lines in which a web page speaks of scripts, cookies and terms, and how many those were."""
    lower = text.lower()
    if not any(hint in lower for hint in _NOTICE_HINTS):
        return text, 0
    lines = text.split("\n")
    kept = [line for line in lines if len(line) > _NOTICE_CHARACTERS or not _NOTICE.search(line)]
    return "\n".join(kept).strip(), len(lines) - len(kept)


def broken_rules(text: str, units: TextUnits, language: str, rules: Quality) -> Iterator[str]:
    """The names of the rules that a text breaks, cheapest first, those of ``rules.skip`` left out."""
    for name in _broken_rules(text, units, language, rules):
        if name not in rules.skip:
            yield name


def _broken_rules(text: str, units: TextUnits, language: str, rules: Quality) -> Iterator[str]:
    spaceless = units.spaceless
    letters = int(units.lengths.sum())
    count = letters if spaceless else len(units)
    low, high = (
        (rules.min_characters, rules.max_characters) if spaceless else (rules.min_words, rules.max_words)
    )  # fmt: skip
    if count < low:
        yield "too_short"
    if count > high:
        yield "too_long"
    if rules.lorem_ipsum and "lorem ipsum" in text.lower():
        yield "lorem_ipsum"
    if rules.curly_brackets and "{" in text:
        yield "curly_brackets"
    if not count:
        return
    if not spaceless and not rules.min_word_length <= letters / count <= rules.max_word_length:
        yield "word_length"
    if (text.count("#") + len(_ELLIPSIS.findall(text))) / count > rules.max_symbols:
        yield "symbols"
    visible = len("".join(text.split()))
    if sum(map(str.isalpha, text)) < rules.min_letters * visible:
        yield "few_letters"
    if language == "en" and not spaceless and len(_STOP_WORDS.intersection(units.units)) < rules.min_stop_words:
        yield "stop_words"
    if rules.min_sentences > 1 and len(_SENTENCE_END.findall(text)) < rules.min_sentences:
        yield "few_sentences"
    yield from _broken_line_rules(text, spaceless, rules)
    yield from _broken_ngram_rules(units, 2 if spaceless else 1, rules)


def _broken_line_rules(text: str, spaceless: bool, rules: Quality) -> Iterator[str]:
    lines = [line for line in text.split("\n") if line.strip()]
    if len(lines) >= _PAGE_LINES:
        ends = [line.rstrip(_CLOSING) for line in lines]
        ended = [end[-1:] in _LINE_ENDS for end in ends]
        short = rules.short_line / 3 if spaceless else rules.short_line
        if sum(1 for line in lines if _BULLET.match(line)) > rules.max_bullet_lines * len(lines):
            yield "bullet_lines"
        if sum(1 for end in ends if end.endswith(("…", "...", "。。。"))) > rules.max_ellipsis_lines * len(lines):
            yield "ellipsis_lines"
        if sum(ended) < rules.min_punctuated_lines * len(lines):
            yield "unpunctuated_lines"
        if sum(
            1 for line, end in zip(lines, ended, strict=True) if not end and len(line) < short
        ) > rules.max_short_lines * len(lines):
            yield "short_lines"
    if _repeats(lines, rules.max_repeated_lines, rules.max_repeated_line_characters):
        yield "repeated_lines"
    paragraphs = [paragraph for paragraph in text.split("\n\n") if paragraph.strip()]
    if _repeats(paragraphs, rules.max_repeated_paragraphs, rules.max_repeated_paragraph_characters):
        yield "repeated_paragraphs"


def _repeats(parts: Sequence[str], most: float, most_characters: float) -> bool:
    """Whether more than these shares of ``parts``, or of their characters, stood there before."""
    repeated = len(parts) - len(set(parts))
    if not repeated:
        return False
    characters = sum(map(len, parts))
    return repeated > most * len(parts) or characters - sum(map(len, set(parts))) > most_characters * characters


def _broken_ngram_rules(units: TextUnits, scale: int, rules: Quality) -> Iterator[str]:
    """Repetition within a text. ``scale`` makes n-grams longer where units are characters."""
    lengths = units.lengths
    total = lengths.sum()
    for n, limit in enumerate(rules.max_top_ngrams, start=2):
        hashes = units.ngrams(n * scale)
        if not len(hashes):
            break
        _, first, counts = np.unique(hashes, return_index=True, return_counts=True)
        top = int(counts.argmax())
        if (
            counts[top] >= _TOP_COUNT
            and counts[top] * lengths[first[top] : first[top] + n * scale].sum() > limit * total
        ):
            yield "top_ngrams"
            break
    for n, limit in enumerate(rules.max_repeated_ngrams, start=5):
        hashes = units.ngrams(n * scale)
        if not len(hashes):
            break
        _, first = np.unique(hashes, return_index=True)
        again = np.ones(len(hashes), np.int64)
        again[first] = 0
        # A unit is repeated if any n-gram over it is: +1 where one begins, -1 after it ends, summed along the text.
        edges = np.zeros(len(units) + 1, np.int64)
        edges[: len(again)] += again
        edges[n * scale : n * scale + len(again)] -= again
        repeated = lengths[np.cumsum(edges[:-1]) > 0].sum()
        if repeated > limit * total:
            yield "repeated_ngrams"
            break
        if repeated <= min(rules.max_repeated_ngrams) * total:
            break  # what longer n-grams repeat, shorter ones repeat too
