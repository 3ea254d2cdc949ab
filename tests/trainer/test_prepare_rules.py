"""Requests that rules drop, and those that they must leave alone."""

import pytest

from lwz_trainer.config.prepare import RulesConfig
from lwz_trainer.prepare.rules import request_language, rule_against
from lwz_trainer.prepare.sources import SourceRow

BOTH = frozenset({"en", "zh"})

KEPT = [
    "Write a short story about a lighthouse keeper.",
    "Write a script for a play in two acts about a strike.",
    "Select a topic from the list where you feel at home and write an essay.",
    "Class 10: write an essay about the history of the city.",
    "How would Harry react to a new class of students? Write the scene.",
    "How do I excel in class? Write a long guide.",
    "Describe the python in the zoo's terrarium in 800 words.",
    "Write a programme for our summer festival; include all events.",
    "写一篇关于春天的作文，不少于八百字",
]
CODE = [
    "Write a Python script that renames my files please",
    "Fix this:\n```\nx = 1\n``` and tell me why",
    "create a function in JavaScript that sorts names for me",
    "#include <stdio.h> what does this header do here",
    "def add(a, b): explain what this does in words",
    "write a SQL query that gives all customers of a town",
    "I need an excel formula that sums column A",
    "please review\nint a;\nint b;\nint c;\nreturn;",
    "请帮我写一个程序计算平均值",
    "这段代码为什么报错",
]
IMAGES = [
    "As a prompt generator for Midjourney, write ten ideas",
    "a castle in the fog, dramatic light --ar 16:9",
    "write a Stable Diffusion text about a red bird",
]


@pytest.mark.parametrize("text", KEPT)
def test_writing_requests_pass_all_rules(text: str) -> None:
    assert rule_against(SourceRow(text, ""), RulesConfig(), BOTH) is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [(text, "program code") for text in CODE] + [(text, "image prompt") for text in IMAGES],
)
def test_code_and_image_prompts_are_dropped_unless_switched_off(text: str, reason: str) -> None:
    row = SourceRow(text, "")
    assert rule_against(row, RulesConfig(), BOTH) == reason
    rules = RulesConfig(drop_code=False, drop_image_prompts=False)
    assert rule_against(row, rules, BOTH) is None


def test_lengths_flags_and_languages() -> None:
    rules = RulesConfig(min_words=3, max_words=6)
    for text, reason in [
        ("", "empty"),
        ("two words", "too short"),
        ("just three words", None),
        ("this one has six words exactly", None),
        ("this one here has seven words exactly", "too long"),
        ("春天来了吗", None),
        ("春天", "too short"),
        ("напиши рассказ о море", "another language"),
    ]:
        assert rule_against(SourceRow(text, ""), rules, BOTH) == reason, text
    flagged = SourceRow("write a long story", "", is_flagged=True)
    assert rule_against(flagged, RulesConfig(min_words=1), BOTH) == "flagged as toxic or redacted"
    assert rule_against(flagged, RulesConfig(min_words=1, drop_flagged=False), BOTH) is None
    english = SourceRow("write a long story", "")
    assert rule_against(english, rules, frozenset({"zh"})) == "another language"


@pytest.mark.parametrize(
    ("text", "declared", "language"),
    [
        ("Write a story.", "", "en"),
        ("Write a story.", "English", "en"),
        ("Write a story.", "unknown", "en"),
        ("Escribe un cuento.", "Spanish", "other"),
        ("Écris une lettre à Zoë.", "", "en"),  # script alone cannot tell
        ("写一个故事", "", "zh"),
        ("写一个故事", "Chinese", "zh"),
        ("Translate 春 and write an essay", "", "zh"),  # as templates and rewards see it
        ("春の物語を書いて", "", "other"),
        ("이야기를 써 줘", "", "other"),
        ("Напиши рассказ", "", "other"),
        ("اكتب قصة", "", "other"),
        ("Write about the word λόγος", "", "en"),
        ("123 !!!", "", "en"),
    ],
)
def test_request_language(text: str, declared: str, language: str) -> None:
    assert request_language(text, declared) == language
