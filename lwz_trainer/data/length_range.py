"""The range of words that a request asks for in so many words, found by rules.

A count N gives 0.9·N to 1.1·N; a lower bound N to 1.1·N, an upper bound 0.9·N to N, two bounds what
is between them. The limits are those of LongWriter-Zero's predictor (arXiv 2506.18841): at most
12,000 words, and a range at most 3,000 wide. What the paper leaves open and this module chooses: a
page is 500 words (250 double-spaced) or 800 Chinese characters; "three sections of 400 words each"
is 1,200; of several counts the largest is the piece's; a wider range keeps its middle.
"""

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass

from lwz_trainer.data.numbers import CHINESE_NUMBER, ENGLISH_NUMBER, parse_chinese, parse_english

__all__ = ["MAX_WIDTH", "MAX_WORDS", "explicit_length_range"]

MAX_WORDS = 12_000
MAX_WIDTH = 3_000
_TOLERANCE = 0.1
_ENGLISH_PAGE, _DOUBLE_SPACED_PAGE, _CHINESE_PAGE = 500, 250, 800


@dataclass(frozen=True)
class _Mention:
    """One or two counts of words; `bound` says how one count is meant."""

    low: float
    high: float
    bound: str  # "about", "least", "most", or "range"

    def words(self) -> tuple[int, int]:
        low, high = self.low, self.high
        if self.bound in ("about", "most"):
            low *= 1 - _TOLERANCE
        if self.bound in ("about", "least"):
            high *= 1 + _TOLERANCE
        return round(low), round(high)


def explicit_length_range(prompt: str) -> tuple[int, int] | None:
    """Words (Chinese characters, in Chinese) that a request asks for explicitly.

    Args:
        prompt: the request, English or Chinese.

    Returns:
        (lo, hi) with 0 < lo < hi <= 12,000 and hi - lo <= 3,000; (0, 0) if it asks for more than
        12,000; None if it names no length, or only that of a part or of a text it is given.

    Example:
        >>> explicit_length_range("Write a 2,000-word essay on tides.")
        (1800, 2200)
        >>> explicit_length_range("写一篇不少于八百字的作文")
        (800, 880)
    """
    text = _plain(prompt)
    mentions = [*_english_mentions(text), *_chinese_mentions(text)]
    if not mentions:
        return None
    piece = max(mentions, key=lambda mention: mention.words()[1])
    low, high = piece.words()
    if piece.high > MAX_WORDS or low >= MAX_WORDS:
        return 0, 0
    high = min(high, MAX_WORDS)  # the tolerance above a count of 12,000 is cut off
    if high - low > MAX_WIDTH:
        middle = (low + high) // 2
        low, high = middle - MAX_WIDTH // 2, middle + MAX_WIDTH // 2
    return max(1, low), max(2, high, low + 1)


_NOT = re.compile(r"n['’]t\b")
_DIGITS_AGAIN = re.compile(r"(?<=[a-z]) \(\d[\d,]*\)(?=[ -]?(?:words?|pages?)\b)")
_TOLERATED = re.compile(r"(?<=\d) ?(?:±|\+/-|\+-) ?\d[\d,]*(?: ?%)?(?= ?(?:words?|字))")
_TRADITIONAL = str.maketrans(
    "數於過內兩萬個單詞頁這長達約節條場漢餘來寫將縮幾",
    "数于过内两万个单词页这长达约节条场汉余来写将缩几",
)


def _plain(prompt: str) -> str:
    """In lower case and simplified characters; "isn't" as "is not", "two hundred (200)" once."""
    text = unicodedata.normalize("NFKC", prompt).lower().translate(_TRADITIONAL)
    return _TOLERATED.sub("", _DIGITS_AGAIN.sub("", _NOT.sub(" not", text)))


# --- English ----------------------------------------------------------------------------------

