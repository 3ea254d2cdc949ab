"""Figures that others have published, for the eye: other judges and wordings gave them."""

from dataclasses import dataclass

__all__ = ["PUBLISHED", "SOURCE", "PublishedRow"]

SOURCE = "published: LongWriter-Zero (arXiv 2506.18841)"


@dataclass(frozen=True)
class PublishedRow:
    """One row of the paper's comparison; None where the source at hand gives no figure."""

    name: str
    writingbench: float | None
    arena_elo: float | None


PUBLISHED = (
    PublishedRow("LongWriter-Zero", 8.69, 1447),
    PublishedRow("Qwen3-235B-A22B", 8.68, 1343),
    PublishedRow("Claude-Sonnet-4", 8.60, 1185),
    PublishedRow("DeepSeek-R1", 8.55, 1343),
    PublishedRow("GPT-4o", 8.16, 947),
    PublishedRow("LongWriter-8B", 7.91, 457),
    PublishedRow("LongWriter-Zero without continual pretraining", 8.12, 1221),
    PublishedRow("LongWriter-Zero without pretraining and thinking", 8.04, 668),
    PublishedRow("SFT instead of RL, from the base", None, 964),
    PublishedRow("SFT instead of RL, after pretraining", None, 971),
)
