"""Personal data is replaced where its form proves it, in Chinese text too, and what only looks like it stays."""

from __future__ import annotations

import random
import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gale.data.cleaning_recipe import PersonalData
from gale.data.personal_data import is_bank_card, is_resident_id, redact

ALL = PersonalData(ip=True)
# Put together here, so that nobody's scanner takes this file for a leak.
AWS, GITHUB, OPENAI = "AKIA" + "IOSFODNN7EXAMPLE", "ghp_" + "a1B2" * 9, "sk-" + "proj-" + "aB3dEfGh1JkLmN0pQrSt"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Write to anna.li+news@mail.example.co.uk.", "Write to <email>."),
        ("邮箱abc_123@qq.com，电话13800138000。", "邮箱<email>，电话<phone>。"),
        ("手机：138 0013 8000 或 138-0013-8000", "手机：<phone> 或 <phone>"),
        ("+86 13800138000; +8613800138000; 86-13800138000", "<phone>; <phone>; <phone>"),
        ("座机010-62345678转801，或（0755）26345678。", "座机<phone>，或<phone>。"),
        ("Call +44 20 7946 0958 or +1 (555) 234-5678.", "Call <phone> or <phone>."),
        ("Call (212) 555-0123 or 212-555-0123.", "Call <phone> or <phone>."),
        ("身份证号11010519491231002X，请核对", "身份证号<id_number>，请核对"),
        ("Card 4111 1111 1111 1111, or 378282246310005", "Card <bank_card>, or <bank_card>"),
        ("卡号6222021234567890128。", "卡号<bank_card>。"),
        ("护照号码：E12345678", "护照号码：<passport>"),
        ("her passport no. X1234567", "her passport no. <passport>"),
        (f"key={AWS} and {GITHUB}", "key=<secret> and <secret>"),
        (f'api_key = "{OPENAI}"', 'api_key = "<secret>"'),
        (
            "aws_secret_access_key = " + "wJalrXUtnFEMI/K7MDENG/" + "bPxRfiCYEXAMPLEKEY",
            "aws_secret_access_key = <secret>",
        ),
        ("-----BEGIN RSA PRIVATE KEY-----\nMIIE\nAA\n-----END RSA PRIVATE KEY-----\nok", "<secret>\nok"),
        ("from 8.8.8.8 no, from 93.184.216.34 and 2606:2800:220:1:248:1893:25c8:1946", None),
    ],
)
def test_what_has_a_form_of_its_own_is_replaced(text: str, expected: str | None) -> None:
    expected = expected or "from 8.8.8.8 no, from <ip> and <ip>"
    assert redact(text, ALL)[0] == expected


@pytest.mark.parametrize(
    "text",
    [
        "On 2024-03-15 at 12:30:45, 2024/03/15, 20240315, 2024年3月15日",
        "Version 1.2.3.4, v10.20.30.40, chapter 2.3.1.3, Python 3.11.4",
        "ISBN 978-7-302-51164-9, ISBN 9787302511649, ISSN 1234-5678",
        "订单号：4111111111111112，快递单号 SF1234567890123",  # fails Luhn
        "编号110105194912310021",  # fails the check digit
        "编号110105194913310022",  # month 13
        "Order 1234567890123456, timestamp 1710489600000 and 1710489600",
        "0.13800138000 metres; 13800138000.55; 113800138000; x13800138000",
        "π = 3.14159265358979, e = 2.718281828459045",
        "Population 1,412,600,000; ¥12,345,678.90; 400-820-8820",
        "icon@2x.png, @decorator, git@github.com:owner/repo.git, a@b, pkg@1.2.3",
        "10.0.0.1, 127.0.0.1, 192.168.1.1 and ::1, std::vector, A::f(x), numbers[::3]",
        "sk-learn-contrib-is-a-long-package-name, task-based, hf_hub_download",
        "commit 4b825dc642cb6eb9a060e54bf8d69288fbee4904",
        "护照需要更换。passport control, E12345678",
        "-----BEGIN PUBLIC KEY-----\nMIIE\n-----END PUBLIC KEY-----",
        "1949-10-01 至 2019-10-01，第0755-2号文件，邮编100101",
        "RFC 2119, ISO 639-3, IEEE 754-2008, room 212-555",
    ],
)
def test_what_only_looks_like_it_stays(text: str) -> None:
    assert redact(text, ALL) == (text, {})


def with_check_digit(seventeen: str) -> str:
    """The 18 digits by GB 11643-1999, computed the other way round: the one that makes the whole sum 1 modulo 11."""
    for last in "0123456789X":
        digits = [10 if c == "X" else int(c) for c in seventeen + last]
        if sum(digit * pow(2, 17 - i, 11) for i, digit in enumerate(digits)) % 11 == 1:
            return seventeen + last
    raise AssertionError


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(["11", "31", "44", "51", "65"]),
    st.integers(0, 9999),
    st.dates(min_value=__import__("datetime").date(1900, 1, 1), max_value=__import__("datetime").date(2030, 1, 1)),
    st.integers(0, 999),
)
def test_resident_numbers_are_those_with_the_right_check_digit(province: str, place: int, born: object, n: int) -> None:
    number = with_check_digit(f"{province}{place:04}{born:%Y%m%d}{n:03}")
    assert is_resident_id(number)
    assert redact(f"号码{number}。", ALL)[0] == "号码<id_number>。"
    for last in set("0123456789X") - {number[-1]}:
        assert not is_resident_id(number[:-1] + last)


@settings(max_examples=200, deadline=None)
@given(st.from_regex(r"(4[0-9]{14}|5[1-5][0-9]{13}|62[0-9]{13,16})", fullmatch=True))
def test_of_ten_card_numbers_just_the_one_with_luhns_digit_is_a_card(start: str) -> None:
    right = [last for last in "0123456789" if is_bank_card(start + last)]
    assert len(right) <= 1  # none where no issuer has numbers of this length
    if len(start) in (15, 18):
        assert len(right) == 1


@settings(max_examples=300, deadline=None)
@example("a@b.cc@d.ee")
@given(st.text(st.sampled_from("ab1@.:-+ (){}<>/_=sk中文0123456789\n"), max_size=60))
def test_redacting_twice_changes_nothing_more_and_counts_what_it_put_in(text: str) -> None:
    once, counts = redact(text, ALL)
    again, more = redact(once, ALL)
    assert (again, more) == (once, {})
    for kind, count in counts.items():
        assert once.count(f"<{kind}>") - text.count(f"<{kind}>") == count


def test_ordinary_numbers_are_hardly_ever_taken_for_something_else() -> None:
    draw = random.Random(1)
    taken = 0
    for _ in range(20_000):
        length = draw.randint(6, 20)
        text = f"数字 {''.join(draw.choice('0123456789') for _ in range(length))}。"
        taken += sum(redact(text, ALL)[1].values())
    # Random digits: one 11-digit number in ten begins like a mobile number, one card number in ten passes Luhn's test.
    assert taken / 20_000 < 0.01


def test_each_kind_can_be_left_alone() -> None:
    text = "abc@qq.com 13800138000 11010519491231002X 4111111111111111 护照E12345678 " + AWS
    for kind in ("email", "phone", "id_number", "bank_card", "passport", "secret"):
        left = redact(text, PersonalData.model_validate({kind: False}))[0]
        assert f"<{kind}>" not in left
        assert len(re.findall(r"<\w+>", left)) == 5
