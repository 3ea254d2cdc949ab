"""What a person sees of a pretraining run."""

from pathlib import Path
from typing import Any

__all__ = ["held_out_line", "learned_line", "step_line"]


def step_line(metrics: dict[str, Any], num_steps: int) -> str:
    """The step in one line."""
    width = len(str(num_steps))
    return (
        f"step {metrics['step']:>{width}}/{num_steps}  loss {metrics['loss']:.4f}  "
        f"grad {metrics['grad_norm']:.2f}  lr {metrics['lr']:.2e}  "
        f"{metrics['tokens/step']:,} tokens in {metrics['time/step_s']:.1f} s "
        f"(data {metrics['time/data_s']:.1f}, update {metrics['time/update_s']:.1f}), "
        f"{metrics['tokens/seen']:,} so far"
    )


def held_out_line(metrics: dict[str, Any]) -> str:
    """The held-out losses of a step in one line."""
    names = [
        name.removeprefix("held_out/").removesuffix("_loss")
        for name in metrics
        if name.startswith("held_out/") and name.endswith("_loss")
    ]
    parts = [
        f"{name} {metrics[f'held_out/{name}_loss']:.4f} "
        f"(perplexity {metrics[f'held_out/{name}_perplexity']:,.2f})"
        for name in names
    ]
    return f"held out after step {metrics['step']}: {', '.join(parts)}"


def learned_line(history: list[dict[str, Any]], run_dir: Path) -> str:
    """The first losses against the last, and where the weights are."""
    names = ["loss", *sorted({n for r in history for n in r if _is_held_out_loss(n)})]
    changes = []
    for name in names:
        values = [record[name] for record in history if record.get(name) is not None]
        changes.append(f"{name} {values[0]:.4f} → {values[-1]:.4f}")
    steps = sum("loss" in record for record in history)
    return f"Trained {steps} steps: {', '.join(changes)}. Look at {run_dir / 'report.html'}"


def _is_held_out_loss(name: str) -> bool:
    return name.startswith("held_out/") and name.endswith("_loss")
