"""AdamW for a model of `shard_model`: masters, gradients and moments on 1/N of the parameters.

The shards that are gathered for computation are the fp32 masters themselves, so a bf16 model needs
no second half beside them: 16 bytes a parameter (12 with bf16 moments), divided by N.
"""

from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lwz_trainer.config.sections import OptimConfig
from lwz_trainer.update.buffers import Buffers, TorchBuffers
from lwz_trainer.update.fully_sharded import sharded_parameters
from lwz_trainer.update.optimizer import adamw_step, moments_dtype

__all__ = ["ShardedAdamW"]


class ShardedAdamW:
    """AdamW over this rank's rows of every parameter; the methods are those of `FlatAdamW`.

    Args:
        model: of `shard_model`, trainable.
        config: of AdamW.
        state: where the moments lie; they are made at once then. None: in torch's memory, when they
            are needed.
    """

    def __init__(
        self, model: nn.Module, config: OptimConfig, *, state: Buffers | None = None
    ) -> None:
        self._config = config
        parameters = sharded_parameters(model)
        # Of a parameter with fewer rows than ranks, some ranks have none.
        self._parameters = {n: p for n, p in parameters.items() if p.to_local().numel() > 0}
        self._moments: dict[str, tuple[Tensor, Tensor]] = {}
        first = next(iter(parameters.values()))
        self._state = state or TorchBuffers(first.device)
        self._step = torch.zeros((), dtype=torch.float32, device=first.device)
        self._rank = first.device_mesh.get_rank()
        if state is not None:
            self._ensure_moments()

    @property
    def grads(self) -> list[Tensor]:
        """This rank's rows of the gradient, summed over ranks, fp32."""
        return list(self._grads().values())

    def zero_grad(self) -> None:
        """Sets the gradients to 0: the next backward pass makes new ones."""
        for parameter in self._parameters.values():
            parameter.grad = None

    def release_grads(self) -> None:
        """Gives the gradients' memory to others until the next backward pass."""
        self.zero_grad()

    def reduce_grads(self, group: dist.ProcessGroup | None) -> Tensor:
        """Sums what is left to be summed: the gradients lie summed on their ranks already.

        Returns:
            fp32 scalar, the 2-norm of the gradient of all parameters; a collective.
        """
        squares = torch.zeros_like(self._step)
        for grad in self.grads:
            squares += torch.linalg.vector_norm(grad).square()
        dist.all_reduce(squares, group=group)
        return squares.sqrt()

    @torch.no_grad()
    def step(self, *, lr: float, grad_norm: Tensor) -> None:
        """Clips to max_grad_norm and steps the masters in place.

        Args:
            lr: of this step.
            grad_norm: of the whole gradient, from `reduce_grads`.
        """
        self._state.wait()
        grads = self._grads()
        self._ensure_moments()
        self._step += 1
        number, norm = int(self._step), float(grad_norm)
        for name, parameter in self._parameters.items():
            exp_avg, exp_avg_sq = self._moments[name]
            adamw_step(
                parameter.to_local().view(-1),
                grads[name].view(-1),
                exp_avg.view(-1),
                exp_avg_sq.view(-1),
                self._config,
                step=number,
                lr=lr,
                weight_decay=self._config.weight_decay if parameter.dim() >= 2 else 0.0,
                grad_norm=norm,
            )

    def complete_weights(self) -> None:
        """Nothing is held twice: what was loaded into `state_dict` is in force."""

    @torch.no_grad()
    def state_dict(self) -> dict[str, Tensor]:
        """Masters and AdamW's moments: the live tensors, so loading into them is enough.

        The names say whose rows they are.
        """
        self._state.wait()
        self._ensure_moments()
        state = {"step": self._step}
        for name, parameter in self._parameters.items():
            exp_avg, exp_avg_sq = self._moments[name]
            state[f"master.{name}"] = parameter.to_local()
            state[f"exp_avg.{name}"] = exp_avg
            state[f"exp_avg_sq.{name}"] = exp_avg_sq
        return {f"{name}.rank_{self._rank}": value for name, value in state.items()}

    def _grads(self) -> dict[str, Tensor]:
        """This rank's rows of the gradient: every backward pass reaches every parameter."""
        return {
            name: cast(DTensor, parameter.grad).to_local()
            for name, parameter in self._parameters.items()
            if parameter.grad is not None
        }

    def _ensure_moments(self) -> None:
        if not self._moments:
            self._moments = {
                name: (self._zeros_like(local), self._zeros_like(local))
                for name, local in ((n, p.to_local()) for n, p in self._parameters.items())
            }

    def _zeros_like(self, rows: Tensor) -> Tensor:
        dtype = moments_dtype(self._config)
        return self._state.zeros(rows.numel(), dtype).view(rows.shape)
