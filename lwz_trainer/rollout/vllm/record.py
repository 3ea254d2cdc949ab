"""What both vLLM engines ask for and what they make of the answer; knows nothing of vLLM itself."""

import hashlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from lwz_trainer.config.sections import RolloutConfig
from lwz_trainer.errors import TrainingStopped
from lwz_trainer.model.decoder import Decoder
from lwz_trainer.model.parameter_names import checkpoint_slices
from lwz_trainer.rollout.sequence import Request, Sample
from lwz_trainer.rollout.stopping import StopChecker

__all__ = ["checkpoint_tensors", "finished_sample", "sample_seed", "sampling_fields"]


def checkpoint_tensors(model: Decoder) -> Iterator[tuple[str, Tensor]]:
    """The present weights under their checkpoint names, as views, layer by layer.

    With the tied head: vLLM on a CPU keeps a packed copy of it, which `embed_tokens` alone would
    leave as it was (measured: mean |Δp| 1e-3 after one update, 4e-6 with it).
    """
    parameters = dict(model.named_parameters())
    for piece in checkpoint_slices(model.config, names_tied_head=True):
        yield piece.name, parameters[piece.parameter].detach()[piece.start : piece.stop]


def sample_seed(seed: int, step: int, sample: int) -> int:
    """63 bits that depend on these three numbers alone."""
    digest = hashlib.sha256(f"{seed}/{step}/{sample}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def sampling_fields(config: RolloutConfig, eos_ids: tuple[int, ...]) -> dict[str, Any]:
    """How to sample, in words that `SamplingParams` and the completions API share.

    Penalties are named because a server fills what is missing from the model's own
    generation_config.json.
    """
    return {
        "max_tokens": config.max_completion_tokens,
        "temperature": config.temperature,
        "top_p": config.top_p,
        "top_k": config.top_k,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "stop": list(config.stop),
        "stop_token_ids": list(eos_ids),
        "logprobs": 0,
        # Stop strings such as <|user|> may be special tokens.
        "skip_special_tokens": False,
    }


def finished_sample(
    request: Request,
    sample: int,
    token_ids: list[int],
    logprobs: list[float],
    stops: StopChecker,
    *,
    policy_version: int,
) -> Sample:
    """The record of a completion, with this project's own judgement of why it ended.

    Raises:
        TrainingStopped: it did not end, or its log-probs are not one a token.
    """
    end = stops.check(token_ids) if token_ids else None
    if end is None or len(token_ids) != len(logprobs):
        raise TrainingStopped(
            f"vLLM returned a completion of {len(token_ids)} tokens and {len(logprobs)} log-probs "
            "that neither reached a stop string, an end token nor the length limit"
        )
    reason, stop_string = end
    return Sample(
        group=request.group,
        sample=sample,
        prompt_ids=request.prompt_ids,
        completion_ids=token_ids,
        logprobs=logprobs,
        text=stops.text(token_ids, reason, stop_string),
        finish_reason=reason,
        stop_string=stop_string,
        policy_version=policy_version,
    )
