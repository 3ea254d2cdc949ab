"""Samples completions: admit, prefill, decode, sample, collect, until every group is complete.

The engine runs the trainer's own module on the trainer's own parameters. Which pages hold what is
known only inside `generate`, so no page can outlast an update of the weights; the memory of the
cache may stay at its addresses (`hold_cache`), and then recorded decode steps stay valid too.

Out of memory makes the batch smaller: a prefill is split, half of the running sequences is
preempted. What is sampled does not change, because a token depends on its key and not on its batch.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from lwz_kernels.attention import SegmentTable
from lwz_trainer.config.sections import RolloutConfig
from lwz_trainer.errors import TrainingStopped
from lwz_trainer.model.decoder import Decoder
from lwz_trainer.model.linear import wide_logits
from lwz_trainer.out_of_memory import is_out_of_memory, release_cached_memory
from lwz_trainer.rollout.attend import PrefillAttend
from lwz_trainer.rollout.burst import Burst, CudaGraphs, DecodeRows
from lwz_trainer.rollout.decode_work import DecodeWork, weight_bytes_of_a_step
from lwz_trainer.rollout.kv_cache import CachePlan, PageAllocator, PagedKVCache, plan_pages
from lwz_trainer.rollout.sampling import keyed_uniforms, sample_keys, sample_tokens
from lwz_trainer.rollout.scheduler import PromptEntry, Scheduler
from lwz_trainer.rollout.sequence import Request, Sample, Sequence
from lwz_trainer.rollout.shared_work import SharedWork
from lwz_trainer.rollout.stopping import StopChecker

__all__ = ["EngineStats", "OnBurst", "Progress", "RolloutEngine", "RolloutInterrupted"]

Progress = Callable[[int, int], None]
OnBurst = Callable[[list[Sample]], bool]
OnTokens = Callable[[list[Sequence]], None]
Result = TypeVar("Result")

# On a CPU the host is the device, and a token past a stop string costs a whole decode row.
CUDA_BURST_STEPS = 8

_logger = logging.getLogger(__name__)


class RolloutInterrupted(Exception):
    """The caller's `should_stop` said so; nothing of this rollout is kept."""


@dataclass(frozen=True)
class EngineStats:
    """Of one `generate`; NaN for what an engine does not say."""

    num_tokens: int
    num_prefill_tokens: int
    num_preemptions: float
    peak_kv_frac: float
    seconds: float
    decode: DecodeWork
    num_out_of_memory: int = 0
    """Forward passes that did not fit and were repeated in smaller parts."""


@dataclass(eq=False)
class _Phase:
    """State of one `generate`."""

    scheduler: Scheduler
    cache: PagedKVCache
    page_table: Tensor
    num_written: list[int]
    """Pages that stand in each row of the page table."""
    burst: Burst
    prefill_tokens: int
    decode: DecodeWork = field(default_factory=DecodeWork)
    num_prefill_tokens: int = 0
    num_tokens: int = 0
    peak_pages: int = 0
    num_out_of_memory: int = 0


@dataclass(eq=False)
class _HeldCache:
    """A cache at fixed addresses, and the steps that were recorded on it."""

    plan: CachePlan
    cache: PagedKVCache
    require: Callable[[], None]
    burst: Burst
    weight_addresses: list[int]
    """Of the model when the burst was made."""


