"""The soft overlong penalty of DAPO (arXiv:2503.14476, eq. 13)."""

__all__ = ["overlong_reward"]


def overlong_reward(num_tokens: int, *, max_tokens: int, buffer_tokens: int) -> float:
    """0 up to max_tokens - buffer_tokens, from there down to -1 at max_tokens, and -1 beyond.

    Args:
        num_tokens: length of the completion.
        max_tokens: where completions are cut off.
        buffer_tokens: length of the slope; 0 is no penalty.
    """
    over = num_tokens - (max_tokens - buffer_tokens)
    if buffer_tokens == 0 or over <= 0:
        return 0.0
    return max(-1.0, -over / buffer_tokens)
