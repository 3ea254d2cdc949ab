"""The held-out report as Markdown."""

from collections.abc import Mapping
from typing import Any

from lwz_trainer.reward_model.calibration import MATCHED_FRAC

__all__ = ["report_markdown"]


def report_markdown(report: Mapping[str, Any]) -> str:
    """Tables of a report of `heldout_report`, under the settings that stand in it."""
    low, high = report["accuracy_low"], report["accuracy_high"]
    gain_low, gain_high = report["gain_over_longer_low"], report["gain_over_longer_high"]
    lines = [
        "# Reward model: held-out pairs",
        "",
        f"Base `{report['base']}`, pairs `{report['pairs']}`, {report['num_trained_pairs']} pairs "
        f"trained on in {report['num_steps']} steps. Accuracy counts a tie as one half; intervals "
        "are 95%, by a bootstrap over prompts.",
        "",
        "| | |",
        "|---|---|",
        f"| held-out pairs (prompts) | {report['num_pairs']} ({report['num_prompts']}) |",
        f"| accuracy | {_number(report['accuracy'])} ({_number(low)} to {_number(high)}) |",
        f"| loss, nats | {_number(report['loss'])} |",
        f"| mean margin | {_number(report['margin'])} |",
        f"| pairs with an answer that was cut | {_number(report['truncated_frac'])} |",
        "",
        "## Length",
        "",
        "| | |",
        "|---|---|",
        f"| accuracy at matched length (words differ by less than {MATCHED_FRAC:.0%}) | "
        f"{_number(report['accuracy_matched_length'])} of {report['num_matched_length']} pairs |",
        f"| accuracy of “the longer answer is better” | "
        f"{_number(report['longer_is_better_accuracy'])} |",
        f"| accuracy above that | {_signed(report['gain_over_longer'])} "
        f"({_signed(gain_low)} to {_signed(gain_high)}) |",
        f"| accuracy where the chosen answer is longer | "
        f"{_number(report['accuracy_chosen_longer'])} |",
        f"| accuracy where it is shorter | {_number(report['accuracy_chosen_shorter'])} |",
        f"| rank correlation of score and words | {_number(report['score_length_correlation'])} |",
        f"| rank correlation of margin and words ahead | "
        f"{_number(report['margin_length_correlation'])} |",
        "",
        "## Calibration",
        "",
        "Confidence is σ of the absolute margin: the probability that the model gives to the "
        f"answer it prefers. Expected calibration error {_number(report['calibration_error'])}.",
        "",
        "| confidence | pairs | mean confidence | accuracy |",
        "|---|---|---|---|",
        *(
            f"| {row['low']:.2f} to {row['high']:.2f} | {row['num_pairs']} | "
            f"{_number(row['mean_confidence'])} | {_number(row['accuracy'])} |"
            for row in report["calibration"]
        ),
        "",
        "## Sources",
        "",
        "| source | pairs | accuracy | at matched length | longer is better |",
        "|---|---|---|---|---|",
        *(
            f"| {_cell(row['source']) or '(none)'} | {row['num_pairs']} | "
            f"{_number(row['accuracy'])} | {_number(row['accuracy_matched_length'])} of "
            f"{row['num_matched_length']} | {_number(row['longer_is_better_accuracy'])} |"
            for row in report["sources"]
        ),
        "",
    ]
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.3f}"


def _signed(value: float | None) -> str:
    return "n/a" if value is None else f"{value:+.3f}"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
