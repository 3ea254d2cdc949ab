"""Is what a provider returned what was asked for, with the log-probs that the model gives it?"""

from typing import Any

import torch
from transformers import AutoModelForCausalLM

from bench.rollout.workload import Answer, Workload

__all__ = ["Gate"]

CHECKED_SAMPLES, CHECKED_TOKENS = 2, 64
# Of mean log-prob errors; matters for fp32 only, where eager loses less than 1e-6.
FLOOR = 1e-5
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Gate:
    """Judges by transformers' plain forward pass in fp64, relative to what the same dtype loses.

    Args:
        model: Hugging Face directory.
    """

    def __init__(self, model: str) -> None:
        self._models: dict[torch.dtype, Any] = {
            dtype: AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
            for dtype in (torch.float64, *DTYPES.values())
        }

    def check(self, workload: Workload, answer: Answer) -> tuple[float, str]:
        """Mean error of the first log-probs, and what is wrong; "" for nothing."""
        lengths = set(map(len, answer.tokens)) | set(map(len, answer.logprobs))
        if len(answer.tokens) != workload.batch or lengths != {workload.num_tokens}:
            return float("nan"), f"{len(answer.tokens)} completions of {sorted(lengths)} tokens"
        if len({tuple(tokens) for tokens in answer.tokens}) < workload.batch:
            return float("nan"), "some completions are equal"
        error = eager_error = 0.0
        for index in range(CHECKED_SAMPLES):
            prompt = workload.sample_prompts[index]
            tokens = answer.tokens[index][:CHECKED_TOKENS]
            truth_T = self._logprobs(torch.float64, prompt, tokens)
            eager_T = self._logprobs(DTYPES[workload.dtype], prompt, tokens)
            found_T = torch.tensor(answer.logprobs[index][:CHECKED_TOKENS], dtype=torch.float64)
            error += float((found_T - truth_T).abs().mean()) / CHECKED_SAMPLES
            eager_error += float((eager_T - truth_T).abs().mean()) / CHECKED_SAMPLES
        allowed = 2 * eager_error + FLOOR
        if not error <= allowed:
            return error, f"log-probs are off by {error:.2e} on average, allowed {allowed:.2e}"
        return error, ""

    @torch.no_grad()
    def _logprobs(self, dtype: torch.dtype, prompt: list[int], tokens: list[int]) -> torch.Tensor:
        ids_1T = torch.tensor([prompt + tokens])
        logits_TV = self._models[dtype](ids_1T).logits[0, len(prompt) - 1 : -1].double()
        return logits_TV.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None]).squeeze(1)
