"""The bound: logits, dhidden and dweight as plain cuBLAS calls over all tokens at once.

Logits and weight gradient in fp32 as the heads need them; no softmax, nothing else. The operand of
the two backward products is the logits rounded to the inputs' dtype: real numbers, since the
power that a matmul draws, and with it the clock, depends on them.
"""

import torch

from bench.loss_head.problem import Problem
from bench.loss_head.provider import Calls, Provider

__all__ = ["PROVIDERS"]


def _load() -> Calls:
    return Calls(matmuls=_matmuls)


def _matmuls(problem: Problem, count: float) -> None:
    """1 product, or 3 of them over `count / 3` of the tokens."""
    is_backward = count != 1
    num_tokens = round(problem.shape.tokens * count / 3) if is_backward else problem.shape.tokens
    hidden, weight = problem.hidden.detach()[:num_tokens], problem.weight.detach()
    scratch = problem.scratch
    if not scratch:
        scratch["logits"] = torch.mm(hidden, weight.T, out_dtype=torch.float32)
        if is_backward:
            scratch["dlogits"] = scratch["logits"].to(weight.dtype)
            scratch["dhidden"] = torch.empty_like(hidden)
            scratch["dweight"] = torch.empty_like(weight, dtype=torch.float32)
    torch.mm(hidden, weight.T, out_dtype=torch.float32, out=scratch["logits"])
    if is_backward:
        dlogits = scratch["dlogits"]
        torch.mm(dlogits, weight, out=scratch["dhidden"])
        torch.mm(dlogits.T, hidden, out_dtype=torch.float32, out=scratch["dweight"])


PROVIDERS = {"floor": Provider(None, ("cuda",), _load)}
