import pytest
from hypothesis import given
from hypothesis import strategies as st

from lwz_trainer.rewards.structure import Completion, parse_completion


def strict(text: str, kind: str = "think", stopped: bool = False) -> Completion:
    return parse_completion(text, kind=kind, mode="strict", stopped_at_answer=stopped)  # type: ignore[arg-type]


def graded(text: str, kind: str = "think", stopped: bool = False) -> float:
    return parse_completion(
        text,
        kind=kind,  # type: ignore[arg-type]
        mode="graded",
        stopped_at_answer=stopped,
    ).structure


WHOLE = "<think> a plan </think>\n<answer> The piece. </answer>\n"


def test_parse_completion_takes_a_whole_one_apart() -> None:
    completion = strict(WHOLE)
    assert completion == Completion(
        think="a plan", answer="The piece.", answer_start=33, structure=1.0, closed=True
    )
    assert WHOLE[33:].startswith("The piece.")


@pytest.mark.parametrize("ending", ["", "</answer>", "</answer>\n"])
def test_parse_completion_accepts_a_stop_string_left_off_or_kept(ending: str) -> None:
    completion = strict("<think>p</think><answer>The piece." + ending, stopped=True)
    assert (completion.structure, completion.closed, completion.answer) == (1.0, True, "The piece.")


def test_parse_completion_keeps_a_truncated_answer_but_not_its_structure() -> None:
    completion = strict("<think>p</think><answer>The piece goes on")
    assert completion.answer == "The piece goes on"
    assert not completion.closed
    assert completion.structure == 0.0


@pytest.mark.parametrize(
    ("text", "think", "answer"),
    [
        ("", "", ""),
        ("no tags at all", "", ""),
        ("<think>still planning", "still planning", ""),
        ("<think>plan</think>and then nothing", "plan", ""),
        ("<think>plan</think><answer></answer>", "plan", ""),
        ("<think>plan</think><answer> \n</answer>", "plan", ""),
        ("<answer>before any thought</answer>", "", ""),
        ("<think>p <answer>early</answer> q</think>", "p <answer>early</answer> q", ""),
        (
            "<think>p <answer>early</answer></think><answer>late</answer>",
            "p <answer>early</answer>",
            "late",
        ),
        ("<think>p</think>x<answer>y</answer>", "p", "y"),
        ("x<think>p</think><answer>y</answer>", "p", "y"),
        ("<think>p</think><answer>y</answer>z", "p", "y"),
        ("<think>p</think><answer>y</answer><answer>z</answer>", "p", "y"),
        ("<think>p</think><think>q</think><answer>y</answer>", "p", "y"),
        ("<think>p</think><answer>y</answer></answer>", "p", "y"),
        ("<think><think>p</think><answer>y</answer>", "<think>p", "y"),
        ("<think>p</think></think><answer>y</answer>", "p", "y"),
        ("<think>p</think><answer>y<think></answer>", "p", "y<think>"),
        ("p</think><answer>y</answer>", "p", "y"),
        ("<Think>p</Think><Answer>y</Answer>", "", ""),
    ],
)
def test_parse_completion_strict_refuses_other_forms(text: str, think: str, answer: str) -> None:
    completion = strict(text)
    assert (completion.think, completion.answer, completion.structure) == (think, answer, 0.0)
    assert graded(text) < 1


def test_parse_completion_stop_inside_the_thinking_is_no_answer() -> None:
    completion = strict("<think>I will end with ", stopped=True)
    assert (completion.answer, completion.structure, completion.closed) == ("", 0.0, False)


