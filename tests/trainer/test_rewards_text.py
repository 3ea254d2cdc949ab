import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lwz_trainer.rewards.text import count_words, split_paragraphs, split_sentences


@pytest.mark.parametrize(
    ("text", "num_words"),
    [
        ("", 0),
        (" \n—… !? ", 0),
        ("The sea was calm.", 4),
        ("don't stop", 2),
        ("don\u2019t stop", 2),
        ("a state-of-the-art re\u2011entry", 3),
        ("rock 'n' roll", 3),
        ("the 'quoted' words", 3),
        ("3.14 is less than 10,000, or v1.2.3b.", 7),
        ("1,2 and 3", 3),
        ("yes,no/maybe_so—well", 5),
        ("Füße à la carte", 4),
        ("cafe\u0301 noir", 2),
        ("人工智能", 4),
        ("我喜欢Python编程。", 6),
        ("第3章，共12章", 6),
        ("GPT-4模型", 3),
        ("слово 한국 かな", 0),
    ],
)
def test_count_words_follows_its_rule(text: str, num_words: int) -> None:
    assert count_words(text) == num_words


@given(st.text(), st.text())
def test_count_words_adds_over_lines(first: str, second: str) -> None:
    assert count_words(first + "\n" + second) == count_words(first) + count_words(second)


def test_split_paragraphs_takes_each_line_that_is_not_blank() -> None:
    text = "\n  One.  \n\n\nTwo\r\n \t\nThree"
    assert [text[start:end] for start, end in split_paragraphs(text)] == ["One.", "Two", "Three"]


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("", []),
        ("One. Two! Three?", ["One.", "Two!", "Three?"]),
        ("Pi is 3.14. Right?! Yes", ["Pi is 3.14.", "Right?!", "Yes"]),
        ("He said “Go.” She went...", ["He said “Go.”", "She went..."]),
        ("Dr. A. Smith met Mr. Jones, i.e. him.", ["Dr. A. Smith met Mr. Jones, i.e. him."]),
        ("1. First item\n2. Second item", ["1. First item", "2. Second item"]),
        (
            "他来了。她走了！真的吗？“是的。”好",
            ["他来了。", "她走了！", "真的吗？", "“是的。”", "好"],
        ),
        ("A line without a stop\nand another.", ["A line without a stop", "and another."]),
    ],
)
def test_split_sentences_knows_both_scripts(text: str, sentences: list[str]) -> None:
    assert [text[start:end] for start, end in split_sentences(text)] == sentences


@given(st.text(alphabet="aB3.!?。！…” \n'"))
def test_split_sentences_keeps_every_character_but_white_space(text: str) -> None:
    spans = split_sentences(text)
    assert "".join("".join(text[start:end] for start, end in spans).split()) == "".join(
        text.split()
    )
    assert all(start < end for start, end in spans)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
