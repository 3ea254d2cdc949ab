"""fp32 master weights, gradients and AdamW state, each one flat buffer.

16 bytes a parameter, 12 with moments in bf16.

Two flats: matrices (decayed) and the rest. The parameters of an fp32 model are views of the master
itself. Those of a bf16 model are its upper halves, rounded, and the lower 16 bits lie beside them:
together they are the exact fp32 master, which never exists whole (`lwz_kernels.adamw`).
Gradients accumulate in the flat fp32 buffer whatever the model's dtype: products add to their
`main_grad` themselves; of the rest autograd adds into it directly, or a hook adds and frees them.
No address of a weight changes after construction.

With a group, its N ranks share the optimizer (ZeRO stage 1, arXiv:1910.02054): every rank holds all
weights and gradients, but moments and lower halves of one N-th of each flat only. Gradients are
reduce-scattered, each rank steps its part of the master, and the weights are gathered in place.
"""

import math
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lwz_kernels.adamw import adamw_
from lwz_trainer.config.sections import OptimConfig
from lwz_trainer.model.main_grad import attach_main_grad
from lwz_trainer.update.buffers import Buffers, TorchBuffers

__all__ = ["FlatAdamW", "adamw_step", "learning_rate", "moments_dtype"]


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


def moments_dtype(config: OptimConfig) -> torch.dtype:
    """Of both moments."""
    return torch.bfloat16 if config.moments_dtype == "bf16" else torch.float32


def adamw_step(
    weights: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    config: OptimConfig,
    *,
    step: int,
    lr: float,
    weight_decay: float,
    grad_norm: float,
    lower: Tensor | None = None,
) -> None:
    """One step of AdamW on vectors, in place, on a gradient clipped to max_grad_norm.

    Args:
        weights, grad, exp_avg, exp_avg_sq, lower: as in `lwz_kernels.adamw.adamw_`.
        config: betas, eps and max_grad_norm; 0 for no limit.
        step: number of this step, from 1.
        lr, weight_decay: of this step and these weights.
        grad_norm: 2-norm of the whole gradient, of which `grad` may be a part.
    """
    limit = config.max_grad_norm
    adamw_(
        weights,
        grad,
        exp_avg,
        exp_avg_sq,
        step=step,
        lr=lr,
        beta1=config.beta1,
        beta2=config.beta2,
        eps=config.eps,
        weight_decay=weight_decay,
        grad_scale=min(1.0, limit / max(grad_norm, 1e-12)) if limit > 0 else 1.0,
        lower=lower,
    )


