"""Templates: how a writing request becomes the text that the policy continues.

The built-in ones are raw completion templates in our own words, after the think and direct prompts
of LongWriter-Zero (arXiv 2506.18841): a conversation in plain text that ends at the assistant's
turn. A .txt file of the user takes their place, and so does the model's own chat template.
"think_example" is for small models, which copy one filled example far more often than they follow
instructions; it holds no instructions at all, because with them SmolLM2-135M kept the form less
often. The requests state their length themselves, so no built-in template uses `{length}`.
"""

import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lwz_trainer.data.prompts import Prompt
from lwz_trainer.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "BUILT_IN_TEMPLATES",
    "STOP_STRINGS",
    "Renderer",
    "Template",
    "load_template",
    "render_chat",
]

BUILT_IN_TEMPLATES = ("think", "direct", "think_example")

# Where a completion of a raw template ends: the next turn, the document's end, the answer's end.
STOP_STRINGS = ("<|user|>", "<|endoftext|>", "</answer>")

_OPENING_TAGS = ("<think>", "<answer>")
_PLACEHOLDER = re.compile(r"\{question\}|\{length\}")


@dataclass(frozen=True)
class Template:
    """A raw completion template.

    Args:
        text_en: its text for English requests, with `{question}` once and, if wanted, `{length}`.
        text_zh: its text for Chinese requests.
        opened: the tag that the template leaves open at its end ("<think>", "<answer>" or ""). It
            belongs to the reply: put it before the completion before looking for tags.
        kind: "think" if the reply is to hold <think> and <answer>, "direct" if <answer> alone.
    """

    text_en: str
    text_zh: str
    opened: str
    kind: Literal["think", "direct"]

    def render(self, prompt: Prompt) -> str:
        """The text that the policy continues.

        The placeholders are filled in one pass, so braces in the request are only characters.
        """
        text = self.text_zh if prompt.language == "zh" else self.text_en
        values = {"{question}": prompt.prompt, "{length}": _length_sentence(prompt)}
        return _PLACEHOLDER.sub(lambda match: values[match.group()], text)


class Renderer:
    """Requests as the text, and the tokens, that a model continues.

    Args:
        template: as in `load_template`, or "chat" for the model's own chat template.
        chat_opened: tag that starts the reply to a chat template, or "".
        chat_system: system message of a chat template; empty for none.

    Raises:
        UserError: from `load_template`.
    """

    def __init__(self, template: str, *, chat_opened: str = "", chat_system: str = "") -> None:
        self.template = None if template == "chat" else load_template(template)
        """The raw template; None for the chat template."""
        self._chat_system = chat_system or None
        self.opened = chat_opened
        """The tag that the text leaves open, or "": put it before a completion."""
        self.kind: Literal["think", "direct"] = "direct" if chat_opened == "<answer>" else "think"
        """Whether a reply is to hold both tags, or <answer> alone."""
        if self.template is not None:
            self.opened, self.kind = self.template.opened, self.template.kind

    def text(self, prompt: Prompt, tokenizer: "PreTrainedTokenizerBase") -> str:
        """The text that the model continues."""
        if self.template is None:
            return render_chat(prompt, tokenizer, self._chat_system, self.opened)
        return self.template.render(prompt)

    def token_ids(self, text: str, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
        """Its tokens; a chat template has written its own special ones."""
        return tokenizer(text, add_special_tokens=self.template is not None)["input_ids"]


def load_template(name_or_path: str) -> Template:
    """A built-in template by name ("think", "direct", "think_example"), or the user's .txt file.

    A file serves both languages. It holds `{question}` exactly once and `{length}` where the wanted
    length is to be told; one line break at its end is dropped. If the text after `{question}` ends
    with <think> or <answer>, the completion starts inside that tag. The kind is "think" if the file
    names <think> and does not end with <answer>.

    Raises:
        UserError: if there is no such file or its placeholders are wrong.
    """
    if name_or_path in BUILT_IN_TEMPLATES:
        folder = resources.files("lwz_trainer.data") / "templates"
        text_en, text_zh = (
            _without_last_line_break((folder / f"{name_or_path}.{language}.txt").read_text("utf-8"))
            for language in ("en", "zh")
        )
        return _template(text_en, text_zh)

    path = Path(name_or_path)
    if path.suffix != ".txt":
        raise UserError(
            f"unknown template {name_or_path!r}; expected one of {', '.join(BUILT_IN_TEMPLATES)},"
            " chat, or the path of a .txt file with {question}"
        )
    if not path.is_file():
        raise UserError(f"no such template file: {path}; check the path")
    try:
        text = _without_last_line_break(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error}); save it as UTF-8") from error
    num_questions = text.count("{question}")
    if num_questions != 1:
        raise UserError(
            f"{path}: a template must contain {{question}} exactly once, found {num_questions}"
        )
    return _template(text, text)


def render_chat(
    prompt: Prompt, tokenizer: "PreTrainedTokenizerBase", system: str | None, opened: str
) -> str:
    """The request in the model's own chat template, up to where the assistant's reply starts.

    The text holds the special tokens that the chat template puts there, so it is tokenized with
    `add_special_tokens=False`.

    Args:
        prompt: the request.
        tokenizer: a tokenizer with a chat template.
        system: the system message; None sends none (some chat templates then put in their own).
        opened: "<think>" or "<answer>" to start the completion inside that tag, else "".
    Raises:
        UserError: if the tokenizer has no chat template or `opened` is another string.
    """
    if opened not in ("", *_OPENING_TAGS):
        raise UserError(f"opened must be '', '<think>' or '<answer>', got {opened!r}")
    if not tokenizer.chat_template:
        raise UserError(
            "this model's tokenizer has no chat template; expected one for template 'chat':"
            f" use one of {', '.join(BUILT_IN_TEMPLATES)}"
        )
    messages = [{"role": "user", "content": prompt.prompt}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert isinstance(text, str), f"tokenize=False gave {type(text).__name__}"
    return text + opened


def _template(text_en: str, text_zh: str) -> Template:
    opened = _opened_tag(text_en)
    assert _opened_tag(text_zh) == opened, "both languages of a template end with the same tag"
    is_think = "<think>" in text_en and opened != "<answer>"
    return Template(text_en, text_zh, opened, "think" if is_think else "direct")


def _opened_tag(text: str) -> str:
    """The tag at the very end of the text after {question}, or ""."""
    _, _, tail = text.partition("{question}")
    return next((tag for tag in _OPENING_TAGS if tail.rstrip().endswith(tag)), "")


def _without_last_line_break(text: str) -> str:
    """Editors end a file with a line break that the completion must not start after."""
    return text.removesuffix("\n")


def _length_sentence(prompt: Prompt) -> str:
    if prompt.length_range is None:
        return ""
    low, high = prompt.length_range
    if prompt.language == "zh":
        return f"请写 {low} 到 {high} 字。"
    return f"Write between {low} and {high} words."
