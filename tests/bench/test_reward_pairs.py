"""The pairs that the reward model's examples are made of, without the downloads."""

import random
from collections import Counter

import pytest

from bench import reward_pairs as example

SPEECHES = [" ".join(f"w{n}x{i}{'.' if i % 4 == 3 else ''}" for i in range(20)) for n in range(30)]


def test_degraded_copies_are_what_they_are_called() -> None:
    text = SPEECHES[0]
    words = text.split()
    shuffled, repeated, truncated = (
        example.degraded(text, k, random.Random(0)).split() for k in example.DEGRADATIONS
    )
    assert shuffled != words
    assert Counter(shuffled) == Counter(words)
    assert len(repeated) == len(words)
    assert repeated[:6] == repeated[6:12] == words[:6]
    assert truncated == words[: len(truncated)]
    assert len(truncated) <= 2 * len(words) / 3
    assert not truncated[-1].endswith(".")


def test_degraded_pairs_are_labelled_and_have_prompts_of_their_own() -> None:
    rows = example.degraded_pairs([*SPEECHES, "Too short."], 20, random.Random(0))
    assert Counter(row["source"] for row in rows) == dict.fromkeys(example.DEGRADATIONS, 10)
    assert len({row["prompt"] for row in rows}) == 30
    assert sorted(row["chosen"] for row in rows) == sorted(SPEECHES)
    assert rows == example.degraded_pairs([*SPEECHES, "Too short."], 20, random.Random(0))


@pytest.mark.parametrize(("preference", "chosen"), [(1, "one"), (2, "two")])
def test_alpaca_pairs_take_the_preferred_answer_once_an_instruction(
    preference: int, chosen: str
) -> None:
    judged = {"output_1": "one", "output_2": "two", "preference": preference}
    judgments = [
        {"instruction": "a", "input": "b", **judged},
        {"instruction": "a", "input": "b", **judged},
        {"instruction": "tie", **judged, "preference": 0},
        {"instruction": "long", **judged, "output_1": "word " * 50},
        {"instruction": "empty", **judged, "output_2": None},
    ]
    (row,) = example.alpaca_pairs(judgments, 10, random.Random(0))
    assert row["prompt"] == "a\n\nb"
    assert row["chosen"] == chosen
    assert {row["chosen"], row["rejected"]} == {"one", "two"}
