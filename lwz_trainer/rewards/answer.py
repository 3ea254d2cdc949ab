"""What a reward from a source looks at, and what it gives back."""

from dataclasses import dataclass

__all__ = ["Answer", "SourceScores"]


@dataclass(frozen=True)
class Answer:
    """What a reward may look at; a reward function gets a list of these.

    Args:
        prompt: the writing request, without the template.
        text: the answer, without tags; "" where there is none.
        thinking: what stands inside <think>.
        length_range: fewest and most words asked for; None if the request does not say.
        checklist: points that come with the request.
        reference: an answer of the data set that this one is compared with; "" for none.
        group: number of the group; answers to one prompt belong together where it is the same.
    """

    prompt: str
    text: str
    thinking: str = ""
    length_range: tuple[int, int] | None = None
    checklist: tuple[str, ...] = ()
    reference: str = ""
    group: int = 0


@dataclass(frozen=True)
class SourceScores:
    """Scores of a list of answers, in its order.

    Args:
        scores: NaN where there is none.
        failures: one line for each NaN that should have been a score.
        is_applicable: False where the request does not call for this reward; its NaN is no failure.
        is_truncated: the answer was too long to be read to its end.
    """

    scores: list[float]
    failures: list[str]
    is_applicable: list[bool]
    is_truncated: list[bool]
