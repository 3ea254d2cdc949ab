"""Everything that an evaluation reads, checked before anything is written."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lwz_trainer.config.evaluation import EvalConfig, GenerateConfig
from lwz_trainer.data.jsonl import jsonl_rows
from lwz_trainer.data.templates import load_template
from lwz_trainer.errors import UserError
from lwz_trainer.evaluation.answer import final_answer
from lwz_trainer.evaluation.items import (
    Benchmark,
    Item,
    Requirement,
    load_items,
    load_requirement,
    load_responses,
)
from lwz_trainer.evaluation.monitor import TrainingSample, training_samples
from lwz_trainer.rewards.text import split_paragraphs

__all__ = ["Inputs", "load_inputs"]


@dataclass(frozen=True)
class Inputs:
    """What an evaluation starts from.

    Attributes:
        items: the tasks, within the limit.
        responses: of the given files, by system and index, within the limit.
        requirements: of WritingBench.
        baseline_texts: for over-used words; None where no file is named.
        training: samples of a run; empty where none is named.
    """

    items: list[Item]
    responses: dict[str, dict[int, str]]
    requirements: list[Requirement]
    baseline_texts: list[str] | None
    training: list[TrainingSample]


def load_inputs(benchmark: Benchmark, config: EvalConfig) -> Inputs:
    """Reads and checks everything; makes nothing.

    Raises:
        UserError: naming the file and line, or the setting.
    """
    if not config.data:
        raise UserError(f"data is not set: pass the JSONL file of {benchmark}, --data=FILE.jsonl")
    all_items = load_items(benchmark, Path(config.data))
    items = all_items[: config.limit] if config.limit else all_items
    kept = {item.index for item in items}
    responses = {
        name: {
            index: text
            for index, text in load_responses(Path(path), all_items).items()
            if index in kept
        }
        for name, path in _named(config.responses, "responses")
    }
    _check_names(config, responses, all_items)
    _check_generation(config.generate)
    if config.requirements and benchmark != "writingbench":
        raise UserError(f"requirements belong to writingbench, got them with {benchmark}")
    monitor = config.monitor
    return Inputs(
        items,
        responses,
        _load_requirements(config.requirements, all_items),
        _baseline_texts(monitor.baseline) if monitor.baseline else None,
        training_samples(
            Path(monitor.run), num_steps=monitor.run_steps, per_step=monitor.run_samples
        )
        if monitor.run
        else [],
    )


def _check_names(
    config: EvalConfig, responses: dict[str, dict[int, str]], items: list[Item]
) -> None:
    """There is a system, and no two have one name."""
    written = config.generate.name
    if not responses and not written:
        raise UserError(
            "nothing to evaluate: pass --responses NAME=FILE.jsonl, or --generate.name with "
            "--generate.model or --generate.endpoint.base_url"
        )
    if written in responses:
        raise UserError(f"responses and generate.name both name '{written}': rename one")
    for name in (*responses, written):
        if any(name in item.baselines for item in items):
            raise UserError(
                f"'{name}' is the name of a baseline in {config.data} too: give these answers "
                "another name"
            )


def _check_generation(config: GenerateConfig) -> None:
    """The model and the template are there; both are read again where they are used."""
    if config.model:
        # Here and not above: it brings in torch.
        from lwz_trainer.model.source import resolve_model_dir

        resolve_model_dir(config.model)
    if config.name and config.template != "chat":
        load_template(config.template)


def _load_requirements(pairs: tuple[str, ...], items: list[Item]) -> list[Requirement]:
    requirements = []
    for name, value in _named(pairs, "requirements"):
        subset, comma, criteria = value.partition(",")
        if not comma:
            raise UserError(
                f"requirements: expected {name}=SUBSET.jsonl,CRITERIA.jsonl, got '{name}={value}'"
            )
        requirements.append(load_requirement(name, Path(subset), Path(criteria), items))
    return requirements


def _named(pairs: tuple[str, ...], field: str) -> Iterator[tuple[str, str]]:
    names: set[str] = set()
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not (name and equals and value):
            raise UserError(f"{field}: expected NAME=FILE, got '{pair}'")
        if name in names:
            raise UserError(f"{field}: the name '{name}' is used twice; rename one")
        names.add(name)
        yield name, value


def _baseline_texts(path: str) -> list[str]:
    """The responses of a .jsonl file, or the paragraphs of a text."""
    if not path.endswith(".jsonl"):
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"monitor.baseline: cannot read {path} ({error}); pass responses or UTF-8 text"
            ) from error
        return [text[start:end] for start, end in split_paragraphs(text)]
    texts = []
    for _, where, record in jsonl_rows(Path(path), path):
        if not isinstance(record, dict) or not isinstance(record.get("response"), str):
            raise UserError(f"{where}: expected an object with a text `response`")
        texts.append(final_answer(record["response"]))
    return texts
