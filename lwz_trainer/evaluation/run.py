"""One evaluation from its inputs to its report: load, answer, judge, aggregate, write.

All inputs are read before anything is made, so bad input leaves nothing behind. Responses and
judgments are appended as they arrive, reports are replaced whole, and the same command goes on.
"""

import csv
import dataclasses
import io
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lwz_trainer.atomic_text import write_text_atomically
from lwz_trainer.config.endpoint import EndpointConfig
from lwz_trainer.config.evaluation import EvalConfig
from lwz_trainer.config.reading import dump_config
from lwz_trainer.endpoint import BlockingEndpoint
from lwz_trainer.errors import UserError
from lwz_trainer.evaluation.answer import final_answer
from lwz_trainer.evaluation.inputs import Inputs, load_inputs
from lwz_trainer.evaluation.items import Benchmark
from lwz_trainer.evaluation.journal import Journal
from lwz_trainer.evaluation.judging import (
    EndpointJudge,
    Judge,
    JudgingResult,
    judge_all,
    judge_calls,
    quality_call,
)
from lwz_trainer.evaluation.outcome import (
    ItemRow,
    Outcome,
    evaluate,
    training_outcome,
    training_system,
)
from lwz_trainer.evaluation.page import report_page
from lwz_trainer.evaluation.tables import table_csv, table_markdown
from lwz_trainer.train.console import RunConsole

__all__ = ["Summary", "run_evaluation"]

# WritingBench's and LongBench-Write's own; Arena-Write's is not published, so its authors' other.
_JUDGE_SAMPLING: dict[Benchmark, dict[str, Any]] = {
    "writingbench": {"temperature": 1.0, "top_p": 0.95, "max_tokens": 2048},
    "arena-write": {"temperature": 0.5, "max_tokens": 1024},
    "longbench-write": {"temperature": 0.5, "max_tokens": 1024},
}


@dataclass(frozen=True)
class Summary:
    """Where the report is, and how many calls failed and can be asked again."""

    report: Path
    num_failures: int


def run_evaluation(
    benchmark: Benchmark, config: EvalConfig, *, judge: Judge | None = None
) -> Summary:
    """Answers, judges and reports.

    Args:
        benchmark: which.
        config: inputs, model, judge.
        judge: instead of the one in `config.judge`.

    Raises:
        UserError: bad input; nothing was written.
        EndpointDown: a server is down; what was answered and judged is kept.
    """
    config = dataclasses.replace(config, output_dir=config.output_dir or f"runs/eval/{benchmark}")
    inputs = load_inputs(benchmark, config)
    _refuse_other_benchmark(Path(config.output_dir) / "results.json", benchmark)
    judge_endpoint = _with_defaults(config.judge, _JUDGE_SAMPLING[benchmark])
    with _opened_judge(judge_endpoint, Path(config.output_dir), judge) as judge:
        return _run(benchmark, config, inputs, judge)


def _run(benchmark: Benchmark, config: EvalConfig, inputs: Inputs, judge: Judge | None) -> Summary:
    out = Path(config.output_dir)
    responses = dict(inputs.responses)
    failures: list[str] = []
    if config.generate.name:
        # Here and not above: torch and transformers take seconds, and a judge needs neither.
        from lwz_trainer.evaluation.generation import generate_responses, resolve_sampling

        with _progress("answers") as on_progress:
            responses[config.generate.name], failures = generate_responses(
                config.generate,
                resolve_sampling(benchmark, config.generate),
                inputs.items,
                Journal(out / "responses" / f"{config.generate.name}.jsonl"),
                out / "answers.sqlite",
                on_progress,
            )
    systems = {
        name: {index: final_answer(text) for index, text in by_index.items()}
        for name, by_index in responses.items()
    }
    judged = JudgingResult({}, [])
    if judge is not None:
        calls = judge_calls(benchmark, inputs.items, systems)
        calls += [
            quality_call(training_system(sample.step), sample.item, sample.answer)
            for sample in inputs.training
            if sample.is_judged
        ]
        with _progress("judgments") as on_progress:
            judged = judge_all(calls, judge, Journal(out / "judgments.jsonl"), on_progress)
    failures += judged.failures
    outcome = evaluate(
        benchmark,
        inputs.items,
        systems,
        judged.judgments,
        requirements=inputs.requirements,
        baseline_texts=inputs.baseline_texts,
        elo=config.elo,
    )
    if inputs.training:
        outcome = _with_training(outcome, training_outcome(inputs.training, judged.judgments))
    outcome.warnings.extend(_failure_warnings(failures, is_judged=judge is not None))
    judged_by = judge.settings if judge is not None else "nobody"
    facts = f"{len(inputs.items)} tasks; judged by {judged_by}"
    page = report_page(
        outcome,
        inputs.items,
        systems,
        judged.judgments,
        title=f"{benchmark}: {', '.join(systems)}",
        facts=facts,
        max_items=config.page_items,
    )
    write_text_atomically(out / "config.yaml", dump_config(config))
    _write(out, benchmark, outcome, page, facts, failures)
    return Summary(out / "report.html", len(failures))


