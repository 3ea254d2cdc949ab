"""Numbers as people write them in requests: digits, English words, Chinese numerals."""

import re

__all__ = ["CHINESE_NUMBER", "ENGLISH_NUMBER", "parse_chinese", "parse_english"]

_UNITS = {
    "zero": 0,
    "one": 1,
    "two": 2,
    "three": 3,
    "four": 4,
    "five": 5,
    "six": 6,
    "seven": 7,
    "eight": 8,
    "nine": 9,
    "ten": 10,
    "eleven": 11,
    "twelve": 12,
    "thirteen": 13,
    "fourteen": 14,
    "fifteen": 15,
    "sixteen": 16,
    "seventeen": 17,
    "eighteen": 18,
    "nineteen": 19,
}
_TENS = {
    "twenty": 20,
    "thirty": 30,
    "forty": 40,
    "fifty": 50,
    "sixty": 60,
    "seventy": 70,
    "eighty": 80,
    "ninety": 90,
}
_SCALES = {"hundred": 100, "thousand": 1000, "k": 1000}
_DIGITS = r"\d{1,3}(?:,\d{3})+|\d+(?:\.\d+)?"
_DOTTED_THOUSANDS = re.compile(r"[1-9]\d{0,2}\.\d{3}")
_SIMPLE = "|".join(sorted((*_TENS, *_UNITS), key=len, reverse=True))
_SCALE = "(?:hundred|thousand)"
# "five hundred and fifty" is one number, "five hundred and six hundred" are two.
# "two thousand and five hundred" is one as well, "one thousand and fifteen hundred" are two.
_BELOW_TEN = "|".join(word for word, value in _UNITS.items() if 0 < value < 10)
_SPELLED = (
    rf"(?:(?:{_SIMPLE})\b|an?(?=[ -]{_SCALE}))"
    rf"(?:[ -](?:{_SIMPLE}|{_SCALE})\b|[ -]and[ -](?:{_SIMPLE})\b(?![ -]{_SCALE})"
    rf"|(?<=thousand)(?:,| and) (?:{_BELOW_TEN})[ -]hundred\b)*"
)

ENGLISH_NUMBER = rf"(?:(?:{_DIGITS})(?:[ -]?(?:k|thousand|hundred)\b)?|\b{_SPELLED}\b)"
"""Pattern of one number: "1,500", "2k", "2.5 thousand", "fifteen hundred", "a thousand"."""

_CHINESE_DIGITS = {char: value for value, char in enumerate("零一二三四五六七八九")} | {
    "〇": 0,
    "两": 2,
}
_CHINESE_SCALES = {"十": 10, "百": 100, "千": 1000}

_NUMERALS = "[零〇一二两三四五六七八九十百千]"
CHINESE_NUMBER = (
    rf"(?:(?:{_DIGITS})(?:[百千万](?:\d+[百千])*\d*)?"
    rf"|{_NUMERALS}+(?:万{_NUMERALS}*)?|万{_NUMERALS}*)"
)
"""Pattern of one number: "800", "3千", "2千5百", "1.2万", "一千五百", "两千五"."""


def parse_english(text: str) -> float:
    """Value of what `ENGLISH_NUMBER` matched, in lower case."""
    digits = re.match(_DIGITS, text)
    if digits:
        number = digits.group().replace(",", "")
        if digits.end() == len(text) and _DOTTED_THOUSANDS.fullmatch(number):
            number = number.replace(".", "")  # nobody asks for one and a half words
        value = float(number)
        return value * _SCALES.get(text[digits.end() :].strip(" -"), 1)
    total = current = 0
    for word in re.split(r"[ ,-]+", text):
        if word in ("hundred", "thousand"):
            current = max(current, 1) * _SCALES[word]
            if word == "thousand":
                total, current = total + current, 0
        elif word != "and":
            current += _TENS.get(word, 0) + _UNITS.get(word, 0) + (word in ("a", "an"))
    return float(total + current)


def parse_chinese(text: str) -> float | tuple[float, float]:
    """Value of what `CHINESE_NUMBER` matched; two values for "三五百", three to five hundred."""
    digits = re.match(_DIGITS, text)
    if digits:
        return _digits_and_scales(float(digits.group().replace(",", "")), text[digits.end() :])
    about = re.fullmatch(r"([一二两三四五六七八九])([二三四五六七八九])([十百千万])", text)
    if about:
        low, high, scale_char = about.groups()
        scale = 10_000 if scale_char == "万" else _CHINESE_SCALES[scale_char]
        return float(_CHINESE_DIGITS[low] * scale), float(_CHINESE_DIGITS[high] * scale)
    ten_thousands, has_ten_thousands, rest = text.rpartition("万")
    total = 10_000 * (_below_ten_thousand(ten_thousands) or 1) if has_ten_thousands else 0
    if has_ten_thousands and len(rest) == 1 and rest in _CHINESE_DIGITS:
        return float(total + 1000 * _CHINESE_DIGITS[rest])  # 一万二 is 12,000
    return float(total + _below_ten_thousand(rest))


def _digits_and_scales(number: float, rest: str) -> float:
    """2千5百, 2千500 and 2千5 are all 2,500."""
    if not rest:
        return number
    scale = 10_000 if rest[0] == "万" else _CHINESE_SCALES[rest[0]]
    total = number * scale
    for digits, scale_char in re.findall(r"(\d+)([百千]?)", rest):
        if scale_char:
            scale = _CHINESE_SCALES[scale_char]
        elif len(digits) == 1:
            scale //= 10
        else:
            scale = 1
        total += int(digits) * scale
    return total


def _below_ten_thousand(text: str) -> int:
    total, digit, scale = 0, 0, 1
    for char in text:
        if char in _CHINESE_SCALES:
            scale = _CHINESE_SCALES[char]
            total += (digit or 1) * scale
            digit = 0
        else:
            digit = _CHINESE_DIGITS[char]
            if digit == 0:
                scale = 10  # after a zero the last digit counts ones: 一千零五 is 1,005
    return total + digit * max(1, scale // 10)  # 两千五 is 2,500, 八百五 is 850
