"""Does vLLM hold these weights, and report what the trainer means by a log-prob?

A few tokens drawn by vLLM at a temperature of 2 are judged by the trainer's own forward pass. Wrong
weights, a head that was not updated, log-probs from before the temperature: each is off by far more
than rounding (on a CPU with bf16: 0.04 on average).
"""

from typing import Any

import torch

from lwz_kernels.attention import SegmentTable, attention
from lwz_kernels.linear_logprobs import linear_logprobs
from lwz_trainer.errors import TrainingStopped
from lwz_trainer.model.decoder import Decoder

__all__ = ["NUM_PROBE_TOKENS", "check_probe", "probe_fields"]

NUM_PROBE_TOKENS = 16
PROBE_TEMPERATURE = 2.0
MAX_PROBE_DIFF = 0.2


def probe_fields() -> dict[str, Any]:
    """What a probe asks for instead of the rollout's own sampling."""
    return {
        "seed": 0,
        "max_tokens": NUM_PROBE_TOKENS,
        "temperature": PROBE_TEMPERATURE,
        "top_p": 1.0,
        "top_k": 0,
        "stop": [],
    }


@torch.no_grad()
def check_probe(
    model: Decoder, prompt_ids: list[int], completion_ids: list[int], logprobs: list[float]
) -> None:
    """Compares log-probs of a completion that was drawn as `probe_fields` says.

    Raises:
        TrainingStopped: on average they are further apart than `MAX_PROBE_DIFF`.
    """
    device = model.head_weight.device
    ids = torch.tensor(prompt_ids + completion_ids, device=device)
    plan = SegmentTable.from_cu_seqlens([0, len(ids)])
    hidden_TD = model(
        ids,
        torch.arange(len(ids), device=device),
        lambda _layer, q, k, v: attention(q, k, v, segments=plan)[0],
    )
    ours_T = linear_logprobs(
        hidden_TD[len(prompt_ids) - 1 : -1],
        model.head_weight,
        ids[len(prompt_ids) :],
        temperature=PROBE_TEMPERATURE,
    )[0]
    diff = float((ours_T - torch.tensor(logprobs, device=device)).abs().mean())
    if not diff <= MAX_PROBE_DIFF:
        raise TrainingStopped(
            f"vLLM's log-probs are off by {diff:.2f} on average, expected at most "
            f"{MAX_PROBE_DIFF}: it does not hold the trainer's weights (docs/vllm.md, tied heads), "
            "or it was started without --logprobs-mode processed_logprobs"
        )
