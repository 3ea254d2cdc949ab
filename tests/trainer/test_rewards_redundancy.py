import random
import time

import numpy as np
import pytest

from lwz_trainer.config.rewards import FormatRewardConfig
from lwz_trainer.rewards.redundancy import Redundancy, embedding_redundancy, shingle_redundancy

CONFIG = FormatRewardConfig()

PARAGRAPHS = [
    "The harbour lay quiet under the morning fog while the first boats came home from the night.",
    "Nobody in the village remembered when the lighthouse had last been painted by its keeper.",
    "Her grandfather kept a ledger of storms, one line for each, written in a hand like rigging.",
    "In winter the road over the hills was closed, and letters had to wait for the thaw in March.",
    "She learned to read from weather reports, which taught her that words may also be warnings.",
]
CHINESE_PARAGRAPHS = [
    "清晨的港口笼罩在薄雾之中，第一批渔船正从漫长的黑夜里慢慢归来。",
    "村里没有人记得灯塔上一次粉刷是在什么时候，只知道守塔人早已老去。",
    "她的祖父留下一本记录风暴的账簿，每一场风暴占据其中短短的一行。",
    "冬天山路封闭以后，所有的信件都必须等到三月冰雪融化才能送到。",
]


def redundancy(answer: str) -> Redundancy:
    return shingle_redundancy(answer, threshold=CONFIG.threshold, shingle_size=CONFIG.shingle_size)


def reworded(text: str, frac: float, generator: random.Random) -> str:
    vocabulary = ["stone", "river", "candle", "orchard", "iron", "velvet", "garden", "thunder"]
    return " ".join(
        generator.choice(vocabulary) if generator.random() < frac else word for word in text.split()
    )


@pytest.mark.parametrize("answer", ["", " \n ", "…", "Short."])
def test_shingle_redundancy_of_nothing_to_compare_is_0(answer: str) -> None:
    assert redundancy(answer) == Redundancy(score=0.0, spans=(), num_units=0)


@pytest.mark.parametrize("paragraphs", [PARAGRAPHS, CHINESE_PARAGRAPHS])
def test_shingle_redundancy_of_different_paragraphs_is_0(paragraphs: list[str]) -> None:
    result = redundancy("\n\n".join(paragraphs))
    assert (result.score, result.spans) == (0.0, ())
    assert result.num_units == len(paragraphs)


@pytest.mark.parametrize("paragraphs", [PARAGRAPHS, CHINESE_PARAGRAPHS])
def test_shingle_redundancy_marks_the_later_copy(paragraphs: list[str]) -> None:
    answer = "\n".join([*paragraphs, "  " + paragraphs[1].upper() + "  "])
    result = redundancy(answer)
    assert result.score == pytest.approx(1 / (len(paragraphs) + 1))
    assert [answer[start:end] for start, end in result.spans] == [paragraphs[1].upper()]


def test_shingle_redundancy_compares_sentences_where_paragraphs_are_few() -> None:
    answer = " ".join([*PARAGRAPHS, PARAGRAPHS[0]])
    result = redundancy(answer)
    assert result.score == pytest.approx(1 / 6)
    assert [answer[start:end] for start, end in result.spans] == [PARAGRAPHS[0]]
    chinese = redundancy("".join([*CHINESE_PARAGRAPHS, CHINESE_PARAGRAPHS[3]]))
    assert chinese.score == pytest.approx(1 / 5)


def test_shingle_redundancy_default_finds_nine_in_ten_lightly_reworded_copies() -> None:
    generator = random.Random(0)
    found = []
    for _ in range(100):
        words = [f"w{generator.randrange(3000)}" for _ in range(generator.randint(20, 150))]
        original = " ".join(words)
        answer = "\n".join([*PARAGRAPHS, original, reworded(original, 0.1, generator)])
        found.append(redundancy(answer).score > 0)
    assert np.mean(found) >= 0.9


