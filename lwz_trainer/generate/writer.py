"""A checkpoint that writes: model, template and engine, from one configuration."""

from pathlib import Path

import torch

from lwz_trainer.config.generate import GENERATE_MAX_TOKENS, GenerateCommandConfig
from lwz_trainer.config.sections import RolloutConfig
from lwz_trainer.data.prompts import Prompt
from lwz_trainer.data.templates import Renderer
from lwz_trainer.errors import UserError
from lwz_trainer.model.linear import resolve_dtype
from lwz_trainer.model.loading import load_pretrained
from lwz_trainer.model.source import resolve_model_dir
from lwz_trainer.rollout.making import make_own_engine

__all__ = ["Writer"]


class Writer:
    """Everything that writing needs, loaded once.

    Raises:
        UserError: no such model or template, or a prompt that leaves no room for a completion.
    """

    def __init__(self, config: GenerateCommandConfig, prompts: list[Prompt]) -> None:
        self._config = config
        renderer = Renderer(
            config.template, chat_opened=config.chat_opened, chat_system=config.chat_system
        )
        self.opened = renderer.opened
        device = _resolve_device(config.device)
        model_dir: Path = resolve_model_dir(config.model)
        model, self.tokenizer = load_pretrained(
            str(model_dir), dtype=resolve_dtype(config.dtype, device), device=device
        )
        texts = [renderer.text(prompt, self.tokenizer) for prompt in prompts]
        self.prompt_ids = [renderer.token_ids(text, self.tokenizer) for text in texts]
        max_tokens = self._max_tokens(prompts, model.config.max_positions)
        self.engine = make_own_engine(
            model,
            self.tokenizer,
            model_dir,
            RolloutConfig(
                max_completion_tokens=max_tokens,
                temperature=config.temperature,
                top_p=config.top_p,
                top_k=config.top_k,
                stop=config.stop,
                max_num_seqs=config.max_num_seqs,
                kv_cache_tokens=config.kv_cache_tokens,
            ),
        )

    def _max_tokens(self, prompts: list[Prompt], max_positions: int) -> int:
        """The configured limit, which every prompt must leave room for, or all there is."""
        wanted = self._config.max_tokens
        for prompt, ids in zip(prompts, self.prompt_ids, strict=True):
            if len(ids) + (wanted or 1) > max_positions:
                raise UserError(
                    f"the request in row {prompt.row} has {len(ids)} tokens with its template, and "
                    f"max_tokens is {wanted or 'unset'}; the model's context is {max_positions}: "
                    "shorten it or lower max_tokens"
                )
        longest = max(len(ids) for ids in self.prompt_ids)
        return wanted or min(GENERATE_MAX_TOKENS, max_positions - longest)


def _resolve_device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device is cuda, but torch sees no GPU: use device=cpu")
    is_cuda = name == "cuda" or (name == "auto" and torch.cuda.is_available())
    return torch.device("cuda" if is_cuda else "cpu")
