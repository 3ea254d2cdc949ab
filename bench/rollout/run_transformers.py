"""transformers: `python -m bench.rollout.run_transformers WORKLOAD.json ANSWER.json MODE`.

Modes: "dynamic" (`generate` as it comes), "static" (`generate` with a static cache and a compiled
forward pass), "continuous" (`generate_batch`: its continuous batching). All attend by SDPA.
"""

import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    GenerationConfig,
    LogitsProcessorList,
    StoppingCriteriaList,
)

from bench.rollout.workload import WARM_UP_TOKENS, Answer, Workload

PAD = 0
BLOCK_TOKENS = 256
Found = tuple[list[list[int]], list[list[float]]]


def main(workload_file: str, answer_file: str, mode: str) -> None:
    workload = Workload.load(Path(workload_file))
    torch.set_num_threads(workload.threads)
    started = time.perf_counter()
    dtype = torch.float32 if workload.dtype == "fp32" else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(
        workload.model, dtype=dtype, attn_implementation="sdpa"
    )
    if mode == "static":
        model.forward = torch.compile(model.forward)
    rollout = _continuous if mode == "continuous" else _generate
    rollout(model, workload, WARM_UP_TOKENS, mode)
    ready = time.perf_counter()
    tokens, logprobs = rollout(model, workload, workload.num_tokens, mode)
    Answer(
        tokens=tokens,
        logprobs=logprobs,
        start_s=ready - started,
        seconds=time.perf_counter() - ready,
        version=transformers.__version__,
    ).save(Path(answer_file))


class _SampledLogprobs:
    """Log-probs of the sampled tokens; `generate` itself would keep the logits of every step.

    As a logits processor it sees the logits, as a stopping criterion the token drawn from them.
    """

    def __init__(self) -> None:
        self._logits_BV = torch.empty(0)
        self.columns: list[Tensor] = []

    def take_logits(self, _ids_BL: Tensor, logits_BV: Tensor) -> Tensor:
        self._logits_BV = logits_BV
        return logits_BV

    def take_tokens(self, ids_BL: Tensor, _scores: Any, **_: Any) -> Tensor:
        lse_B = self._logits_BV.float().logsumexp(-1)
        chosen_B = self._logits_BV.float().gather(1, ids_BL[:, -1:]).squeeze(1)
        self.columns.append(chosen_B - lse_B)
        return torch.zeros(len(ids_BL), dtype=torch.bool)


def _config(num_tokens: int, **settings: Any) -> GenerationConfig:
    return GenerationConfig(
        max_new_tokens=num_tokens,
        do_sample=True,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        eos_token_id=-1,  # never drawn
        pad_token_id=PAD,
        **settings,
    )


@torch.inference_mode()
def _generate(model: Any, workload: Workload, num_tokens: int, mode: str) -> Found:
    torch.manual_seed(workload.seed)
    width = workload.longest_prompt
    prompts = workload.sample_prompts
    ids_BL = torch.tensor([[PAD] * (width - len(prompt)) + prompt for prompt in prompts])
    mask_BL = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    sampled = _SampledLogprobs()
    settings = {"cache_implementation": "static"} if mode == "static" else {}
    out_BL = model.generate(
        ids_BL,
        attention_mask=mask_BL,
        generation_config=_config(num_tokens, **settings),
        logits_processor=LogitsProcessorList([sampled.take_logits]),
        stopping_criteria=StoppingCriteriaList([sampled.take_tokens]),
    )
    return out_BL[:, width:].tolist(), torch.stack(sampled.columns, 1).tolist()


def _continuous(model: Any, workload: Workload, num_tokens: int, _mode: str) -> Found:
    blocks_each = 1 + (workload.longest_prompt + num_tokens) // BLOCK_TOKENS
    outputs = model.generate_batch(
        workload.sample_prompts,
        generation_config=_config(num_tokens),
        continuous_batching_config=ContinuousBatchingConfig(
            page_size=BLOCK_TOKENS,
            # Left to itself it takes most of the memory, and the time to fill that with zeros.
            num_blocks=workload.batch * blocks_each,
            max_batch_tokens=workload.batch * workload.longest_prompt,
            return_logprobs=True,
            seed=workload.seed,
        ),
    )
    answers = list(outputs.values())
    return [list(a.generated_tokens) for a in answers], [list(a.logprobs) for a in answers]


if __name__ == "__main__":
    main(*sys.argv[1:])
