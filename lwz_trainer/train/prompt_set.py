"""Requests, rendered and tokenised once; a step's share of them depends on seed and step alone."""

from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedTokenizerBase

from lwz_trainer.config.train import TrainConfig
from lwz_trainer.data.prompts import Prompt, load_prompts, prompt_order
from lwz_trainer.data.templates import load_template, render_chat
from lwz_trainer.errors import UserError
from lwz_trainer.rollout.sequence import Request

__all__ = ["GroupPrompt", "PromptSet"]


@dataclass(frozen=True)
class GroupPrompt:
    """A request as the policy sees it, and its place in the step."""

    prompt: Prompt
    text: str
    request: Request


class PromptSet:
    """All prompts of a run.

    Raises:
        UserError: from the loaders, or a prompt that leaves no room for its completion.
    """

    def __init__(
        self, config: TrainConfig, tokenizer: PreTrainedTokenizerBase, max_positions: int
    ) -> None:
        self._config = config
        self._prompts = load_prompts(config.data.prompts)
        self.opened, self.kind = self._render_all(tokenizer)
        self._refuse_too_long(max_positions)

    def __len__(self) -> int:
        return len(self._prompts)

    @property
    def longest(self) -> int:
        """Tokens of the longest rendered prompt."""
        return max(len(ids) for ids in self._token_ids)

    def step_groups(self, step: int, *, rank: int, world_size: int) -> list[GroupPrompt]:
        """The groups, or parts of groups, that this rank samples in a 0-based step.

        Sample s of a step is member s % G of group s // G; ranks take equal runs of samples.
        """
        num_groups = self._config.data.prompts_per_step
        group_size = self._config.rollout.group_size
        order = prompt_order(len(self._prompts), self._config.seed, step * num_groups, num_groups)
        share = num_groups * group_size // world_size
        mine = range(rank * share, (rank + 1) * share)
        groups = sorted({sample // group_size for sample in mine})
        return [
            GroupPrompt(
                prompt=self._prompts[order[group]],
                text=self._texts[order[group]],
                request=Request(
                    group=group,
                    prompt_ids=self._token_ids[order[group]],
                    samples=[sample for sample in mine if sample // group_size == group],
                ),
            )
            for group in groups
        ]

    def _render_all(
        self, tokenizer: PreTrainedTokenizerBase
    ) -> tuple[str, Literal["think", "direct"]]:
        data = self._config.data
        if data.template == "chat":
            system = data.chat_system or None
            opened = data.chat_opened
            kind: Literal["think", "direct"] = "direct" if opened == "<answer>" else "think"
            self._texts = [render_chat(p, tokenizer, system, opened) for p in self._prompts]
        else:
            template = load_template(data.template)
            opened, kind = template.opened, template.kind
            self._texts = [template.render(prompt) for prompt in self._prompts]
        add_special = data.template != "chat"  # a chat template writes its own special tokens
        self._token_ids: list[list[int]] = [
            tokenizer(text, add_special_tokens=add_special)["input_ids"] for text in self._texts
        ]
        return opened, kind

    def _refuse_too_long(self, max_positions: int) -> None:
        completion = self._config.rollout.max_completion_tokens
        for prompt, ids in zip(self._prompts, self._token_ids, strict=True):
            if len(ids) + completion > max_positions:
                raise UserError(
                    f"{self._config.data.prompts} row {prompt.row}: the prompt has {len(ids)} "
                    f"tokens with its template, and rollout.max_completion_tokens is {completion}; "
                    f"the model's context is {max_positions}: shorten the prompt or lower that"
                )
