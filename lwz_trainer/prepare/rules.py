"""Rules that drop a request before any model sees it.

They are cheap and coarse: what a rule cannot tell is left to the judge's quality question.
"""

import re
from typing import Literal

from lwz_trainer.config.prepare import RulesConfig
from lwz_trainer.data.prompts import prompt_language
from lwz_trainer.prepare.sources import SourceRow
from lwz_trainer.rewards.text import count_words

__all__ = ["request_language", "rule_against"]

Language = Literal["en", "zh", "other"]

_JAPANESE_OR_KOREAN = re.compile(r"[\u3041-\u30ff\uac00-\ud7af]")
_LATIN = re.compile(r"[A-Za-zÀ-ÖØ-öø-\u024f\u1e00-\u1eff]")
# Greek to Georgian, and the scripts of Africa and Asia up to U+1CFF but for phonetic letters.
_OTHER_SCRIPT = re.compile(r"[\u0370-\u1cff]")
_DECLARED = {"english": "en", "chinese": "zh", "en": "en", "zh": "zh", "unknown": ""}

# These three are searched in lower-cased text.
_CODE = re.compile(
    r"```|#include\s*<|\bpublic static\b|\bconsole\.log\(|\bsystem\.out\b|\bprintf?\("
    r"|</?(?:div|html|span|script|body)\b|(?:[;{}]\s*\n.*){3}"
    r"|^\s*(?:def \w+\(|class \w+\(|import \w+\s*$|from \w+ import )",
    re.MULTILINE,
)
_PROGRAMMING = (
    r"(?:python|java|javascript|typescript|c\+\+|c#|php|sql|bash|powershell|html|css|rust|golang"
    r"|kotlin|vba|matlab|node\.?js|latex|arduino|pine ?script)"
)
_CODE_WANTED = re.compile(
    rf"\b{_PROGRAMMING}\W+(?:\w+\W+){{0,2}}?(?:code|script|function|program|class|query|formula"
    r"|macro|component|page|api|app)\b"
    rf"|\b(?:code|script|function|program|app|class|macro|formula) (?:in|with|using|for) "
    rf"{_PROGRAMMING}(?!\w)"
    r"|\b(?:source code|unit tests?|regular expression|regex|stack ?trace|leetcode"
    r"|excel (?:formula|macro|sheet)s?)\b"
    r"|代码|编程|报错|(?:写|编)(?:一?个|一段)?(?:程序|函数|爬虫)",
)
_IMAGE_PROMPT = re.compile(
    r"\bmid ?journey\b|\bstable ?diffusion\b|\bdall[-·. ]?e\b|\btext[- ]to[- ]image\b"
    r"|\bimage (?:generation )?prompts?\b|\s--(?:ar|v|q|stylize) \d|文生图|绘画提示词",
)


def rule_against(row: SourceRow, rules: RulesConfig, languages: frozenset[str]) -> str | None:
    """Why a row is dropped, in a few words; None if no rule is against it.

    Args:
        row: as read.
        rules: which rules there are.
        languages: those that are wanted, of "en" and "zh".
    """
    text = row.text
    if not text:
        return "empty"
    if rules.drop_flagged and row.is_flagged:
        return "flagged as toxic or redacted"
    if request_language(text, row.language) not in languages:
        return "another language"
    num_words = count_words(text)
    if num_words < rules.min_words:
        return "too short"
    if num_words > rules.max_words:
        return "too long"
    lowered = text.lower()
    if rules.drop_code and (_CODE.search(lowered) or _CODE_WANTED.search(lowered)):
        return "program code"
    if rules.drop_image_prompts and _IMAGE_PROMPT.search(lowered):
        return "image prompt"
    return None


def request_language(text: str, declared: str) -> Language:
    """By script; what the data set declares tells Spanish from English, which script cannot.

    A text with a Chinese character is Chinese, as for templates and rewards, unless it has Japanese
    or Korean letters too.
    """
    known = _DECLARED.get(declared.casefold(), "other" if declared else "")
    if known == "other" or _JAPANESE_OR_KOREAN.search(text):
        return "other"
    if prompt_language(text) == "zh":
        return "zh"
    is_latin = len(_LATIN.findall(text)) >= len(_OTHER_SCRIPT.findall(text))
    return "en" if is_latin else "other"
