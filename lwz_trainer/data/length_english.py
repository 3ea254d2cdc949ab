"""Counts of words and pages in English requests.

Every number is looked at, with the words around it: they tell whether it counts words or pages, is
a bound, is meant for each of several parts, or is the length of a text that is there already.
"""

import re

from lwz_trainer.data.length_mention import BoundWords, Mention, join_bounds
from lwz_trainer.data.numbers import ENGLISH_NUMBER, parse_english

__all__ = ["english_mentions"]

_PAGE_WORDS, _DOUBLE_SPACED_PAGE_WORDS = 500, 250
_AROUND = 80  # characters before and after a number that are looked at
_MIN_LABELLED = 20  # "length: 10" counts something else

_TO = r"(?:\s*(?:-?\s?to-?|-|–|—|~|and|or)\s*)"
_UNIT = r"(?P<unit>(?:-?ish)?[- ]?(?:english[- ]|chinese[- ])?words?\b|[- ]?pages?\b)"
_COUNT = re.compile(
    rf"(?P<low>{ENGLISH_NUMBER})"
    rf"(?:(?:[- ]?words?(?={_TO}{ENGLISH_NUMBER}[- ]?words?\b))?{_TO}(?P<high>{ENGLISH_NUMBER}))?"
    rf"(?P<suffix>\+|[ -]plus\b| or (?:more|less|fewer)\b)?(?:{_UNIT})?"
)
# "word count should be at least ", with the number next.
_LABEL_BEFORE = re.compile(
    r"\b(?:(?P<words>word ?(?:count|limit|length|target|range|requirement)|number of words)"
    r"|length|words(?=\s?[:=≤≥<>]))\b"
    r"(?: should| must| is| of| be| to| between| around| about| approximately| at least| at most"
    r"| no (?:less|more) than| not exceed| under| over| up to| (?:min|max)(?:imum|\.)?"
    r"| approx\.|[:=≤≥<>-]|\s)*$"
)
_OTHER_UNIT = re.compile(
    r"\s*(?:page|minute|hour|line|sentence|paragraph|char|day|second|section|chapter|stanza|point)"
    r"|\S*%|[- ]?\w+ly\b"
)
# After "length: 2000" or "at least 500" no other unit may follow: it could be metres.
_NO_UNIT = re.compile(
    r" ?(?:$|[.,;!?()\]\n≤<]|(?:and|but|to|max|min|or (?:more|less|fewer|so)|in total|total)\b)"
)

# "maximum of", "max.", "minimum length is"
_EXTREME = r"(?:imum|\.)?(?: (?:word )?(?:length|count|limit|words))?(?: of| is)?"
_BOUNDS = BoundWords(
    most_before=re.compile(
        r"(?:no(?:t)? (?:\w+ )?(?:more|longer|greater) th[ae]n|"
        r"not?(?: to)? (?:exceed(?:ing)?|surpass|above|over|go (?:over|above|beyond|past))|"
        r"(?:less|fewer|shorter) than|under|below|up to|at (?:the )?most|within|≤|<=?|"
        rf"max{_EXTREME}|"
        r"a limit of|word limit\D{0,12}|limit(?:ed)?(?: \w+){0,3}? to|"
        r"never exceed|without exceeding|cap(?:ped)?(?: it)? at)\s*:?\s*(?:the )?$"
    ),
    most_after=re.compile(
        r"\s*(?:\(?\s*max(?:imum)?\b(?! (?:of )?\d)|or (?:less|fewer|under|shorter)\b|"
        r"at (?:the )?most\b(?! \d)|tops\b|limit\b|long at most\b|"
        r"and (?:no|not) more\b(?! th[ae]n)|in length at most\b)"
    ),
    least_before=re.compile(
        r"(?:at leas[et]|no(?:t)? (?:\w+ )?(?:less|fewer|shorter) than|not (?:be )?(?:under|below)|"
        rf"(?:more|longer|greater) than|over|above|upwards of|≥|>=|min{_EXTREME}|"
        r"exceed(?:s|ing)?)\s*:?\s*$"
    ),
    least_after=re.compile(
        r"\s*(?:\(?\s*min(?:imum)?\b(?! (?:of )?\d)|or (?:more|longer|above|over)\b|"
        r"at (?:the )?least\b(?! \d)|and up\b|and more\b(?! th[ae]n)|\+|long at least\b|"
        r"(?:≤|<=?)(?= ?(?:word|length)))"
    ),
)
# Between the two bounds of one range; "a body of" would make them those of two things.
_BETWEEN = re.compile(
    r"(?:[\s,;:.()&/-]|(?:and|but|or|yet|with|it|should|must|may|do|does|keep|a|an|the|to|be|words?"
    r"|count)\b)*"
)

