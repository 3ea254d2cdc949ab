"""A vLLM server somewhere else as rollout engine, with weights that pass through a directory.

The server runs with VLLM_SERVER_DEV_MODE=1, which adds reloading of weights, dropping of the prefix
cache and a label for the weights to its interface. A rollout begins and ends with a look at that
label, so samples of another policy, of another run or of a server that was restarted are refused.
"""

import shutil
import time
import uuid
from collections.abc import Callable
from math import nan
from pathlib import Path
from typing import Any, TypeVar

from lwz_trainer.config.sections import RolloutConfig
from lwz_trainer.endpoint import BlockingEndpoint, Endpoint, EndpointDown, EndpointError
from lwz_trainer.errors import TrainingStopped, UserError
from lwz_trainer.model.decoder import Decoder
from lwz_trainer.model.export import write_weights
from lwz_trainer.parallel import Ranks
from lwz_trainer.rollout.decode_work import DecodeWork
from lwz_trainer.rollout.engine import EngineStats, OnBurst, Progress, RolloutInterrupted
from lwz_trainer.rollout.sequence import Request, Sample
from lwz_trainer.rollout.shared_work import SharedWork
from lwz_trainer.rollout.stopping import StopChecker
from lwz_trainer.rollout.vllm.probe import NUM_PROBE_TOKENS, check_probe, probe_fields
from lwz_trainer.rollout.vllm.record import finished_sample, sample_seed, sampling_fields

__all__ = ["VllmServerEngine"]

T = TypeVar("T")
Completion = tuple[list[int], list[float]]
"""Token ids and their log-probs."""


