"""Responses of a model to a benchmark's tasks, recorded as they are written.

A checkpoint is run by this project's own engine; a served model is asked through the endpoint
client. Both write `{"index", "response", ...}` lines, the benchmarks' own format.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lwz_trainer.config.endpoint import EndpointConfig
from lwz_trainer.config.evaluation import GenerateConfig
from lwz_trainer.config.sections import RolloutConfig
from lwz_trainer.data.prompts import Prompt, prompt_language
from lwz_trainer.data.templates import Renderer, load_template
from lwz_trainer.digest import short_digest
from lwz_trainer.endpoint import BlockingEndpoint, EndpointError
from lwz_trainer.errors import UserError
from lwz_trainer.evaluation.items import Benchmark, Item
from lwz_trainer.evaluation.journal import Journal
from lwz_trainer.evaluation.monitor import wanted_range
from lwz_trainer.model.linear import resolve_dtype
from lwz_trainer.model.loading import load_pretrained
from lwz_trainer.model.source import resolve_model_dir, weights_stamp
from lwz_trainer.rollout import Request, Sample
from lwz_trainer.rollout.making import make_engine

__all__ = ["Sampling", "generate_responses", "resolve_sampling"]

_ANSWER_END = "</answer>"


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn."""

    temperature: float
    top_p: float
    top_k: int
    max_tokens: int


# WritingBench's own settings; LongWriter-Zero's own for the other two, whose papers vary.
_DEFAULTS: dict[Benchmark, Sampling] = {
    "writingbench": Sampling(0.7, 0.8, 20, 16_000),
    "arena-write": Sampling(0.6, 0.95, 0, 15_500),
    "longbench-write": Sampling(0.6, 0.95, 0, 15_500),
}


def resolve_sampling(benchmark: Benchmark, config: GenerateConfig) -> Sampling:
    """The benchmark's settings, but for those that the configuration sets."""
    names = [field.name for field in dataclasses.fields(Sampling)]
    chosen = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    return dataclasses.replace(_DEFAULTS[benchmark], **chosen)


def generate_responses(
    config: GenerateConfig,
    sampling: Sampling,
    items: list[Item],
    journal: Journal,
    cache_path: Path,
    on_progress: Callable[[int, int], None],
) -> tuple[dict[int, str], list[str]]:
    """Writes what the journal does not hold yet.

    Args:
        config: which model and template.
        sampling: from `resolve_sampling`.
        items: the tasks.
        journal: of this model's responses.
        cache_path: of the endpoint's answers, so that no paid call is repeated.
        on_progress: gets the numbers of responses that are there and of all.

    Returns:
        {index: response} and, for a served model, the failures in words.

    Raises:
        UserError: the journal was written under other settings or for other tasks, or the model
            cannot be run.
        EndpointDown: from the endpoint; what was written is in the journal.
    """
    settings = _settings_digest(config, sampling)
    responses: dict[int, str] = {}
    tasks = {item.index: _task_digest(item) for item in items}
    for record in journal.records:
        if record.get("settings") != settings:
            raise UserError(
                f"{journal.path} holds responses written with other settings or weights: pass "
                "another output_dir or generate.name, or remove the file"
            )
        index = record["index"]
        if index not in tasks:
            continue  # an earlier run may have had a higher limit
        if record.get("task") != tasks[index]:
            raise UserError(
                f"{journal.path} answers another task {index} than this benchmark file has: pass "
                "another output_dir or generate.name, or remove the file"
            )
        responses[index] = record["response"]
    failures: dict[int, str] = {}
    remaining = [item for item in items if item.index not in responses]
    on_progress(len(items) - len(remaining), len(items))
    if not remaining:
        return responses, []
    written = (
        _write_here(config, sampling, remaining)
        if config.model
        else _write_served(config, sampling, remaining, cache_path)
    )
    for index, outcome in written:
        if isinstance(outcome, EndpointError):
            failures[index] = f"{config.name}, index {index}: no response: {outcome}"
        else:
            known = {"task": tasks[index], "settings": settings}
            journal.append({"index": index, **outcome, **known})
            responses[index] = outcome["response"]
        on_progress(len(responses) + len(failures), len(items))
    return responses, [failures[item.index] for item in remaining if item.index in failures]


