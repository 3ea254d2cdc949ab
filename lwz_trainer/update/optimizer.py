"""fp32 master weights, gradients and AdamW state, each one flat buffer.

Two flats: matrices (decayed) and the rest. When the model is fp32 its parameters are views of the
master buffer and nothing is kept twice; otherwise the master is rounded into the parameters in
place after each step, so their addresses never change. Gradients accumulate in the flat fp32 buffer
whatever the model's dtype: autograd adds into it directly, or a hook adds and frees them.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lwz_trainer.config.sections import OptimConfig

__all__ = ["FlatAdamW", "learning_rate"]


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


class FlatAdamW:
    """AdamW over flat fp32 buffers of all parameters of a model."""

    def __init__(self, model: nn.Module, config: OptimConfig) -> None:
        self._config = config
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._flats: list[tuple[Tensor, list[tuple[nn.Parameter, Tensor, Tensor]]]] = []
        groups: list[dict[str, Any]] = []
        matrices = [p for p in self._parameters if p.dim() >= 2]
        vectors = [p for p in self._parameters if p.dim() < 2]
        for parameters, decay in ((matrices, config.weight_decay), (vectors, 0.0)):
            if parameters:
                groups.append({"params": [self._flatten(parameters)], "weight_decay": decay})
        self._adamw = torch.optim.AdamW(
            groups,
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            fused=True,
        )

    def _flatten(self, parameters: list[nn.Parameter]) -> Tensor:
        """Copies parameters into one fp32 flat with a gradient, and hooks their gradients to it."""
        total = sum(p.numel() for p in parameters)
        master = torch.empty(total, dtype=torch.float32, device=parameters[0].device)
        master.grad = torch.zeros_like(master)
        entries = []
        offset = 0
        for parameter in parameters:
            span = slice(offset, offset + parameter.numel())
            view = master[span].view_as(parameter)
            grad = master.grad[span].view_as(parameter)
            view.copy_(parameter.detach())
            if parameter.dtype == torch.float32:
                parameter.data, parameter.grad = view, grad
            else:
                parameter.register_post_accumulate_grad_hook(_adding_into(grad))
            entries.append((parameter, view, grad))
            offset = span.stop
        self._flats.append((master, entries))
        return master

    @property
    def masters(self) -> list[Tensor]:
        """The fp32 flats; each one's `.grad` is the flat of accumulated gradients."""
        return [master for master, _ in self._flats]

    def grad_of(self, parameter: Tensor) -> Tensor:
        """The fp32 view of the flat gradient that belongs to a parameter, in its shape."""
        return next(
            grad for _, entries in self._flats for own, _, grad in entries if own is parameter
        )

    def zero_grad(self) -> None:
        for master, _ in self._flats:
            assert master.grad is not None
            master.grad.zero_()

    def all_reduce_grads(self, group: dist.ProcessGroup | None) -> None:
        """Sums gradients over ranks; the loss is already divided by global counts."""
        if group is not None:
            for master, _ in self._flats:
                dist.all_reduce(master.grad, group=group)

    def grad_norm(self) -> Tensor:
        """Global 2-norm of the accumulated gradient, fp32 scalar."""
        norms = [torch.linalg.vector_norm(master.grad) for master, _ in self._flats]
        return torch.linalg.vector_norm(torch.stack(norms))

    def step(self, *, lr: float, grad_norm: Tensor) -> None:
        """Clips to max_grad_norm, steps, and rounds the master into the parameters in place."""
        limit = self._config.max_grad_norm
        for group in self._adamw.param_groups:
            group["lr"] = lr
        for master, _ in self._flats:
            assert master.grad is not None
            if limit > 0:
                master.grad.mul_((limit / grad_norm.clamp(min=1e-12)).clamp(max=1.0))
        self._adamw.step()
        self._write_parameters()

    def state_dict(self) -> dict[str, Any]:
        """Masters and AdamW's moments; tensors are the live ones."""
        state: dict[str, Any] = {}
        for index, (master, _) in enumerate(self._flats):
            state[f"master_{index}"] = master
            moments = self._adamw.state.get(master) or self._initial_moments(master)
            for name in ("step", "exp_avg", "exp_avg_sq"):
                state[f"{name}_{index}"] = moments[name]
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` returned."""
        for index, (master, _) in enumerate(self._flats):
            master.copy_(state[f"master_{index}"])
            self._adamw.state[master] = {
                name: state[f"{name}_{index}"] for name in ("step", "exp_avg", "exp_avg_sq")
            }
        self._write_parameters()

    def _initial_moments(self, master: Tensor) -> dict[str, Tensor]:
        moments = {
            "step": torch.zeros((), dtype=torch.float32, device=master.device),
            "exp_avg": torch.zeros_like(master),
            "exp_avg_sq": torch.zeros_like(master),
        }
        self._adamw.state[master] = moments
        return moments

    def _write_parameters(self) -> None:
        with torch.no_grad():
            for _, entries in self._flats:
                for parameter, view, _ in entries:
                    if parameter.dtype != torch.float32:
                        parameter.copy_(view)


def _adding_into(total: Tensor) -> Callable[[Tensor], None]:
    def hook(parameter: Tensor) -> None:
        assert parameter.grad is not None
        total.add_(parameter.grad)
        parameter.grad = None

    return hook
