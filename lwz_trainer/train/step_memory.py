"""Memory of the two halves of a step: what the rollout and what the update alone need takes turns.

`rollout.memory phase`: KV cache, gradients and, where it waits on the host, optimizer state lie in
regions of one phase memory. A switch moves pages from the one to the other, creates what is missing
and gives what is left to torch's allocator; no tensor changes its address. The update's regions are
filled before the first rollout, whose cache takes its size from what is free then. In an
interleaved step the gradients are there in both phases.

`rollout.memory plain`: the engine allocates and frees its cache in each rollout, and the gradients'
storage is given to torch's allocator meanwhile.
"""

import logging
import time
from functools import partial
from typing import Any

import torch

from lwz_kernels.memory import (
    LedgerEntry,
    PhaseMemory,
    PhaseMemoryError,
    Region,
    unavailable_reason,
)
from lwz_trainer.config.sections import RolloutConfig
from lwz_trainer.config.train import TrainConfig
from lwz_trainer.errors import TrainingStopped, UserError
from lwz_trainer.model.decoder import Decoder
from lwz_trainer.out_of_memory import release_cached_memory
from lwz_trainer.parallel import Ranks, local_world_size
from lwz_trainer.rollout import RolloutEngine
from lwz_trainer.rollout.interface import SamplingEngine
from lwz_trainer.rollout.kv_cache import CachePlan, free_memory
from lwz_trainer.train.forecast import forecast_memory, gpu_memory_bytes
from lwz_trainer.train.metrics import peak_memory_gb
from lwz_trainer.update.buffers import Buffers, ParkedBuffers, RegionBuffers, TorchBuffers
from lwz_trainer.update.optimizer import moments_dtype

__all__ = ["StepMemory"]

ROLLOUT, UPDATE = "rollout", "update"
# The rest is for what a decode step and a prefill compute with, and for recorded steps.
KV_FRAC = 0.9

_logger = logging.getLogger(__name__)


class StepMemory:
    """Made before the optimizer, which takes `grads` and `state`; entered by the training loop.

    Args:
        config: of the run.
        model: the policy.
        engine: of the run; refuses what cannot be decoded.
        ranks: this one and its peers.
        longest_prompt: in tokens, of all steps.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: Decoder,
        engine: SamplingEngine,
        ranks: Ranks,
        *,
        longest_prompt: int,
    ) -> None:
        device = ranks.device
        self._device = device
        self.grads: Buffers = TorchBuffers(device)
        """For the gradients."""
        self.state: Buffers | None = None
        """For the optimizer's state; None: wherever the optimizer likes."""
        self._turns: _Turns | None = None
        self._parked: ParkedBuffers | None = None
        self._switch_s = {"memory/to_rollout_s": 0.0, "memory/to_update_s": 0.0}
        state: Buffers = TorchBuffers(device)
        is_parked = _offloads_optimizer(config, model, ranks, longest_prompt)
        uses_phases, why_not = _uses_phases(config.rollout, device)
        if uses_phases:
            assert isinstance(engine, RolloutEngine), "the configuration allows no other engine"
            count = sum(parameter.numel() for parameter in model.parameters())
            state_size = 2 + 2 * moments_dtype(config.optim).itemsize  # lower halves, two moments
            self._turns = _Turns(
                engine,
                device,
                longest_prompt=longest_prompt,
                num_samples=config.num_samples_per_rank(ranks.world_size),
                update_bytes=(4 + state_size * is_parked) * (count + ranks.world_size),
                is_interleaved=config.update.is_interleaved,
            )
            self.grads = self._turns.grads
            self.state = state  # made at once: the cache gets what is left
            if is_parked:
                state = self._turns.state
        else:
            engine.plan_cache(
                longest_prompt=longest_prompt, num_samples=config.rollout.max_num_seqs
            )
        if is_parked:
            self.state = self._parked = ParkedBuffers(state, device)
        kind = "KV cache and update take turns in the same pages" if uses_phases else "plain"
        where = "on the host during the rollout" if is_parked else "on the device"
        self.description = f"memory: {kind}{why_not}; optimizer state {where}"

    def enter_rollout(self) -> None:
        """The weights are whole; the gradients hold nothing unless the step is interleaved.

        Raises:
            TrainingStopped: the pages cannot be had; the update still has its own then.
        """
        began_s = time.perf_counter()
        if self._parked is not None:
            self._parked.release()
        if self._turns is not None:
            self._turns.enter_rollout()
        self._switch_s["memory/to_rollout_s"] = time.perf_counter() - began_s

    def enter_update(self) -> None:
        """The rollout is over, or was interrupted.

        Raises:
            TrainingStopped: as `enter_rollout`; the rollout still has its pages.
        """
        began_s = time.perf_counter()
        if self._turns is not None:
            self._turns.enter_update()
        if self._parked is not None:
            self._parked.restore()
        self._switch_s["memory/to_update_s"] = time.perf_counter() - began_s

    def end_update(self) -> None:
        """The optimizer's state stays as it is until the next update: its way out may begin."""
        if self._parked is not None:
            self._parked.save()

    def peak_gb(self) -> float:
        """Peak of this process so far: resident on a CPU; on a GPU allocated, regions included."""
        if self._turns is None or self._device.type == "cpu":
            return peak_memory_gb(self._device)
        return self._turns.note_peak() / 1e9

    def metrics(self, ranks: Ranks) -> dict[str, Any]:
        """What was held when each phase last began, and how long that took; a collective.

        The largest rank's numbers, and the smallest rank's `driver_free`; beside them those of
        each rank where there are several.
        """
        mine = dict(self._switch_s)
        for entry in self._turns.memory.ledger.values() if self._turns else ():
            mine |= _ledger_metrics(entry)
        everyone = ranks.gather(mine)
        merged: dict[str, Any] = {
            name: (min if "driver_free" in name else max)(rank[name] for rank in everyone)
            for name in mine
        }
        if len(everyone) > 1:
            merged["memory/ranks"] = everyone
        return merged


