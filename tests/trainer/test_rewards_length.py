import pytest
from hypothesis import given
from hypothesis import strategies as st

from lwz_trainer.rewards.length import length_reward


@pytest.mark.parametrize(
    ("num_words", "length_range", "n_max", "reward"),
    [
        (1000, (1000, 2000), 14000, 1.0),
        (2000, (1000, 2000), 14000, 1.0),
        (500, (1000, 2000), 14000, 0.5),
        (0, (1000, 2000), 14000, 0.0),
        (8000, (1000, 2000), 14000, 0.5),
        (14000, (1000, 2000), 14000, 0.0),
        (20000, (1000, 2000), 14000, 0.0),
        (0, (0, 100), 14000, 1.0),
        (101, (0, 100), 101, 0.0),
        (150, (0, 100), 200, 0.5),
        (14000, (100, 14000), 14000, 1.0),
        (14001, (100, 14000), 14000, 0.0),
        (15000, (100, 16000), 14000, 1.0),
        (16001, (100, 16000), 14000, 0.0),
        (50, (100, 16000), 14000, 0.5),
    ],
)
def test_length_reward_by_hand(
    num_words: int, length_range: tuple[int, int], n_max: int, reward: float
) -> None:
    assert length_reward(num_words, length_range, n_max) == pytest.approx(reward)


@given(st.integers(0, 20000), st.integers(0, 15000), st.integers(0, 5000), st.integers(1, 20000))
def test_length_reward_stays_in_range_and_falls_away_from_the_range(
    num_words: int, lo: int, width: int, n_max: int
) -> None:
    hi = lo + width
    reward = length_reward(num_words, (lo, hi), n_max)
    assert 0 <= reward <= 1
    assert (reward == 1) == (lo <= num_words <= hi)
    if num_words >= hi:
        assert length_reward(num_words + 1, (lo, hi), n_max) <= reward
    if num_words < lo:
        assert length_reward(num_words + 1, (lo, hi), n_max) > reward


@pytest.mark.parametrize("length_range", [(5, 4), (-1, 4)])
def test_length_reward_refuses_an_impossible_range(length_range: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="0 <= lo <= hi"):
        length_reward(3, length_range, 14000)
