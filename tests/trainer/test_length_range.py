"""Explicit word counts in requests: English and Chinese, digits and words, bounds, pages, none."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lwz_trainer.data.length_range import MAX_WORDS, explicit_length_range
from lwz_trainer.data.numbers import parse_chinese, parse_english
from lwz_trainer.data.prompts import load_prompts

ENGLISH: dict[str, tuple[int, int] | None] = {
    # one count
    "Write a 2,000-word essay on tides.": (1800, 2200),
    "Write a 2000 word essay on tides.": (1800, 2200),
    "Write a 2000 words essay on tides.": (1800, 2200),
    "Write about tides in 500 words": (450, 550),
    "An essay of about 800 words on patience.": (720, 880),
    "roughly 1,200 words, please, on the harbour strike": (1080, 1320),
    "A Hong Kong travel guide, approximately 3000 words": (2700, 3300),
    "Write a report around 700 words long.": (630, 770),
    "I need exactly 150 words about my dog.": (135, 165),
    "Describe a rainy street. 60 words.": (54, 66),
    "Write a 6000-words paper based on the outline.": (5400, 6600),
    "Write 5000 words essay about walking": (4500, 5500),
    "Write me a 1.5k word story about a lighthouse": (1350, 1650),
    "write a 3k-word chapter": (2700, 3300),
    "Write a 2k words article on tea": (1800, 2200),
    "A 2.5 thousand word essay on glass": (2250, 2750),
    "Give a speech of 350 words for my sister's wedding.": (315, 385),
    "The story (900 words) should end at dawn.": (810, 990),
    "Word count: 750. Topic: the first snow.": (675, 825),
    "Topic: bread. Length: 400 words.": (360, 440),
    "Write a letter to the council, word count of 300.": (270, 330),
    "The word count should be 1200.": (1080, 1320),
    "Make the length about 500 words and keep it light.": (450, 550),
    "Write a 250-300 word bio": (250, 300),
    "Write a story, length: 600 words, hero: a postman": (540, 660),
    "Compose a 1,500-English-word article": (1350, 1650),
    "Write 1.500 words on Goethe.": (1350, 1650),
    "no fewer than five hundred (500) words": (500, 550),
    "An essay of two thousand (2,000) words": (1800, 2200),
    "Write 1500 ± 100 words on salt": (1350, 1650),
    "Write 1,500 +/- 10% words on salt": (1350, 1650),
    "Write 1500 words (+/- 10%) on salt": (1350, 1650),
    "Write an article of 1500 English words on salt.": (1350, 1650),
    "Write a 12000 words thesis": (10800, 12000),
    "Write a fifty-word note to my neighbour.": (45, 55),
    # counts in words
    "Write a two-thousand-word essay.": (1800, 2200),
    "Write two thousand words on bridges.": (1800, 2200),
    "a five hundred word story about frost": (450, 550),
    "Tell it in one hundred and fifty words.": (135, 165),
    "Write fifteen hundred words about the sea.": (1350, 1650),
    "Write a thousand words about one tree.": (900, 1100),
    "Write a thousand-word letter.": (900, 1100),
    "In twenty-five hundred words, explain enzymes.": (2250, 2750),
    "An essay of three hundred words": (270, 330),
    "A piece of two thousand five hundred words on rust": (2250, 2750),
    "Write a hundred words on gratitude": (90, 110),
    "in eighty words, describe my kitchen": (72, 88),
    "Write ten thousand words of a novel": (9000, 11000),
    # upper bounds
    "Write no more than 2,000 words on trade.": (1800, 2000),
    "In at most 300 words, say why.": (270, 300),
    "Answer in less than 200 words.": (180, 200),
    "Keep it under 400 words.": (360, 400),
    "Explain interest in fewer than 150 words": (135, 150),
    "Write up to 1000 words about wells.": (900, 1000),
    "The essay must not exceed 500 words.": (450, 500),
    "A cover letter, not exceeding 350 words": (315, 350),
    "Maximum 600 words: the case for trains.": (540, 600),
    "A maximum of 250 words on owls.": (225, 250),
    "Write a review, max 120 words.": (108, 120),
    "Write a review (120 words max).": (108, 120),
    "Write a eulogy, 500 words or less.": (450, 500),
    "Write a eulogy in 500 words or fewer.": (450, 500),
    "Describe the plan within 800 words.": (720, 800),
    "A summary of no longer than 100 words of Hamlet": (90, 100),
    "Limit your answer to 450 words.": (405, 450),
    "There is a limit of 650 words.": (585, 650),
    "a 300 word limit applies: why this college?": (270, 300),
    "Write the toast in five hundred words at most.": (450, 500),
    "It should be not more than 900 words.": (810, 900),
    "word limit: 700 words": (630, 700),
    "Write a bio (max. 200 words).": (180, 200),
    "Don't exceed 500 words.": (450, 500),
    "Make sure it doesn’t exceed 800 words": (720, 800),
    "It shouldn't be longer than 600 words.": (540, 600),
    "It should be less than 500 words.": (450, 500),
    "Do not go beyond 900 words": (810, 900),
    "A maximum length of 700 words, on bees": (630, 700),
    "The maximum word count is 1000.": (900, 1000),
    "Word count: max 500": (450, 500),
    "an abstract, ≤ 250 words": (225, 250),
    "no more then 400 words on mice": (360, 400),
    # lower bounds
    "Write at least 2,000 words on trade.": (2000, 2200),
    "The content should be no less than 200 words.": (200, 220),
    "at lease 300 words about habits": (300, 330),
    "Write no fewer than 1,000 words.": (1000, 1100),
    "A text of more than 5000 words about rain.": (5000, 5500),
    "Write over 800 words about my hometown.": (800, 880),
    "A minimum of 600 words is required.": (600, 660),
    "Minimum 400 words. Topic: glaciers.": (400, 440),
    "Write 1,500 words or more about Rome.": (1500, 1650),
    "Write 2000+ words on chess": (2000, 2200),
    "An essay, 700 words minimum, on fear": (700, 770),
    "The story should be at least 10000 words long.": (10000, 11000),
    "The piece must exceed 3000 words.": (3000, 3300),
    "at least one thousand words on whales": (1000, 1100),
    "not less than 900 words on courage": (900, 990),
    "A story (min. 500 words) about a goat": (500, 550),
    "The minimum length is 1200 words.": (1200, 1320),
    "The minimum word count is 1000.": (1000, 1100),
    "It shouldn't be less than 700 words.": (700, 770),
    "It must not be under 600 words.": (600, 660),
    "It should be longer than 2000 words.": (2000, 2200),
    "an essay, ≥ 800 words": (800, 880),
    # two bounds and ranges
    "Write 500-700 words on moss.": (500, 700),
    "Write 500–700 words on moss.": (500, 700),
    "Write between 500 and 700 words.": (500, 700),
    "Between five hundred and seven hundred words on moss": (500, 700),
    "from 800 to 1,000 words about kites": (800, 1000),
    "500 to 600 words, no grand conclusions": (500, 600),
    "500 words to 600 words about conkers": (500, 600),
    "An article of 1.5k-2k words": (1500, 2000),
    "a 2-3k word story": (2000, 3000),
    "1,000 to 1,200-word essay on mud": (1000, 1200),
    "Tell me in at least 900 but not more than 1000 words the story of a cook": (900, 1000),
    "at least 400 words and at most 500 words about ink": (400, 500),
    "no less than 300 words but no more than 450 words": (300, 450),
    "Word count: 800-1000": (800, 1000),
    "word limit between 300 and 400": (300, 400),
    "two to three thousand words on Lisbon": (2000, 3000),
    "Write 5,000 to 10,000 words on Rome.": (6000, 9000),  # 3,000 wide at most: the middle
    # pages and parts
    "Write a two-page memo on parking.": (900, 1100),
    "Write a 3-page story about a ferry.": (1350, 1650),
    "Write 2 pages on the Hanseatic League": (900, 1100),
    "A one-page letter to my landlord": (450, 550),
    "a 4 page double-spaced essay on Emma": (900, 1100),
    "Write 10 to 12 pages about coal": (5000, 6000),
    "Write at least five pages on Kant": (2500, 2750),
    "Write three sections of 400 words each on soil.": (1080, 1320),
    "Write five paragraphs of 100 words each.": (450, 550),
    "Give me 4 blog posts, 500 words each": (1800, 2200),
    "Write three letters of about 200 words each.": (540, 660),
    "Write a 1500-word essay with a 150-word abstract.": (1350, 1650),
    "A title of at most 10 words, then a story of 800 words.": (720, 880),
    "Summarise this 3000-word article in 200 words.": (180, 220),
    "Cut the following 900 words to a 300-word version.": (270, 330),
    "Shorten my 1,000 word essay to under 650 words": (585, 650),
    # beyond the limit
    "Write a 20,000-word novella.": (0, 0),
    "Write at least 15000 words about the war.": (0, 0),
    "Write 50k words for my novel": (0, 0),
    "Write a 100-page report": (0, 0),
    "Write 12,000 words of an article about rivers": (10800, 12000),
    # none
    "Write a long essay about tides.": None,
    "Write a story that a child would like, in simple words.": None,
    "In other words, what is entropy?": None,
    "Don't use any words a young child wouldn't know.": None,
    "What is the word for rain in Finnish?": None,
    "List 20 words that rhyme with day.": None,
    "Give me 10 words that start with q and their meanings.": None,
    "Use these words in a story: apple, river, iron.": None,
    "Write a 30-minute speech about 5 heroes.": None,
    "A poem of four short stanzas about a lighthouse": None,
    "Explain the key words of the contract.": None,
    "Write a novel set in 1984 with 12 chapters.": None,
    "Each chapter should have 800 words.": None,
    "Make every paragraph about 120 words.": None,
    "Turn to page 12 of the book and describe the map.": None,
    "Design the landing page of a bakery.": None,
    "Write a page-turner about a heist.": None,
    "Write the home page text for a bakery": None,
    "Rewrite this text in my own words.": None,
    "Proofread my 2000-word essay.": None,
    "Write a thank-you note.": None,
    "Teach me the 1000 most common words": None,
    "A word of advice for a new teacher?": None,
    "Write an email in a few words.": None,
    "A story about a 60W light bulb": None,
    "The length of the bridge is 400 metres; write about it.": None,
}

CHINESE: dict[str, tuple[int, int] | None] = {
    # one count
    "写一篇800字的作文，题目是春天": (720, 880),
    "写一篇８００字的作文": (720, 880),
    "写一篇八百字的作文": (720, 880),
    "请写一篇约4000字的长文": (3600, 4400),
    "两百字左右，优点是汤头": (180, 220),
    "用80字左右描写清晨的豆浆铺": (72, 88),
    "写一篇3500字的小说，以1978年的考场为背景": (3150, 3850),
    "写一篇三千字的武侠小说": (2700, 3300),
    "写一篇两千五百字的论文": (2250, 2750),
    "写一篇两千五的论文，字数两千五": (2250, 2750),
    "写1.2万字的小说": (10800, 12000),
    "写一篇3千字的报告": (2700, 3300),
    "写一部万字长文": (9000, 11000),
    "写一篇千字文": (900, 1100),
    "写一篇一万字的小说": (9000, 11000),
    "写一篇1000个字的散文": (900, 1100),
    "500字，写写外婆的菜园": (450, 550),
    "字数：1500。题目：桥": (1350, 1650),
    "字数在600左右": (540, 660),
    "字数要求八百字": (720, 880),
    "篇幅大约2000字": (1800, 2200),
    "写一篇500个单词的英语作文": (450, 550),
    "写一篇120词的英语短文": (108, 132),
    "写一篇1,200字的演讲稿": (1080, 1320),
    "写一百二十字的简介": (108, 132),
    "写一篇一千零五十字的游记": (945, 1155),
    "控制在800字": (720, 880),
    "写一篇 800 字的作文": (720, 880),
    "请写一篇约 1,500 字的游记": (1350, 1650),
    "寫一篇兩千五百字的論文": (2250, 2750),
    "字数：1500 字左右": (1350, 1650),
    "写一篇1500±100字的评论": (1350, 1650),
    # upper bounds
    "不超过2000字，评论一本回忆录": (1800, 2000),
    "给展览写简介，不超过100字": (90, 100),
    "800字以内": (720, 800),
    "控制在八百字以内": (720, 800),
    "最多500字": (450, 500),
    "至多一千字": (900, 1000),
    "少于300字": (270, 300),
    "600字以下": (540, 600),
    "字数不超过1200": (1080, 1200),
    "不要超过400字": (360, 400),
    "限500字": (450, 500),
    "不多于一千五百字": (1350, 1500),
    "300字之内说清楚": (270, 300),
    "不超过 2000 字，评论一本回忆录": (1800, 2000),
    "字數不超過八百": (720, 800),
    "五百字以內": (450, 500),
    # lower bounds
    "写一篇不少于2000字的深度报道": (2000, 2200),
    "写一篇不少于八百字的作文": (800, 880),
    "至少1000字": (1000, 1100),
    "1000字以上": (1000, 1100),
    "不低于600字": (600, 660),
    "最少五百字": (500, 550),
    "超过3000字的小说": (3000, 3300),
    "800多字的随笔": (800, 880),
    "三千余字的回忆": (3000, 3300),
    "字数不少于1500": (1500, 1650),
    "要求达到2000字": (2000, 2200),
    "不少于 800 字": (800, 880),
    "寫一篇不少於一千字的散文": (1000, 1100),
    "写1000+字的影评": (1000, 1100),
    # ranges
    "800-1000字的读后感": (800, 1000),
    "800到1000字的读后感": (800, 1000),
    "八百到一千字的读后感": (800, 1000),
    "500～600字": (500, 600),
    "500至600字之间": (500, 600),
    "500字到600字": (500, 600),
    "字数在800-1000之间": (800, 1000),
    "字数控制在1500到1800字": (1500, 1800),
    "两三千字的小说": (2000, 3000),
    "三五百字的短文": (300, 500),
    "七八百字的作文": (700, 800),
    "两到三千字": (2000, 3000),
    "5000到10000字的小说": (6000, 9000),
    "800 - 1000 字的读后感": (800, 1000),
    "兩到三千個字": (2000, 3000),
    # pages and parts
    "写两页的工作总结": (1440, 1760),
    "写3页报告": (2160, 2640),
    "写三段，每段200字": (540, 660),
    "写四封信，每封300字": (1080, 1320),
    "写5个部分，每部分约500字": (2250, 2750),
    "写一篇2000字的论文，并附200字的摘要": (1800, 2200),
    "把这篇3000字的文章缩写成500字": (450, 550),
    # beyond the limit
    "写一部五万字的小说": (0, 0),
    "写20000字的小说": (0, 0),
    "至少1.5万字": (0, 0),
    # none
    "写一篇关于春天的作文": None,
    "请用四字成语写一段话": None,
    "写一首七言绝句": None,
    "解释这个字的意思": None,
    "写一个适合三个人演的校园小品": None,
    "这篇文章一字不改地朗读": None,
    "写一首五字一句的诗": None,
    "每段200字": None,
    "介绍1978年的高考": None,
    "写一篇长文，讲一讲汉字的历史": None,
    "翻到第12页，描述插图": None,
    "写一个30分钟的演讲": None,
    "字数不限": None,
    "写几千字的小说": None,
    "写数百字的短文": None,
    "用十个词语造句": None,
}


@pytest.mark.parametrize(("prompt", "expected"), [*ENGLISH.items(), *CHINESE.items()])
def test_explicit_length_range_reads_the_request(
    prompt: str, expected: tuple[int, int] | None
) -> None:
    assert explicit_length_range(prompt) == expected


def test_explicit_length_range_agrees_with_the_bundled_requests() -> None:
    found = 0
    for request in load_prompts("writing"):
        got = explicit_length_range(request.prompt)
        if got is None:
            continue
        assert request.length_range is not None
        found += 1
        for ours, theirs in zip(got, request.length_range, strict=True):
            assert ours == pytest.approx(theirs, rel=0.12), request.prompt
    assert found >= 130


@given(st.integers(1, 40_000), st.sampled_from(["{} words", "at least {} words", "不超过{}字"]))
def test_explicit_length_range_stays_within_the_limits(count: int, form: str) -> None:
    got = explicit_length_range(form.format(count))
    if got is None:
        assert count < 10  # a single Chinese numeral counts as an idiom
    elif got != (0, 0):
        low, high = got
        assert 0 < low < high <= MAX_WORDS
        assert high - low <= 3000
        assert low <= max(count, 1) <= high + 1
    else:
        assert count >= MAX_WORDS


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1,500", 1500),
        ("2k", 2000),
        ("2.5 thousand", 2500),
        ("twenty-five hundred", 2500),
        ("one hundred and fifty", 150),
        ("a thousand", 1000),
        ("twelve thousand three hundred and four", 12304),
    ],
)
def test_parse_english_reads_numbers(text: str, value: float) -> None:
    assert parse_english(text) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("800", 800.0),
        ("1.2万", 12000.0),
        ("一千零五", 1005.0),
        ("一千零五十", 1050.0),
        ("八百五", 850.0),
        ("一万二", 12000.0),
        ("一万两千三百", 12300.0),
        ("十二", 12.0),
        ("七八百", (700.0, 800.0)),
    ],
)
def test_parse_chinese_reads_numerals(text: str, value: float | tuple[float, float]) -> None:
    assert parse_chinese(text) == value
