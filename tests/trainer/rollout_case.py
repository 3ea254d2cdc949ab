"""A tiny engine and the requests that its tests sample."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lwz_trainer.config.sections import RolloutConfig
from lwz_trainer.model.decoder import Decoder
from lwz_trainer.model.loading import load_pretrained
from lwz_trainer.rollout import Request, RolloutEngine, Sample
from tests.trainer.tiny import make_tiny_model

__all__ = ["PROMPTS", "load_tiny", "make_engine", "make_requests", "sample_all"]

PROMPTS = [[5, 6, 7], list(range(10, 31)), list(range(40, 57)), [90] * 16]


def load_tiny(tmp_path: Path, family: str = "llama") -> tuple[Decoder, Any]:
    return load_pretrained(
        str(make_tiny_model(tmp_path, family)), dtype=torch.float32, device="cpu"
    )


def make_engine(model: Decoder, tokenizer: Any, **settings: Any) -> RolloutEngine:
    defaults: dict[str, Any] = {
        "group_size": 4,
        "max_completion_tokens": 24,
        "temperature": 0.7,
        "stop": (),
        "page_size": 8,
    }
    return RolloutEngine(
        model,
        tokenizer,
        eos_ids=(tokenizer.eos_token_id,),
        config=RolloutConfig(**(defaults | settings)),
        memory_limit_bytes=1 << 30,
    )


def make_requests(prompts: Sequence[list[int]] = PROMPTS, group_size: int = 4) -> list[Request]:
    return [
        Request(group, ids, list(range(group * group_size, (group + 1) * group_size)))
        for group, ids in enumerate(prompts)
    ]


def sample_all(engine: RolloutEngine, requests: list[Request], **settings: Any) -> list[Sample]:
    defaults: dict[str, Any] = {"seed": 3, "step": 2, "policy_version": 2}
    return engine.generate(requests, **(defaults | settings))[0]