# "the following 2,000 words", "this 800-word text": what is given, not what is asked for.
_GIVEN_BEFORE = re.compile(
    r"(?:\b(?:this|these|my|our|the following|the above|the below|the attached|the given|"
    r"the original|following|his|her|their|your)|\b(?:summari[sz]e|condense|shorten|proofread|"
    r"translate|edit|cut|reduce|review|critique)\s+(?:an?|the))\s+$"
)
# What is written or read beside the piece, or has the piece as its part or summary.
_OTHER_TEXT_BEFORE = re.compile(
    r"(?:\b(?:i|we)(?:['’](?:m|re|ve)| am| are| was| have| had)?"
    r"(?: been| just| currently| already| also| now)* (?:writing|working on|wrote|written|"
    r"finish(?:ed|ing)|read|reading|draft(?:ed|ing)|edit(?:ed|ing)|completed)"
    r"(?: (?:an?|the|my|our|about|over)(?: [\w-]+){0,2})?"
    r"|\b(?:chapter|scene|section|introduction|intro|conclusion|abstract|outline|prologue|epilogue|"
    r"opening|beginning|ending|summary|synopsis|review|critique|analysis|overview|blurb|title)s?"
    r"(?: \d+)?(?: \([^()]*\))? (?:of|for|from|to|in) (?:an?|the|my|our|this)(?: [\w-]+){0,2}"
    r"|\b(?:book|novel|pdf|manuscript|textbook|(?:my|our) (?:\w+ )?(?:essay|paper|story|thesis|"
    r"dissertation|article|report|draft|text)),? (?:which |that |it )?(?:is|was|has|had|contains|"
    r"runs to|spans)(?: about| over| around| roughly| nearly| almost)?) $"
)
_OTHER_TEXT_AFTER = re.compile(
    r"[- ](?:\w+ ){1,2}(?:that |which )?(?:i|we)(?:['’](?:m|re|ve))?(?: am| have| had| just| been)*"
    r" (?:wrote|written|writing|working|read|reading|finished)\b"
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
    r"\s*(?:or (?:so|more|less) )?(?:long )?,?\s*"
    r"(?:(?:on |for )?each|apiece|per|a piece|every)\b"
)
_EACH_BEFORE = re.compile(
    r"\b(?:each|every|per)\b(?: \w+){0,3}(?: of| with| in| at| about| around| be| is)*"
    r"(?: about| around| roughly| approximately| at least| up to| at most)? $"
)
_PARTS = (
    r"(?:\w+ ){0,2}?(?:paragraphs|sections|chapters|parts|scenes|stanzas|essays|stories|letters|"
    r"posts|entries|articles|emails|episodes|reviews|pieces|speeches|descriptions|versions|acts|"
    r"poems)\b"
)
_PARTS_BEFORE = re.compile(rf"(?P<number>{ENGLISH_NUMBER})[- ]{_PARTS}[^.!?;]{{0,40}}$")
# "three 500-word essays"
_NUMBER_BEFORE = re.compile(rf"(?P<number>{ENGLISH_NUMBER}) $")
_PARTS_AFTER = re.compile(rf"[- ]{_PARTS}")
_PART_OF_PIECE_AFTER = re.compile(
    r"[- ]?(?:\w+ )?(?:title|headline|tagline|slogan|subject line|hook|byline|caption)s?\b"
)
# Shorter than the piece if it has pages as well, else the piece.
_MAYBE_PART = "(?:abstract|introduction|intro|conclusion|bio|blurb|foreword|preface|appendix)"
_MAYBE_PART_BEFORE = re.compile(rf"\b{_MAYBE_PART}\b[^.!?;,]{{0,25}}$")
_MAYBE_PART_AFTER = re.compile(rf"[- ]?(?:\w+ )?{_MAYBE_PART}\b")


