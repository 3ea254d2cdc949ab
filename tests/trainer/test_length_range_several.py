"""Requests with several numbers: two bounds, texts that are there already, pages, metres."""

import time

import pytest

from lwz_trainer.data.length_range import explicit_length_range

TWO_BOUNDS: dict[str, tuple[int, int] | None] = {
    "字数不少于600字，不超过800字": (600, 800),
    "不少于3000字，不超过5000字的小说": (3000, 5000),
    "写一篇游记，1500字以上，2000字以内": (1500, 2000),
    "最少1500字，最多2000字": (1500, 2000),
    "字数要求：不少于1500，不超过2000": (1500, 2000),
    "1000字≤字数≤2000字": (1000, 2000),
    "1000≤字数≤2000": (1000, 2000),
    "不得少于600字，也不得超过八百字": (600, 800),
    "写一篇作文，大于1000字小于1500字": (1000, 1500),
    "字数在1500以上，2000以下": (1500, 2000),
    "最多2000字，最少1500字": (1500, 2000),
    "字数上限为2000，下限为1500": (1500, 2000),
    "至少六百字，但不要超过八百字。": (600, 800),
    "不少于两页，不超过三页": (1600, 2400),
    "Minimum 500 words, maximum 800 words": (500, 800),
    "at least 3000 words, maximum 5000 words": (3000, 5000),
    "no less than 1000 words and not more than 1500": (1000, 1500),
    "more than 500 words but less than 800": (500, 800),
    "Write an essay of at least 500 words (max 800).": (500, 800),
    "The minimum is 500 words. The maximum is 800 words.": (500, 800),
    "Word count: min 500, max 800": (500, 800),
    "500 words minimum, 800 words maximum": (500, 800),
    "1500 words minimum, 2000 max, on the tea trade": (1500, 2000),
    "Max 800 words, min 500.": (500, 800),
    "It must be over 900 words but should not exceed 1,200 words": (900, 1200),
    "a minimum of 500 and a maximum of 800 words": (500, 800),
    "Write a report, at least 3 pages but no more than 4.": (1500, 2000),
    "500 ≤ word count ≤ 800": (500, 800),
    "1000 words and no more": (900, 1000),
    "Write a script of min 1500 words & max 2000 words": (1500, 2000),
    # no two bounds of one piece
    "An abstract of at least 100 words and a body of at most 2000 words": (1800, 2000),
    "Write at least 1500 words and use no more than 10 sources": (1500, 1650),
    "Write at least 600 words in at most 3 paragraphs": (600, 660),
    "At most 800 words, at least 3 examples": (720, 800),
    "摘要不少于200字，正文不超过2000字": (1800, 2000),
    "每段不少于300字，全文不少于1500字": (1500, 1650),
    "不少于800字，不超过5个段落": (800, 880),
}


@pytest.mark.parametrize(("prompt", "expected"), TWO_BOUNDS.items())
def test_explicit_length_range_joins_the_bounds_of_one_piece(
    prompt: str, expected: tuple[int, int] | None
) -> None:
    assert explicit_length_range(prompt) == expected


OTHER_TEXTS: dict[str, tuple[int, int] | None] = {
    "I am writing an 80,000 word novel. Write the first chapter, about 3000 words.": (2700, 3300),
    "I'm writing a 10,000 word dissertation on bees. Write an introduction of 500 words": (
        450,
        550,
    ),
    "Write a 1500-word review of the book, which has 450 pages": (1350, 1650),
    "Write a summary of a 300-page book in 1000 words": (900, 1100),
    "Write the first chapter (3000 words) of a 90,000-word novel.": (2700, 3300),
    "Write the first chapter of a 90,000-word novel.": None,
    "Write an introduction for a 3000 word essay on salt.": None,
    "We have just finished a 5000 word report. Write a 400 word abstract.": (360, 440),
    "Based on a 6,000 word story I wrote, write a 900-word sequel.": (810, 990),
    "My thesis is 40,000 words. Write a 300-word abstract of it.": (270, 330),
    "I need help writing a 500 word essay on tides.": (450, 550),
    "I want to write a 2000-word story; please write it.": (1800, 2200),
    "Write a 30,000-word saga. Its villain speaks 400 words at the end.": None,
    "我正在写一部20万字的小说，请写第一章，约3000字": (2700, 3300),
    "写一部20万字的小说的第一章，3000字": (2700, 3300),
    "我写了一篇5000字的论文，请写300字的摘要": (270, 330),
    "为一本300页的书写1000字的书评": (900, 1100),
    "我的论文有2万字，写一篇600字的答辩稿": (540, 660),
    "帮我写一篇800字的作文": (720, 880),
    "我要写一篇八百字的作文": (720, 880),
    # pages beside words
    "5 page paper (1500 words)": (1350, 1650),
    "4-5 pages (about 1200 words)": (1080, 1320),
    "About 1500 words or 3 pages on silk": (1350, 1650),
    "写一份3页的报告（约1500字）": (1350, 1650),
    "Write a 10-page report with a 200-word abstract.": (4500, 5500),
    "写一份5页的报告，附200字的摘要": (3600, 4400),
    "Write a 250-word abstract.": (225, 275),
}

