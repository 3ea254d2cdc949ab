"""This project's engine: `python -m bench.rollout.run_lwz WORKLOAD.json ANSWER.json`."""

import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch

from bench.rollout.workload import WARM_UP_TOKENS, Answer, Workload
from lwz_trainer.config.sections import RolloutConfig
from lwz_trainer.model.linear import resolve_dtype
from lwz_trainer.model.loading import load_pretrained
from lwz_trainer.rollout import Request, RolloutEngine, Sample
from lwz_trainer.rollout.kv_cache import kv_memory_limit


def main(workload_file: str, answer_file: str) -> None:
    workload = Workload.load(Path(workload_file))
    started = time.perf_counter()
    torch.set_num_threads(workload.threads)
    dtype = resolve_dtype("fp32" if workload.dtype == "fp32" else "bf16", "cpu")
    model, tokenizer = load_pretrained(workload.model, dtype=dtype, device="cpu")

    def rollout(num_tokens: int) -> list[Sample]:
        engine = RolloutEngine(
            model,
            tokenizer,
            eos_ids=(),
            config=RolloutConfig(
                max_completion_tokens=num_tokens,
                temperature=1.0,
                stop=(),
                max_num_seqs=workload.batch,
            ),
            memory_limit_bytes=kv_memory_limit(model.embed.device),
        )
        size = workload.group_size
        requests = [
            Request(group, prompt, list(range(group * size, (group + 1) * size)))
            for group, prompt in enumerate(workload.prompts)
        ]
        return engine.generate(requests, seed=workload.seed, step=0, policy_version=0)[0]

    rollout(WARM_UP_TOKENS)
    ready = time.perf_counter()
    samples = rollout(workload.num_tokens)
    Answer(
        tokens=[sample.completion_ids for sample in samples],
        logprobs=[sample.logprobs for sample in samples],
        start_s=ready - started,
        seconds=time.perf_counter() - ready,
        version=version("longwriter-zero"),
    ).save(Path(answer_file))


if __name__ == "__main__":
    main(*sys.argv[1:])