class _Turns:
    """The phase memory of one rank, and who is mapped when."""

    def __init__(
        self,
        engine: RolloutEngine,
        device: torch.device,
        *,
        longest_prompt: int,
        num_samples: int,
        update_bytes: int,
        is_interleaved: bool,
    ) -> None:
        self._engine = engine
        self._device = device
        self._longest_prompt = longest_prompt
        self._num_samples = num_samples
        wanted = self._plan(int(KV_FRAC * free_memory(device))).num_bytes + update_bytes
        # Each of the three regions ends within a page, of a 2,048th or of the device's own size.
        self.memory = PhaseMemory(device, wanted + wanted // 512 + (8 << 20))
        self._kv = self._reserve("kv_cache", ROLLOUT)
        gradients, state = self._reserve("gradients", UPDATE), self._reserve("optimizer", UPDATE)
        self.grads = RegionBuffers(gradients, UPDATE)
        self.state = RegionBuffers(state, UPDATE)
        self._in_update = (gradients, state)
        self._in_both = (gradients,) if is_interleaved else ()
        self._kv_bytes = 0
        self._peak_bytes = 0

    def enter_rollout(self) -> None:
        self.note_peak()
        try:
            if self._kv_bytes == 0:
                self._begin()
            else:
                self._switch_or_shrink()
        except (MemoryError, PhaseMemoryError) as error:
            raise _stopped(ROLLOUT, error) from error

    def enter_update(self) -> None:
        if self.memory.phase in (None, UPDATE):  # before the first rollout nothing is lent
            return
        self.note_peak()
        try:
            self.memory.switch(UPDATE)
        except (MemoryError, PhaseMemoryError) as error:
            raise _stopped(UPDATE, error) from error

    def note_peak(self) -> int:
        """Most bytes on a GPU so far: torch's peak since the last call beside the present pages."""
        if self._device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self._device)
            peak += self.memory.stats().physical_bytes
            self._peak_bytes = max(self._peak_bytes, peak)
            torch.cuda.reset_peak_memory_stats(self._device)
        return self._peak_bytes

    def _begin(self) -> None:
        """The first rollout: all that the run holds is there, and decides the cache's size."""
        # The update's regions are complete: their sizes are what is mapped by now.
        sizes = {region.name: region.mapped_bytes for region in self._in_update}
        self.memory.define_phase(UPDATE, sizes, keep_free_bytes=0)
        self._hold(self._plan(self._limit_bytes()))

    def _switch_or_shrink(self) -> None:
        """A later rollout. What others have taken meanwhile is missing from the cache then."""
        try:
            self.memory.switch(ROLLOUT)
        except MemoryError:
            release_cached_memory(self._device)
            plan = self._plan(self._limit_bytes())
            if plan.num_bytes >= self._kv_bytes:
                raise
            _logger.warning(
                "%.2f GB of KV cache cannot be mapped any more: from now on it has %.2f GB; lower "
                "rollout.kv_cache_tokens or rollout.max_num_seqs",
                self._kv_bytes / 1e9,
                plan.num_bytes / 1e9,
            )
            self._hold(plan)

    def _hold(self, plan: CachePlan) -> None:
        """Enters the rollout with a cache of this size; recorded steps on another one are lost."""
        sizes = {region.name: region.mapped_bytes for region in self._in_both}
        sizes[self._kv.name] = plan.num_bytes
        self.memory.define_phase(ROLLOUT, sizes, keep_free_bytes=0)
        self.memory.switch(ROLLOUT)
        self._kv_bytes = plan.num_bytes
        self._engine.hold_cache(
            plan,
            self._kv.tensor(plan.shape, plan.dtype),
            partial(self.memory.require_phase, ROLLOUT),
        )

    def _plan(self, memory_limit_bytes: int) -> CachePlan:
        return self._engine.plan_cache(
            longest_prompt=self._longest_prompt,
            num_samples=self._num_samples,
            memory_limit_bytes=memory_limit_bytes,
        )

    def _limit_bytes(self) -> int:
        """What the cache may have: of what is free, and of the pages that are its turn to get."""
        kept = sum(region.mapped_bytes for region in self._in_both)
        lent = sum(region.mapped_bytes for region in self._in_update) - kept
        release_cached_memory(self._device)
        free = free_memory(self._device) + lent
        return min(int(KV_FRAC * free), self.memory.capacity_bytes - kept)

    def _reserve(self, name: str, tag: str) -> Region:
        """Addresses for whatever it will hold; they cost nothing."""
        return self.memory.reserve(name, self.memory.capacity_bytes, tag=tag, keeps_views=True)