NUMBERS: dict[str, tuple[int, int] | None] = {
    "2 000 word essay": (1800, 2200),
    "Write 1 500 word on salt": (1350, 1650),
    "Write 1 500 to 2 000 words on salt": (1500, 2000),
    "写一篇2 000字的散文": (1800, 2200),
    "Write 2 500-word essays.": (900, 1100),
    "Write three 500-word essays on salt.": (1350, 1650),
    "Write a 500-to-700-word essay": (500, 700),
    "Write a 1,000- to 1,200-word feature": (1000, 1200),
    "three to four hundred words": (300, 400),
    "from fifty to one hundred words": (50, 100),
    "two thousand and five hundred words": (2250, 2750),
    "two thousand, five hundred words": (2250, 2750),
    "between one thousand and fifteen hundred words": (1000, 1500),
    "2千5百字": (2250, 2750),
    "写一篇1万2千字的小说": (10800, 12000),
    "3千5字左右": (3150, 3850),
    "千千万万的人，写一篇800字的文章": (720, 880),
    "essay 1000 words +/- 10%": (900, 1100),
    "An essay of 1000 words (± 100 words)": (900, 1100),
    "1500字±10%": (1350, 1650),
    "Write 500 or more words about rain": (500, 550),
}

LABELS: dict[str, tuple[int, int] | None] = {
    "Write a poem. Length: 10 stanzas": None,
    "Write a story. Length: 3 chapters": None,
    "Write a report about a bridge with a length of 2000 meters": None,
    "The song should have a length of 32 bars": None,
    "Write about a ship of length 300 feet": None,
    "介绍长江大桥，全桥长度1670米，写一篇说明文": None,
    "写一篇关于我国公路总长度500万公里的文章": None,
    "写一篇关于长度为2000米的大桥的报告": None,
    "篇幅：3章": None,
    "字数不限，写于1984年": None,
    "Length: 2000\nTone: formal": (1800, 2200),
    "Word count: 2000 (excluding references)": (1800, 2200),
    "Length: 1000-1500, topic: rivers": (1000, 1500),
    "篇幅：2000左右": (1800, 2200),
    "Word count: approx. 1,200": (1080, 1320),
    "Word limit - 750": (675, 750),
    "Write 1000 words on each of the following: tea, coffee": None,
    "Don't write less than 1500 words!": (1500, 1650),
    "最低800字": (800, 880),
    "800字起": (800, 880),
    "至少写够1000字": (1000, 1100),
    "Keep it below 600 words": (540, 600),
    "Keep it above 600 words": (600, 660),
    "字数≥1000": (1000, 1100),
    "字数<=1000": (900, 1000),
}


@pytest.mark.parametrize(("prompt", "expected"), OTHER_TEXTS.items())
def test_explicit_length_range_is_that_of_the_piece(
    prompt: str, expected: tuple[int, int] | None
) -> None:
    assert explicit_length_range(prompt) == expected


@pytest.mark.parametrize(("prompt", "expected"), [*NUMBERS.items(), *LABELS.items()])
def test_explicit_length_range_reads_numbers_and_labels(
    prompt: str, expected: tuple[int, int] | None
) -> None:
    assert explicit_length_range(prompt) == expected


@pytest.mark.parametrize("unit", ["1 ", "one ", "at least 1, ", "一", "万", "2千", "≤", " ", "5-"])
def test_explicit_length_range_takes_linear_time(unit: str) -> None:
    def seconds(num_characters: int) -> float:
        prompt = unit * (num_characters // len(unit)) + " 字x"
        start = time.perf_counter()
        explicit_length_range(prompt)
        return time.perf_counter() - start

    short = min(seconds(500) for _ in range(3))
    long = min(seconds(4_000) for _ in range(2))
    assert long < 25 * short + 0.01  # 8 times as long; a square would be 64 times
