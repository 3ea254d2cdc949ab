"""vLLM in the trainer's own processes, with a copy of the weights that is pushed in place.

One engine a rank. On a GPU it sleeps between rollouts and gives up weights and KV cache; it wakes
by tag: memory of the weights, the push, memory of the cache. On a CPU it cannot sleep.
"""

import os
import time
from collections.abc import Callable
from math import nan
from pathlib import Path
from typing import Any

from lwz_trainer.config.sections import RolloutConfig
from lwz_trainer.errors import TrainingStopped, UserError
from lwz_trainer.model.decoder import Decoder
from lwz_trainer.rollout.decode_work import DecodeWork
from lwz_trainer.rollout.engine import EngineStats, OnBurst, Progress, RolloutInterrupted
from lwz_trainer.rollout.sequence import Request, Sample
from lwz_trainer.rollout.shared_work import SharedWork
from lwz_trainer.rollout.stopping import StopChecker
from lwz_trainer.rollout.vllm.probe import NUM_PROBE_TOKENS, check_probe, probe_fields
from lwz_trainer.rollout.vllm.record import (
    checkpoint_tensors,
    finished_sample,
    sample_seed,
    sampling_fields,
)

__all__ = ["VllmEngine"]


class VllmEngine:
    """Samples with `vllm.LLMEngine`.

    Args:
        model: whose weights are pushed.
        tokenizer: decodes for stop strings and texts.
        model_dir: directory that describes the model to vLLM; its weights are not read.
        eos_ids: tokens that end a completion.
        config: sampling and limits; `page_size` is vLLM's own business.
        memory_limit_bytes: for vLLM's KV cache.
        is_launched: several ranks were started by torchrun.
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: Any,
        model_dir: Path,
        *,
        eos_ids: tuple[int, ...],
        config: RolloutConfig,
        memory_limit_bytes: int,
        is_launched: bool,
    ) -> None:
        self._model = model
        self._model_dir = model_dir
        self._eos_ids = eos_ids
        self._config = config
        self._memory_limit_bytes = memory_limit_bytes
        self._is_launched = is_launched
        self._can_sleep = model.embed.device.type == "cuda"
        self._stops = StopChecker(
            tokenizer,
            stop=config.stop,
            eos_ids=eos_ids,
            max_tokens=config.max_completion_tokens,
        )
        self._engine: Any = None
        self._version: int | None = None
        self.expected_completion_tokens = float(config.max_completion_tokens)

    def plan_cache(self, *, longest_prompt: int, num_samples: int) -> None:
        """Starts vLLM, for sequences of at most this length; then it sleeps.

        Raises:
            UserError: vLLM is not installed, or the cache has no room for one sequence.
        """
        full_length = longest_prompt + self._config.max_completion_tokens
        cache_bytes = self._cache_bytes(full_length, num_samples)
        # The engine has to live in this process: it is given views of the trainer's tensors.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        # The trainer's threads run where they are told to.
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        try:
            from vllm import EngineArgs, LLMEngine
        except ImportError as error:
            raise UserError(
                f"rollout.engine vllm needs vLLM, which cannot be imported ({error}): install it "
                "(docs/vllm.md), or use rollout.engine own"
            ) from error
        arguments = EngineArgs(
            model=str(self._model_dir),
            dtype=str(self._model.embed.dtype).removeprefix("torch."),
            load_format="dummy",  # the first rollout pushes the weights
            generation_config="vllm",  # its own defaults, not the model's
            logprobs_mode="processed_logprobs",  # of the distribution that was sampled from
            max_model_len=full_length,
            max_num_seqs=self._config.max_num_seqs,
            max_num_batched_tokens=max(self._config.prefill_tokens, self._config.max_num_seqs),
            kv_cache_memory_bytes=cache_bytes,
            enforce_eager=self._config.vllm_eager,
            enable_sleep_mode=self._can_sleep,
            distributed_executor_backend="external_launcher" if self._is_launched else "uni",
            disable_log_stats=True,
        )
        self._engine = LLMEngine.from_engine_args(arguments)
        self._sleep()

    def generate(
        self,
        requests: list[Request] | SharedWork,
        *,
        seed: int,
        step: int,
        policy_version: int,
        on_progress: Progress | None = None,
        should_stop: Callable[[], bool] | None = None,
        on_burst: OnBurst | None = None,
    ) -> tuple[list[Sample], EngineStats]:
        """As `SamplingEngine.generate`; a sample's seed is keyed by (seed, step, sample)."""
        assert not isinstance(requests, SharedWork), "the configuration refuses it"
        started = time.perf_counter()
        if self._engine is None:
            longest = max(len(request.prompt_ids) for request in requests)
            num_samples = sum(len(request.samples) for request in requests)
            self.plan_cache(longest_prompt=longest, num_samples=num_samples)
        self._wake(requests[0].prompt_ids, policy_version)
        owners: dict[str, tuple[Request, int]] = {}
        for request in requests:
            for sample in request.samples:
                owners[str(sample)] = (request, sample)
                self._add(str(sample), request.prompt_ids, seed=sample_seed(seed, step, sample))
        samples: list[Sample] = []
        num_steps = num_tokens = num_prefill_tokens = 0
        try:
            while self._engine.has_unfinished_requests():
                if should_stop is not None and should_stop():
                    raise RolloutInterrupted
                finished = []
                for output in self._engine.step():
                    request, sample = owners.pop(output.request_id)
                    ids, logprobs = self._completion(output, policy_version)
                    finished.append(
                        finished_sample(
                            request,
                            sample,
                            ids,
                            logprobs,
                            self._stops,
                            policy_version=policy_version,
                        )
                    )
                    num_tokens += len(ids)
                    num_prefill_tokens += len(request.prompt_ids) - (output.num_cached_tokens or 0)
                num_steps += 1
                samples += finished
                if on_progress is not None:
                    on_progress(len(samples), num_tokens)
                if on_burst is not None and not on_burst(finished):
                    break
        finally:
            self._engine.abort_request(list(owners))
            self._sleep()
        return sorted(samples, key=lambda sample: sample.sample), EngineStats(
            num_tokens=num_tokens,
            num_prefill_tokens=num_prefill_tokens,
            num_preemptions=nan,
            peak_kv_frac=nan,
            seconds=time.perf_counter() - started,
            decode=DecodeWork(nan, nan, nan, nan),
        )

    def _wake(self, prompt_ids: list[int], policy_version: int) -> None:
        """Awake, with the weights of this version and no page of older ones."""
        if self._can_sleep:
            self._engine.wake_up(tags=["weights"])
        elif self._version == policy_version:
            return
        self._engine.collective_rpc(
            "reload_weights", kwargs={"weights_iterator": checkpoint_tensors(self._model)}
        )
        if self._can_sleep:
            self._engine.wake_up(tags=["kv_cache"])
        if not self._engine.reset_prefix_cache():
            raise TrainingStopped("vLLM did not drop the pages of the old weights")
        self._engine.set_weight_version(str(policy_version))
        self._probe(prompt_ids, policy_version)
        self._version = policy_version

    def _probe(self, prompt_ids: list[int], policy_version: int) -> None:
        prompt_ids = prompt_ids[:NUM_PROBE_TOKENS]
        self._add("probe", prompt_ids, **probe_fields())
        outputs: list[Any] = []
        while not outputs:
            outputs = self._engine.step()
        check_probe(self._model, prompt_ids, *self._completion(outputs[0], policy_version))

    def _add(self, name: str, prompt_ids: list[int], **fields: Any) -> None:
        """Queues one completion; its output carries the name."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        merged = sampling_fields(self._config, self._eos_ids) | fields
        params = SamplingParams(**merged, output_kind=RequestOutputKind.FINAL_ONLY)
        (prompt,) = self._engine.renderer.render_cmpl([{"prompt_token_ids": prompt_ids}])
        self._engine.add_request(name, prompt, params)

    def _completion(self, output: Any, policy_version: int) -> tuple[list[int], list[float]]:
        """Tokens and their log-probs, all of them from the weights of this version."""
        (completion,) = output.outputs
        versions = {span.version for span in completion.weight_versions or ()}
        if versions != {str(policy_version)}:
            raise TrainingStopped(
                f"vLLM sampled from weights of versions {sorted(versions)}, expected "
                f"{policy_version}"
            )
        ids = list(completion.token_ids)
        logprobs = [
            entry[token].logprob for token, entry in zip(ids, completion.logprobs, strict=True)
        ]
        return ids, logprobs

    def _sleep(self) -> None:
        if self._can_sleep:
            self._engine.sleep(level=2)

    def _cache_bytes(self, full_length: int, num_samples: int) -> int:
        model = self._model.config
        size = self._model.embed.element_size()
        token_bytes = 2 * model.layers * model.kv_heads * model.head_dim * size
        num_seqs = min(self._config.max_num_seqs, num_samples)
        wanted = self._config.kv_cache_tokens * token_bytes or min(
            # One page of vLLM's (at most 128 tokens) more than a sequence fills, and one spare.
            (num_seqs + 1) * (full_length + 128) * token_bytes,
            self._memory_limit_bytes,
        )
        if wanted < (full_length + 128) * token_bytes:
            raise UserError(
                f"vLLM's KV cache has room for {wanted // token_bytes} tokens, one sequence may "
                f"need {full_length}: lower rollout.max_completion_tokens or raise "
                "rollout.kv_cache_tokens"
            )
        return wanted