_TO = r"(?:\s*(?:-|–|—|~|to|and|or)\s*)"
_UNIT = r"(?P<unit>[- ]?(?:english[- ]|chinese[- ])?words?\b|[- ]?pages?\b)"
_COUNT = (
    rf"(?P<low>{ENGLISH_NUMBER})(?:(?:[- ]?words?)?{_TO}(?P<high>{ENGLISH_NUMBER}))?"
    rf"(?P<plus>\+)?{_UNIT}"
)
_LABEL = r"(?:word (?:count|limit|length|target)|length|number of words)"
_LABELLED = (
    rf"\b(?:(?:min|max)(?:imum|\.)? )?{_LABEL}\b(?: should| must| is| of| be| to| between| around"
    rf"| about| approximately| at least| at most| no more than| not exceed| under| over| up to"
    rf"| (?:min|max)(?:imum|\.)?|[:=]| )*\s*"
    rf"(?P<low>{ENGLISH_NUMBER})(?:{_TO}(?P<high>{ENGLISH_NUMBER}))?(?!\S*%|[- ]?\w+ly\b)"
)
_TWO_BOUNDS = re.compile(
    r"(?:at least|no less than|no fewer than|not less than|not fewer than|more than|over|"
    rf"a minimum of|minimum)\s+(?P<low>{ENGLISH_NUMBER})(?: words)?,?\s+(?:but|and|or)\s+(?:no more"
    r" than|not more than|at most|less than|fewer than|not over|under|up to|a maximum of|maximum)"
    rf"\s+(?P<high>{ENGLISH_NUMBER}){_UNIT}"
)
_OTHER_UNIT = re.compile(r"\s*(?:page|minute|hour|line|sentence|paragraph|char|day|second)")
# "maximum of", "max.", "minimum length is"
_EXTREME = r"(?:imum|\.)?(?: (?:word )?(?:length|count|limit|words))?(?: of| is)?"
_AT_MOST_BEFORE = re.compile(
    r"(?:no(?:t)? (?:be )?(?:more|longer|greater) th[ae]n|"
    r"not?(?: to)? (?:exceed(?:ing)?|surpass|above|over|go (?:over|above|beyond|past))|"
    r"(?<!no )(?<!not )(?<!not be )(?:less|fewer|shorter) than|(?<!not )(?<!not be )under|"
    rf"(?<!not )(?<!not be )below|up to|at (?:the )?most|within|≤|<=?|max{_EXTREME}|"
    r"a limit of|word limit\D{0,12}|limit(?:ed)?(?: \w+){0,3}? to|"
    r"never exceed|without exceeding|cap(?:ped)?(?: it)? at)\s*:?\s*(?:the )?$"
)
_AT_LEAST_BEFORE = re.compile(
    r"(?:at leas[et]|no(?:t)? (?:be )?(?:less|fewer|shorter) than|not (?:be )?(?:under|below)|"
    r"(?<!no )(?<!not )(?<!not be )(?:more|longer|greater) than|(?<!go )(?<!not )over|"
    rf"(?<!go )(?<!not )above|upwards of|≥|>=|min{_EXTREME}|"
    r"(?<!not )(?<!without )exceed(?:s|ing)?)\s*:?\s*$"
)
_AT_MOST_AFTER = re.compile(
    r"\s*(?:\(?\s*max(?:imum)?\b|or (?:less|fewer|under|shorter)\b|at (?:the )?most\b|tops\b|"
    r"limit\b|long at most\b|and (?:no|not) more\b|in length at most\b)"
)
_AT_LEAST_AFTER = re.compile(
    r"\s*(?:\(?\s*min(?:imum)?\b|or (?:more|longer|above|over)\b|at (?:the )?least\b|and up\b|"
    r"and more\b|\+|long at least\b)"
)
# "the following 2,000 words", "this 800-word text": what is given, not what is asked for.
_GIVEN_BEFORE = re.compile(
    r"(?:\b(?:this|these|my|our|the following|the above|the attached|the given|the original|"
    r"following|above|below|his|her|their|your)|\b(?:summari[sz]e|condense|shorten|proofread|"
    r"translate|edit|cut|reduce|review|critique)\s+(?:an?|the))\s+$"
)
# "10 words that rhyme", "list twenty words": a few words as things, not as a length.
_MAX_LISTED = 100
_LISTED_AFTER = re.compile(
    r"\s+(?:that (?:rhyme|start|begin|end|mean|describe|are)|which (?:rhyme|start|begin|mean)|"
    r"(?:starting|beginning|ending|rhyming|meaning|related|associated|describing|used) |"
    r"to describe|and their meanings|from the list|i (?:don't|do not))"
)
_LISTED_BEFORE = re.compile(
    r"\b(?:list|find|learn|use|using|give me|include|including|teach me|memori[sz]e|choose|pick|"
    r"contain(?:s|ing)?|with) (?:all |the |these |exactly )?$"
)
_EACH_AFTER = re.compile(
    r"\s*(?:or (?:so|more|less) )?(?:long )?,?\s*(?:each|apiece|per|a piece|every)\b"
)
_EACH_BEFORE = re.compile(
    r"\b(?:each|every|per)\b(?: \w+){0,3}(?: of| with| in| at| about| around| be| is)*"
    r"(?: about| around| roughly| approximately| at least| up to| at most)? $"
)
_PARTS_BEFORE = re.compile(
    rf"(?P<number>{ENGLISH_NUMBER})[- ](?:\w+ ){{0,2}}?(?:paragraphs|sections|chapters|parts|"
    r"scenes|stanzas|essays|stories|letters|posts|entries|articles|emails|episodes|reviews|"
    r"pieces|speeches|descriptions|versions|acts|poems)\b[^.!?;]{0,40}$"
)
_PART_OF_PIECE_AFTER = re.compile(
    r"[- ]?(?:\w+ )?(?:title|headline|tagline|slogan|subject line|hook|byline|caption)s?\b"
)


