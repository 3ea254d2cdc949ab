"""`prepare`: read, apply rules, drop duplicates, find explicit counts, ask the judge, write.

Cheap stages come first and everything is read before anything is asked, so bad input costs no call.
The state of a run is its answers on disk: the same command reads again and asks what is missing.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeAlias, TypeVar

import numpy as np

from lwz_trainer.atomic_text import write_text_atomically
from lwz_trainer.config.prepare import PrepareConfig
from lwz_trainer.data.length_range import explicit_length_range
from lwz_trainer.endpoint import AnswerError, EndpointError, RequestRefused
from lwz_trainer.errors import UserError
from lwz_trainer.prepare.duplicates import near_duplicates, text_key
from lwz_trainer.prepare.judges import EndpointJudge, Judge
from lwz_trainer.prepare.questions import Question, quality_question, range_question
from lwz_trainer.prepare.report import Candidate, PrepareReport
from lwz_trainer.prepare.rules import request_language, rule_against
from lwz_trainer.prepare.sources import SourceRow, find_files, read_rows
from lwz_trainer.train.console import RunConsole

__all__ = ["run_prepare"]

T = TypeVar("T")
_Input: TypeAlias = tuple[str, list[Path], frozenset[str]]
"""Name, files, and the languages that are taken from it."""
_SHOW_EVERY = 500


def run_prepare(config: PrepareConfig) -> None:
    """From the inputs to the output file and its report.

    Raises:
        UserError: bad settings or input, or nothing is left.
        EndpointDown: the same command goes on when the endpoint is back.
    """
    console = RunConsole(is_main=True, progress=config.progress)
    inputs = [_find_input(name) for name in config.inputs]
    if not inputs:
        raise UserError("no inputs: pass --inputs FILE.jsonl, a directory, or a hub id")
    report = PrepareReport(config)
    judge = _make_judge(config)
    try:
        candidates = _read(inputs, report, console)
        candidates = _drop_near_duplicates(candidates, report, console)
        candidates = _use_explicit_ranges(candidates, report)
        candidates = _draw(candidates, report)
        if judge is not None:
            candidates = _ask(judge, candidates, report, console)
            report.judge_usage = judge.usage()
    finally:
        if judge is not None:
            judge.close()
    report.kept = candidates
    _write(candidates, report, console)


def _find_input(name: str) -> _Input:
    path, colon, language = name.rpartition(":")
    if colon and language in ("en", "zh"):
        return name, find_files(path), frozenset({language})
    return name, find_files(name), frozenset({"en", "zh"})


def _make_judge(config: PrepareConfig) -> Judge | None:
    answers = Path(config.output).with_suffix(".answers.sqlite")
    if config.judge == "endpoint":
        return EndpointJudge(config.endpoint, answers)
    if config.judge == "local":
        # Here and not above: torch and transformers take seconds, and no other judge needs them.
        from lwz_trainer.prepare.local_judge import LocalJudge

        return LocalJudge(config.local, config.seed, answers)
    return None


def _read(inputs: Sequence[_Input], report: PrepareReport, console: RunConsole) -> list[Candidate]:
    """Rules and exact duplicates, row by row: only what is left stays in memory."""
    seen: set[bytes] = set()
    candidates: list[Candidate] = []
    num_files = sum(len(files) for _, files, _ in inputs)
    with console.bar("reading", num_files, "files") as bar:
        for num_rows, (row, languages, num_done) in enumerate(_rows(inputs, report), start=1):
            if num_rows % _SHOW_EVERY == 0:
                bar.update(num_done, f"{num_rows:,} rows, {len(candidates):,} left")
            reason = rule_against(row, report.config.rules, languages)
            if reason is not None:
                report.drop("rules", reason)
            elif (key := text_key(row.text)) in seen:
                report.drop("duplicates", "same words")
            else:
                seen.add(key)
                candidates.append(
                    Candidate(
                        text=row.text,
                        where=row.where,
                        language=request_language(row.text, row.language),
                        length_range=row.length_range,
                        range_from="data" if row.length_range else "",
                    )
                )
    return candidates


def _rows(
    inputs: Sequence[_Input], report: PrepareReport
) -> Iterator[tuple[SourceRow, frozenset[str], int]]:
    """Each row with the languages that are wanted of it and the number of files before its own."""
    num_done = 0
    for name, files, languages in inputs:
        for file in files:
            for row in read_rows(file):
                report.rows_read[name] += 1
                yield row, languages, num_done
            num_done += 1


def _drop_near_duplicates(
    candidates: list[Candidate], report: PrepareReport, console: RunConsole
) -> list[Candidate]:
    config = report.config.duplicates
    with console.bar("near duplicates", len(candidates), "requests"):
        is_duplicate = near_duplicates(
            [candidate.text for candidate in candidates],
            threshold=config.threshold,
            shingle_size=config.shingle_size,
        )
    report.drop("duplicates", "near duplicate", int(is_duplicate.sum()))
    return [candidates[index] for index in np.flatnonzero(~is_duplicate)]


def _use_explicit_ranges(candidates: list[Candidate], report: PrepareReport) -> list[Candidate]:
    """The data's own ranges, then counts in so many words; both need no model."""
    left = []
    for candidate in candidates:
        if candidate.length_range is None:
            explicit = explicit_length_range(candidate.text)
            if explicit is not None:
                candidate.length_range, candidate.range_from = explicit, "rules"
        if candidate.length_range is None and report.config.judge == "none":
            report.drop("explicit counts", "none given, and no judge")
        elif candidate.length_range is None or _is_long_enough(
            candidate, report, "explicit counts"
        ):
            left.append(candidate)
    return left