class _Flat:
    """The masters of some parameters, their gradient and moments, one after the other.

    `part` is what this rank steps: all of it, or its share among the ranks of `group`.
    """

    def __init__(
        self,
        parameters: list[nn.Parameter],
        weight_decay: float,
        moments_dtype: torch.dtype,
        group: dist.ProcessGroup | None,
        grads: Buffers,
        state: Buffers,
    ) -> None:
        dtypes = {parameter.dtype for parameter in parameters}
        assert dtypes in ({torch.float32}, {torch.bfloat16}), f"no masters for {dtypes}"
        (dtype,) = dtypes
        self.weight_decay = weight_decay
        self._moments_dtype = moments_dtype
        self.parameters = parameters
        device = parameters[0].device
        size = sum(parameter.numel() for parameter in parameters)
        num_ranks = 1 if group is None else dist.get_world_size(group)
        rank = 0 if group is None else dist.get_rank(group)
        share = -(-size // num_ranks)
        self.part = slice(rank * share, (rank + 1) * share)
        self._state = state
        # Zeros, because the last ranks' shares may reach beyond the parameters.
        self._weights = torch.zeros(share * num_ranks, dtype=dtype, device=device)
        self.lower: Tensor | None = None
        if dtype == torch.bfloat16:
            self.lower = state.zeros(share, torch.int16)
        self.grad = grads.zeros(share * num_ranks, torch.float32)
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

    @property
    def own_grad(self) -> Tensor:
        """The gradient of this rank's part."""
        return self.grad[self.part]

    @property
    def own_weights(self) -> Tensor:
        """Masters of an fp32 model, upper halves of a bf16 model: this rank's part."""
        return self._weights[self.part]

    def weights(self) -> dict[str, Tensor]:
        """The live tensors that hold this rank's part of the master: itself, or its two halves."""
        if self.lower is None:
            return {"master": self.own_weights}
        return {"master_upper": self.own_weights, "master_lower": self.lower}

    def gather_weights(self, group: dist.ProcessGroup) -> None:
        """Completes the parameters from the parts of all ranks, in place."""
        dist.all_gather_into_tensor(self._weights, self.own_weights.clone(), group=group)

    def ensure_moments(self) -> dict[str, Tensor]:
        """AdamW's step count and two moments; made when they are first needed."""
        if not self.moments:
            share = self.part.stop - self.part.start
            self.moments = {
                "step": torch.zeros((), dtype=torch.float32, device=self.grad.device),
                "exp_avg": self._state.zeros(share, self._moments_dtype),
                "exp_avg_sq": self._state.zeros(share, self._moments_dtype),
            }
        return self.moments


class FlatAdamW:
    """AdamW over flat fp32 masters of all parameters of a model.

    Args:
        model: its parameters are moved into flat buffers.
        config: of AdamW.
        shard_group: ranks that share the optimizer state; None: every rank holds all of it.
        grads: where the gradients lie; None: in torch's memory.
        state: where moments and lower halves lie; they are made at once then. None: in torch's
            memory, when they are needed.
    """

    def __init__(
        self,
        model: nn.Module,
        config: OptimConfig,
        shard_group: dist.ProcessGroup | None = None,
        *,
        grads: Buffers | None = None,
        state: Buffers | None = None,
    ) -> None:
        self._config = config
        self._shard_group = shard_group
        parameters = [p for p in model.parameters() if p.requires_grad]
        self._grads = grads or TorchBuffers(parameters[0].device)
        self._state = state or TorchBuffers(parameters[0].device)
        matrices = [p for p in parameters if p.dim() >= 2]
        vectors = [p for p in parameters if p.dim() < 2]
        self._flats = [
            _Flat(part, decay, moments_dtype(config), shard_group, self._grads, self._state)
            for part, decay in ((matrices, config.weight_decay), (vectors, 0.0))
            if part
        ]
        if state is not None:
            for flat in self._flats:
                flat.ensure_moments()

    @property
    def grads(self) -> list[Tensor]:
        """The flat fp32 gradients."""
        return [flat.grad for flat in self._flats]

    def zero_grad(self) -> None:
        """Sets the gradients to 0, and takes their memory back if it was released."""
        self._grads.restore()
        for grad in self.grads:
            grad.zero_()

    def release_grads(self) -> None:
        """Gives the gradients' memory to others until `zero_grad`; their views stay valid."""
        self._grads.release()

    def reduce_grads(self, group: dist.ProcessGroup | None) -> Tensor:
        """Sums gradients over ranks; the loss is already divided by global counts.

        Afterwards a rank of a sharded optimizer has the sum of its own part only.

        Returns:
            fp32 scalar, the 2-norm of the summed gradient of all parameters.
        """
        if group is None:
            return self.grad_norm()
        if self._shard_group is None:
            for grad in self.grads:
                dist.all_reduce(grad, group=group)
            return self.grad_norm()
        for flat in self._flats:
            summed = torch.empty_like(flat.own_grad)
            dist.reduce_scatter_tensor(summed, flat.grad, group=group)
            flat.own_grad.copy_(summed)
        parts = [torch.linalg.vector_norm(flat.own_grad).square() for flat in self._flats]
        squares = torch.stack(parts).sum()
        dist.all_reduce(squares, group=group)
        return squares.sqrt()

    def grad_norm(self) -> Tensor:
        """2-norm of the gradient that this rank has accumulated, fp32 scalar."""
        norms = [torch.linalg.vector_norm(grad) for grad in self.grads]
        return torch.linalg.vector_norm(torch.stack(norms))

    @torch.no_grad()
    def step(self, *, lr: float, grad_norm: Tensor) -> None:
        """Clips to max_grad_norm and steps masters and parameters in place.

        Args:
            lr: of this step.
            grad_norm: of the whole gradient, from `reduce_grads`.
        """
        self._state.wait()
        for flat in self._flats:
            moments = flat.ensure_moments()
            moments["step"] += 1
            adamw_step(
                flat.own_weights,
                flat.own_grad,
                moments["exp_avg"],
                moments["exp_avg_sq"],
                self._config,
                step=int(moments["step"]),
                lr=lr,
                weight_decay=flat.weight_decay,
                grad_norm=float(grad_norm),
                lower=flat.lower,
            )
        self.complete_weights()

    def complete_weights(self) -> None:
        """Gathers what the ranks of a sharded optimizer hold; all of them call it together."""
        if self._shard_group is not None:
            for flat in self._flats:
                flat.gather_weights(self._shard_group)

    def state_dict(self) -> dict[str, Tensor]:
        """Masters and AdamW's moments: the live tensors, so loading into them is enough.

        The names of a sharded optimizer's parts say whose they are; after loading into them comes
        `complete_weights`.
        """
        self._state.wait()
        whose = ""
        if self._shard_group is not None:
            whose = f".rank_{dist.get_rank(self._shard_group)}"
        return {
            f"{name}_{index}{whose}": value
            for index, flat in enumerate(self._flats)
            for name, value in (flat.weights() | flat.ensure_moments()).items()
        }


def _adding_into(total: Tensor) -> Callable[[Tensor], None]:
    def hook(parameter: Tensor) -> None:
        if parameter.grad is not None:  # None where a product added to main_grad
            total.add_(parameter.grad)
            parameter.grad = None

    return hook