class RolloutEngine:
    """Continuous batching over a paged KV cache."""

    def __init__(
        self,
        model: Decoder,
        tokenizer: "object",
        *,
        eos_ids: tuple[int, ...],
        config: RolloutConfig,
        memory_limit_bytes: int,
    ) -> None:
        self._model = model
        self._config = config
        self._memory_limit_bytes = memory_limit_bytes
        self._eos_ids = eos_ids
        self._uses_graphs = model.head_weight.is_cuda and config.cuda_graphs
        default_steps = CUDA_BURST_STEPS if model.head_weight.is_cuda else 1
        self._burst_steps = config.burst_steps or default_steps
        self._weight_bytes = weight_bytes_of_a_step(model)
        self._stops = StopChecker(
            tokenizer,  # type: ignore[arg-type]
            stop=config.stop,
            eos_ids=eos_ids,
            max_tokens=config.max_completion_tokens,
        )
        self.expected_completion_tokens = float(config.max_completion_tokens)
        """Running estimate that admission goes by; carried from rollout to rollout."""
        self._held: _HeldCache | None = None

    def plan_cache(
        self, *, longest_prompt: int, num_samples: int, memory_limit_bytes: int | None = None
    ) -> CachePlan:
        """Sizes for these samples within a limit, by default the engine's own.

        Raises:
            UserError: the memory limit or the config leaves no room for one sequence.
        """
        limit = self._memory_limit_bytes if memory_limit_bytes is None else memory_limit_bytes
        return plan_pages(
            self._config,
            self._model.config,
            self._model.head_weight.dtype,
            longest_prompt=longest_prompt,
            num_samples=num_samples,
            memory_limit_bytes=limit,
        )

    def hold_cache(self, plan: CachePlan, memory: Tensor, require: Callable[[], None]) -> None:
        """From now on every rollout has its cache in `memory`.

        Args:
            plan: for the longest prompt and the most samples that will come.
            memory: of the plan's shape; its content is nobody's between two rollouts.
            require: called before a rollout; raises unless the memory is there.
        """
        cache = PagedKVCache(memory)
        burst, addresses = self._make_burst(plan, cache), self._weight_addresses()
        self._held = _HeldCache(plan, cache, require, burst, addresses)

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
        on_tokens: OnTokens | None = None,
    ) -> tuple[list[Sample], EngineStats]:
        """All samples of all requests, or those claimed here, in order of their sample numbers.

        Args:
            requests: the groups, or what is to be shared with other ranks.
            seed, step: with sample number and position the key of every token.
            policy_version: kept with every sample.
            on_progress: called with (samples done, tokens) after every burst.
            should_stop: asked before every burst; True raises RolloutInterrupted.
            on_burst: called after every burst, outside inference mode, with the samples that ended
                in it. It may compute with the weights, but not change them. False ends the rollout:
                what is not finished is dropped.
            on_tokens: called after every burst with the sequences that are not finished.
        """
        started = time.perf_counter()
        phase = self._begin(requests)
        scheduler = phase.scheduler
        samples: list[Sample] = []
        while scheduler.goes_on():
            if should_stop is not None and should_stop():
                raise RolloutInterrupted
            finished = self._burst(phase, seed=seed, step=step, policy_version=policy_version)
            samples += finished
            if on_progress is not None:
                on_progress(len(samples), phase.num_tokens)
            if on_tokens is not None:
                on_tokens(scheduler.running)
            if on_burst is not None and not on_burst(finished):
                scheduler.abandon()
        allocator = scheduler.allocator
        assert allocator.num_free == allocator.num_pages, "a page was not released"
        self.expected_completion_tokens = scheduler.expected_completion_tokens
        return sorted(samples, key=lambda sample: sample.sample), EngineStats(
            num_tokens=phase.num_tokens,
            decode=phase.decode,
            num_prefill_tokens=phase.num_prefill_tokens,
            num_preemptions=scheduler.num_preemptions,
            peak_kv_frac=phase.peak_pages / allocator.num_pages,
            seconds=time.perf_counter() - started,
            num_out_of_memory=phase.num_out_of_memory,
        )

    @torch.inference_mode()
    def _burst(self, phase: _Phase, *, seed: int, step: int, policy_version: int) -> list[Sample]:
        """Admits and prefills what fits, then writes the next tokens of every sequence."""
        finished: list[Sample] = []
        for advance in (self._prefill, self._decode):
            advance(phase, seed=seed, step=step)
            finished += self._collect(phase.scheduler, policy_version)
        return finished

    @torch.inference_mode()
    def _begin(self, requests: list[Request] | SharedWork) -> _Phase:
        config = self._config
        own = requests.own if isinstance(requests, SharedWork) else requests
        known = requests.all if isinstance(requests, SharedWork) else requests
        longest_prompt = max(len(request.prompt_ids) for request in known)
        if self._held is None:
            num_samples = sum(len(request.samples) for request in own)
            plan = self.plan_cache(longest_prompt=longest_prompt, num_samples=num_samples)
            device = self._model.head_weight.device
            cache = PagedKVCache(torch.empty(plan.shape, dtype=plan.dtype, device=device))
            burst = self._make_burst(plan, cache)
        else:
            plan, cache, burst = self._held_parts(self._held, longest_prompt)
        return _Phase(
            scheduler=Scheduler(
                requests,
                allocator=PageAllocator(plan.num_pages),
                page_size=config.page_size,
                max_num_seqs=plan.max_num_seqs,
                max_completion_tokens=config.max_completion_tokens,
                expected_completion_tokens=self.expected_completion_tokens,
            ),
            cache=cache,
            page_table=torch.zeros(plan.max_num_seqs, plan.pages_each, dtype=torch.int32),
            num_written=[0] * plan.max_num_seqs,
            burst=burst,
            prefill_tokens=config.prefill_tokens,
        )

    def _held_parts(
        self, held: _HeldCache, longest_prompt: int
    ) -> tuple[CachePlan, PagedKVCache, Burst]:
        """What stays from rollout to rollout; steps are recorded anew if weights have moved."""
        held.require()
        longest = longest_prompt + self._config.max_completion_tokens
        assert longest <= held.plan.max_tokens_each, f"the cache is not for {longest} tokens"
        if (addresses := self._weight_addresses()) != held.weight_addresses:
            held.burst = self._make_burst(held.plan, held.cache)
            held.weight_addresses = addresses
        return held.plan, held.cache, held.burst

    def _make_burst(self, plan: CachePlan, cache: PagedKVCache) -> Burst:
        return Burst(
            self._model,
            cache,
            self._config,
            eos_ids=self._eos_ids,
            max_rows=plan.max_num_seqs,
            max_pages=plan.pages_each,
            max_steps=self._burst_steps,
            capture=CudaGraphs() if self._uses_graphs else None,
        )

    def _weight_addresses(self) -> list[int]:
        return [parameter.data_ptr() for parameter in self._model.parameters()]

    def _prefill(self, phase: _Phase, *, seed: int, step: int) -> None:
        """Admits what fits, fills its pages, and draws the first tokens of fresh sequences."""
        prompts, fresh, resumed = phase.scheduler.admit()
        self._fill_pages(phase, prompts, resumed)
        self._copy_tail_pages(phase, fresh)
        phase.scheduler.release_prompts(fresh)
        for sequence in [*resumed, *(sequence for sequence, _ in fresh)]:
            self._write_page_row(phase, sequence)
        hidden = [entry.last_hidden for _, entry in fresh if entry.last_hidden is not None]
        assert len(hidden) == len(fresh), "a group was admitted before its prompt was computed"
        if hidden:
            sequences = [sequence for sequence, _ in fresh]
            self._sample(phase, sequences, torch.stack(hidden), seed=seed, step=step)

    def _fill_pages(
        self, phase: _Phase, prompts: list[PromptEntry], resumed: list[Sequence]
    ) -> None:
        """Packed forward passes of at most `prefill_tokens`; prompts keep their last hidden."""
        jobs: list[tuple[list[int], list[int], PromptEntry | None]] = [
            *((entry.prompt_ids, entry.pages, entry) for entry in prompts),
            *((sequence.cached_ids(), sequence.pages, None) for sequence in resumed),
        ]
        while jobs:
            pack = [jobs.pop(0)]
            total = len(pack[0][0])
            while jobs and total + len(jobs[0][0]) <= phase.prefill_tokens:
                pack.append(jobs.pop(0))
                total += len(pack[-1][0])
            found = self._unless_out_of_memory(
                phase, partial(self._forward_pack, phase, [(ids, pages) for ids, pages, _ in pack])
            )
            if found is None:
                _refuse_smaller_than_one(len(pack), f"the prefill of {total} tokens")
                jobs, phase.prefill_tokens = pack + jobs, total // 2
                continue
            hidden_TD, ends = found
            phase.num_prefill_tokens += total
            for (_, _, entry), end in zip(pack, ends, strict=True):
                if entry is not None:
                    entry.last_hidden = hidden_TD[end - 1].clone()

    def _forward_pack(
        self, phase: _Phase, pack: list[tuple[list[int], list[int]]]
    ) -> tuple[Tensor, list[int]]:
        device, page_size = self._model.head_weight.device, self._config.page_size
        cu_seqlens = [0]
        ids: list[int] = []
        slots: list[Tensor] = []
        for token_ids, pages in pack:
            ids += token_ids
            cu_seqlens.append(len(ids))
            offsets = torch.arange(len(token_ids))
            slots.append(
                torch.tensor(pages)[offsets // page_size] * page_size + offsets % page_size
            )
        positions = torch.cat([torch.arange(len(token_ids)) for token_ids, _ in pack])
        attend = PrefillAttend(
            phase.cache, SegmentTable.from_cu_seqlens(cu_seqlens), torch.cat(slots).to(device)
        )
        hidden_TD = self._model(torch.tensor(ids, device=device), positions.to(device), attend)
        return hidden_TD, cu_seqlens[1:]

    def _copy_tail_pages(self, phase: _Phase, fresh: list[tuple[Sequence, PromptEntry]]) -> None:
        """The partly filled last page of a prompt is the one page that members cannot share."""
        sources, targets = [], []
        for sequence, entry in fresh:
            full = sequence.num_cached // self._config.page_size
            sources += entry.pages[full:]
            targets += sequence.pages[full:]
        phase.cache.copy_pages(sources, targets)

    def _decode(self, phase: _Phase, *, seed: int, step: int) -> None:
        """A burst of forward passes over the last token of every running sequence."""
        scheduler = phase.scheduler
        num_steps = scheduler.make_room(self._burst_steps)
        while running := list(scheduler.running):
            used = scheduler.allocator.num_pages - scheduler.allocator.num_free
            phase.peak_pages = max(phase.peak_pages, used)
            context_lens = [sequence.num_cached for sequence in running]
            started = time.perf_counter()
            drawn = self._unless_out_of_memory(
                phase,
                partial(
                    phase.burst.run,
                    self._make_rows(phase, running, num_steps, seed=seed, step=step),
                    num_steps,
                ),
            )
            if drawn is not None:
                break
            _refuse_smaller_than_one(len(running), "decoding one sequence")
            scheduler.preempt_youngest(len(running) // 2)
        else:
            return
        phase.decode.add(
            num_steps,
            context_lens,
            weight_bytes=self._weight_bytes,
            token_bytes=phase.cache.token_bytes,
            seconds=time.perf_counter() - started,
        )
        for tokens, logprobs in zip(*drawn, strict=True):
            for sequence, token, logprob in zip(running, tokens, logprobs, strict=True):
                if sequence.end is None:  # else the burst went on past a stop string
                    sequence.num_cached += 1
                    self._append(phase, sequence, token, logprob)

    def _make_rows(
        self, phase: _Phase, running: list[Sequence], num_steps: int, *, seed: int, step: int
    ) -> DecodeRows:
        for sequence in running:
            if len(sequence.pages) > phase.num_written[sequence.row]:
                self._write_page_row(phase, sequence)
        positions_B = torch.tensor([sequence.num_cached for sequence in running])
        samples_B = torch.tensor([sequence.sample for sequence in running])
        num_columns = (int(positions_B.max()) + num_steps - 1) // self._config.page_size + 1
        page_table_BP = phase.page_table[[sequence.row for sequence in running]]
        return DecodeRows(
            tokens_B=torch.tensor([sequence.tokens[-1] for sequence in running]),
            positions_B=positions_B,
            num_tokens_B=torch.tensor([len(sequence.tokens) for sequence in running]),
            keys_B=sample_keys(seed, step, samples_B),
            active_B=torch.ones(len(running), dtype=torch.bool),
            page_table_BP=page_table_BP[:, :num_columns].contiguous(),
        )

    def _unless_out_of_memory(self, phase: _Phase, run: Callable[[], Result]) -> Result | None:
        """The result, or None where memory did not suffice."""
        try:
            return run()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        if phase.num_out_of_memory == 0:
            _logger.warning(
                "out of memory in the rollout: it goes on with smaller batches; lower "
                "rollout.max_num_seqs or rollout.kv_cache_tokens"
            )
        phase.num_out_of_memory += 1
        release_cached_memory(self._model.head_weight.device)
        return None

    def _write_page_row(self, phase: _Phase, sequence: Sequence) -> None:
        pages = torch.tensor(sequence.pages, dtype=torch.int32)
        phase.page_table[sequence.row, : len(pages)] = pages
        phase.num_written[sequence.row] = len(pages)

    def _sample(
        self, phase: _Phase, sequences: list[Sequence], hidden_BD: Tensor, *, seed: int, step: int
    ) -> None:
        drawn = self._unless_out_of_memory(
            phase, partial(self._draw, sequences, hidden_BD, seed=seed, step=step)
        )
        if drawn is None:
            _refuse_smaller_than_one(len(sequences), "sampling one token")
            half = len(sequences) // 2
            self._sample(phase, sequences[:half], hidden_BD[:half], seed=seed, step=step)
            self._sample(phase, sequences[half:], hidden_BD[half:], seed=seed, step=step)
            return
        tokens_B, logprobs_B = drawn
        for sequence, token, logprob in zip(
            sequences, tokens_B.tolist(), logprobs_B.tolist(), strict=True
        ):
            self._append(phase, sequence, token, logprob)

    def _append(self, phase: _Phase, sequence: Sequence, token: int, logprob: float) -> None:
        sequence.tokens.append(token)
        sequence.logprobs.append(logprob)
        sequence.end = self._stops.check(sequence.tokens)
        phase.num_tokens += 1

    def _draw(
        self, sequences: list[Sequence], hidden_BD: Tensor, *, seed: int, step: int
    ) -> tuple[Tensor, Tensor]:
        """The next token of each sequence and its log-prob, each [B]."""
        config, device = self._config, hidden_BD.device
        logits_BV = wide_logits(hidden_BD, self._model.head_weight)
        samples_B = torch.tensor([sequence.sample for sequence in sequences], device=device)
        positions_B = torch.tensor([len(sequence.tokens) for sequence in sequences], device=device)
        return sample_tokens(
            logits_BV,
            keyed_uniforms(seed, step, samples_B, positions_B),
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
        )

    def _collect(self, scheduler: Scheduler, policy_version: int) -> list[Sample]:
        """Removes the finished sequences from the running ones."""
        finished = []
        for sequence in list(scheduler.running):
            if sequence.end is None:
                continue
            reason, stop_string = sequence.end
            scheduler.finish(sequence)
            finished.append(
                Sample(
                    group=sequence.group,
                    sample=sequence.sample,
                    prompt_ids=sequence.prompt_ids,
                    completion_ids=sequence.tokens,
                    logprobs=sequence.logprobs,
                    text=self._stops.text(sequence.tokens, reason, stop_string),
                    finish_reason=reason,
                    stop_string=stop_string,
                    policy_version=policy_version,
                )
            )
        return finished


def _refuse_smaller_than_one(count: int, what: str) -> None:
    """Raises where a batch that did not fit cannot become smaller."""
    if count == 1:
        raise TrainingStopped(
            f"out of memory in {what}: lower rollout.kv_cache_tokens or "
            "rollout.max_completion_tokens"
        )
