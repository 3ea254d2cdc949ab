"""Who may be timed: whose values and gradients are near fp64, measured by plain PyTorch's error.

A provider passes if for each of its outputs

    rms(output - truth) <= 2 · (rms(eager - truth) + FLOOR · rms(truth))

where eager is PyTorch in the provider's own dtype (products in that dtype, softmax in fp32) and
truth is the same formula in fp64 of the same inputs. FLOOR is sixteen units of fp32's last place,
about what another order of summation over a vocabulary changes: it decides only in fp32.
A loss is one number, on which eager may be exact by luck; it is judged by eager's error in the
log-probs times Σ|dloss/dlogprob| instead.
"""

from dataclasses import dataclass

import torch

from bench.loss_head.problem import Problem
from bench.loss_head.provider import Calls, Case, Outputs, clipped_loss, prepare, run_case

__all__ = ["MAX_ERROR_VS_EAGER", "Verdict", "judge"]

MAX_ERROR_VS_EAGER = 2.0
FLOOR = 16 * torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Verdict:
    """The largest error over eager's, and the output that has it."""

    error_vs_eager: float
    output: str
    checked: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return self.error_vs_eager <= MAX_ERROR_VS_EAGER  # false for NaN


def judge(calls: Calls, case: Case, problem: Problem) -> Verdict:
    """Runs the case once and compares all that it returns."""
    prepared = prepare(calls, case, problem)
    outputs = {name: x.detach().double() for name, x in run_case(calls, case, prepared).items()}
    truth = _plain(case, prepared.double())
    eager = _plain(case, prepared)
    verdicts = []
    for name, value in outputs.items():
        if value.shape != truth[name].shape:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}, expected {tuple(truth[name].shape)}"
            )
        allowance = _eager_error(name, eager, truth) + FLOOR * _rms(truth[name])
        ratio = _rms(value - truth[name]) / allowance
        # NaN must lose against every number.
        verdicts.append((float("inf") if ratio != ratio else ratio, name))
    error, output = max(verdicts)
    return Verdict(error, output, tuple(outputs))


def _eager_error(name: str, eager: Outputs, truth: Outputs) -> float:
    if name == "loss":
        error = _rms(eager["logprobs"].double() - truth["logprobs"])
        return error * truth["sum_abs_dlogprobs"].item()
    return _rms(eager[name].double() - truth[name])


def _rms(x: torch.Tensor) -> float:
    return x.square().mean().sqrt().item()


def _plain(case: Case, problem: Problem) -> Outputs:
    """The formulas, by autograd over full logits; softmax in at least fp32."""
    if problem.logits is not None:
        leaves = {"dlogits": problem.logits.detach().requires_grad_()}
        (logits,) = x = list(leaves.values())
    else:
        inputs = {"dhidden": problem.hidden, "dweight": problem.weight}
        leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
        hidden, weight = x = list(leaves.values())
        logits = hidden @ weight.T
    wide_dtype = torch.promote_types(logits.dtype, torch.float32)
    logprobs_TV = torch.log_softmax(logits.to(wide_dtype) / problem.temperature, dim=-1)
    logprobs = logprobs_TV.gather(1, problem.labels[:, None])[:, 0]
    if case.op == "linear_policy_loss":
        loss = clipped_loss(logprobs, problem)
        dlogprobs, *gradients = torch.autograd.grad(loss, (logprobs, *x))
        extra = {"loss": loss.detach(), "sum_abs_dlogprobs": dlogprobs.abs().sum()}
    else:
        gradients = list(torch.autograd.grad(logprobs, x, problem.dlogprobs.to(wide_dtype)))
        logprobs_TV = logprobs_TV.detach()
        extra = {"entropy": -(logprobs_TV.exp() * logprobs_TV).sum(-1)}
    return {"logprobs": logprobs.detach(), **dict(zip(leaves, gradients, strict=True)), **extra}