def _english_mentions(text: str) -> Iterator[_Mention]:
    for match in _TWO_BOUNDS.finditer(text):
        low, high = parse_english(match["low"]), parse_english(match["high"])
        yield _Mention(low, high, "range")
    text = _TWO_BOUNDS.sub(lambda match: " " * len(match.group()), text)
    for match in re.finditer(_COUNT, text):
        before, after = text[max(0, match.start() - 80) : match.start()], text[match.end() :]
        factor = _unit_words(match["unit"], text) * _num_parts(before, after)
        if not factor or _is_not_the_piece(match, before, after):
            continue
        yield _mention(match, before, after, factor)
    for match in re.finditer(_LABELLED, text):
        if match["low"] == "one" or re.match(_UNIT, text[match.end() :]):
            continue  # no number, or already found with its unit
        after = text[match.end() :]
        if not _OTHER_UNIT.match(after):
            yield _mention(match, text[match.start() : match.start("low")], after, 1)


def _mention(match: re.Match[str], before: str, after: str, factor: float) -> _Mention:
    low = parse_english(match["low"]) * factor
    if match["high"]:
        high = parse_english(match["high"]) * factor
        # "2-3k words": the scale belongs to both.
        if low < high / 100 and re.search(r"k|thousand", match["high"]):
            low *= 1000
        return _Mention(min(low, high), max(low, high), "range")
    if _AT_MOST_BEFORE.search(before) or _AT_MOST_AFTER.match(after):
        return _Mention(low, low, "most")
    has_plus = match.groupdict().get("plus")
    if has_plus or _AT_LEAST_BEFORE.search(before) or _AT_LEAST_AFTER.match(after):
        return _Mention(low, low, "least")
    return _Mention(low, low, "about")


def _unit_words(unit: str, text: str) -> int:
    if "page" not in unit:
        return 1
    return _DOUBLE_SPACED_PAGE if re.search(r"double[- ]spaced", text) else _ENGLISH_PAGE


def _num_parts(before: str, after: str) -> float:
    """Parts of the counted length; 0 if it is that of one part, of nobody knows how many."""
    parts = _PARTS_BEFORE.search(before)
    is_each = _EACH_AFTER.match(after) or _EACH_BEFORE.search(before)
    if is_each:
        return parse_english(parts["number"]) if parts else 0
    is_of = parts is not None and re.search(r"\b(?:of|with)(?: about| around)? $", before)
    return parse_english(parts["number"]) if parts and is_of else 1


def _is_not_the_piece(match: re.Match[str], before: str, after: str) -> bool:
    if "page" in match["unit"]:
        is_one_of_many = re.match(r"\s*(?:\d|number|layout|break|turner|title|website)", after)
        is_web = re.search(r"\b(?:web|landing|home|on|the|this|title|sales|front)[- ]$", before)
        return bool(_GIVEN_BEFORE.search(before) or is_one_of_many or is_web)
    is_listed = _LISTED_AFTER.match(after) or _LISTED_BEFORE.search(before)
    return bool(
        _GIVEN_BEFORE.search(before)
        or (parse_english(match["low"]) <= _MAX_LISTED and is_listed)
        or _PART_OF_PIECE_AFTER.match(after)
    )


# --- Chinese ----------------------------------------------------------------------------------

