"""Length reward of LongWriter-Zero (arXiv 2506.18841): does the answer keep to its range?"""

__all__ = ["length_reward"]


def length_reward(num_words: int, length_range: tuple[int, int], n_max: int) -> float:
    """1 within the range, falling linearly to 0 at no words and at `n_max` words.

        r = 1                               lo <= n <= hi
        r = n / lo                          n < lo
        r = (n_max - n) / (n_max - hi)      n > hi

    clipped to [0, 1]. Where hi >= n_max there is no slope: everything above hi gets 0. A prompt
    without a range has no length reward at all; see `RewardParts.not_applicable`.

    Args:
        num_words: n, words of the answer.
        length_range: [lo, hi].
        n_max: number of words from which on the reward is 0, unless the range reaches further.
    """
    lo, hi = length_range
    if not 0 <= lo <= hi:
        raise ValueError(f"length_range must have 0 <= lo <= hi, got [{lo}, {hi}]")
    if num_words < lo:
        return num_words / lo
    if num_words <= hi:
        return 1.0
    if num_words >= n_max:
        return 0.0
    return (n_max - num_words) / (n_max - hi)
