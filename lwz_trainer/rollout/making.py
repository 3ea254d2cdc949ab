"""An engine for a model that was loaded from files."""

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from lwz_trainer.config.sections import RolloutConfig
from lwz_trainer.model.decoder import Decoder
from lwz_trainer.model.loading import load_generation_config, resolve_eos_ids
from lwz_trainer.rollout.engine import RolloutEngine
from lwz_trainer.rollout.kv_cache import kv_memory_limit

__all__ = ["make_engine"]


def make_engine(
    model: Decoder, tokenizer: PreTrainedTokenizerBase, model_dir: Path, config: RolloutConfig
) -> RolloutEngine:
    """An engine with the end tokens that the files name, within the memory that is free now.

    Args:
        model, tokenizer: from `load_pretrained`.
        model_dir: where they came from.
        config: sampling and limits.
    """
    return RolloutEngine(
        model,
        tokenizer,
        eos_ids=resolve_eos_ids(tokenizer, load_generation_config(model_dir)),
        config=config,
        memory_limit_bytes=kv_memory_limit(model.embed.device),
    )
