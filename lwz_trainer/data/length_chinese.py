"""Counts of characters, words and pages in Chinese requests; built as `length_english`."""

import re

from lwz_trainer.data.length_mention import BoundWords, Mention, join_bounds
from lwz_trainer.data.numbers import CHINESE_NUMBER, parse_chinese

__all__ = ["chinese_mentions"]

_PAGE_CHARACTERS = 800
_AROUND = 30  # characters before and after a number that are looked at
_MIN_LABELLED = 20  # 篇幅：3 counts something else

_UNIT = (
    r"(?P<unit>[多余来]?个?(?:汉字|字(?![母体符典幕面数段形号迹音眼帖画谜节条])|"
    r"(?:英文)?单词|词(?![语汇典牌性组人曲作])|页(?![码面边眉脚])))"
)
_TO = r" ?[-—–~到至]+ ?"
_COUNT = re.compile(
    rf"(?!(?<=[几数])[百千万])(?P<low>{CHINESE_NUMBER})"
    rf"(?:(?: ?个?字(?={_TO}{CHINESE_NUMBER} ?个?[字词]))?{_TO}(?P<high>{CHINESE_NUMBER}))?"
    rf"(?P<plus>\+)?(?: ?{_UNIT})?"
)
# 字数要求：不少于, with the number next.
_LABEL_BEFORE = re.compile(
    r"(?:(?P<words>字数)|篇幅|长度)"
    r"(?:一般|[^\d零一二两三四五六七八九十百千万。,;!?\n]){0,10}$"
)
_OTHER_UNIT = re.compile(r"\s*[%\d分小天年月日段章节部篇句行个人元]")
# After 长度2000 no unit may follow: it could be metres.
_NO_UNIT = re.compile(r" ?(?:$|[。,、;!?)\n]|左右|上下|以[内上下]|之[内间]|内)")

_BOUNDS = BoundWords(
    most_before=re.compile(
        r"(?:不(?:要|能|得|可|宜|应该?|可以)?(?:超过|多于|超出|大于|高于)|不长于|最多|至多|"
        r"少于|低于|小于|上限(?:为|是)?|限(?:制在|定在|于|在)?|≤|<=?)\s*:?\s*$"
    ),
    most_after=re.compile(r"\s*(?:以内|之内|以下|内(?!容)|封顶|为限|[≥>](?=字数|篇幅))"),
    least_before=re.compile(
        r"(?:不(?:要|能|得|可|宜|应该?|可以)?(?:少于|低于|短于|小于|下于)|至少|最少|最低|起码|"
        r"超过|多于|大于|高于|下限(?:为|是)?|达到|满|≥|>=|(?:字数|篇幅) ?>)"
        r"\s*:?\s*(?:要?写?够?)?$"
    ),
    least_after=re.compile(
        r"\s*(?:以上|起(?=步|$|[,。;!、\s)])|往上|开外|打底|(?:≤|<=?) ?(?=字数|篇幅))"
    ),
)
# Between the two bounds of one range; 正文 would make them those of two things.
_BETWEEN = re.compile(
    r"(?:[\s,、;:。()]|但|且|并|而|同时|也|又|和|或|总|字数|篇幅|全文|要求|应|需|须|请|最好|一般|"
    r"尽量|控制|在|为)*"
)

_GIVEN_BEFORE = re.compile(
    r"(?:这篇|这段|下面|以下|上面|上述|原文|我的|该|把|将一篇|缩写一篇)(?:的|这|约)?$"
)
# What is written or read beside the piece, or has the piece as its part or summary.
_OTHER_TEXT_BEFORE = re.compile(
    r"(?:我们?(?:(?:正在|正|在)(?:写|读|看|创作)|(?:已经|已|刚刚?)?(?:写|读|看)(?:了|过|完了))"
    r"(?:[一这那]?[部篇本份个])?|(?:为|根据|基于|针对|读完?|阅读)[一这那][部篇本份]"
    r"|我的(?:毕业)?(?:论文|小说|文章|作文|书|报告)(?:一共|共|大约|约|有|是)*)$"
)
_OTHER_TEXT_AFTER = re.compile(
    r"的?(?:小说|论文|书|文章|作品|作文|报告|剧本)的(?:第[\d一二三四五六七八九十]+[章回节卷]|"
    r"开头|开篇|结尾|大纲|提纲|摘要|引言|序言|书评|读后感|评论)"
)
# Shorter than the piece if it has pages as well, else the piece.
_MAYBE_PART_BEFORE = re.compile(r"(?:摘要|引言|前言|结语)[^,。;]{0,6}$")
_MAYBE_PART_AFTER = re.compile(r"的?(?:中文|英文)?(?:摘要|引言|前言|结语)")
_EACH_BEFORE = re.compile(r"每(?:一)?[^,。;]{0,6}$")
_PARTS = re.compile(
    rf"(?P<number>{CHINESE_NUMBER})个?(?:段|章|节|部分|篇|封|首|则|幕|场|集|条)[^。!?]{{0,14}}$"
)