def _refuse_other_benchmark(results: Path, benchmark: Benchmark) -> None:
    """Tables of two benchmarks in one folder would look like one report."""
    if not results.exists():
        return
    try:
        found = json.loads(results.read_text(encoding="utf-8"))["benchmark"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{results} is no result of an evaluation: pass another output_dir, or remove the file"
        ) from error
    if found != benchmark:
        raise UserError(f"{results} is a result of {found}: pass another output_dir")


@contextmanager
def _opened_judge(
    endpoint: EndpointConfig, out: Path, judge: Judge | None
) -> Iterator[Judge | None]:
    if judge is not None or not endpoint.base_url:
        yield judge
        return
    with BlockingEndpoint(endpoint, out / "answers.sqlite") as opened:
        sampling = json.dumps(endpoint.sampling_fields(), sort_keys=True)
        yield EndpointJudge(opened, f"{endpoint.model} {sampling}")


def _with_defaults(endpoint: EndpointConfig, sampling: dict[str, Any]) -> EndpointConfig:
    unset = {name: value for name, value in sampling.items() if getattr(endpoint, name) is None}
    return dataclasses.replace(endpoint, **unset)


@contextmanager
def _progress(unit: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal, nothing elsewhere."""
    with RunConsole(is_main=True, progress=None).bar("evaluating", 1, unit) as bar:
        yield lambda done, total: bar.update(done, total=total)


def _with_training(first: Outcome, second: Outcome) -> Outcome:
    return Outcome(
        scores=first.scores,
        rows=first.rows,
        tables=first.tables + second.tables,
        figures=first.figures + second.figures,
        warnings=first.warnings + second.warnings,
        training=second.training,
    )


def _failure_warnings(failures: list[str], *, is_judged: bool) -> list[str]:
    warnings = [] if is_judged else ["There is no judge: set judge.base_url and judge.model."]
    if failures:
        warnings.append(
            f"{len(failures)} calls failed and are missing, not zero; the same command asks them "
            f"again. The first: {failures[0]}"
        )
    return warnings


def _write(
    out: Path,
    benchmark: Benchmark,
    outcome: Outcome,
    page: str,
    facts: str,
    failures: list[str],
) -> None:
    for table in outcome.tables:
        write_text_atomically(out / "tables" / f"{table.name}.csv", table_csv(table))
    write_text_atomically(out / "tables" / "items.csv", _items_csv(outcome.rows))
    results = {
        "benchmark": benchmark,
        "facts": facts,
        "scores": outcome.scores,
        "training": outcome.training,
        "warnings": outcome.warnings,
        "failures": failures,
    }
    write_text_atomically(
        out / "results.json", json.dumps(_plain(results), ensure_ascii=False, indent=1) + "\n"
    )
    head = [f"## {benchmark}", "", f"{facts}.", ""]
    head += [f"> {warning}\n" for warning in outcome.warnings]
    tables = [table_markdown(table) for table in outcome.tables if table.rows]
    write_text_atomically(out / "report.md", "\n".join([*head, *tables]))
    write_text_atomically(out / "report.html", page)


def _items_csv(rows: list[ItemRow]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("system", "index", "group", "words", "wanted_low", "wanted_high", "score"))
    for row in rows:
        low, high = row.wanted if row.wanted is not None else ("", "")
        score = "" if math.isnan(row.score) else row.score
        writer.writerow((row.system, row.index, row.group, row.words, low, high, score))
    return text.getvalue()


def _plain(value: Any) -> Any:
    """As JSON has it: NaN and infinity become null."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