class VllmServerEngine:
    """Samples by `/v1/completions`, one request a sample.

    Args:
        model: whose weights are pushed.
        tokenizer: decodes for stop strings and texts.
        eos_ids: tokens that end a completion.
        config: sampling, `max_num_seqs` requests at once, and the server.
        ranks: all of them sample, the first pushes; None for a process on its own.
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: Any,
        *,
        eos_ids: tuple[int, ...],
        config: RolloutConfig,
        ranks: Ranks | None,
    ) -> None:
        self._model = model
        self._eos_ids = eos_ids
        self._config = config
        self._ranks = ranks
        self._stops = StopChecker(
            tokenizer,
            stop=config.stop,
            eos_ids=eos_ids,
            max_tokens=config.max_completion_tokens,
        )
        run = uuid.uuid4().hex
        self._published = ""
        self._run = run if ranks is None else ranks.gather(run)[0]
        self.expected_completion_tokens = float(config.max_completion_tokens)

    def plan_cache(self, *, longest_prompt: int, num_samples: int) -> None:
        """Asks the server whether it can take weights; its cache is its own business.

        Raises:
            UserError: it does not answer, or was started without VLLM_SERVER_DEV_MODE=1.
        """
        server = self._config.server
        try:
            with self._open() as endpoint:
                self._label(endpoint)
        except (EndpointDown, TrainingStopped) as error:
            raise UserError(
                f"rollout.server.base_url {server.base_url} is no vLLM server that takes weights "
                f"({error}): start it with VLLM_SERVER_DEV_MODE=1, as docs/vllm.md says"
            ) from error
        if not Path(server.weights_dir).is_dir():
            raise UserError(
                f"rollout.server.weights_dir {server.weights_dir} is no directory: make it, or "
                "name one that this process and the server share"
            )

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
        """As `SamplingEngine.generate`; a sample's seed is keyed by (seed, step, sample).

        `should_stop` is asked whenever a completion arrives; the server is then told to drop the
        others by closing their connections.
        """
        assert not isinstance(requests, SharedWork), "the configuration refuses it"
        started = time.perf_counter()
        samples: list[Sample] = []
        label = f"{self._run}-{policy_version}"
        jobs = [(request, sample) for request in requests for sample in request.samples]

        def call(endpoint: Endpoint, job: tuple[Request, int]) -> Any:
            fields = {"seed": sample_seed(seed, step, job[1])}
            return self._complete(endpoint, job[0].prompt_ids, fields)

        with self._open() as endpoint:
            self._publish(endpoint, label, requests[0].prompt_ids)
            answers = endpoint.map(jobs, call)
            while should_stop is None or not should_stop():
                found = next(answers, None)
                if found is None:
                    break
                (request, number), answer = found
                ids, logprobs = _unless_failed(answer)
                sample = finished_sample(
                    request, number, ids, logprobs, self._stops, policy_version=policy_version
                )
                samples.append(sample)
                if on_progress is not None:
                    on_progress(len(samples), sum(len(s.completion_ids) for s in samples))
                if on_burst is not None and not on_burst([sample]):
                    break
            else:
                raise RolloutInterrupted
            self._require(endpoint, label)
        return sorted(samples, key=lambda sample: sample.sample), EngineStats(
            num_tokens=sum(len(sample.completion_ids) for sample in samples),
            num_prefill_tokens=sum(len(request.prompt_ids) for request in requests),
            num_preemptions=nan,
            peak_kv_frac=nan,
            seconds=time.perf_counter() - started,
            decode=DecodeWork(nan, nan, nan, nan),
        )

    def _open(self) -> BlockingEndpoint:
        return BlockingEndpoint(self._config.server.endpoint(self._config.max_num_seqs))

    def _publish(self, endpoint: BlockingEndpoint, label: str, prompt_ids: list[int]) -> None:
        """The server holds the weights of this label, and no page of older ones.

        Ranks wait for each other once a label: within a step they may sample unequally often.
        """
        is_main = self._ranks is None or self._ranks.is_main
        if is_main and self._label(endpoint) != label:
            self._push(endpoint, label)
            self._probe(endpoint, prompt_ids[:NUM_PROBE_TOKENS])
        if self._ranks is not None and self._published != label:
            self._ranks.barrier()
        self._published = label
        self._require(endpoint, label)

    def _push(self, endpoint: BlockingEndpoint, label: str) -> None:
        folder = Path(self._config.server.weights_dir) / label
        reload = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        try:
            folder.mkdir()
            write_weights(self._model, folder, names_tied_head=True)
            _ask(endpoint, lambda client: client.post("/collective_rpc", reload, read=_results))
        except OSError as error:
            raise TrainingStopped(
                f"cannot write weights to rollout.server.weights_dir: {error}"
            ) from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        if not _ask(endpoint, lambda c: c.post("/reset_prefix_cache", {}, read=_is_success)):
            raise TrainingStopped(
                "the vLLM server did not drop the pages of the old weights: let nobody else use "
                "it while it serves a training run"
            )
        version = {"new_version": label}
        _ask(endpoint, lambda c: c.post("/update_weight_version", version, read=_is_success))

    def _probe(self, endpoint: BlockingEndpoint, prompt_ids: list[int]) -> None:
        completion = _ask(
            endpoint, lambda client: self._complete(client, prompt_ids, probe_fields())
        )
        check_probe(self._model, prompt_ids, *completion)

    def _complete(self, client: Endpoint, prompt_ids: list[int], fields: dict[str, Any]) -> Any:
        body = {
            "model": self._config.server.model,
            "prompt": prompt_ids,
            "return_token_ids": True,
            **sampling_fields(self._config, self._eos_ids),
            **fields,
        }
        return client.post("/v1/completions", body, read=_completion)

    def _label(self, endpoint: BlockingEndpoint) -> str:
        return _ask(
            endpoint,
            lambda client: client.get("/weight_info", read=lambda answer: answer["weight_version"]),
        )

    def _require(self, endpoint: BlockingEndpoint, label: str) -> None:
        found = self._label(endpoint)
        if found != label:
            raise TrainingStopped(
                f"the vLLM server holds weights {found!r}, expected {label!r}: it was restarted, "
                "or another run pushes weights to it; nothing of this rollout is kept"
            )


def _ask(endpoint: BlockingEndpoint, call: Callable[[Endpoint], Any]) -> Any:
    """One request."""
    ((_, answer),) = endpoint.map([None], lambda client, _: call(client))
    return _unless_failed(answer)


def _unless_failed(answer: T | EndpointError) -> T:
    if isinstance(answer, EndpointError):
        raise TrainingStopped(f"the vLLM server failed: {answer}") from answer
    return answer


def _completion(answer: Any) -> Completion:
    (choice,) = answer["choices"]
    ids = [int(token) for token in choice["token_ids"]]
    return ids, [float(logprob) for logprob in choice["logprobs"]["token_logprobs"]]


def _is_success(answer: Any) -> bool:
    return bool(answer["success"])


def _results(answer: Any) -> Any:
    return answer["results"]
