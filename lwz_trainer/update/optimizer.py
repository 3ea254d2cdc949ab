"""fp32 master weights, gradients and AdamW state, each one flat buffer; 16 bytes a parameter.

Two flats: matrices (decayed) and the rest. The parameters of an fp32 model are views of the master
itself. Those of a bf16 model are its upper halves, rounded, and the lower 16 bits lie beside them:
together they are the exact fp32 master, which exists only a span at a time while it is stepped.
Gradients accumulate in the flat fp32 buffer whatever the model's dtype: products add to their
`main_grad` themselves; of the rest autograd adds into it directly, or a hook adds and frees them.
No address changes after construction.
"""

import math
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.adamw import adamw

from lwz_trainer.config.sections import OptimConfig
from lwz_trainer.model.main_grad import attach_main_grad

__all__ = ["FlatAdamW", "join_halves", "learning_rate", "split_halves"]

# Elements of a master that are joined, stepped and split again at a time: 4 MiB in fp32.
SPAN = 1 << 20


def learning_rate(config: OptimConfig, step: int, num_steps: int) -> float:
    """Learning rate of a 0-based step: linear warm-up, then constant, linear or cosine."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    span = max(1, num_steps - config.warmup_steps)
    progress = min(1.0, (step - config.warmup_steps) / span)
    shape = 1 - progress if config.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return config.lr * (config.min_lr_frac + (1 - config.min_lr_frac) * shape)


def split_halves(master: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 [n] as its nearest bf16 and the int16 that is missing: exact for finite values.

    Ties are rounded away from zero, so that the rest fits 16 bits.
    """
    bits = master.view(torch.int32)
    upper = (bits + 0x8000) >> 16
    lower = (bits - (upper << 16)).to(torch.int16)
    return upper.to(torch.int16).view(torch.bfloat16), lower


def join_halves(upper: Tensor, lower: Tensor) -> Tensor:
    """The fp32 [n] that `split_halves` was given."""
    bits = upper.view(torch.int16).to(torch.int32)
    bits <<= 16
    bits += lower
    return bits.view(torch.float32)


class _Flat:
    """The masters of some parameters, their gradient and moments, one after the other."""

    def __init__(self, parameters: list[nn.Parameter], weight_decay: float) -> None:
        dtypes = {parameter.dtype for parameter in parameters}
        assert dtypes in ({torch.float32}, {torch.bfloat16}), f"no masters for {dtypes}"
        (dtype,) = dtypes
        self.weight_decay = weight_decay
        self.parameters = parameters
        device = parameters[0].device
        self.size = sum(parameter.numel() for parameter in parameters)
        self._weights = torch.empty(self.size, dtype=dtype, device=device)
        self._lower: Tensor | None = None
        if dtype == torch.bfloat16:
            self._lower = torch.zeros(self.size, dtype=torch.int16, device=device)
        self.grad = torch.zeros(self.size, dtype=torch.float32, device=device)
        self.moments: dict[str, Tensor] = {}
        offset = 0
        for parameter in parameters:
            span = slice(offset, offset + parameter.numel())
            weight = self._weights[span].view_as(parameter)
            grad = self.grad[span].view_as(parameter)
            weight.copy_(parameter.detach())
            parameter.data = weight
            if dtype == torch.float32:
                parameter.grad = grad
            else:
                parameter.register_post_accumulate_grad_hook(_adding_into(grad))
            attach_main_grad(parameter, grad)
            offset = span.stop

    def spans(self) -> Iterator[slice]:
        """Parts to step: all at once where the master exists, else a span at a time."""
        step = self.size if self._lower is None else SPAN
        for start in range(0, self.size, step):
            yield slice(start, min(start + step, self.size))

    def master(self, span: slice) -> Tensor:
        """fp32 master of a span: a view, or joined from its halves."""
        if self._lower is None:
            return self._weights[span]
        return join_halves(self._weights[span], self._lower[span])

    def write(self, span: slice, master: Tensor) -> None:
        """Takes over the master of a span, and with it the parameters."""
        if self._lower is not None:
            self._weights[span], self._lower[span] = split_halves(master)
        elif master.data_ptr() != self._weights[span].data_ptr():  # else it is there already
            self._weights[span] = master

    def weights(self) -> dict[str, Tensor]:
        """The live tensors that hold the master: itself, or its two halves."""
        if self._lower is None:
            return {"master": self._weights}
        return {"master_upper": self._weights, "master_lower": self._lower}

    def ensure_moments(self) -> dict[str, Tensor]:
        """AdamW's step count and two moments; made when they are first needed."""
        if not self.moments:
            self.moments = {
                "step": torch.zeros((), dtype=torch.float32, device=self.grad.device),
                "exp_avg": torch.zeros_like(self.grad),
                "exp_avg_sq": torch.zeros_like(self.grad),
            }
        return self.moments


class FlatAdamW:
    """AdamW over flat fp32 masters of all parameters of a model."""

    def __init__(self, model: nn.Module, config: OptimConfig) -> None:
        self._config = config
        parameters = [p for p in model.parameters() if p.requires_grad]
        matrices = [p for p in parameters if p.dim() >= 2]
        vectors = [p for p in parameters if p.dim() < 2]
        self._flats = [
            _Flat(part, decay)
            for part, decay in ((matrices, config.weight_decay), (vectors, 0.0))
            if part
        ]

    @property
    def grads(self) -> list[Tensor]:
        """The flat fp32 gradients."""
        return [flat.grad for flat in self._flats]

    def zero_grad(self) -> None:
        for grad in self.grads:
            grad.zero_()

    def all_reduce_grads(self, group: dist.ProcessGroup | None) -> None:
        """Sums gradients over ranks; the loss is already divided by global counts."""
        if group is not None:
            for grad in self.grads:
                dist.all_reduce(grad, group=group)

    def grad_norm(self) -> Tensor:
        """Global 2-norm of the accumulated gradient, fp32 scalar."""
        norms = [torch.linalg.vector_norm(grad) for grad in self.grads]
        return torch.linalg.vector_norm(torch.stack(norms))

    @torch.no_grad()
    def step(self, *, lr: float, grad_norm: Tensor) -> None:
        """Clips to max_grad_norm and steps masters and parameters in place."""
        limit = self._config.max_grad_norm
        for flat in self._flats:
            if limit > 0:
                flat.grad.mul_((limit / grad_norm.clamp(min=1e-12)).clamp(max=1.0))
            moments = flat.ensure_moments()
            for span in flat.spans():
                master = flat.master(span)
                adamw(
                    [master],
                    [flat.grad[span]],
                    [moments["exp_avg"][span]],
                    [moments["exp_avg_sq"][span]],
                    [],
                    [moments["step"].clone()],  # each call counts one up
                    fused=True,
                    amsgrad=False,
                    beta1=self._config.beta1,
                    beta2=self._config.beta2,
                    lr=lr,
                    weight_decay=flat.weight_decay,
                    eps=self._config.eps,
                    maximize=False,
                )
                flat.write(span, master)
            moments["step"] += 1

    def state_dict(self) -> dict[str, Tensor]:
        """Masters and AdamW's moments: the live tensors, so loading into them is enough."""
        return {
            f"{name}_{index}": value
            for index, flat in enumerate(self._flats)
            for name, value in (flat.weights() | flat.ensure_moments()).items()
        }


def _adding_into(total: Tensor) -> Callable[[Tensor], None]:
    def hook(parameter: Tensor) -> None:
        if parameter.grad is not None:  # None where a product added to main_grad
            total.add_(parameter.grad)
            parameter.grad = None

    return hook
