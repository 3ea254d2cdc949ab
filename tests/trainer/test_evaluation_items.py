"""Records, responses and judges' replies: what is read, and what is refused and where."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from lwz_trainer.errors import UserError
from lwz_trainer.evaluation.answer import final_answer
from lwz_trainer.evaluation.items import (
    BANDS,
    Benchmark,
    load_items,
    load_requirement,
    load_responses,
)
from lwz_trainer.evaluation.journal import Journal
from lwz_trainer.evaluation.questions import (
    DIMENSIONS,
    criterion_question,
    pair_question,
    parse_criterion,
    parse_pair,
    parse_quality,
    quality_question,
)
from tests.trainer.evaluation_case import (
    arena_record,
    longbench_record,
    quality_reply,
    write_jsonl,
    writing_record,
)


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("The piece.", "The piece."),
        # The public scripts strip thinking only where a blank line follows it.
        ("<think>plan</think>The piece.", "The piece."),
        ("<think>plan</think>\nThe piece.", "The piece."),
        ("<think>plan</think>\n\nThe piece.", "The piece."),
        ("<think>a</think> <answer>The piece.</answer> done", "The piece."),
        # A stop string leaves the closing tag off.
        ("<think>a</think><answer>The piece.\n", "The piece."),
        # A template that opened the tag leaves it out of the response.
        ("plan</think><answer>The piece.</answer>", "The piece."),
        ("The piece.</answer>", "The piece."),
        ("<think>a</think><think>b</think>The piece.", "The piece."),
        # Thinking is cut out wherever it stands outside of <answer>.
        ("Sure! <think>plan</think>Here.", "Sure! Here."),
        ("<think>a</think>One,<think>b</think> two", "One, two"),
        ("Sure! <think>plan</think><answer>The piece.", "The piece."),
        ("The piece. <think>Was it good", "The piece."),
        ("<think>inside <answer> tags</think><answer>The piece.", "The piece."),
        # Generation was cut while thinking: none of it is an answer.
        ("<think>a long plan, and then", ""),
        ("<think>a</think>", ""),
        ("", ""),
        ("<answer>He wrote </think> on the wall.</answer>", "He wrote </think> on the wall."),
    ],
)
def test_final_answer_is_the_piece_without_thinking(response: str, answer: str) -> None:
    assert final_answer(response) == answer


def test_load_items_reads_the_three_formats(tmp_path: Path) -> None:
    writing = write_jsonl(tmp_path / "w.jsonl", [writing_record(7, "Law", ("Tone", "Length"))])
    [item] = load_items("writingbench", writing)
    assert (item.index, item.group, item.subgroup) == (7, "Law", "Law papers")
    assert [criterion.name for criterion in item.criteria] == ["Tone", "Length"]
    assert item.criteria[0].bands["9-10"] == "Tone at 9-10."

    listed = [{"model": "m", "response": "text"}, {"name": "n", "response": "more"}]
    arena = write_jsonl(
        tmp_path / "a.jsonl", [arena_record(0), arena_record(1, baseline_response=listed)]
    )
    first, second = load_items("arena-write", arena)
    assert (first.target, first.baselines["old-b"]) == (200, "Harbour 0 by b.")
    assert second.baselines == {"m": "text", "n": "more"}

    length = write_jsonl(tmp_path / "l.jsonl", [longbench_record(100), longbench_record(200)])
    assert [(i.index, i.target) for i in load_items("longbench-write", length)] == [
        (0, 100),
        (1, 200),
    ]


def test_load_items_leaves_out_empty_baselines_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    baselines = ["", {"m": " \n", "n": "text"}, [{"model": "m", "response": ""}], {}, {"m": "text"}]
    records = [arena_record(i, baseline_response=value) for i, value in enumerate(baselines)]
    items = load_items("arena-write", write_jsonl(tmp_path / "a.jsonl", records))
    assert [item.baselines for item in items] == [{}, {"n": "text"}, {}, {}, {"m": "text"}]
    assert "2 empty baseline texts are left out; 3 of 5 tasks have no baseline" in caplog.text
    caplog.clear()
    load_items("arena-write", write_jsonl(tmp_path / "b.jsonl", records[-1:]))
    assert not caplog.text


def _without(record: dict, *path: Any) -> dict:
    copy = json.loads(json.dumps(record))
    inner = copy
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    return copy


@pytest.mark.parametrize(
    ("benchmark", "record", "expected"),
    [
        ("writingbench", [1], "holds a list"),
        ("writingbench", _without(writing_record(1, "Law", ("A",)), "query"), "no `query`"),
        (
            "writingbench",
            _without(writing_record(1, "Law", ("A",)), "checklist", 0, "7-8"),
            r"checklist\[0\] has no `7-8`",
        ),
        ("writingbench", writing_record(1, "Law", ()), "checklist must be a list of objects"),
        ("writingbench", writing_record(1, "Law", ("A", "A")), "two criteria of one name"),
        (
            "writingbench",
            writing_record(1, "Law", ("A",)) | {"index": True},
            "index must be an integer",
        ),
        ("writingbench", writing_record(0, "Law", ("A",)), "index 0 stands in .* line 1 already"),
        ("arena-write", arena_record(1, baseline_response="text"), "must be a list of objects"),
        ("arena-write", arena_record(1, baseline_response={"m": 3}), "m must be a text"),
        (
            "arena-write",
            arena_record(1, baseline_response=[{"model": "m", "response": "text"}] * 2),
            "must hold texts of different names",
        ),
        ("longbench-write", longbench_record(0), "length must be above 0, got 0"),
    ],
)
def test_load_items_names_the_line_of_a_bad_record(
    tmp_path: Path, benchmark: Benchmark, record: Any, expected: str
) -> None:
    good: dict[Benchmark, Any] = {
        "writingbench": writing_record(0, "Law", ("A",)),
        "arena-write": arena_record(0),
        "longbench-write": longbench_record(100),
    }
    path = write_jsonl(tmp_path / "data.jsonl", [good[benchmark], record])
    with pytest.raises(UserError, match=rf"data\.jsonl line 2.*{expected}"):
        load_items(benchmark, path)


def test_load_items_refuses_an_empty_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is empty"):
        load_items("longbench-write", write_jsonl(tmp_path / "l.jsonl", []))


def test_load_requirement_keeps_the_criteria_of_its_twin(tmp_path: Path) -> None:
    path = write_jsonl(
        tmp_path / "w.jsonl", [writing_record(i, "Law", ("Tone", "Length")) for i in range(3)]
    )
    items = load_items("writingbench", path)
    subset = write_jsonl(
        tmp_path / "s.jsonl", [writing_record(i, "Law", ("Tone", "Length")) for i in (0, 2)]
    )
    twin = write_jsonl(
        tmp_path / "c.jsonl", [writing_record(i, "Law", ("Length",)) for i in (0, 2)]
    )
    requirement = load_requirement("length", subset, twin, items)
    assert requirement.indices == (0, 2)
    assert requirement.criteria == ((0, "Length"), (2, "Length"))

    stranger = write_jsonl(tmp_path / "x.jsonl", [writing_record(0, "Law", ("Metre",))])
    with pytest.raises(UserError, match="has the criterion 'Metre'"):
        load_requirement("length", subset, stranger, items)
    with pytest.raises(UserError, match="index 1 is not in the benchmark file"):
        load_requirement(
            "length",
            write_jsonl(tmp_path / "y.jsonl", [writing_record(1, "Law", ("Tone",))]),
            twin,
            items[:1],
        )


def test_load_responses_counts_a_repeated_line_once(tmp_path: Path) -> None:
    items = load_items(
        "longbench-write", write_jsonl(tmp_path / "l.jsonl", [longbench_record(9)] * 2)
    )
    line = {"index": 1, "response": "text", "model": "any other key"}
    path = write_jsonl(tmp_path / "r.jsonl", [line, line])
    assert load_responses(path, items) == {1: "text"}


@pytest.mark.parametrize(
    ("second", "expected"),
    [
        ({"index": 0, "response": "b"}, "index 0 has another response in .* line 1"),
        ({"index": 2, "response": "b"}, "index 2 is no task"),
        ({"index": 1, "response": None}, "response must be a text"),
        ({"index": "1", "response": "b"}, "index must be an integer"),
        ({"response": "b"}, "no `index`"),
    ],
)
def test_load_responses_names_the_line_of_a_bad_one(
    tmp_path: Path, second: dict, expected: str
) -> None:
    items = load_items(
        "longbench-write", write_jsonl(tmp_path / "l.jsonl", [longbench_record(9)] * 2)
    )
    path = write_jsonl(tmp_path / "r.jsonl", [{"index": 0, "response": "a"}, second])
    with pytest.raises(UserError, match=rf"r\.jsonl line 2.*{expected}"):
        load_responses(path, items)


def test_journal_cuts_a_torn_last_line_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "j.jsonl"
    journal = Journal(path)
    journal.append({"index": 0, "response": "夜\u2028雨"})
    with path.open("ab") as file:
        file.write(b'{"index": 1, "respon')
    again = Journal(path)
    assert again.records == [{"index": 0, "response": "夜\u2028雨"}]
    again.append({"index": 1, "response": ""})
    assert [record["index"] for record in Journal(path).records] == [0, 1]
    assert path.read_bytes().count(b"\n") == 2
    path.write_text('{"index": 0}\nbroken\n')
    with pytest.raises(UserError, match=r"j\.jsonl line 2 is not valid JSON"):
        Journal(path)


@pytest.mark.parametrize("text", ["Notes without a line break", "Notes.\nMore of them"])
def test_journal_leaves_a_file_that_is_none_as_it_is(tmp_path: Path, text: str) -> None:
    path = tmp_path / "notes.txt"
    path.write_text(text)
    with pytest.raises(UserError, match=r"notes\.txt"):
        Journal(path)
    assert path.read_text() == text
    path.write_text('{"mine": 1}\n{"half": ')
    Journal(path)
    assert path.read_text() == '{"mine": 1}\n{"half": '
    for occupied in (tmp_path, path / "below.jsonl"):
        with pytest.raises(UserError, match="is in the way; pass another path"):
            Journal(occupied)


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ('{"score": 7, "reason": "good"}', 7),
        ('```json\n{"score": 7.0, "reason": "two\nlines"}\n```', 7),
        ('<think>{"score": 1}</think>Here: {"reason": "r", "score": 10}', 10),
        ('{"score": 1}', 1),
        ('I compare {A} and {B}. {"score": 4}', 4),
        ('{"score": <1 to 10>}: {"score": 4, "reason": "its <think> shows"} {', 4),
        ('{"score": 4}\n```json\n{"score": 4}\n```', 4),
    ],
)
def test_parse_criterion_reads_what_judges_write(text: str, score: int) -> None:
    assert parse_criterion(text)["score"] == score


@pytest.mark.parametrize(
    "text",
    [
        "",
        "I would say 7.",
        '{"score": 7',
        '{"score": 0}',
        '{"score": 11}',
        '{"score": 7.5}',
        '{"score": "7"}',
        '{"score": true}',
        '{"score": NaN}',
        '{"score": Infinity}',
        '{"reason": "no score"}',
        '{"score": 7, "reason": 3}',
        '{"score": 1} {"score": 2}',
        # Cut while thinking: a draft is no verdict.
        '<think>Perhaps {"score": 3, "reason": "draft"} but wait, the ending is',
        '<think>a</think> {"score": 3} <think>or rather',
        # Cut in the object: what stands in it is another one.
        '{"score": 7, "parts": {"score": 3}, "reas',
        '{"score": ' + "[" * 100_000,
    ],
)
def test_parse_criterion_refuses_anything_else(text: str) -> None:
    with pytest.raises(ValueError):
        parse_criterion(text)


def test_parse_pair_and_quality_read_their_schema_only() -> None:
    assert parse_pair('{"winner": "tie", "reason": "even"}')["winner"] == "tie"
    for text in ('{"winner": "C"}', '{"winner": 1}', "{}"):
        with pytest.raises(ValueError, match="winner must be"):
            parse_pair(text)
    assert parse_quality(quality_reply(1, 2, 3, 4, 5, 1))["coherence"] == 3
    half = json.dumps(dict.fromkeys(list(DIMENSIONS)[:5], 3))
    with pytest.raises(ValueError, match="reading_experience must be a whole number"):
        parse_quality(half)
    with pytest.raises(ValueError, match="from 1 to 5, got 6"):
        parse_quality(quality_reply(6, 1, 1, 1, 1, 1))


def test_questions_hold_what_is_judged_and_the_scale(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "w.jsonl", [writing_record(7, "Law", ("Tone",))])
    [item] = load_items("writingbench", path)
    question = criterion_question("REQUEST", "PIECE", item.criteria[0])[-1]["content"]
    for text in ("REQUEST", "PIECE", "How well Tone is met.", *(f"Tone at {b}" for b in BANDS)):
        assert text in question
    question = pair_question("REQUEST", "ONE", "TWO")[-1]["content"]
    assert question.index("piece A") < question.index("ONE") < question.index("piece B")
    assert question.index("piece B") < question.index("TWO")
    question = quality_question("REQUEST", "PIECE")[-1]["content"]
    assert all(f'"{name}"' in question for name in DIMENSIONS)


@pytest.mark.parametrize(
    ("benchmark", "name", "count"),
    [
        ("writingbench", "benchmark_all.jsonl", 1000),
        ("writingbench", "writingbench_length_100.jsonl", 100),
        ("writingbench", "writingbench_length_C_100.jsonl", 100),
        ("longbench-write", "longbench_write_en.jsonl", 60),
    ],
)
def test_load_items_reads_the_public_files(benchmark: Benchmark, name: str, count: int) -> None:
    path = Path(os.environ.get("LWZ_BENCHMARKS", "")) / name
    if not os.environ.get("LWZ_BENCHMARKS") or not path.exists():
        pytest.skip(f"LWZ_BENCHMARKS names no directory with {name}")
    items = load_items(benchmark, path)
    assert len(items) == count
    if benchmark == "longbench-write":
        assert all(item.target for item in items)
    else:
        sizes = {len(item.criteria) for item in items}
        assert sizes == ({1, 2} if "_C_" in name else {5})
