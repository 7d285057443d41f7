"""Customer messages for the example of a fine-tuning job, written for it: which of four desks should read each?

Half are English, half Chinese. A message says of a thing what is wrong with it, in one of several frames. Two sets are
held out: ``pairs`` of things and faults that were never trained on together, though each was alone; and ``words``,
things and faults of which none was trained on at all.
"""

from __future__ import annotations

import random

LABELS = ("billing", "delivery", "technical", "account")

# By label and language: things, and what one says of them.
_PARTS: dict[str, dict[str, tuple[list[str], list[str]]]] = {
    "billing": {
        "en": (
            ["invoice", "last bill", "refund", "payment", "credit note", "monthly charge", "receipt", "discount"],
            [
                "shows the wrong amount",
                "was charged twice",
                "has not reached my bank",
                "is higher than agreed",
                "lists a fee that I do not know",
                "was taken from the wrong card",
                "costs more than the price you quoted",
                "has the wrong tax on it",
            ],
        ),
        "zh": (
            ["发票", "上个月的账单", "退款", "付款", "月费", "收据", "优惠券", "扣款"],
            [
                "金额不对",
                "被扣了两次",
                "还没有到我的银行卡",
                "比说好的贵",
                "多收了钱",
                "扣错了卡",
                "价格和报价不一样",
                "税算错了",
            ],
        ),
    },
    "delivery": {
        "en": (
            ["parcel", "package", "order", "shipment", "box", "courier", "letter", "delivery van"],
            [
                "has not arrived yet",
                "was left in the rain",
                "went to my old street",
                "is three days late",
                "came to the wrong house",
                "arrived with a broken corner",
                "has been in the depot for a week",
                "never rang at my door",
            ],
        ),
        "zh": (
            ["包裹", "快递", "订单", "货物", "箱子", "快递员", "信件", "送货车"],
            [
                "还没有到",
                "放在雨里了",
                "送到了以前的街道",
                "晚了三天",
                "送错了门牌",
                "送来时压坏了",
                "在仓库停了一周",
                "没有按门铃",
            ],
        ),
    },
    "technical": {
        "en": (
            ["app", "website", "screen", "update", "printer", "software", "search page", "sound"],
            [
                "crashes when I open it",
                "stays black",
                "freezes after a minute",
                "shows an error message",
                "does not load",
                "has been very slow since Monday",
                "stopped working on my phone",
                "does not respond to any button",
            ],
        ),
        "zh": (
            ["应用", "网站", "屏幕", "更新", "打印机", "软件", "搜索页面", "声音"],
            [
                "一打开就崩溃",
                "一直是黑的",
                "一分钟后卡住",
                "显示错误信息",
                "加载不出来",
                "从周一起很慢",
                "在手机上不能用",
                "按什么键都没有反应",
            ],
        ),
    },
    "account": {
        "en": (
            [
                "password",
                "user name",
                "profile",
                "login",
                "e-mail address",
                "membership",
                "security question",
                "sign-in code",
            ],
            [
                "is no longer accepted",
                "needs to be changed",
                "was forgotten by my wife",
                "is locked",
                "must be deleted",
                "belongs to another person now",
                "should be in my new name",
                "cannot be reset",
            ],
        ),
        "zh": (
            ["密码", "用户名", "个人资料", "登录", "邮箱地址", "会员", "安全问题", "验证码"],
            [
                "不再被接受",
                "需要更改",
                "我忘记了",
                "被锁定了",
                "要注销",
                "现在是别人的",
                "要换成我的新名字",
                "不能重置",
            ],
        ),
    },
}
_FRAMES = {
    "en": [
        "My {thing} {fault}.",
        "Hello, the {thing} {fault}. Please help!",
        "The {thing} {fault}, what can I do?",
        "{fault}: that is my {thing}.",
    ],
    "zh": [
        "我的{thing}{fault}。",
        "你好，{thing}{fault}，请帮忙！",
        "{thing}{fault}，怎么办？",
        "请问，{thing}{fault}是为什么？",
    ],
}
QUESTION = "Which desk should read this message: billing, delivery, technical or account?\n\n{message}"


_KNOWN = 6  # of the eight things and faults each; the rest stand in the set ``words`` only

Row = dict[str, list[dict[str, str]]]


def rows(training: int, held_out: int, *, seed: int = 0) -> dict[str, list[Row]]:
    """``train`` and the held-out sets ``pairs`` and ``words``, in OpenAI's chat format, each label as often."""
    generator = random.Random(seed)
    found: dict[str, list[Row]] = {"train": [], "pairs": [], "words": []}
    for label in LABELS:
        sets = _messages(label)
        for name, count in (("train", training), ("pairs", held_out), ("words", held_out)):
            generator.shuffle(sets[name])
            found[name] += [_row(message, label) for message in sets[name][: count // len(LABELS)]]
    for part in found.values():
        generator.shuffle(part)
    return found


def _messages(label: str) -> dict[str, list[str]]:
    sets: dict[str, list[str]] = {"train": [], "pairs": [], "words": []}
    for language, (things, faults) in _PARTS[label].items():
        for i, thing in enumerate(things):
            for j, fault in enumerate(faults):
                if (i < _KNOWN) != (j < _KNOWN):
                    continue
                name = "words" if i >= _KNOWN else "pairs" if (i + j) % 3 == 0 else "train"
                for frame in _FRAMES[language]:
                    text = frame.format(thing=thing, fault=fault)
                    sets[name].append(text[0].upper() + text[1:])
    return sets


def _row(message: str, label: str) -> Row:
    question = {"role": "user", "content": QUESTION.format(message=message)}
    return {"messages": [question, {"role": "assistant", "content": label}]}
