"""The inputs that all providers get: a head as a trained model has it, from a fixed seed.

Distributions are peaked as those of a trained model are: a label's logit stands about half a nat
above the log-sum of all others, give or take two nats. Random logits would be nearly uniform, and
a provider that skips small probabilities would skip everything. All sequences have one length and
every token counts, so a padded peer computes no more than a packed one. The temperature is a power
of two: a peer without temperature gets hidden / temperature, which is then exact in bf16.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

__all__ = ["CLIP_RATIO_HIGH", "CLIP_RATIO_LOW", "Problem", "Shape", "make_problem"]

CLIP_RATIO_LOW = 0.2
CLIP_RATIO_HIGH = 0.28
TEMPERATURE = 0.5
NUM_SEQUENCES = 8
LOGIT_STD = 2.0
LABEL_MARGIN_MEAN, LABEL_MARGIN_STD = 0.5, 2.0
# Far from log(1 - low) and log(1 + high), so that rounding does not decide who is clipped.
OLD_LOG_RATIOS = (-0.5, -0.1, 0.1, 0.5)
OLD_CHUNK_TOKENS = 256
# A row of logits costs a random number an entry; different rows beyond these change no time.
NUM_DISTINCT_LOGIT_ROWS = 256


@dataclass(frozen=True)
class Shape:
    """Tokens T, model width D, vocabulary V."""

    tokens: int
    width: int
    vocab: int

    def __str__(self) -> str:
        return f"T{self.tokens} D{self.width} V{self.vocab}"


@dataclass
class Problem:
    """Inputs of one head; `old_logprobs` is None on-policy.

    `scratch` keeps buffers between the calls of one turn, such as a caller's gradient buffer.
    """

    hidden: torch.Tensor  # [T, D]
    weight: torch.Tensor  # [V, D]
    labels: torch.Tensor  # [T]
    advantages: torch.Tensor  # [T] fp32, constant within a sequence
    dlogprobs: torch.Tensor  # [T] fp32, what a loss outside sends back
    cu_seqlens: torch.Tensor  # [N+1] int32
    old_logprobs: torch.Tensor | None  # [T] fp32
    logits: torch.Tensor | None = None  # [T, V], for those who already have them
    temperature: float = TEMPERATURE
    scratch: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def shape(self) -> Shape:
        return Shape(len(self.hidden), self.hidden.shape[1], self.weight.shape[0])

    @property
    def num_sequences(self) -> int:
        return len(self.cu_seqlens) - 1

    def to(self, device: torch.device) -> "Problem":
        """A copy on `device` that shares nothing with this one but tensors already there."""
        return self._map(lambda x: x.to(device))

    def pin(self) -> "Problem":
        """A copy in page-locked memory, which moves to a GPU many times faster."""
        return self._map(torch.Tensor.pin_memory)

    def double(self) -> "Problem":
        """The same numbers in fp64."""
        return self._map(lambda x: x.double() if x.is_floating_point() else x)

    def for_mode(self, mode: str) -> "Problem":
        """What the modes of the policy loss change: who was old, and which advantages are zero."""
        advantages = self.advantages
        if mode == "half_zero":
            length = self.shape.tokens // self.num_sequences
            is_zero = torch.arange(len(advantages), device=advantages.device) // length % 2 == 0
            advantages = advantages.masked_fill(is_zero, 0.0)
        elif mode == "cross_entropy":
            advantages = torch.ones_like(advantages)
        old_logprobs = self.old_logprobs if mode == "off_policy" else None
        return dataclasses.replace(
            self, advantages=advantages, old_logprobs=old_logprobs, scratch={}
        )

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Problem":
        changed: dict[str, Any] = {
            name: change(value)
            for name, value in vars(self).items()
            if isinstance(value, torch.Tensor)
        }
        return dataclasses.replace(self, **changed, scratch={})


def make_problem(
    shape: Shape, dtype: torch.dtype, device: torch.device, *, with_old_logprobs: bool
) -> Problem:
    """Builds the inputs on `device`; the same seed, so every process builds the same."""
    if shape.tokens % NUM_SEQUENCES:
        raise ValueError(
            f"tokens must be a multiple of {NUM_SEQUENCES} (sequences of one length), "
            f"got {shape.tokens}"
        )
    length = shape.tokens // NUM_SEQUENCES
    generator = torch.Generator(device).manual_seed(0)

    def randn(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, device=device)

    weight = (randn(shape.vocab, shape.width) / math.sqrt(shape.width)).to(dtype)
    labels = torch.randint(shape.vocab, (shape.tokens,), generator=generator, device=device)
    margin_T = _label_margins(randn(shape.tokens), shape.vocab)
    hidden = LOGIT_STD * randn(shape.tokens, shape.width)
    hidden += margin_T[:, None] * weight[labels].float()
    problem = Problem(
        hidden=(TEMPERATURE * hidden).to(dtype),
        weight=weight,
        labels=labels,
        advantages=randn(NUM_SEQUENCES).repeat_interleave(length),
        dlogprobs=randn(shape.tokens) / shape.tokens,
        cu_seqlens=length * torch.arange(NUM_SEQUENCES + 1, dtype=torch.int32, device=device),
        old_logprobs=None,
    )
    if with_old_logprobs:
        choices = torch.randint(
            len(OLD_LOG_RATIOS), (shape.tokens,), generator=generator, device=device
        )
        log_ratios = torch.tensor(OLD_LOG_RATIOS, device=device)[choices]
        problem.old_logprobs = _exact_logprobs(problem) - log_ratios
    return problem


def make_logits(shape: Shape, labels: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Logits [T, V] for those who already have them; equal but for the labels every 256 rows."""
    generator = torch.Generator(labels.device).manual_seed(1)
    num_rows = min(shape.tokens, NUM_DISTINCT_LOGIT_ROWS)
    rows = torch.randn(num_rows, shape.vocab, generator=generator, device=labels.device)
    block = (TEMPERATURE * LOGIT_STD * rows).to(dtype)
    repeats = -(-shape.tokens // num_rows)
    logits = block.repeat(repeats, 1)[: shape.tokens]
    normal = torch.randn(shape.tokens, generator=generator, device=labels.device)
    margin = TEMPERATURE * _label_margins(normal, shape.vocab)
    return logits.scatter_(1, labels[:, None], margin[:, None].to(dtype))


def _label_margins(normal: torch.Tensor, vocab: int) -> torch.Tensor:
    """Logits of the labels (before temperature) that leave them half a nat above all others."""
    log_sum_of_others = math.log(vocab) + LOGIT_STD**2 / 2
    return log_sum_of_others + LABEL_MARGIN_MEAN + LABEL_MARGIN_STD * normal


def _exact_logprobs(problem: Problem) -> torch.Tensor:
    weight = problem.weight.float()
    chunks = []
    for start in range(0, problem.shape.tokens, OLD_CHUNK_TOKENS):
        rows = slice(start, start + OLD_CHUNK_TOKENS)
        z = problem.hidden[rows].float() @ weight.T / problem.temperature
        label_z = z.gather(1, problem.labels[rows, None])[:, 0]
        chunks.append(label_z - z.logsumexp(1))
    return torch.cat(chunks)
