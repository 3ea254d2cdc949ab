"""What to measure by name: shapes, dtypes, and how long."""

from dataclasses import dataclass

import torch

from bench.loss_head.problem import Shape

__all__ = ["DTYPES", "PRESETS", "Preset"]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Preset:
    """Rounds over all providers; in its turn a provider warms up, then is timed, for seconds.

    A turn has at least one timed call; the first warm-up is the gate's call at full size.
    """

    device: str
    dtypes: tuple[str, ...]
    shapes: tuple[Shape, ...]
    rounds: int
    warm_up_s: float
    seconds: float
    note: str = ""


PRESETS = {
    # SmolLM2-135M's head at one packed micro-batch.
    "cpu": Preset(
        "cpu", ("bf16", "fp32"), (Shape(4096, 576, 49152),), rounds=3, warm_up_s=0.0, seconds=2.0
    ),
    # Seconds in all: shows that everything runs, measures nothing worth keeping.
    "cpu-small": Preset(
        "cpu", ("fp32",), (Shape(64, 64, 1000),), rounds=2, warm_up_s=0.01, seconds=0.02
    ),
    # Qwen2.5 heads of 1.5B, 7B and 14B/32B width at one 16k-token sequence's worth of tokens.
    "gpu": Preset(
        "cuda",
        ("bf16",),
        (Shape(16384, 1536, 151936), Shape(16384, 3584, 152064), Shape(16384, 5120, 152064)),
        rounds=3,
        warm_up_s=0.2,
        seconds=0.4,
    ),
    "trl": Preset(
        "cuda",
        ("bf16",),
        (Shape(8192, 4096, 151936),),
        rounds=3,
        warm_up_s=0.2,
        seconds=0.4,
        note="TRL's maintainers quote for this shape, forward and backward on an H100: "
        "naive 59 ms / 19.9 GiB, Liger 192 ms / 6.1 GiB; they ask for 60-80 ms at about 6 GiB",
    ),
}