@pytest.mark.parametrize(
    ("text", "structure", "answer"),
    [
        ("<answer>The piece.</answer>", 1.0, "The piece."),
        ("<answer>The piece.", 0.0, "The piece."),
        ("<answer>The <think>piece</think>.</answer>", 0.0, "The <think>piece</think>."),
        ("<answer>The <think> piece.</answer>", 0.0, "The <think> piece."),
        ("Sure! <answer>The piece.</answer>", 0.0, "The piece."),
        ("<think>p</think><answer>The piece.</answer>", 0.0, "The piece."),
        ("<answer>a</answer><answer>b</answer>", 0.0, "a"),
        ("<answer></answer>", 0.0, ""),
        ("The piece.", 0.0, ""),
    ],
)
def test_parse_completion_direct_wants_the_answer_alone(
    text: str, structure: float, answer: str
) -> None:
    completion = strict(text, kind="direct")
    assert (completion.structure, completion.answer, completion.think) == (structure, answer, "")


def test_parse_completion_graded_rises_piece_by_piece() -> None:
    stages = [
        "<think>plan",
        "<think>plan</think>",
        "<think>plan</think><answer>",
        "<think>plan</think><answer>text",
        "<think>plan</think>so<answer>text</answer>",
        "<think>plan</think><answer>text</answer>",
    ]
    assert [graded(text) for text in stages] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])


def test_parse_completion_graded_rises_piece_by_piece_without_thinking() -> None:
    stages = ["", "<answer>", "<answer>text", "<answer>text</answer>bye", "<answer>text</answer>"]
    assert [graded(text, "direct") for text in stages] == [0, 0.25, 0.5, 0.75, 1]


@pytest.mark.parametrize(
    ("text", "structure"),
    [
        ("<think>p</think></think><answer>text</answer>", 0.0),
        ("<think>p</think><answer>text<answer>text</answer>", 0.2),
        ("<think>p <answer>early</think><answer>text</answer>", 0.2),
        ("<think>p</think><answer>text</answer></answer>", 0.6),
        ("<think>p</think><answer>text</answer>more", 0.8),
    ],
)
def test_parse_completion_graded_loses_a_doubled_piece_and_all_after_it(
    text: str, structure: float
) -> None:
    assert graded(text) == pytest.approx(structure)


@pytest.mark.parametrize(
    "text",
    [
        "<think>" + "</think>" * 20,
        "<think></think>" * 20 + "<answer></answer>" * 20,
        "<answer>" * 20,
        "<think>" * 3 + "</think>" * 3 + "<answer>" * 3 + "text" + "</answer>" * 3,
    ],
)
def test_parse_completion_graded_gives_nothing_for_spam(text: str) -> None:
    assert graded(text) == 0
    assert graded(text, "direct") == 0


TAGS = ["<think>", "</think>", "<answer>", "</answer>"]


@given(
    st.lists(st.sampled_from([*TAGS, "text", " ", "\n"]), max_size=9),
    st.sampled_from(["think", "direct"]),
    st.booleans(),
)
def test_parse_completion_graded_is_one_exactly_where_strict_is(
    parts: list[str], kind: str, stopped: bool
) -> None:
    text = "".join(parts)
    score = graded(text, kind, stopped)
    assert (score == 1) == (strict(text, kind, stopped).structure == 1)
    assert 0 <= score <= 1


@given(st.integers(0, 4), st.sampled_from(TAGS))
def test_parse_completion_repeating_a_tag_never_gains(position: int, tag: str) -> None:
    parts = ["<think>", "plan", "</think>", "<answer>", "text", "</answer>"]
    doubled = [*parts[: position + 1], tag, *parts[position + 1 :]]
    assert graded("".join(doubled)) <= 0.6
    assert strict("".join(doubled)).structure == 0


@given(st.lists(st.sampled_from([*TAGS, "text", " ", "\n"]), max_size=9), st.sampled_from(TAGS))
def test_parse_completion_answer_start_points_at_the_answer(parts: list[str], last: str) -> None:
    text = "".join([*parts, last])
    completion = strict(text)
    end = completion.answer_start + len(completion.answer)
    assert text[completion.answer_start : end] == completion.answer


def test_parse_completion_refuses_unknown_words() -> None:
    with pytest.raises(ValueError, match="kind must be"):
        strict(WHOLE, kind="chat")
    with pytest.raises(ValueError, match="mode must be"):
        parse_completion(WHOLE, kind="think", mode="soft", stopped_at_answer=False)  # type: ignore[arg-type]
