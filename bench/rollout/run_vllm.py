"""vLLM: `python -m bench.rollout.run_vllm WORKLOAD.json ANSWER.json eager|compiled`.

Runs in an environment that has vLLM and need not have this project.
"""

import os
import sys
import time
from importlib.metadata import version
from pathlib import Path

from bench.rollout.workload import WARM_UP_TOKENS, Answer, Workload

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def main(workload_file: str, answer_file: str, mode: str) -> None:
    workload = Workload.load(Path(workload_file))
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "4",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    from vllm import LLM, SamplingParams

    started = time.perf_counter()
    llm = LLM(
        workload.model,
        dtype=DTYPES[workload.dtype],
        enforce_eager=mode == "eager",
        max_model_len=workload.longest_prompt + workload.num_tokens,
        max_num_seqs=workload.batch,
        logprobs_mode="processed_logprobs",
        seed=workload.seed,
    )

    def rollout(num_tokens: int) -> list[tuple[list[int], list[float]]]:
        params = SamplingParams(
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            max_tokens=num_tokens,
            ignore_eos=True,
            logprobs=0,
            detokenize=False,
        )
        prompts = [{"prompt_token_ids": prompt} for prompt in workload.sample_prompts]
        found = []
        for output in llm.generate(prompts, params, use_tqdm=False):
            (completion,) = output.outputs
            ids = list(completion.token_ids)
            rows = zip(ids, completion.logprobs, strict=True)
            found.append((ids, [row[token].logprob for token, row in rows]))
        return found

    rollout(WARM_UP_TOKENS)
    ready = time.perf_counter()
    found = rollout(workload.num_tokens)
    Answer(
        tokens=[ids for ids, _ in found],
        logprobs=[logprobs for _, logprobs in found],
        start_s=ready - started,
        seconds=time.perf_counter() - ready,
        version=version("vllm"),
    ).save(Path(answer_file))


if __name__ == "__main__":
    main(*sys.argv[1:])