def english_mentions(text: str) -> list[Mention]:
    """The counts of words and pages that `text` (lower case) asks for, in its order."""
    is_double_spaced = re.search(r"double[- ]spaced", text)
    page_words = _DOUBLE_SPACED_PAGE_WORDS if is_double_spaced else _PAGE_WORDS
    found = (_mention(match, text, page_words) for match in _COUNT.finditer(text))
    return join_bounds((mention for mention in found if mention), text, _BETWEEN)


def _mention(match: re.Match[str], text: str, page_words: int) -> Mention | None:
    """One number of the text; None if it is no length, or none of the piece."""
    before = text[max(0, match.start() - _AROUND) : match.start()]
    after = text[match.end() : match.end() + _AROUND]
    num_parts = _num_parts(before, after)
    is_pages = "page" in (match["unit"] or "")
    is_part = _MAYBE_PART_BEFORE.search(before) or _MAYBE_PART_AFTER.match(after)
    if match["unit"]:
        unit_words = num_parts * (page_words if is_pages else 1)
        if not num_parts or _is_not_the_piece(match, before, after):
            return None
    elif _is_labelled(match, before, after):
        unit_words = num_parts
    elif _NO_UNIT.match(after):
        unit_words = 0
    else:
        return None
    low, high = _ends(match)
    bound, num_before, num_after = _bound(match, before, after)
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
    low = parse_english(match["low"])
    if not match["high"]:
        return low, low
    high = parse_english(match["high"])
    # "2-3k words", "three to four hundred words": the scale belongs to both.
    scale = 1000 if re.search(r"k|thousand$", match["high"]) else 100
    if low * scale <= high and low < 100 and re.search(r"(?:k|thousand|hundred)$", match["high"]):
        low *= scale
    return min(low, high), max(low, high)


def _bound(match: re.Match[str], before: str, after: str) -> tuple[str, int, int]:
    if match["high"]:
        return "range", 0, 0
    if match["suffix"]:
        is_most = match["suffix"] in (" or less", " or fewer")
        return "most" if is_most else "least", 0, 0
    return _BOUNDS.read(before, after)


def _is_labelled(match: re.Match[str], before: str, after: str) -> bool:
    label = _LABEL_BEFORE.search(before)
    if label is None or parse_english(match["low"]) < _MIN_LABELLED:
        return False
    return bool(not _OTHER_UNIT.match(after) if label["words"] else _NO_UNIT.match(after))


def _num_parts(before: str, after: str) -> float:
    """Parts of the counted length; 0 if it is that of one part, of nobody knows how many."""
    parts = _PARTS_BEFORE.search(before)
    is_each = _EACH_AFTER.match(after) or _EACH_BEFORE.search(before)
    if is_each:
        return parse_english(parts["number"]) if parts else 0
    number = _NUMBER_BEFORE.search(before)
    if number and _PARTS_AFTER.match(after):
        return parse_english(number["number"])
    is_of = parts is not None and re.search(r"\b(?:of|with)(?: about| around)? $", before)
    return parse_english(parts["number"]) if parts and is_of else 1


def _is_not_the_piece(match: re.Match[str], before: str, after: str) -> bool:
    if _OTHER_TEXT_BEFORE.search(before) or _OTHER_TEXT_AFTER.match(after):
        return True
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
