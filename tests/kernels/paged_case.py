"""Paged caches with garbage wherever no key counts, and how far a result may be from the truth."""

from typing import Any

import torch

from lwz_kernels.paged_attention import paged_attention, reference


def make_problem(
    context_lens: list[int],
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    page_size: int,
    dtype: torch.dtype,
    *,
    spread: float = 1.0,
) -> dict[str, Any]:
    """Pages in random order; whatever lies behind the contexts is NaN, unused entries are -1."""
    batch = len(context_lens)
    used = [-(-length // page_size) for length in context_lens]
    num_pages = sum(used) + 2
    shape = (num_pages, page_size, num_kv_heads, head_size)
    k_cache = torch.full(shape, float("nan"), dtype=dtype)
    v_cache = torch.full(shape, float("nan"), dtype=dtype)
    page_table = torch.full((batch, max(used) + 1), -1, dtype=torch.int32)
    free = torch.randperm(num_pages).tolist()
    for b, length in enumerate(context_lens):
        for i in range(used[b]):
            page = page_table[b, i] = free.pop()
            valid = min(page_size, length - i * page_size)
            k_cache[page, :valid] = torch.randn(valid, num_kv_heads, head_size).to(dtype)
            v_cache[page, :valid] = torch.randn(valid, num_kv_heads, head_size).to(dtype)
    return {
        "q": (spread * torch.randn(batch, num_heads, head_size)).to(dtype),
        "k_cache": k_cache,
        "v_cache": v_cache,
        "page_table": page_table,
        "context_lens": torch.tensor(context_lens, dtype=torch.int32),
    }


def exact(problem: dict[str, Any]) -> torch.Tensor:
    """The oracle in fp64 on the same numbers."""
    wide = {name: x.double() if x.is_floating_point() else x for name, x in problem.items()}
    return reference.paged_attention(**wide, softmax_scale=problem["q"].shape[2] ** -0.5)


def assert_as_good_as_reference(out: torch.Tensor, problem: dict[str, Any]) -> None:
    """At most twice the error of plain torch in the same dtype, plus a floor.

    The floor, 4.8e-7, is what another order of the fp32 sums costs (measured: at most 3.6e-7 where
    plain torch has 1.8e-7); beside the rounding of a bf16 result it is nothing.
    """
    truth = exact(problem)
    eager = paged_attention(**problem, impl="reference")
    floor = 4 * torch.finfo(torch.float32).eps
    error = (out.double() - truth).abs().max().item()
    assert error <= 2 * (eager.double() - truth).abs().max().item() + floor
