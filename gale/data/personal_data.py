"""Personal data and secrets, found by their form and replaced by placeholders such as ``<email>``.

Precision comes first: a number is taken for an identity or a card only where its check digit is right, and for a
passport only where the text says so. Names, addresses and whatever has no form of its own stay: this is not
anonymisation.
"""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from collections.abc import Callable
from datetime import date
from typing import NamedTuple

from gale.data.cleaning_recipe import PersonalData

# Chinese text puts no space before a number, so "beside no word character" has to mean ASCII ones.
_EMAIL = re.compile(
    r"(?<![A-Za-z0-9._%+/-])[A-Za-z0-9][A-Za-z0-9._%+-]{0,63}@(?:[A-Za-z0-9][A-Za-z0-9-]{0,62}\.)+"
    r"([A-Za-z]{2,24})(?![A-Za-z0-9@]|-[A-Za-z0-9]|\.[A-Za-z0-9]|:[A-Za-z0-9~])"
)
# What looks like the end of an address but is a file's: icon@2x.png.
_FILE_ENDINGS = frozenset(
    "png jpg jpeg gif svg webp ico css js ts jsx tsx json html htm md txt py java cpp xml yml yaml zip gz tar".split()  # noqa: SIM905
)

# +86 138 0013 8000, +1 (555) 234-5678, +44 20 7946 0958
_INTERNATIONAL = r"\+[1-9]\d{0,2}(?:[ .-]?\(\d{1,4}\))?(?:[ .-]?\d{2,5}){2,5}"
_CHINESE_MOBILE = r"(?:1(?:3\d|4[5-9]|5[0-35-9]|6[2567]|7[0-8]|8\d|9[0-35-9]))(?:\d{8}|([ -])\d{4}\1\d{4})"
_CHINESE_LANDLINE = (
    r"(?:[(（]0(?:10|2\d|[3-9]\d{2})[)）] ?|0(?:10|2\d|[3-9]\d{2})[ -])[2-9]\d{6,7}(?:[ -]?(?:转|ext\.?) ?\d{1,5})?"
)
# Not hotlines, which are nobody's own: 800 and its like, 400 in China.
_NORTH_AMERICAN = r"(?!\(?(?:400|8(?:00|33|44|55|66|77|88)))(?:\([2-9]\d{2}\) ?|[2-9]\d{2}-)[2-9]\d{2}-\d{4}"
_NOT_WITHIN_NUMBER = r"(?<![A-Za-z0-9_+./=-])"
_NUMBER_ENDS = r"(?![A-Za-z0-9_]|[.,/-]\d|%)"
_PHONE = re.compile(
    _NOT_WITHIN_NUMBER
    + rf"(?:{_INTERNATIONAL}|(?:\+?86[ -]?)?{_CHINESE_MOBILE}|{_CHINESE_LANDLINE}|{_NORTH_AMERICAN})"
    + _NUMBER_ENDS
)

_ID_NUMBER = re.compile(r"(?<![A-Za-z0-9_.])[1-8]\d{5}(?:19|20)\d{9}[0-9Xx](?![A-Za-z0-9_]|\.\d)")
_PROVINCES = frozenset(
    "11 12 13 14 15 21 22 23 31 32 33 34 35 36 37 41 42 43 44 45 46 50 51 52 53 54 61 62 63 64 65 71 81 82 83".split()  # noqa: SIM905
)
_ID_WEIGHTS = tuple(2 ** (17 - i) % 11 for i in range(17))  # GB 11643-1999, which is ISO 7064 MOD 11-2

_BANK_CARD = re.compile(
    _NOT_WITHIN_NUMBER + r"(?:\d{14,19}|\d{4}([ -])\d{4}\1\d{4}\1\d{4}(?:\1\d{1,3})?|\d{4}([ -])\d{6}\2\d{5})"
    + _NUMBER_ENDS
)  # fmt: skip
# Issuers' first digits and how long their numbers are (ISO/IEC 7812).
_ISSUERS = re.compile(
    r"(?:4\d{15}|4\d{18}|5[1-5]\d{14}|2(?:22[1-9]|2[3-9]\d|[3-6]\d\d|7[01]\d|720)\d{12}|3[47]\d{13}|62\d{14,17}"
    r"|9558\d{15}|60[0-9]{14,17}|6011\d{12}|64[4-9]\d{13}|65\d{14}|35(?:2[89]|[3-8]\d)\d{12}|3(?:0[0-5]|[68]\d)\d{11})"
)

_PASSPORT = re.compile(
    r"((?:护照(?:号码|号|编号)?(?:是|为)?|\bpassport(?: (?:no|number|nr))?\.?(?: is)?)\s{0,2}[:：#]?\s{0,2})"
    r"(?:[A-Z]{1,2}\d{6,8}|\d{9})(?![A-Za-z0-9_])",
    re.IGNORECASE,
)

