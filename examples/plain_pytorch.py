"""GRPO in a plain PyTorch loop: rollout, advantages, one loss call, backward, step.

A small recurrent policy learns to count in a circle: after token v it should write v + 1 (mod V).
The reward is the share of steps that do so. Shown besides: sequences of different lengths packed
without padding, one normaliser for all micro-batches, and a head gradient that is accumulated in
fp32 by the loss itself (`weight_grad`).
"""

import torch
from torch import Tensor, nn

from lwz_kernels.linear_policy_loss import PolicyLossConfig, linear_policy_loss

__all__ = ["Policy", "train"]

VOCAB_SIZE, WIDTH, GROUP_SIZE, PROMPTS, MAX_TOKENS = 16, 32, 8, 16, 12


class Policy(nn.Module):
    """Token ids [N, L] to hidden states [N, L, D], and the head that the loss reads."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB_SIZE, WIDTH)
        self.backbone = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.head = nn.Linear(WIDTH, VOCAB_SIZE, bias=False)

    def forward(self, input_ids_NL: Tensor) -> Tensor:
        hidden_NLD, _ = self.backbone(self.embedding(input_ids_NL))
        return hidden_NLD


@torch.no_grad()
def rollout(policy: Policy, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sample a group for each prompt token: ids [N, 1 + MAX_TOKENS] and completion lengths [N]."""
    prompts_P = torch.randint(VOCAB_SIZE, (PROMPTS,), generator=generator)
    ids_NL = prompts_P.repeat_interleave(GROUP_SIZE)[:, None]
    for _ in range(MAX_TOKENS):
        logits_NV = policy.head(policy(ids_NL)[:, -1])
        next_N1 = torch.multinomial(logits_NV.softmax(-1), 1, generator=generator)
        ids_NL = torch.cat([ids_NL, next_N1], dim=1)
    lengths_N = torch.randint(4, MAX_TOKENS + 1, (len(ids_NL),), generator=generator)
    return ids_NL, lengths_N


def counting_rewards(ids_NL: Tensor, is_completion_NL: Tensor) -> Tensor:
    """Share of a completion's tokens that follow their predecessor, [N]."""
    is_next_NL = ids_NL[:, 1:] == (ids_NL[:, :-1] + 1) % VOCAB_SIZE
    return (is_next_NL & is_completion_NL).sum(1) / is_completion_NL.sum(1)


def group_advantages(rewards_N: Tensor) -> Tensor:
    """Reward minus the mean of its group, over the group's spread, [N]."""
    rewards_PG = rewards_N.view(PROMPTS, GROUP_SIZE)
    centered_PG = rewards_PG - rewards_PG.mean(1, keepdim=True)
    return (centered_PG / (rewards_PG.std(1, keepdim=True) + 1e-4)).flatten()


def train(num_steps: int, *, num_micro_batches: int = 2, seed: int = 0) -> list[float]:
    """Mean reward of each step."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    policy = Policy()
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-2)
    config = PolicyLossConfig(loss_type="dapo", clip_ratio_high=0.28, entropy_coef=0.01)
    curve = []
    for _ in range(num_steps):
        ids_NL, lengths_N = rollout(policy, generator)
        is_completion_NL = torch.arange(MAX_TOKENS) < lengths_N[:, None]
        rewards_N = counting_rewards(ids_NL, is_completion_NL)
        advantages_N = group_advantages(rewards_N)

        weight_grad = torch.zeros_like(policy.head.weight)
        for rows in torch.arange(len(ids_NL)).chunk(num_micro_batches):
            mask_NL = is_completion_NL[rows]
            advantages_NL = advantages_N[rows, None].expand_as(mask_NL)
            cu_seqlens = torch.zeros(len(rows) + 1, dtype=torch.int32)
            cu_seqlens[1:] = lengths_N[rows].cumsum(0)
            loss, _ = linear_policy_loss(
                policy(ids_NL[rows, :-1])[mask_NL],  # [T, D]: only tokens that were sampled
                policy.head.weight,
                ids_NL[rows, 1:][mask_NL],
                advantages_NL[mask_NL],
                torch.ones(int(cu_seqlens[-1]), dtype=torch.bool),
                cu_seqlens=cu_seqlens,
                num_loss_tokens=int(lengths_N.sum()),  # of the whole step, not of the micro-batch
                weight_grad=weight_grad,
                config=config,
            )
            loss.backward()
        policy.head.weight.grad = weight_grad
        optimizer.step()
        optimizer.zero_grad()
        curve.append(rewards_N.mean().item())
    return curve


def main() -> None:
    """Train for 60 steps and print the reward."""
    curve = train(60)
    for step in [*range(0, len(curve), 10), len(curve) - 1]:
        print(f"step {step:2d}  reward {curve[step]:.2f}")


if __name__ == "__main__":
    main()
