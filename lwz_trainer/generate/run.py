"""Writes one piece to the terminal, or the answers to a file of requests."""

import dataclasses
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from lwz_trainer.config.generate import GenerateCommandConfig
from lwz_trainer.data.length_range import explicit_length_range
from lwz_trainer.data.prompts import Prompt, has_utf8, load_prompts, prompt_language
from lwz_trainer.data.templates import load_template
from lwz_trainer.digest import short_digest
from lwz_trainer.errors import TrainingStopped, UserError
from lwz_trainer.evaluation.answer import final_answer
from lwz_trainer.evaluation.journal import Journal
from lwz_trainer.generate.parts import PartStream, TextStream
from lwz_trainer.generate.terminal import TerminalPage, length_words
from lwz_trainer.generate.writer import Writer
from lwz_trainer.model.source import resolve_model_dir, weights_stamp
from lwz_trainer.rewards.structure import parse_completion
from lwz_trainer.rewards.text import count_words
from lwz_trainer.rollout import Request, Sample
from lwz_trainer.rollout.sequence import Sequence
from lwz_trainer.train.console import RunConsole

__all__ = ["run_generate"]

_ANSWER_END = "</answer>"


def run_generate(config: GenerateCommandConfig) -> None:
    """The `generate` command."""
    if not config.model or not (config.prompt or config.prompts):
        raise UserError("generate needs --model, and --prompt or --prompts with --output")
    if not has_utf8(config.prompt):
        raise UserError("prompt is not UTF-8: check the terminal's encoding")
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    if config.prompt:
        _write_to_terminal(config)
    else:
        _write_to_file(config)


def _write_to_terminal(config: GenerateCommandConfig) -> None:
    prompt = Prompt(config.prompt, config.length_range, prompt_language(config.prompt), 1)
    prompt = dataclasses.replace(prompt, length_range=_wanted_range(config, prompt))
    writer = Writer(config, [prompt])
    page = TerminalPage(prompt.length_range, show_thinking=config.show_thinking)
    text = TextStream(writer.tokenizer)
    parts = PartStream(writer.opened, config.stop)

    def show(tokens: list[int]) -> None:
        for event, piece in parts.feed(text.new_text(tokens)):
            if event == "restart":
                page.restart(piece)
            else:
                page.add(event, piece)

    def show_running(running: list[Sequence]) -> None:
        for sequence in running:
            show(sequence.tokens)

    started = time.perf_counter()
    sample: Sample | None = None
    try:
        request = Request(0, writer.prompt_ids[0], [prompt.row])
        (sample,), _ = writer.engine.generate(
            [request],
            seed=config.seed,
            step=0,
            policy_version=0,
            on_tokens=show_running,
        )
        show(_text_ids(sample))
        for part, piece in parts.finish():
            page.add(part, piece)
    except KeyboardInterrupt:
        pass  # what was written stays, and is counted below
    finally:
        thinking, answer = page.close()
    summary = length_words(count_words(answer), prompt.length_range)
    if thinking:
        summary += f"; {count_words(thinking):,} words of thinking"
    if sample is None:
        raise TrainingStopped(f"interrupted: {summary}")
    seconds = time.perf_counter() - started
    summary += f"; {len(sample.completion_ids):,} tokens in {seconds:.1f} s"
    if sample.is_truncated:
        summary += "; cut at max_tokens"
    Console(stderr=True, highlight=False).print(summary, style="dim", markup=False)


def _write_to_file(config: GenerateCommandConfig) -> None:
    prompts = [
        dataclasses.replace(prompt, length_range=_wanted_range(config, prompt))
        for prompt in load_prompts(config.prompts)
    ]
    settings = _settings_digest(config)
    journal = Journal(Path(config.output))
    requests_by_row = {prompt.row: _request(prompt) for prompt in prompts}
    for record in journal.records:
        if record.get("settings") != settings:
            raise UserError(
                f"{config.output} holds answers written with other settings or weights: pass "
                "another output, or remove the file"
            )
        row = record["index"]
        if {name: record[name] for name in ("prompt", "length_range")} != requests_by_row.get(row):
            raise UserError(
                f"{config.output} answers another request {row} than {config.prompts} has: pass "
                "another output, or remove the file"
            )
    done = {record["index"] for record in journal.records}
    console = RunConsole(is_main=True, progress=None)
    if any(prompt.row not in done for prompt in prompts):
        # All of them, done or not: the longest decides how long an answer may be.
        writer = Writer(config, prompts)
        prompt_of = {prompt.row: prompt for prompt in prompts}
        # The row is the sample's number: random numbers do not depend on where a run went on.
        requests = [
            Request(group, ids, [prompt.row])
            for group, (prompt, ids) in enumerate(zip(prompts, writer.prompt_ids, strict=True))
            if prompt.row not in done
        ]

        def keep(ended: list[Sample]) -> bool:
            for sample in ended:
                record = _record(sample, prompt_of[sample.sample], writer.opened)
                journal.append(record | {"settings": settings})
            return True  # go on

        with console.bar("writing", len(requests), "answers") as bar:
            try:
                writer.engine.generate(
                    requests,
                    seed=config.seed,
                    step=0,
                    policy_version=0,
                    on_progress=lambda num, tokens: bar.update(num, f"{tokens:,} tokens"),
                    on_burst=keep,
                )
            except KeyboardInterrupt as error:
                raise TrainingStopped(
                    f"interrupted: {len(journal.records)} of {len(prompts)} answers are in "
                    f"{config.output}; the same command goes on"
                ) from error
    console.print(f"{len(journal.records)} answers in {config.output}")


def _record(sample: Sample, prompt: Prompt, opened: str) -> dict[str, Any]:
    """One answer as it is kept."""
    stopped = sample.stop_string == _ANSWER_END
    response = opened + sample.text + (_ANSWER_END if stopped else "")
    answer = final_answer(response)
    thinking = parse_completion(
        response, kind="think", mode="strict", stopped_at_answer=stopped
    ).think
    return {
        "index": prompt.row,
        **_request(prompt),
        "response": response,
        "thinking": thinking,
        "answer": answer,
        "words": count_words(answer),
        "num_tokens": len(sample.completion_ids),
        "finish_reason": sample.finish_reason,
    }


def _request(prompt: Prompt) -> dict[str, Any]:
    """What is answered, as a file gives it back: a list for a tuple."""
    return {
        "prompt": prompt.prompt,
        "length_range": None if prompt.length_range is None else list(prompt.length_range),
    }


def _text_ids(sample: Sample) -> list[int]:
    """The tokens that are text: an end token is none."""
    ids = sample.completion_ids
    return ids[:-1] if sample.finish_reason == "eos" else ids


def _wanted_range(config: GenerateCommandConfig, prompt: Prompt) -> tuple[int, int] | None:
    wanted = config.length_range or prompt.length_range or explicit_length_range(prompt.prompt)
    return None if wanted == (0, 0) else wanted


def _settings_digest(config: GenerateCommandConfig) -> str:
    """Of what an answer depends on besides its request."""
    settings = dataclasses.asdict(config)
    for name in ("prompt", "prompts", "output", "show_thinking", "device", "num_threads"):
        del settings[name]
    del settings["max_num_seqs"], settings["kv_cache_tokens"]
    settings["weights"] = weights_stamp(resolve_model_dir(config.model))
    if config.template != "chat":
        settings["template"] = dataclasses.asdict(load_template(config.template))
    return short_digest(settings)
