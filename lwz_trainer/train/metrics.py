"""Numbers of one step, from the records of all its samples and from the rollout."""

import math
import re
import resource
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lwz_trainer.parallel import Ranks
from lwz_trainer.train.sampling import StepSamples

__all__ = ["peak_memory_gb", "rollout_metrics", "sample_metrics", "step_warnings"]


def sample_metrics(records: list[dict[str, Any]]) -> dict[str, float]:
    """Means over samples; a missing reward is left out of its mean."""

    def column(name: str) -> np.ndarray:
        return np.array([record[name] for record in records], dtype=np.float64)

    metrics: dict[str, float] = {}
    for key in records[0]:
        if key.startswith("reward_"):
            name, values = key.removeprefix("reward_"), column(key)
            scored = values[~np.isnan(values)]
            metrics[f"reward/{name}"] = _mean_of_scored(values)
            metrics[f"reward/{name}_std"] = float(scored.std()) if scored.size else math.nan
    structure = column("structure")
    tokens, truncated = column("num_completion_tokens"), column("truncated")
    untruncated = tokens[truncated == 0]
    metrics |= {
        "reward/structure": float(structure.mean()),
        "reward/strict_frac": float((structure == 1).mean()),
        "reward/redundancy": _mean_of_scored(column("redundancy")),
        "words/answer_mean": float(column("words_answer").mean()),
        "words/think_mean": float(column("words_think").mean()),
        "tokens/completion_mean": float(tokens.mean()),
        "tokens/completion_max": float(tokens.max()),
        "truncated_frac": float(truncated.mean()),
        "zero_spread_frac": _zero_spread_frac(records),
        "distinct_frac": _distinct_frac(records),
    }
    if untruncated.size:
        metrics["tokens/completion_mean_untruncated"] = float(untruncated.mean())
    return metrics


def rollout_metrics(
    found: StepSamples, ranks: Ranks, *, seconds: float, copy_bandwidth: float
) -> dict[str, float]:
    """Sums and maxima over the ranks, which call it together.

    Args:
        found: of this rank.
        ranks: all of them.
        seconds: that decoding took.
        copy_bandwidth: of this rank's device, bytes a second.
    """
    sums = ranks.sum(
        [
            float(sum(stats.num_tokens for stats in found.stats)),
            float(sum(stats.num_prefill_tokens for stats in found.stats)),
            float(sum(stats.num_preemptions for stats in found.stats)),
            float(found.num_replaced),
            float(found.num_dropped),
            float(found.num_worker_failures),
            float(found.num_handed),
            sum(stats.decode.num_steps for stats in found.stats),
            sum(stats.decode.num_rows for stats in found.stats),
            sum(stats.decode.num_bytes for stats in found.stats),
            sum(stats.decode.seconds for stats in found.stats),
            sum(stats.num_out_of_memory for stats in found.stats),
        ]
    )
    (kv_used,) = ranks.max([max(stats.peak_kv_frac for stats in found.stats)])
    decode_steps, decode_rows, decode_bytes, decode_s = sums[7:11]
    bytes_per_s = decode_bytes / decode_s if decode_s else math.nan
    failed = {f"reward/{name}_failed_frac": frac for name, frac in found.failed_frac.items()}
    return failed | {
        "rollout/tokens_per_s": sums[0] / seconds,
        "rollout/prefill_tokens": sums[1],
        "rollout/preemptions": sums[2],
        "rollout/replaced_groups": sums[3],
        "rollout/dropped_groups": sums[4],
        "rollout/handed_samples": sums[6],
        "rollout/kv_used_frac": kv_used,
        "rollout/out_of_memory": sums[11],
        "rollout/rows_in_flight": decode_rows / decode_steps if decode_steps else math.nan,
        "rollout/decode_gb_per_s": bytes_per_s / 1e9,
        "rollout/bandwidth_frac": bytes_per_s / copy_bandwidth,
        "reward/worker_failures": sums[5],
    }


def step_warnings(metrics: dict[str, float], *, truncates_sampling: bool) -> list[str]:
    """Signs that a run is not learning, in words.

    Args:
        metrics: of the step.
        truncates_sampling: the sampler draws from another distribution than the trainer's.
    """
    rules = [
        ("truncated_frac", 0.999, "every completion was truncated: raise max_completion_tokens"),
        ("zero_spread_frac", 0.5, "more than half of the groups have no spread in any reward"),
        ("clip_frac_low", 0.3, "more than 30% of tokens are clipped below"),
        ("clip_frac_high", 0.3, "more than 30% of tokens are clipped above"),
        ("reward/worker_failures", 0, "reward workers failed; see the log for the reasons"),
    ]
    if not truncates_sampling:
        text = "sampler and trainer disagree on probabilities"
        rules.append(("sampler/prob_diff_mean", 0.01, text))
    found = [text for name, limit, text in rules if metrics.get(name, 0.0) > limit]
    if metrics["distinct_frac"] < 1:
        found.append("some completions of a group are identical")
    return found


def peak_memory_gb(device: torch.device) -> float:
    """Peak of this process so far: resident on a CPU, allocated on a GPU, in units of 1e9 bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss begins with what a large parent held at the fork
        peak = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        if peak is not None:
            return int(peak[1]) * 1024 / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def _mean_of_scored(values: np.ndarray) -> float:
    """Mean of what is there; NaN where nothing is."""
    scored = values[~np.isnan(values)]
    return float(scored.mean()) if scored.size else math.nan


def _zero_spread_frac(records: list[dict[str, Any]]) -> float:
    """Share of groups in which every advantage is 0."""
    groups: dict[int, bool] = {}
    for record in records:
        groups[record["group"]] = groups.get(record["group"], False) or record["advantage"] != 0
    return 1 - sum(groups.values()) / len(groups)


def _distinct_frac(records: list[dict[str, Any]]) -> float:
    distinct = {(record["group"], tuple(record["completion_ids"])) for record in records}
    return len(distinct) / len(records)
