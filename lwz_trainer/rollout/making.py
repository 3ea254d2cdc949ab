"""An engine for a model that was loaded from files."""

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from lwz_trainer.config.sections import RolloutConfig
from lwz_trainer.model.decoder import Decoder
from lwz_trainer.model.loading import load_generation_config, resolve_eos_ids
from lwz_trainer.parallel import Ranks
from lwz_trainer.rollout.engine import RolloutEngine
from lwz_trainer.rollout.interface import SamplingEngine
from lwz_trainer.rollout.kv_cache import kv_memory_limit
from lwz_trainer.rollout.vllm import VllmEngine, VllmServerEngine

__all__ = ["make_engine", "make_own_engine"]


def make_engine(
    model: Decoder,
    tokenizer: PreTrainedTokenizerBase,
    model_dir: Path,
    config: RolloutConfig,
    ranks: Ranks | None = None,
) -> SamplingEngine:
    """An engine with the end tokens that the files name, within the memory that is free now.

    Args:
        model, tokenizer: from `load_pretrained`.
        model_dir: where they came from.
        config: which engine, sampling and limits.
        ranks: the processes that sample together; None for one on its own.
    """
    eos_ids = resolve_eos_ids(tokenizer, load_generation_config(model_dir))
    if config.engine == "vllm_server":
        return VllmServerEngine(model, tokenizer, eos_ids=eos_ids, config=config, ranks=ranks)
    memory_limit_bytes = kv_memory_limit(model.embed.device)
    if config.engine == "vllm":
        return VllmEngine(
            model,
            tokenizer,
            model_dir,
            eos_ids=eos_ids,
            config=config,
            memory_limit_bytes=memory_limit_bytes,
            is_launched=ranks is not None and ranks.group is not None,
        )
    return make_own_engine(model, tokenizer, model_dir, config)


def make_own_engine(
    model: Decoder, tokenizer: PreTrainedTokenizerBase, model_dir: Path, config: RolloutConfig
) -> RolloutEngine:
    """As `make_engine`, whatever `config.engine` says."""
    return RolloutEngine(
        model,
        tokenizer,
        eos_ids=resolve_eos_ids(tokenizer, load_generation_config(model_dir)),
        config=config,
        memory_limit_bytes=kv_memory_limit(model.embed.device),
    )
