"""`generate`: parts of a growing completion, the terminal, and files that can be gone on with."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from lwz_trainer.__main__ import main
from lwz_trainer.evaluation.answer import final_answer
from lwz_trainer.generate.parts import PartStream, TextStream
from lwz_trainer.generate.terminal import TerminalPage, length_words
from lwz_trainer.rollout import RolloutEngine
from tests.trainer.test_bad_input import assert_refused
from tests.trainer.tiny import make_tiny_model, make_tiny_tokenizer
from tests.trainer.train_case import ROOT

STOP = ("<|user|>", "</answer>")


def show_pieces(pieces: list[str], opened: str, *, is_terminal: bool) -> tuple[str, str, str]:
    """What a page without thinking shows, and its thinking and answer."""
    file = io.StringIO()
    console = Console(file=file, force_terminal=is_terminal, width=40, highlight=False)
    page = TerminalPage(None, show_thinking=False, console=console)
    stream = PartStream(opened, STOP)
    for piece in pieces:
        for event, text in stream.feed(piece):
            if event == "restart":
                page.restart(text)
            else:
                page.add(event, text)
    for part, text in stream.finish():
        page.add(part, text)
    thinking, answer = page.close()
    return file.getvalue(), thinking, answer


@pytest.mark.parametrize(
    ("text", "opened", "thinking", "answer"),
    [
        ("<think>a</think><answer>b</answer>c", "", "a", "b"),
        ("a</think>\n<answer>b", "<think>", "a", "b"),
        ("the <answer> tag</think>Here: <answer>b", "<think>", "the <answer> tag", "b"),
        ("<think>a</think>b <think>c</think>d", "", "ac", "b d"),
        ("a</think>b", "", "a", "b"),
        ("a</think><answer>", "", "a", ""),
        ("so </think> and <think>", "<answer>", "", "so </think> and <think>"),
        ("b</answer>", "<answer>", "", "b"),
        ("b < c <an", "", "", "b < c <an"),
        ("b<|user|>: next", "<answer>", "", "b"),
        ("no tags at all", "", "", "no tags at all"),
    ],
)
def test_part_stream_tells_thinking_from_answer(
    text: str, opened: str, thinking: str, answer: str
) -> None:
    for size in (1, 2, 3, len(text)):
        pieces = [text[start : start + size] for start in range(0, len(text), size)]
        assert show_pieces(pieces, opened, is_terminal=False) == (
            f"{answer}\n" if answer else "",
            thinking,
            answer,
        )


@given(
    pieces=st.lists(
        st.sampled_from(["<think>", "</think>", "<answer>", "a<", "/", "answer>", "b", "<|us"]),
        max_size=12,
    ),
    opened=st.sampled_from(["", "<think>", "<answer>"]),
)
def test_part_stream_finds_the_answer_of_the_whole_text(pieces: list[str], opened: str) -> None:
    whole = "".join(pieces)
    expected = final_answer(opened + whole.partition("</answer>")[0])
    for fed in (pieces, [whole]):
        shown, _, answer = show_pieces(fed, opened, is_terminal=False)
        assert (shown.strip(), answer) == (expected, expected)


def test_a_terminal_shows_untagged_text_at_once() -> None:
    pieces = ["plan</think>", "Here it is: ", "<answer>", "The piece."]
    shown, thinking, answer = show_pieces(pieces, "<think>", is_terminal=True)
    assert (thinking, answer) == ("plan", "The piece.")
    assert shown.index("Here it is:") < shown.index("The piece.")


def test_text_stream_waits_for_whole_characters() -> None:
    tokenizer = make_tiny_tokenizer()
    text = "Café, 海很平静。 😀!"
    ids = tokenizer(text)["input_ids"]
    stream = TextStream(tokenizer)
    pieces = [stream.new_text(ids[:count]) for count in range(1, len(ids) + 1)]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_length_words_compares_with_what_was_wanted() -> None:
    assert length_words(1234, None) == "1,234 words"
    assert length_words(90, (100, 200)) == "90 words of 100 to 200, 10 too few"
    assert length_words(100, (100, 200)) == "100 words of 100 to 200, in range"
    assert length_words(201, (100, 200)) == "201 words of 100 to 200, 1 too many"


def show_on_terminal(*, show_thinking: bool) -> tuple[str, tuple[str, str]]:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=40, highlight=False)
    page = TerminalPage((3, 5), show_thinking=show_thinking, console=console)
    page.add("thinking", "First the tide.")
    for word in ["The sea ", "was calm.\n\n", "And a very long paragraph ", "goes over the edge."]:
        page.add("answer", word)
    return file.getvalue(), page.close()


@pytest.mark.parametrize("show_thinking", [False, True])
def test_terminal_page_counts_words_and_hides_thinking(show_thinking: bool) -> None:
    shown, (thinking, answer) = show_on_terminal(show_thinking=show_thinking)
    assert thinking == "First the tide."
    assert answer == "The sea was calm.\n\nAnd a very long paragraph goes over the edge."
    assert "The sea was calm." in shown
    assert "thinking: 3 words" in shown
    assert ("\x1b[2mFirst the tide." in shown) == show_thinking


def make_arguments(tmp_path: Path, **settings: Any) -> list[str]:
    if not (tmp_path / "tiny-llama").exists():
        make_tiny_model(tmp_path)
    defaults: dict[str, Any] = {
        "model": tmp_path / "tiny-llama",
        "template": ROOT / "tests" / "trainer" / "answer_only.txt",
        "dtype": "fp32",
        "max_tokens": 24,
        "num_threads": 1,
        "temperature": 1.0,
    }
    merged = defaults | settings
    return ["generate", *(f"--{name}={value}" for name, value in merged.items())]


def make_file_arguments(tmp_path: Path, output: str, **settings: Any) -> list[str]:
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"Write {n} words on the sea."} for n in range(3, 9)]
    prompts.write_text("\n".join(json.dumps(row) for row in rows))
    return make_arguments(tmp_path, prompts=prompts, output=tmp_path / output, **settings)


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_generate_writes_a_piece_to_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(make_file_arguments(tmp_path, "out.jsonl")) == 0
    (first,) = [r for r in read_lines(tmp_path / "out.jsonl") if r["index"] == 1]
    capsys.readouterr()
    assert main(make_arguments(tmp_path, prompt=first["prompt"])) == 0
    out, err = capsys.readouterr()
    assert out.strip() == first["answer"]
    assert f"{first['words']} words of 3 to 4" in err
    assert f"{first['num_tokens']} tokens in" in err


def test_generate_answers_a_file_and_goes_on_with_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(make_file_arguments(tmp_path, "whole.jsonl")) == 0
    whole = read_lines(tmp_path / "whole.jsonl")
    assert sorted(record["index"] for record in whole) == [1, 2, 3, 4, 5, 6]
    assert whole[0].keys() >= {"prompt", "thinking", "answer", "words", "length_range", "response"}
    assert {tuple(r["length_range"]) for r in whole if r["index"] == 5} == {(6, 8)}

    generate = RolloutEngine.generate

    def interrupted(self: RolloutEngine, *args: Any, on_burst: Any, **kwargs: Any) -> Any:
        def stop_after_the_first(ended: list) -> bool:
            on_burst(ended)
            if (tmp_path / "parts.jsonl").exists():
                raise KeyboardInterrupt
            return True

        return generate(self, *args, on_burst=stop_after_the_first, **kwargs)

    arguments = make_file_arguments(tmp_path, "parts.jsonl", max_num_seqs=2)
    monkeypatch.setattr(RolloutEngine, "generate", interrupted)
    capsys.readouterr()
    assert main(arguments) == 1
    assert "of 6 answers are in" in capsys.readouterr().err
    kept = read_lines(tmp_path / "parts.jsonl")
    assert 0 < len(kept) < 6
    with (tmp_path / "parts.jsonl").open("a") as file:
        file.write('{"index": 6, "answ')
    monkeypatch.setattr(RolloutEngine, "generate", generate)
    assert main(arguments) == 0
    parts = read_lines(tmp_path / "parts.jsonl")
    assert parts[: len(kept)] == kept
    assert sorted(parts, key=lambda r: r["index"]) == sorted(whole, key=lambda r: r["index"])


def test_generate_refuses_to_mix_settings_in_one_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(make_file_arguments(tmp_path, "out.jsonl")) == 0
    content = (tmp_path / "out.jsonl").read_text()
    arguments = make_file_arguments(tmp_path, "out.jsonl", seed=1)
    assert_refused(arguments, capsys, "written with other settings")
    make_tiny_model(tmp_path)  # weights written again in place
    arguments = make_file_arguments(tmp_path, "out.jsonl")
    assert_refused(arguments, capsys, "other settings or weights")
    assert (tmp_path / "out.jsonl").read_text() == content


def test_generate_refuses_a_file_with_answers_to_other_requests(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = make_file_arguments(tmp_path, "out.jsonl")
    prompts = tmp_path / "prompts.jsonl"
    first = {"prompt": "Name the sea in 9 words."}
    prompts.write_text(json.dumps(first))
    assert main(arguments) == 0
    prompts.write_text(json.dumps(first) + '\n{"prompt": "Write."}')  # a row more is gone on with
    assert main(arguments) == 0
    content = (tmp_path / "out.jsonl").read_text()
    assert len(content.splitlines()) == 2
    second = {"prompt": "Write.", "length_range": [1, 2]}
    for rows in ([first], [first, {"prompt": "Sing."}], [first, second]):
        prompts.write_text("\n".join(json.dumps(row) for row in rows))
        assert_refused(arguments, capsys, "answers another request 2 than")
    assert (tmp_path / "out.jsonl").read_text() == content


def test_generate_uses_what_the_context_leaves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [a for a in make_arguments(tmp_path, prompt="Write!") if "max_tokens" not in a]
    assert main([*arguments, "--temperature=0.6"]) == 0
    assert "words" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "generate needs --model, and --prompt or --prompts"),
        ({"prompt": "a", "prompts": "b.jsonl", "output": "c"}, "prompt and prompts are both set"),
        ({"prompts": "b.jsonl"}, "prompts and output belong together"),
        ({"prompt": "a", "max_tokens": 512}, "the model's context is 512"),
        ({"prompt": "a", "template": "thinking"}, "unknown template 'thinking'"),
        ({"prompt": "a", "model": "/nowhere"}, "no model at /nowhere"),
        ({"prompts": "/nowhere.jsonl", "output": "c"}, "no such prompt file"),
        ({"prompt": "a", "temperature": 0}, "temperature must be above 0"),
        ({"prompt": "a", "seed": 2**63}, "seed must be at least 0 and below 2**63"),
        ({"prompt": "a \udcff"}, "prompt is not UTF-8"),
    ],
)
def test_generate_refuses_bad_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: dict[str, Any], expected: str
) -> None:
    assert_refused(make_arguments(tmp_path, **settings), capsys, expected)


@pytest.mark.parametrize("harm", ["bad line", "occupied output"])
def test_generate_refuses_bad_files_and_leaves_them_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], harm: str
) -> None:
    arguments = make_file_arguments(tmp_path, "notes.txt")
    if harm == "bad line":
        with (tmp_path / "prompts.jsonl").open("a") as file:
            file.write('\n{"prompt": 3}\n')
        assert_refused(arguments, capsys, "prompts.jsonl line 7")
        assert not (tmp_path / "notes.txt").exists()
    else:
        (tmp_path / "notes.txt").write_text("Notes without a line break")
        assert_refused(arguments, capsys, "notes.txt is no file of this program")
        assert (tmp_path / "notes.txt").read_text() == "Notes without a line break"