def _uses_phases(config: RolloutConfig, device: torch.device) -> tuple[bool, str]:
    """Whether phase memory is used, and for the announcement why not."""
    is_wanted = config.memory == "phase"
    if config.memory == "auto":
        is_wanted = device.type == "cuda" and config.engine == "own"
    reason = unavailable_reason(device) if is_wanted else ""
    if reason and config.memory == "phase":
        raise UserError(
            f"rollout.memory phase does not work on this machine ({reason}): use rollout.memory "
            "plain"
        )
    return is_wanted and not reason, f" ({reason})" if reason else ""


def _offloads_optimizer(
    config: TrainConfig, model: Decoder, ranks: Ranks, longest_prompt: int
) -> bool:
    """As the forecast says."""
    found = forecast_memory(
        config,
        model.config,
        dtype=model.head_weight.dtype,
        device=ranks.device,
        longest_prompt=longest_prompt,
        num_ranks=ranks.world_size,
        ranks_per_node=local_world_size(),
        device_bytes=gpu_memory_bytes(ranks.device),
    )
    return bool(found.parked)


def _ledger_metrics(entry: LedgerEntry) -> dict[str, float]:
    sizes = {region.name: region.mapped_bytes for region in entry.stats.regions}
    sizes["driver_free"] = entry.stats.device_free_bytes
    sizes["torch_reserved"] = entry.torch_reserved_bytes
    return {f"memory/{entry.phase}_{owner}_gb": size / 1e9 for owner, size in sizes.items()}


def _stopped(phase: str, error: BaseException) -> TrainingStopped:
    advice = "use rollout.memory plain"
    if isinstance(error, MemoryError):
        advice = "lower rollout.kv_cache_tokens or update.microbatch_tokens"
    return TrainingStopped(
        f"the {phase} did not get its memory, and the phase before it has kept its own ({error}): "
        f"{advice}"
    )
