"""Which steps a page shows, and how a list of steps is written."""

__all__ = ["format_steps", "spread_steps"]


def spread_steps(steps: list[int], count: int) -> list[int]:
    """At most `count` of the sorted steps: the first, the last, and evenly spaced ones between.

    One step means the last one.
    """
    if len(steps) <= count:
        return list(steps)
    if count <= 1:
        return steps[-1:] if count == 1 else []
    last = len(steps) - 1
    return [steps[round(i * last / (count - 1))] for i in range(count)]


def format_steps(steps: list[int]) -> str:
    """Sorted steps as words, neighbours joined to a range with a dash: 1, 2, 3, 7 gives two."""
    ranges: list[list[int]] = []
    for step in steps:
        if ranges and step == ranges[-1][1] + 1:
            ranges[-1][1] = step
        else:
            ranges.append([step, step])
    words = [str(a) if a == b else f"{a}–{b}" for a, b in ranges]
    return ("step " if len(steps) == 1 else "steps ") + ", ".join(words)