_ZH_UNIT = (
    r"(?P<unit>[多余来]?个?(?:汉字|字(?![母体符典幕面数段形号迹音眼帖画谜节条])|"
    r"(?:英文)?单词|词(?![语汇典牌性组人曲作])|页(?![码面边眉脚])))"
)
_ZH_TO = r" ?[-—–~到至]+ ?"
_ZH_COUNT = (
    rf"(?!(?<=[几数])[百千万])(?P<low>{CHINESE_NUMBER})"
    rf"(?: ?个?字?{_ZH_TO}(?P<high>{CHINESE_NUMBER}))?(?P<plus>\+)? ?{_ZH_UNIT}"
)
_ZH_LABELLED = (
    rf"(?:字数|篇幅|长度)(?P<how>[^\d零一二两三四五六七八九十百千万。！？\n]{{0,10}})"
    rf"(?P<low>{CHINESE_NUMBER})(?:{_ZH_TO}(?P<high>{CHINESE_NUMBER}))?(?!\d|[分小天年月])"
)
_ZH_AT_MOST_BEFORE = re.compile(
    r"(?:不(?:要|能|得|可|宜|应)?(?:超过|多于|超出|大于|高于)|不长于|最多|至多|(?<!不)(?:少于|低于|小于)|"
    r"上限(?:为|是)?|限(?:制在|定在|于|在)?)\s*[:：]?\s*$"
)
_ZH_AT_LEAST_BEFORE = re.compile(
    r"(?:不(?:要|能|得|可|宜|应)?(?:少于|低于|短于|小于|下于)|至少|最少|起码|(?<!不)(?:超过|多于|大于|高于)|"
    r"下限(?:为|是)?|达到|满)\s*[:：]?\s*(?:要?写?)?$"
)
_ZH_AT_MOST_AFTER = re.compile(r"\s*(?:以内|之内|以下|内(?!容)|封顶|为限)")
_ZH_AT_LEAST_AFTER = re.compile(r"\s*(?:以上|起步|往上|开外|打底)")
_ZH_GIVEN_BEFORE = re.compile(
    r"(?:这篇|这段|下面|以下|上面|上述|原文|我的|该|把|将一篇|缩写一篇)(?:的|这|约)?$"
)
_ZH_EACH_BEFORE = re.compile(r"每(?:一)?[^，。；,;]{0,6}$")
_ZH_PARTS = re.compile(
    rf"(?P<number>{CHINESE_NUMBER})个?(?:段|章|节|部分|篇|封|首|则|幕|场|集|条)[^。！？]{{0,14}}$"
)


def _chinese_mentions(text: str) -> Iterator[_Mention]:
    counts = list(re.finditer(_ZH_COUNT, text))
    for match in counts:
        before, after = text[max(0, match.start() - 30) : match.start()], text[match.end() :]
        factor = _chinese_unit(match["unit"]) * _chinese_parts(before)
        if factor and not _ZH_GIVEN_BEFORE.search(before) and not _is_idiom(match, before):
            yield _chinese_mention(match, before, after, factor)
    for match in re.finditer(_ZH_LABELLED, text):
        if any(count.start() <= match.start("low") < count.end() for count in counts):
            continue
        yield _chinese_mention(match, match["how"], text[match.end() :], 1)


def _chinese_mention(match: re.Match[str], before: str, after: str, factor: float) -> _Mention:
    low = parse_chinese(match["low"])
    if isinstance(low, tuple):
        return _Mention(low[0] * factor, low[1] * factor, "range")
    if match["high"]:
        high = parse_chinese(match["high"])
        assert not isinstance(high, tuple)
        # 两到三千字, 1-2万字: the scale belongs to both.
        scale = {"百": 100, "千": 1000, "万": 10_000}.get(match["high"][-1], 1)
        if low < 100 <= high:
            low *= scale
        return _Mention(min(low, high) * factor, max(low, high) * factor, "range")
    low *= factor
    groups = match.groupdict()
    if _ZH_AT_MOST_BEFORE.search(before) or _ZH_AT_MOST_AFTER.match(after):
        return _Mention(low, low, "most")
    is_more = bool(groups.get("plus")) or (groups.get("unit") or "").startswith(("多", "余"))
    if is_more or _ZH_AT_LEAST_BEFORE.search(before) or _ZH_AT_LEAST_AFTER.match(after):
        return _Mention(low, low, "least")
    return _Mention(low, low, "about")


def _chinese_unit(unit: str) -> int:
    return _CHINESE_PAGE if unit.endswith("页") else 1


def _chinese_parts(before: str) -> float:
    """As `_num_parts`."""
    each = _ZH_EACH_BEFORE.search(before)
    if each is None:
        return 1
    parts = _ZH_PARTS.search(before[: each.start()])
    number = parse_chinese(parts["number"]) if parts else 0.0
    return number if isinstance(number, float) else 0.0


def _is_idiom(match: re.Match[str], before: str) -> bool:
    """一字不改, 四字成语, 第八百字: no length."""
    text = match["low"]
    is_small = match["high"] is None and re.fullmatch(r"[一二两三四五六七八九十]|\d", text)
    return (bool(is_small) and match["unit"] != "页") or before.endswith("第")