def test_shingle_redundancy_threshold_is_inclusive_and_read() -> None:
    # 3-shingles: 8 in each text, the first 4 shared, so the Jaccard index is 4 / 12.
    first = "a1 a2 a3 a4 a5 a6 b1 b2 b3 b4"
    second = "a1 a2 a3 a4 a5 a6 c1 c2 c3 c4"
    answer = "\n".join([*PARAGRAPHS, first, second])
    assert shingle_redundancy(answer, threshold=1 / 3, shingle_size=3).score > 0
    assert shingle_redundancy(answer, threshold=0.34, shingle_size=3).score == 0
    # 5-shingles: 6 in each, 2 shared: 2 / 10.
    assert shingle_redundancy(answer, threshold=0.21, shingle_size=5).score == 0
    assert shingle_redundancy(answer, threshold=0.2, shingle_size=5).score > 0


@pytest.mark.parametrize(
    "answer",
    [
        "very " * 500,
        "The sea. " * 200,
        "The sea.\n" * 200,
        "好" * 500,
        "他来了。\n" * 200,
        "\n".join(" ".join([paragraph] * 20) for paragraph in PARAGRAPHS),
        "\n".join("".join([paragraph] * 20) for paragraph in CHINESE_PARAGRAPHS),
        "\n\n".join(f"{paragraph} {number}" for number in range(40) for paragraph in PARAGRAPHS),
    ],
)
def test_shingle_redundancy_sees_through_padding(answer: str) -> None:
    assert redundancy(answer).score > 0.8


def test_shingle_redundancy_does_not_punish_headings_and_short_list_items() -> None:
    sections = [f"## Summary\n\n- Yes\n- No\n\n{paragraph}" for paragraph in PARAGRAPHS]
    assert redundancy("\n\n".join(sections)).score == 0


def test_shingle_redundancy_spans_lie_in_the_answer_in_order() -> None:
    generator = random.Random(1)
    lines = [generator.choice([*PARAGRAPHS, *CHINESE_PARAGRAPHS, "Yes.", ""]) for _ in range(40)]
    answer = "\n".join(lines)
    result = redundancy(answer)
    assert len(result.spans) == round(result.score * result.num_units) > 0
    positions = [position for span in result.spans for position in span]
    assert positions == sorted(positions)
    assert all(answer[start:end].strip() == answer[start:end] for start, end in result.spans)


def test_shingle_redundancy_is_fast_on_long_answers() -> None:
    # Near copies are the worst case: every shingle is shared with many units. Measured here: 25 ms
    # for 10,000 words of prose, 55 ms for this; the limit leaves room for a busy machine.
    generator = random.Random(0)
    sentence = " ".join(f"w{number}" for number in range(10))
    answer = "\n".join(reworded(sentence, 0.1, generator) for _ in range(1000))
    start = time.perf_counter()
    assert redundancy(answer).score > 0.5
    assert time.perf_counter() - start < 2


def encode_by_first_letter(texts: list[str]) -> np.ndarray:
    angles = np.array([ord(text[0]) for text in texts], np.float64) * 0.1
    return 7 * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def test_embedding_redundancy_compares_with_earlier_units_only() -> None:
    # The first letters are T, N, H, I, S: at a tenth of a radian a letter, H and I are 0.1 apart,
    # and so are S and T; all others are further from each other.
    answer = "\n".join(PARAGRAPHS)
    result = embedding_redundancy(
        answer, threshold=float(np.cos(0.15)), shingle_size=3, encode=encode_by_first_letter
    )
    assert [answer[start] for start, _ in result.spans] == ["I", "S"]
    assert result.score == pytest.approx(2 / 5)


def test_embedding_redundancy_finds_equal_texts_at_threshold_1() -> None:
    answer = "\n".join([*PARAGRAPHS, PARAGRAPHS[2]])
    result = embedding_redundancy(
        answer, threshold=1.0, shingle_size=3, encode=encode_by_first_letter
    )
    assert result.score == pytest.approx(1 / 6)


def test_embedding_redundancy_sees_units_that_repeat_within_themselves() -> None:
    answer = "\n".join(" ".join([paragraph] * 5) for paragraph in PARAGRAPHS)
    result = embedding_redundancy(
        answer, threshold=1.0, shingle_size=3, encode=encode_by_first_letter
    )
    assert result.score == 1.0


def test_embedding_redundancy_of_an_empty_answer_does_not_encode() -> None:
    def fail(texts: list[str]) -> np.ndarray:
        raise AssertionError(texts)

    assert embedding_redundancy("", threshold=0.5, shingle_size=3, encode=fail).score == 0
