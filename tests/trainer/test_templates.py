"""Templates: built-in wording, the user's files, the model's chat template."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lwz_trainer.data.prompts import Prompt
from lwz_trainer.data.templates import (
    BUILT_IN_TEMPLATES,
    STOP_STRINGS,
    Template,
    load_template,
    render_chat,
)
from lwz_trainer.errors import UserError

ENGLISH = Prompt("Write about the sea.", (40, 80), "en", 1)
CHINESE = Prompt("写一写大海。", (400, 600), "zh", 2)


class _RecordingTokenizer:
    """Stands for a tokenizer with a chat template: prints the roles and keeps its arguments."""

    chat_template: str | None = "a template"

    def apply_chat_template(self, messages: list[dict[str, str]], **kwargs: Any) -> str:
        self.kwargs = kwargs
        return "".join(f"[{m['role']}]{m['content']}" for m in messages) + "[assistant]"


def _write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("name", "opened", "kind"),
    [("think", "", "think"), ("direct", "", "direct"), ("think_example", "<think>", "think")],
)
def test_load_template_knows_what_built_ins_leave_open(name: str, opened: str, kind: str) -> None:
    template = load_template(name)
    assert (template.opened, template.kind) == (opened, kind)
    for text in (template.text_en, template.text_zh):
        assert text.count("{question}") == 1
        end = "<|user|>: {question} <|assistant|>:"
        assert text.endswith(end + " <think>" if opened else end)


@pytest.mark.parametrize("name", BUILT_IN_TEMPLATES)
def test_built_in_templates_are_in_their_language(name: str) -> None:
    template = load_template(name)
    assert not re.search(r"[\u4e00-\u9fff]", template.text_en)
    assert len(re.findall(r"[\u4e00-\u9fff]", template.text_zh)) > 50


@pytest.mark.parametrize("name", BUILT_IN_TEMPLATES)
def test_built_in_templates_name_the_tags_of_their_kind(name: str) -> None:
    template = load_template(name)
    for text in (template.text_en, template.text_zh):
        assert text.count("</think>") == (
            0 if template.kind == "direct" else text.count("<answer>")
        )
        assert text.count("<answer>") == text.count("</answer>") > 0


def test_think_example_holds_one_filled_reply() -> None:
    template = load_template("think_example")
    for text in (template.text_en, template.text_zh):
        replies = re.findall(
            r"<\|assistant\|>: <think>([^<]{10,})</think>\s*<answer>([^<]{40,})</answer>", text
        )
        assert len(replies) == 1


def test_think_example_is_short_enough_for_a_small_model() -> None:
    # Words and marks stand in for tokens, so that the test needs no tokenizer: this text has 101 of
    # them and 106 tokens of SmolLM2's tokenizer.
    text = load_template("think_example").text_en.replace("{question}", "")
    assert len(re.findall(r"\w+|[^\w\s]", text)) <= 105


def test_render_takes_the_text_of_the_requests_language() -> None:
    template = Template("en {question}", "中 {question}", "", "direct")
    assert template.render(ENGLISH) == "en Write about the sea."
    assert template.render(CHINESE) == "中 写一写大海。"


def test_render_leaves_braces_in_the_request_alone(tmp_path: Path) -> None:
    template = load_template(_write(tmp_path / "mine.txt", "{x} {length} {question} {}"))
    prompt = Prompt(r"{length} {question} {0} {{\1}}", (40, 80), "en", 1)
    assert template.render(prompt) == (
        r"{x} Write between 40 and 80 words. {length} {question} {0} {{\1}} {}"
    )


def test_render_tells_the_length_in_the_requests_language(tmp_path: Path) -> None:
    template = load_template(_write(tmp_path / "mine.txt", "{question} {length}|{length}"))
    sentence = "Write between 40 and 80 words."
    assert template.render(ENGLISH) == f"Write about the sea. {sentence}|{sentence}"
    assert template.render(CHINESE) == "写一写大海。 请写 400 到 600 字。|请写 400 到 600 字。"
    assert template.render(Prompt("x", None, "en", 1)) == "x |"


def test_built_in_render_ends_where_the_completion_starts() -> None:
    rendered = load_template("think").render(ENGLISH)
    assert rendered.endswith("\n<|user|>: Write about the sea. <|assistant|>:")
    rendered = load_template("think_example").render(CHINESE)
    assert rendered.endswith("\n<|user|>: 写一写大海。 <|assistant|>: <think>")


@pytest.mark.parametrize(
    ("text", "opened", "kind"),
    [
        ("Q: {question}\nA:\n", "", "direct"),
        ("Use <answer> please. Q: {question}\nA: <answer>\n", "<answer>", "direct"),
        ("Use <think> and <answer>. Q: {question}\nA:", "", "think"),
        ("Q: {question}\nA: <think>\n\n", "<think>", "think"),
        ("No thinking: {question} <think></think> <answer>", "<answer>", "direct"),
        ("<think> {question}", "", "think"),
        ("Not the end: {question} <think> then", "", "think"),
    ],
)
def test_load_template_reads_what_a_file_leaves_open(
    tmp_path: Path, text: str, opened: str, kind: str
) -> None:
    template = load_template(_write(tmp_path / "mine.txt", text))
    expected = text.removesuffix("\n")
    assert template == Template(expected, expected, opened, kind)  # type: ignore[arg-type]


def test_load_template_drops_one_line_break_of_either_kind(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_bytes(b"\xef\xbb\xbf{question}\r\nA:\r\n")
    assert load_template(str(path)).text_en == "{question}\nA:"


@pytest.mark.parametrize(
    ("text", "found"), [("no place", 0), ("{question} {question}", 2), ("", 0)]
)
def test_load_template_wants_the_question_once(tmp_path: Path, text: str, found: int) -> None:
    path = _write(tmp_path / "mine.txt", text)
    message = rf"mine.txt: a template must contain {{question}} exactly once, found {found}"
    with pytest.raises(UserError, match=message):
        load_template(path)


def test_load_template_names_the_known_ones() -> None:
    message = "unknown template 'thinking'; expected one of think, direct, think_example, chat, or"
    with pytest.raises(UserError, match=message):
        load_template("thinking")


def test_load_template_refuses_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such template file: .*mine\.txt; check the path"):
        load_template(str(tmp_path / "mine.txt"))


def test_load_template_refuses_other_encodings(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_bytes("写信 {question}".encode("gb18030"))
    with pytest.raises(UserError, match=r"mine\.txt is not UTF-8 .*; save it as UTF-8"):
        load_template(str(path))


def test_render_chat_sends_the_messages_and_opens_the_tag() -> None:
    tokenizer: Any = _RecordingTokenizer()
    rendered = render_chat(ENGLISH, tokenizer, "Be brief.", "<think>")
    assert rendered == "[system]Be brief.[user]Write about the sea.[assistant]<think>"
    assert tokenizer.kwargs == {"tokenize": False, "add_generation_prompt": True}


def test_render_chat_without_system_sends_the_request_alone() -> None:
    tokenizer: Any = _RecordingTokenizer()
    assert render_chat(CHINESE, tokenizer, None, "") == "[user]写一写大海。[assistant]"
    assert render_chat(CHINESE, tokenizer, "", "") == "[system][user]写一写大海。[assistant]"


def test_render_chat_uses_a_real_tokenizers_template() -> None:
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.BPE())
    )
    with pytest.raises(UserError, match="tokenizer has no chat template"):
        render_chat(ENGLISH, tokenizer, None, "")
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    rendered = render_chat(ENGLISH, tokenizer, "Be brief.", "<answer>")
    assert rendered == "<system>Be brief.\n<user>Write about the sea.\n<assistant><answer>"


def test_render_chat_refuses_a_tokenizer_without_chat_template() -> None:
    tokenizer: Any = SimpleNamespace(chat_template=None)
    with pytest.raises(UserError, match=r"no chat template; .* use one of think, direct"):
        render_chat(ENGLISH, tokenizer, None, "")


def test_render_chat_refuses_other_opened_tags() -> None:
    tokenizer: Any = _RecordingTokenizer()
    with pytest.raises(UserError, match="opened must be '', '<think>' or '<answer>', got '<a>'"):
        render_chat(ENGLISH, tokenizer, None, "<a>")


def test_stop_strings_end_the_next_turn_and_the_answer() -> None:
    assert STOP_STRINGS == ("<|user|>", "<|endoftext|>", "</answer>")
