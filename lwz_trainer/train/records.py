"""One record a sample: everything that was sampled and scored, as it is written to Parquet."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lwz_trainer.rewards.score import RewardParts
from lwz_trainer.rollout.sequence import Sample
from lwz_trainer.train.groups import ScoredGroup

__all__ = ["sample_records", "write_records"]


def sample_records(
    step: int, groups: Sequence[ScoredGroup], *, opened: str
) -> list[dict[str, Any]]:
    """Records of this rank's samples."""
    return [
        _record(step, group, sample, part, opened)
        for group in groups
        for sample, part in zip(group.ended.samples, group.parts, strict=True)
    ]


def _record(
    step: int, group: ScoredGroup, sample: Sample, part: RewardParts, opened: str
) -> dict[str, Any]:
    member, source, advantages = group.member(sample), group.ended.prompt, group.advantages
    record: dict[str, Any] = {
        "step": step,
        "group": sample.group,
        "member": member,
        "prompt_row": source.prompt.row,
        "prompt": source.prompt.prompt,
        "length_range": source.prompt.length_range,
        "language": source.prompt.language,
        "prompt_text": source.text,
        "completion": opened + sample.text,
        "think": part.completion.think,
        "answer": part.completion.answer,
        "num_prompt_tokens": len(sample.prompt_ids),
        "num_completion_tokens": len(sample.completion_ids),
        "finish_reason": sample.finish_reason,
        "stop_string": sample.stop_string,
        "truncated": sample.is_truncated,
        "words_think": part.num_think_words,
        "words_answer": part.num_answer_words,
        "structure": part.completion.structure,
        "redundancy": part.redundancy,
        "repeated_spans": [list(span) for span in part.repeated_spans],
        "advantage": float(advantages.advantages_PG[0, member]),
        "logprob_mean": float(np.mean(sample.logprobs)),
        "logprob_min": float(np.min(sample.logprobs)),
        "prompt_ids": sample.prompt_ids,
        "completion_ids": sample.completion_ids,
        "sampling_logprobs": sample.logprobs,
        "policy_version": sample.policy_version,
    }
    for name, reward in part.rewards.items():
        record[f"reward_{name}"] = float(reward)
        record[f"normalized_{name}"] = float(advantages.normalized[name][0, member])
        record[f"weighted_{name}"] = float(advantages.weighted[name][0, member])
    return record


def write_records(path: Path, records: list[dict[str, Any]]) -> None:
    """One Parquet file; it appears whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    fixed = {
        "length_range": pa.list_(pa.int64()),
        "repeated_spans": pa.list_(pa.list_(pa.int64())),
        "prompt_ids": pa.list_(pa.int32()),
        "completion_ids": pa.list_(pa.int32()),
        "sampling_logprobs": pa.list_(pa.float32()),
    }
    columns = {
        name: pa.array([record[name] for record in records], type=fixed.get(name))
        for name in records[0]
    }
    pq.write_table(pa.table(columns), partial, compression="zstd")
    os.replace(partial, path)
