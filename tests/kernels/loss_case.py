"""One small case of the loss head, in any dtype, and how far a result may be from the truth."""

from typing import Any

import torch
from torch import Tensor

from lwz_kernels.linear_logprobs.reference import linear_logprobs_reference

ROWS, DIM, VOCAB = 13, 8, 37
TEMPERATURE = 0.7
LENGTHS = (4, 1, 0, 6, 2)


def make_case(dtype: torch.dtype = torch.float64, *, seed: int = 1) -> dict[str, Any]:
    """Arguments of linear_policy_loss: two masked rows, one ignored, advantages that vary."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden, weight, bias = randn(ROWS, DIM), randn(VOCAB, DIM), randn(VOCAB) / 4
    labels = torch.randint(0, VOCAB, (ROWS,), generator=generator)
    logprobs = linear_logprobs_reference(
        hidden, weight, labels, bias=bias, temperature=TEMPERATURE
    )[0]
    labels[8] = -100
    mask = torch.ones(ROWS, dtype=torch.bool)
    mask[[2, 6]] = False
    advantages = randn(ROWS)
    advantages[5:8] = 0
    lengths = torch.tensor((0, *LENGTHS))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        "hidden": hidden.to(dtype).requires_grad_(),
        "weight": weight.to(dtype).requires_grad_(),
        "bias": bias.to(dtype).requires_grad_(),
        "labels": labels,
        "advantages": advantages.to(wide),
        "loss_mask": mask,
        "cu_seqlens": lengths.cumsum(0).to(torch.int32),
        "num_loss_tokens": 10,
        "num_sequences": 4,
        "old_logprobs": (logprobs + 0.3 * randn(ROWS)).to(wide),
        "ref_logprobs": (logprobs + 0.3 * randn(ROWS)).to(wide),
        "sampling_logprobs": (logprobs + 0.3 * randn(ROWS)).to(wide),
        "temperature": TEMPERATURE,
    }


def call(function: Any, case: dict[str, Any], **changes: Any) -> Any:
    """`function` on a case: tensors by position, the rest by keyword."""
    arguments = case | changes
    first = [
        arguments.pop(name) for name in ("hidden", "weight", "labels", "advantages", "loss_mask")
    ]
    return function(*first, **arguments)


def logprob_arguments(case: dict[str, Any]) -> dict[str, Any]:
    """The part of a case that linear_logprobs takes."""
    names = ("hidden", "weight", "labels", "bias", "temperature")
    return {name: case[name] for name in names}


def assert_as_good_as_eager(
    ours: Tensor, eager: Tensor, truth: Tensor, *, magnitude: float = 0.0
) -> None:
    """err(ours) ≤ 2 · err(eager of the same dtype) + floor, in the norm, against a truth in fp64.

    The floor is one unit in the last place of fp32, because eager may be exact by luck: relative to
    the truth, or to the `magnitude` of the terms of a sum that cancels.
    """
    exact = truth.detach().double()
    error = (ours.double() - exact).norm()
    eager_error = (eager.double() - exact).norm()
    floor = 1.2e-7 * max(float(exact.norm()), magnitude)
    assert error <= 2 * eager_error + floor, (float(error), float(eager_error))
