"""The quality rules drop what is not prose, in English and in Chinese, and leave prose and verse alone."""

from __future__ import annotations

import pytest

from gale.data.cleaning_recipe import Languages, Quality
from gale.data.languages import identify, rejected
from gale.data.quality import broken_rules, without_notices
from gale.data.text_units import TextUnits
from tests.tiny_data import SENTENCES

ENGLISH = (
    "The heron stood in the shallow water and waited for a fish. It had been there since the morning, quite still, "
    "and the children who came by thought that it was made of stone. Then a fish came, and the heron was faster."
)
CHINESE = (
    "白鹭站在浅水里，等着一条鱼。它从早晨起就在那里，一动也不动，路过的孩子们都以为它是石头做的。"
    "后来鱼来了，白鹭比鱼更快。孩子们吓了一跳，笑着跑回家去，把这件事讲给奶奶听。"
)
VERSE = "\n".join(["床前明月光，", "疑是地上霜。", "举头望明月，", "低头思故乡。", "白日依山尽，", "黄河入海流。"])
MENU = "\n".join(["Home", "About us", "Products", "Contact", "Log in", "Sign up for the news", "Help", "The shop"] * 4)
MENU_ZH = "\n".join(["首页", "关于我们", "产品中心", "联系我们", "登录", "注册新用户", "帮助中心", "网上商店"])


def broken(text: str, **rules: object) -> set[str]:
    return set(broken_rules(text, TextUnits(text), identify(text)[0], Quality.model_validate(rules)))


@pytest.mark.parametrize("text", [ENGLISH, CHINESE, VERSE, f"{ENGLISH}\n\n{CHINESE}", f"# Herons\n\n{ENGLISH}"])
def test_prose_and_verse_break_no_rule(text: str) -> None:
    assert broken(text) == set()


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("Too short to keep.", "too_short"),
        ("太短。", "too_short"),
        (MENU, "short_lines"),
        (MENU_ZH, "unpunctuated_lines"),
        (ENGLISH + " Lorem ipsum dolor sit amet.", "lorem_ipsum"),
        (
            "\n".join(f"- the point of that number {word}" for word in "abcdef"),
            "bullet_lines",
        ),
        ("\n".join(f"{line} and so on with the rest of it..." for line in ENGLISH.split(", ") * 2), "ellipsis_lines"),
        ("2 4 6 8 10 12 14 16 the and " * 5 + "3.5 | 4.5 | 5.5 | 6.5 | 7.5 | 8.5 | 9.5 | 10.5", "few_letters"),
        ("价格 1234.56 | 2345.67 | 3456.78 | 4567.89 | 一二三四五六七八九十" + "一二三四五六七八九十", "few_letters"),
        ("#the #and #heron #stood #of #water #fish #that #be #to " * 3, "symbols"),
        ("a b c d e f g h i j the of a b c d e f g h i j k l m n o p", "word_length"),
        ("Herons stood; waters waited. Children laughed, grandmothers listened." * 4, "stop_words"),
        ("\n".join([ENGLISH] * 5), "repeated_lines"),
        ("\n\n".join([CHINESE] * 5), "repeated_paragraphs"),
        ("Buy the best shoes and bags now. " * 20, "repeated_ngrams"),
        ("本店出售优质皮鞋和皮包欢迎选购。" * 20, "repeated_ngrams"),
        (" ".join(f"best shoes {word}" for word in ENGLISH.split()), "top_ngrams"),
    ],
)
def test_what_is_not_prose_breaks_a_rule_that_says_why(text: str, rule: str) -> None:
    assert rule in broken(text)
    assert rule not in broken(text, skip=[rule])


def test_rules_about_words_do_not_judge_scripts_without_spaces() -> None:
    text = "ราชอาณาจักรไทยเป็นรัฐชาติอันตั้งอยู่ในเอเชียตะวันออกเฉียงใต้มีพรมแดนด้านตะวันออกติดประเทศลาว"
    for spaceless in (CHINESE, text, "彼は毎朝早く起きて、庭の花に水をやり、それから静かに朝食を取るのが好きだった。"):
        assert not {"word_length", "stop_words"} & broken(spaceless)
    assert "stop_words" not in broken("Der Reiher stand im flachen Wasser und wartete auf einen Fisch. " * 2)


def test_original_thresholds_can_be_had_back() -> None:
    assert broken(ENGLISH, min_words=50) == {"too_short"}
    assert "few_sentences" in broken("And that is all the heron had to say " * 2, min_sentences=3)
    assert "curly_brackets" in broken(ENGLISH + " {}", curly_brackets=True)


@pytest.mark.parametrize("what", ["words", "characters", "word_length"])
def test_bounds_between_which_nothing_lies_are_refused(what: str) -> None:
    with pytest.raises(ValueError, match=f"min_{what} is 9.*, more than max_{what}, 8.*, so that nothing passes"):
        Quality.model_validate({f"min_{what}": 9, f"max_{what}": 8})
    Quality.model_validate({f"min_{what}": 9, f"max_{what}": 9})


def test_lines_about_scripts_and_cookies_are_cut_and_prose_about_them_stays() -> None:
    page = f"Please enable JavaScript to go on.\n{ENGLISH}\nThis site uses cookies.\n我们使用 Cookie 记住你。"
    assert without_notices(page) == (ENGLISH, 3)
    essay = "She read the privacy policy to the end, which nobody had done before. " * 4 + "So."
    assert without_notices(essay) == (essay, 0)


def test_languages_are_told_apart_with_their_confidence() -> None:
    assert identify(ENGLISH)[0] == "en"
    assert identify(CHINESE)[0] == "zh"
    assert identify("Der Reiher stand im flachen Wasser und wartete auf einen Fisch.")[0] == "de"
    assert identify("12345 ... 678") == ("und", 0.0)
    keep = Languages(keep=("en", "zh"), min_confidence=0.3)
    assert [rejected(keep, *identify(text)) for text in SENTENCES] == [None] * len(SENTENCES)
    assert rejected(keep, "de", 0.99) == "other_language"
    assert rejected(keep, "en", 0.1) == "unsure_language"
