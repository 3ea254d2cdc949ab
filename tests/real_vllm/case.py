"""A tiny model that the real vLLM takes, and what the trainer thinks of its samples."""

from pathlib import Path
from typing import Any

import torch

from lwz_kernels.attention import SegmentTable, attention
from lwz_kernels.linear_logprobs import linear_logprobs
from lwz_trainer.model.decoder import Decoder
from lwz_trainer.model.loading import load_pretrained
from lwz_trainer.rollout import Sample
from tests.trainer.tiny import make_tiny_model

__all__ = ["TEMPERATURE", "load_model", "trainer_logprobs"]

TEMPERATURE = 0.7


def load_model(tmp_path: Path) -> tuple[Path, Decoder, Any]:
    """Directory, decoder and tokenizer; a head of vLLM's on a CPU has 32 numbers or more."""
    model_dir = make_tiny_model(tmp_path, hidden_size=128, intermediate_size=256)
    return model_dir, *load_pretrained(str(model_dir), dtype=torch.float32, device="cpu")


@torch.no_grad()
def trainer_logprobs(model: Decoder, sample: Sample) -> torch.Tensor:
    ids = torch.tensor(sample.prompt_ids + sample.completion_ids)
    plan = SegmentTable.from_cu_seqlens([0, len(ids)])
    hidden_TD = model(
        ids, torch.arange(len(ids)), lambda _, q, k, v: attention(q, k, v, segments=plan)[0]
    )
    start = len(sample.prompt_ids)
    return linear_logprobs(
        hidden_TD[start - 1 : -1], model.head_weight, ids[start:], temperature=TEMPERATURE
    )[0]