_SECRET = re.compile(
    r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY(?: BLOCK)?-----(?:(?!-----BEGIN ).){1,20000}?"
    r"-----END (?:[A-Z]+ )*PRIVATE KEY(?: BLOCK)?-----"
    r"|(?<![A-Za-z0-9_])(?:"
    r"(?:AKIA|ASIA)[A-Z0-9]{16}"  # AWS access key
    r"|gh[pousr]_[A-Za-z0-9]{36,251}|github_pat_[A-Za-z0-9]{22}_[A-Za-z0-9]{59}"
    r"|glpat-[A-Za-z0-9_-]{20}"
    r"|sk-(?:proj-|svcacct-|admin-|ant-api\d\d-|or-v1-)?(?=[A-Za-z_-]{0,200}\d)(?=[a-z0-9_-]{0,200}[A-Z]|[a-f0-9]{32})"
    r"[A-Za-z0-9_-]{20,200}"
    r"|(?:sk|rk)_live_[A-Za-z0-9]{20,200}"  # Stripe
    r"|xox[abprs]-\d{8,}-[A-Za-z0-9-]{20,200}"  # Slack
    r"|AIza[A-Za-z0-9_-]{35}"  # Google
    r"|hf_(?=[A-Za-z]*[A-Z])(?=[A-Za-z]*[a-z])[A-Za-z]{34}"
    r"|(?<!-)eyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{20,}"  # JSON Web Token
    r")(?![A-Za-z0-9])",
    re.DOTALL,
)
_SECRET_HINTS = (
    *("PRIVATE KEY", "AKIA", "ASIA", "ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_", "glpat-", "sk-"),
    *("_live_", "xox", "AIza", "hf_", "eyJ"),
)
# A name that says what stands after it, for secrets without a form of their own.
_NAMED_SECRET = re.compile(
    r"""(aws_secret_access_key|AccountKey)(["']?\s{0,3}[:=]\s{0,3}["']?)[A-Za-z0-9/+]{40,86}={0,2}(?![A-Za-z0-9/+=])""",
    re.IGNORECASE,
)

_IPV4 = re.compile(r"(?<![A-Za-z0-9_.-])(?:\d{1,3}\.){3}\d{1,3}(?![A-Za-z0-9_-]|\.\d)")
_IPV6 = re.compile(r"(?<![A-Za-z0-9_:.])(?=[0-9a-fA-F:]*:[0-9a-fA-F:]*:)[0-9a-fA-F:]{3,39}(?![A-Za-z0-9_:])")
_VERSION_BEFORE = re.compile(r"(?:\bv|\bversion|\brelease|版本)\s{0,2}[:：]?\s{0,2}$", re.IGNORECASE)


def redact(text: str, recipe: PersonalData) -> tuple[str, Counter[str]]:
    """The text with placeholders, and how many of each kind were put in. Redacting twice changes nothing more."""
    counts: Counter[str] = Counter()
    digits = _enough_digits(text)
    for detector in _DETECTORS:
        if getattr(recipe, detector.kind) and (
            any(hint in text for hint in detector.hints) if detector.hints else digits
        ):
            text = _replace(text, detector, counts)
    return text, counts


def is_resident_id(number: str) -> bool:
    """Whether 18 digits are a Chinese resident identity number: province, date of birth and check digit."""
    if number[:2] not in _PROVINCES:
        return False
    try:
        born = date(int(number[6:10]), int(number[10:12]), int(number[12:14]))
    except ValueError:
        return False
    if not 1900 <= born.year <= 2099:
        return False
    total = sum(int(digit) * weight for digit, weight in zip(number, _ID_WEIGHTS, strict=False))
    return number[17].upper() == "10X98765432"[total % 11]


def is_bank_card(number: str) -> bool:
    """Whether digits are a card number: a known issuer's length and prefix, and the check digit of Luhn (ISO 7812)."""
    if not _ISSUERS.fullmatch(number):
        return False
    doubled = (int(digit) * (2 if i % 2 else 1) for i, digit in enumerate(reversed(number)))
    return sum(value - 9 if value > 9 else value for value in doubled) % 10 == 0


def _is_phone(found: re.Match[str]) -> bool:
    number = found[0]
    digits = sum(character.isdigit() for character in number)
    return 8 <= digits <= 15 if number.startswith("+") else True


def _is_email(found: re.Match[str]) -> bool:
    return found[1].lower() not in _FILE_ENDINGS and ".." not in found[0]


def _is_public_ip(found: re.Match[str]) -> bool:
    parts = [part for part in re.split("[.:]", found[0]) if part]
    if "." in found[0] and sum(len(part) > 1 for part in parts) < 2:  # 2.3.1.3 is a section
        return False
    if ":" in found[0] and len(parts) < 3:  # a::b is a name in C++, ::2 a step in Python
        return False
    if _VERSION_BEFORE.search(found.string[max(0, found.start() - 12) : found.start()]):
        return False
    try:
        return ipaddress.ip_address(found[0]).is_global
    except ValueError:
        return False


def _any(_: re.Match[str]) -> bool:
    return True


class _Detector(NamedTuple):
    kind: str
    pattern: re.Pattern[str]
    accepts: Callable[[re.Match[str]], bool]
    hints: tuple[str, ...]  # the pattern is only tried on texts with one of these; with none, on texts with numbers
    replacement: str = ""


_DETECTORS = (
    _Detector("secret", _SECRET, _any, _SECRET_HINTS),
    _Detector("secret", _NAMED_SECRET, _any, ("ey",), r"\1\2<secret>"),
    _Detector("email", _EMAIL, _is_email, ("@",)),
    _Detector("id_number", _ID_NUMBER, lambda found: is_resident_id(found[0]), ()),
    _Detector("bank_card", _BANK_CARD, lambda found: is_bank_card(re.sub("[ -]", "", found[0])), ()),
    _Detector("passport", _PASSPORT, _any, (), r"\1<passport>"),
    _Detector("phone", _PHONE, _is_phone, ()),
    _Detector("ip", _IPV4, _is_public_ip, (".",)),
    _Detector("ip", _IPV6, _is_public_ip, (":",)),
)
_DIGITS = re.compile(r"\d(?:[ ().（）-]{0,2}\d){5}")


def _enough_digits(text: str) -> bool:
    return _DIGITS.search(text) is not None


def _replace(text: str, detector: _Detector, counts: Counter[str]) -> str:
    def replacement(found: re.Match[str]) -> str:
        if not detector.accepts(found):
            return found[0]
        counts[detector.kind] += 1
        return found.expand(detector.replacement) if detector.replacement else f"<{detector.kind}>"

    return detector.pattern.sub(replacement, text)
