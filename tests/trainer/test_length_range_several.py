"""Requests with several numbers: two bounds, texts that are there already, pages, metres."""

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
