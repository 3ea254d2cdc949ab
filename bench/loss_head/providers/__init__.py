"""Every provider by the name that stands in the CSV; importing this needs none of their packages.

`floor` is no provider: the matmuls alone, in cuBLAS, as a bound for the others of the same run.
"""

from bench.loss_head.provider import Provider
from bench.loss_head.providers import cce, floor, liger, lwz, pytorch, quack, trl, verl

__all__ = ["PROVIDERS"]

PROVIDERS: dict[str, Provider] = {
    **floor.PROVIDERS,
    **lwz.PROVIDERS,
    **pytorch.PROVIDERS,
    **trl.PROVIDERS,
    **liger.PROVIDERS,
    **cce.PROVIDERS,
    **quack.PROVIDERS,
    **verl.PROVIDERS,
}
