"""Requests, rendered and tokenised once; a step's share of them depends on seed and step alone."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedTokenizerBase

from lwz_trainer.config.train import TrainConfig
from lwz_trainer.data.prompts import Prompt, load_prompts, prompt_order, replacement_index
from lwz_trainer.data.templates import Renderer, load_template
from lwz_trainer.digest import short_digest
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
        self.identity = {
            "data.prompts": short_digest([prompt.prompt for prompt in self._prompts]),
            "data.template": self._template_digest(tokenizer),
        }
        """Digests of what the requests are and of how they are put."""
        self._refuse_too_long(max_positions)

    def __len__(self) -> int:
        return len(self._prompts)

    @property
    def prompts(self) -> list[Prompt]:
        """All of them, in the order of the file."""
        return self._prompts

    @property
    def longest(self) -> int:
        """Tokens of the longest rendered prompt."""
        return max(len(ids) for ids in self._token_ids)

    def step_groups(self, step: int, *, rank: int, world_size: int) -> list[GroupPrompt]:
        """The groups, or parts of groups, that this rank samples in a 0-based step.

        Sample s of a step is member s % G of group s // G; ranks take equal runs of samples.
        """
        group_size = self._config.rollout.group_size
        order = self._order(step)
        share = len(order) * group_size // world_size
        mine = range(rank * share, (rank + 1) * share)
        return [
            self._group(
                group,
                order[group],
                [sample for sample in mine if sample // group_size == group],
            )
            for group in sorted({sample // group_size for sample in mine})
        ]

    def replacement(self, old: GroupPrompt, step: int, attempt: int) -> GroupPrompt:
        """Another prompt in the place of a group; `attempt` counts from 1.

        Its samples have numbers of their own, since the numbers are keys of the random tokens.
        """
        order = self._order(step)
        index = replacement_index(
            len(self._prompts),
            self._config.seed,
            step=step,
            group=old.request.group,
            attempt=attempt,
            taken=set(order),
        )
        per_step = len(order) * self._config.rollout.group_size
        samples = [sample + per_step for sample in old.request.samples]
        return self._group(old.request.group, index, samples)

    def _order(self, step: int) -> list[int]:
        """Indices of the prompts of a step, by group."""
        count = self._config.data.prompts_per_step
        return prompt_order(len(self._prompts), self._config.seed, step * count, count)

    def _group(self, group: int, index: int, samples: list[int]) -> GroupPrompt:
        return GroupPrompt(
            prompt=self._prompts[index],
            text=self._texts[index],
            request=Request(group=group, prompt_ids=self._token_ids[index], samples=samples),
        )

    def _render_all(
        self, tokenizer: PreTrainedTokenizerBase
    ) -> tuple[str, Literal["think", "direct"]]:
        data = self._config.data
        renderer = Renderer(
            data.template, chat_opened=data.chat_opened, chat_system=data.chat_system
        )
        self._texts = [renderer.text(prompt, tokenizer) for prompt in self._prompts]
        self._token_ids = [renderer.token_ids(text, tokenizer) for text in self._texts]
        return renderer.opened, renderer.kind

    def _template_digest(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """Of its text: what a chat template makes of it may hold the date."""
        data = self._config.data
        if data.template == "chat":
            return short_digest([tokenizer.chat_template, data.chat_opened, data.chat_system])
        return short_digest(dataclasses.asdict(load_template(data.template)))

    def _refuse_too_long(self, max_positions: int) -> None:
        completion = self._config.rollout.max_completion_tokens
        for prompt, ids in zip(self._prompts, self._token_ids, strict=True):
            if len(ids) + completion > max_positions:
                raise UserError(
                    f"{self._config.data.prompts} row {prompt.row}: the prompt has {len(ids)} "
                    f"tokens with its template, and rollout.max_completion_tokens is {completion}; "
                    f"the model's context is {max_positions}: shorten the prompt or lower that"
                )