def _write_here(
    config: GenerateConfig, sampling: Sampling, items: list[Item]
) -> Iterator[tuple[int, dict[str, Any] | EndpointError]]:
    """By the own engine, `max_num_seqs` responses at a time."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model_dir = resolve_model_dir(config.model)
    model, tokenizer = load_pretrained(
        str(model_dir), dtype=resolve_dtype(config.dtype, device), device=device
    )
    renderer = Renderer(
        config.template, chat_opened=config.chat_opened, chat_system=config.chat_system
    )
    texts = [renderer.text(_prompt(item), tokenizer) for item in items]
    token_ids = [renderer.token_ids(text, tokenizer) for text in texts]
    _refuse_too_long(items, token_ids, sampling.max_tokens, model.config.max_positions)
    engine = make_engine(
        model,
        tokenizer,
        model_dir,
        RolloutConfig(
            max_completion_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            stop=config.stop,
            max_num_seqs=config.max_num_seqs,
            kv_cache_tokens=config.kv_cache_tokens,
        ),
    )
    for start in range(0, len(items), config.max_num_seqs):
        batch = range(start, min(start + config.max_num_seqs, len(items)))
        # Random numbers depend on (seed, index, position): not on where a run was interrupted.
        requests = [Request(row, token_ids[row], [items[row].index]) for row in batch]
        samples, _ = engine.generate(requests, seed=config.seed, step=0, policy_version=0)
        for sample in samples:
            yield sample.sample, _record(sample, renderer.opened)


def _record(sample: Sample, opened: str) -> dict[str, Any]:
    closing = _ANSWER_END if sample.stop_string == _ANSWER_END else ""
    return {
        "response": opened + sample.text + closing,
        "finish_reason": sample.finish_reason,
        "num_tokens": len(sample.completion_ids),
    }


def _write_served(
    config: GenerateConfig, sampling: Sampling, items: list[Item], cache_path: Path
) -> Iterator[tuple[int, dict[str, Any] | EndpointError]]:
    """By an endpoint: chat for template "chat", else a raw completion."""
    template = None if config.template == "chat" else load_template(config.template)
    opened = "" if template is None else template.opened
    stop = () if template is None else config.stop

    async def ask(endpoint: Any, item: Item) -> str:
        if template is not None:
            return await endpoint.complete(template.render(_prompt(item)), parse=str)
        messages = [{"role": "user", "content": item.prompt}]
        if config.chat_system:
            messages.insert(0, {"role": "system", "content": config.chat_system})
        return await endpoint.chat(messages, parse=str)

    with BlockingEndpoint(_served_endpoint(config.endpoint, sampling, stop), cache_path) as served:
        for item, outcome in served.map(items, ask):
            if isinstance(outcome, EndpointError):
                yield item.index, outcome
            else:
                yield item.index, {"response": opened + outcome}


def _served_endpoint(
    endpoint: EndpointConfig, sampling: Sampling, stop: tuple[str, ...]
) -> EndpointConfig:
    extra = json.loads(endpoint.extra_body or "{}")
    if sampling.top_k:
        extra["top_k"] = sampling.top_k
    if stop:
        extra["stop"] = list(stop)
    return dataclasses.replace(
        endpoint,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        max_tokens=sampling.max_tokens,
        extra_body=json.dumps(extra) if extra else "",
    )


def _prompt(item: Item) -> Prompt:
    return Prompt(item.prompt, wanted_range(item), prompt_language(item.prompt), item.index)


def _refuse_too_long(
    items: list[Item], token_ids: list[list[int]], max_tokens: int, max_positions: int
) -> None:
    for item, ids in zip(items, token_ids, strict=True):
        if len(ids) + max_tokens > max_positions:
            raise UserError(
                f"index {item.index}: the prompt has {len(ids)} tokens with its template, and "
                f"generate.max_tokens is {max_tokens}; the model's context is {max_positions}: "
                "lower generate.max_tokens, or serve a model with a longer context"
            )


def _task_digest(item: Item) -> str:
    """Of what the model is asked: benchmarks and their files share index numbers."""
    return short_digest([item.prompt, wanted_range(item)])


def _settings_digest(config: GenerateConfig, sampling: Sampling) -> str:
    """Of what responses depend on; limits, patience and where a server is are not part of it."""
    template = load_template(config.template) if config.template != "chat" else None
    return short_digest(
        [
            config.model,
            weights_stamp(resolve_model_dir(config.model)) if config.model else [],
            config.endpoint.model,
            config.endpoint.extra_body,
            config.dtype,
            [config.template, dataclasses.asdict(template)] if template else "chat",
            config.chat_opened,
            config.chat_system,
            list(config.stop),
            config.seed,
            dataclasses.asdict(sampling),
        ]
    )