def _draw(candidates: list[Candidate], report: PrepareReport) -> list[Candidate]:
    limit = report.config.max_requests
    if limit == 0 or len(candidates) <= limit:
        return candidates
    order = np.random.default_rng(report.config.seed).permutation(len(candidates))
    report.drop("draw", "not drawn", len(candidates) - limit)
    return [candidates[index] for index in sorted(order[:limit].tolist())]


def _ask(
    judge: Judge, candidates: list[Candidate], report: PrepareReport, console: RunConsole
) -> list[Candidate]:
    if report.config.ask_quality:
        is_kept = _answers(judge, quality_question(), candidates, report, console)
        report.drop("quality", "no long writing", sum(not kept for kept in is_kept.values()))
        candidates = [candidate for index, candidate in enumerate(candidates) if is_kept.get(index)]
    unknown = [candidate for candidate in candidates if candidate.length_range is None]
    for index, bounds in _answers(judge, range_question(), unknown, report, console).items():
        unknown[index].length_range, unknown[index].range_from = bounds, "judge"
    left = []
    for candidate in candidates:
        is_judged = candidate.range_from == "judge"
        has_range = candidate.length_range is not None
        if has_range and (not is_judged or _is_long_enough(candidate, report, "range")):
            left.append(candidate)
    return left


def _answers(
    judge: Judge,
    question: Question[T],
    candidates: list[Candidate],
    report: PrepareReport,
    console: RunConsole,
) -> dict[int, T]:
    """Answers by index; failures are counted, and are not answers."""
    answers: dict[int, T] = {}
    num_failed = 0
    with console.bar(question.name, len(candidates), "requests") as bar:
        requests = [candidate.text for candidate in candidates]
        for index, answer in judge.ask(question, requests):
            if isinstance(answer, EndpointError):
                num_failed += 1
                report.drop(question.name, _failure(answer))
            else:
                answers[index] = answer
            bar.update(len(answers) + num_failed, f"{num_failed} failed" if num_failed else "")
    return answers


def _failure(error: EndpointError) -> str:
    if isinstance(error, AnswerError):
        return "no readable answer"
    if isinstance(error, RequestRefused):
        return "refused by the judge"
    return _NO_ANSWER


_NO_ANSWER = "no answer from the judge"


def _is_long_enough(candidate: Candidate, report: PrepareReport, stage: str) -> bool:
    """Counts what is not."""
    if candidate.length_range == (0, 0):
        report.drop(stage, "cannot be fulfilled")
    elif candidate.length_range is not None and candidate.length_range[1] < report.config.min_range:
        report.drop(stage, "below min_range")
    else:
        return True
    return False


def _write(candidates: list[Candidate], report: PrepareReport, console: RunConsole) -> None:
    output = Path(report.config.output)
    if candidates:
        lines = [
            json.dumps(
                {
                    "prompt": candidate.text,
                    "length_range": candidate.length_range,
                    "language": candidate.language,
                    "range_from": candidate.range_from,
                    "source": candidate.where,
                },
                ensure_ascii=False,
            )
            for candidate in candidates
        ]
        write_text_atomically(output, "\n".join(lines) + "\n")
    report.write(output)
    if not candidates:
        raise UserError(
            f"no request is left of {sum(report.rows_read.values())} rows: "
            f"{output.with_suffix('.report.md')} says what was dropped and why"
        )
    console.print(report.as_markdown())
    failed = sum(rows for (_, reason), rows in report.dropped.items() if reason == _NO_ANSWER)
    if failed:
        console.print(f"{failed} requests got no answer; the same command asks for them again")
    console.print(f"{output}: {len(candidates)} requests")