def chinese_mentions(text: str) -> list[Mention]:
    """The counts of characters and pages that `text` asks for, in its order.

    Args:
        text: the request in simplified characters and NFKC: its commas are those of ASCII.
    """
    found = (_mention(match, text) for match in _COUNT.finditer(text))
    return join_bounds((mention for mention in found if mention), text, _BETWEEN)


def _mention(match: re.Match[str], text: str) -> Mention | None:
    """One number of the text; None if it is no length, or none of the piece."""
    before = text[max(0, match.start() - _AROUND) : match.start()]
    after = text[match.end() : match.end() + _AROUND]
    num_parts = _num_parts(before)
    low, high = _ends(match)
    is_part = _MAYBE_PART_BEFORE.search(before) or _MAYBE_PART_AFTER.match(after)
    is_pages = (match["unit"] or "").endswith("页")
    if match["unit"]:
        unit_words = num_parts * (_PAGE_CHARACTERS if is_pages else 1)
        if not num_parts or _is_not_the_piece(match, before, after):
            return None
    elif _OTHER_UNIT.match(after):
        return None
    else:
        unit_words = num_parts if low >= _MIN_LABELLED and _is_labelled(before, after) else 0
    bound, num_before, num_after = _bound(match, before, after)
    if low < high:
        bound, num_before, num_after = "range", 0, 0
    return Mention(
        low=low,
        high=high,
        bound=bound,
        unit_words=unit_words,
        kind="pages" if is_pages else "part" if is_part else "words",
        start=match.start() - num_before,
        end=match.end() + num_after,
    )


def _ends(match: re.Match[str]) -> tuple[float, float]:
    low = parse_chinese(match["low"])
    if isinstance(low, tuple):
        return low
    if not match["high"]:
        return low, low
    high = parse_chinese(match["high"])
    if isinstance(high, tuple):
        return low, high[1]
    # 两到三千字, 1-2万字: the scale belongs to both.
    if low < 100 <= high:
        low *= {"百": 100, "千": 1000, "万": 10_000}.get(match["high"][-1], 1)
    return min(low, high), max(low, high)


def _bound(match: re.Match[str], before: str, after: str) -> tuple[str, int, int]:
    if match["plus"] or (match["unit"] or "").startswith(("多", "余")):
        return "least", 0, 0
    return _BOUNDS.read(before, after)


def _is_labelled(before: str, after: str) -> bool:
    label = _LABEL_BEFORE.search(before)
    return label is not None and bool(label["words"] or _NO_UNIT.match(after))


def _num_parts(before: str) -> float:
    """Parts of the counted length; 0 if it is that of one part, of nobody knows how many."""
    each = _EACH_BEFORE.search(before)
    if each is None:
        return 1
    parts = _PARTS.search(before[: each.start()])
    number = parse_chinese(parts["number"]) if parts else 0.0
    return number if isinstance(number, float) else 0.0


def _is_not_the_piece(match: re.Match[str], before: str, after: str) -> bool:
    return bool(
        _GIVEN_BEFORE.search(before)
        or _OTHER_TEXT_BEFORE.search(before)
        or _OTHER_TEXT_AFTER.match(after)
        or _is_idiom(match, before)
    )


def _is_idiom(match: re.Match[str], before: str) -> bool:
    """一字不改, 四字成语, 第八百字: no length."""
    text = match["low"]
    is_small = match["high"] is None and re.fullmatch(r"[一二两三四五六七八九十]|\d", text)
    return (bool(is_small) and match["unit"] != "页") or before.endswith("第")
