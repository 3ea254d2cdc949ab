"""Whole evaluations: stub judge or loopback server, tiny model, kills, and bad input."""

import csv
import dataclasses
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lwz_trainer.__main__ import main
from lwz_trainer.config.endpoint import EndpointConfig
from lwz_trainer.config.evaluation import EloConfig, EvalConfig, GenerateConfig, MonitorConfig
from lwz_trainer.endpoint import EndpointDown
from lwz_trainer.errors import UserError
from lwz_trainer.evaluation.generation import generate_responses, resolve_sampling
from lwz_trainer.evaluation.items import load_items
from lwz_trainer.evaluation.journal import Journal
from lwz_trainer.evaluation.judging import JudgeCall
from lwz_trainer.evaluation.run import run_evaluation
from lwz_trainer.train.records import write_records
from tests.processes import Program
from tests.trainer.evaluation_case import (
    StubJudge,
    arena_record,
    longbench_record,
    quality_reply,
    write_jsonl,
    writing_record,
)
from tests.trainer.fault_server import FaultServer, Hang, Reply, chat_reply, user_text
from tests.trainer.test_bad_input import assert_refused
from tests.trainer.tiny import make_tiny_model

HOSTILE = '</div><b id="injected">&amp;<!-- insert title -->'


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def writing_case(tmp_path: Path, **settings: Any) -> EvalConfig:
    """Two queries of two criteria; system a answers both, b the first one."""
    data = write_jsonl(
        tmp_path / "w.jsonl",
        [writing_record(3, "Law", ("Tone", "Length")), writing_record(5, "Arts", ("Tone", "Form"))],
    )
    a = [
        {"index": 3, "response": f"<think>plan</think>{HOSTILE}"},
        {"index": 5, "response": "word " * 100},
    ]
    paths = {
        "a": write_jsonl(tmp_path / "a.jsonl", a),
        "b": write_jsonl(tmp_path / "b.jsonl", [{"index": 3, "response": "<think>cut"}]),
    }
    defaults: dict[str, Any] = {
        "data": str(data),
        "output_dir": str(tmp_path / "out"),
        "responses": tuple(f"{name}={path}" for name, path in paths.items()),
    }
    return EvalConfig(**(defaults | settings))


def by_criterion(call: JudgeCall) -> str:
    return json.dumps({"score": {"Tone": 4, "Length": 9, "Form": 8}[call.part], "reason": "r"})


def test_run_evaluation_writes_hand_computed_tables(tmp_path: Path) -> None:
    config = writing_case(tmp_path)
    judge = StubJudge(by_criterion)
    summary = run_evaluation("writingbench", config, judge=judge)
    out = Path(config.output_dir)
    overall = {row["system"]: row for row in read_csv(out / "tables" / "overall.csv")}
    assert float(overall["a"]["score"]) == (4 + 9 + 4 + 8) / 4
    # b's thinking never ended: no answer, the lowest scores, and no call for them.
    assert float(overall["b"]["score"]) == 1
    assert overall["b"]["criteria missing"] == "2"
    assert {system for system, _, _ in judge.asked} == {"a"}
    assert overall["LongWriter-Zero"]["score"] == "8.69"
    assert "2506.18841" in overall["LongWriter-Zero"]["source"]
    domains = {row["domain"]: row for row in read_csv(out / "tables" / "domains.csv")}
    assert (domains["Law"]["a"], domains["Arts"]["b"]) == ("6.5", "")
    items = read_csv(out / "tables" / "items.csv")
    assert [(row["system"], row["index"], row["score"]) for row in items] == [
        ("a", "3", "6.5"),
        ("a", "5", "6.0"),
        ("b", "3", "1.0"),
    ]
    results = json.loads((out / "results.json").read_text())
    assert results["scores"]["a"]["overall"] == 6.25
    assert results["scores"]["b"]["domains"]["Arts"] is None
    assert any("b answers 1 of 2 tasks" in warning for warning in results["warnings"])
    assert summary.report == out / "report.html"


def test_run_evaluation_adds_requirements(tmp_path: Path) -> None:
    subset = write_jsonl(tmp_path / "s.jsonl", [writing_record(3, "Law", ("Tone", "Length"))])
    twin = write_jsonl(tmp_path / "c.jsonl", [writing_record(3, "Law", ("Length",))])
    config = writing_case(tmp_path, requirements=(f"length={subset},{twin}",))
    run_evaluation("writingbench", config, judge=StubJudge(by_criterion))
    rows = read_csv(Path(config.output_dir) / "tables" / "requirements.csv")
    assert rows == [
        {"requirement": "length R", "a": "6.5", "b": "1.0"},
        {"requirement": "length C", "a": "9.0", "b": "1.0"},
    ]


def test_report_page_shows_texts_as_text(tmp_path: Path) -> None:
    config = writing_case(tmp_path)
    page = run_evaluation("writingbench", config, judge=StubJudge(by_criterion)).report.read_text()
    assert '<b id="injected">' not in page
    assert "&lt;/div&gt;&lt;b id=&quot;injected&quot;&gt;&amp;amp;" in page
    assert "plan" not in page  # thinking is no part of the piece
    assert page.count("<svg") == 2
    assert "<script" not in page
    assert "http-equiv" in page
    assert "<!-- insert" not in page
    assert "Tone: score 4. r" in page
    hidden = run_evaluation(
        "writingbench", writing_case(tmp_path, page_items=0), judge=StubJudge(by_criterion)
    ).report.read_text()
    assert '<details class="reading">' not in hidden


def test_run_evaluation_resumes_without_asking_twice(tmp_path: Path) -> None:
    config = writing_case(tmp_path)

    def first_two(call: JudgeCall) -> str:
        if len(judge.asked) > 2:
            raise EndpointDown("the endpoint is down")
        return by_criterion(call)

    judge = StubJudge(first_two)
    with pytest.raises(EndpointDown):
        run_evaluation("writingbench", config, judge=judge)
    journal = Path(config.output_dir) / "judgments.jsonl"
    assert len(journal.read_text().splitlines()) == 2
    assert not (journal.parent / "report.html").exists()
    with journal.open("a") as file:
        file.write('{"system": "a", "ind')

    again = StubJudge(by_criterion)
    run_evaluation("writingbench", config, judge=again)
    assert len(again.asked) == 2
    assert not set(again.asked) & set(judge.asked[:2])
    report = (journal.parent / "tables" / "overall.csv").read_bytes()
    # A public script scores the last item twice when it resumes: here a third run changes nothing.
    third = StubJudge(by_criterion)
    run_evaluation("writingbench", config, judge=third)
    assert third.asked == []
    assert (journal.parent / "tables" / "overall.csv").read_bytes() == report
    assert len(journal.read_text().splitlines()) == 4
    # Lines that were doubled by hand count once too.
    lines = journal.read_text()
    journal.write_text(lines + lines.splitlines()[-1] + "\n")
    run_evaluation("writingbench", config, judge=StubJudge(by_criterion))
    assert (journal.parent / "tables" / "overall.csv").read_bytes() == report


def test_judgments_of_another_judge_or_answer_are_not_reused(tmp_path: Path) -> None:
    config = writing_case(tmp_path)
    run_evaluation("writingbench", config, judge=StubJudge(by_criterion))
    other = StubJudge(by_criterion, settings="another model")
    run_evaluation("writingbench", config, judge=other)
    assert len(other.asked) == 4
    rewritten = [{"index": 3, "response": "new"}, {"index": 5, "response": "word " * 100}]
    write_jsonl(tmp_path / "a.jsonl", rewritten)
    changed = StubJudge(by_criterion)
    run_evaluation("writingbench", config, judge=changed)
    assert sorted(changed.asked) == [("a", 3, "Length"), ("a", 3, "Tone")]


def test_a_failed_judgment_is_missing_and_asked_again(tmp_path: Path) -> None:
    config = writing_case(tmp_path)
    judge = StubJudge(lambda call: None if call.part == "Length" else by_criterion(call))
    summary = run_evaluation("writingbench", config, judge=judge)
    assert summary.num_failures == 1
    results = json.loads((Path(config.output_dir) / "results.json").read_text())
    assert results["scores"]["a"]["overall"] == pytest.approx((4 + 4 + 8) / 3)
    assert results["failures"] == ["a, index 3, Length: unreadable"]
    again = StubJudge(by_criterion)
    assert run_evaluation("writingbench", config, judge=again).num_failures == 0
    assert again.asked == [("a", 3, "Length")]


def test_arena_evaluation_rates_systems_against_baselines(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "arena.jsonl", [arena_record(i) for i in range(6)])
    answers = [{"index": i, "response": f"mine {i}" if i else ""} for i in range(6)]
    path = write_jsonl(tmp_path / "mine.jsonl", answers)

    def wins_second_place_only(call: JudgeCall) -> str:
        return json.dumps({"winner": "B" if call.part.startswith("old-a/") else "tie"})

    config = EvalConfig(
        data=str(data),
        output_dir=str(tmp_path / "out"),
        responses=(f"mine={path}",),
        elo=EloConfig(num_bootstrap=50),
    )
    judge = StubJudge(wins_second_place_only)
    run_evaluation("arena-write", config, judge=judge)
    assert len(judge.asked) == 5 * 2 * 2
    results = json.loads((tmp_path / "out" / "results.json").read_text())["scores"]
    # The judge likes the second place: half of these are won. The empty answer loses all four.
    assert results["win_rate"]["mine"] == pytest.approx((5 * 2 * 0.5 + 5 * 2 * 0.5) / 24)
    assert results["agreement"]["mine"] == pytest.approx((5 + 2) / 12)
    rates = read_csv(tmp_path / "out" / "tables" / "win_rates.csv")
    assert float(rates[0]["old-b"]) == pytest.approx(5 / 12)
    ratings = read_csv(tmp_path / "out" / "tables" / "ratings.csv")
    assert {row["system"] for row in ratings[:3]} == {"mine", "old-a", "old-b"}
    assert "Harbour 3 by b." in (tmp_path / "out" / "report.html").read_text()
    same_name = dataclasses.replace(config, responses=(f"old-a={path}",))
    with pytest.raises(UserError, match="'old-a' is the name of a baseline"):
        run_evaluation("arena-write", same_name, judge=judge)


def test_eval_command_judges_through_a_failing_server(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_jsonl(tmp_path / "l.jsonl", [longbench_record(n) for n in (10, 20, 30, 40)])
    answers = [{"index": i, "response": "word " * n} for i, n in enumerate((10, 40, 30, 40))]
    path = write_jsonl(tmp_path / "a.jsonl", answers)
    whole = quality_reply(5, 5, 5, 5, 5, 3)
    replies: dict[str, list[Reply | Hang]] = {
        "10": [Reply("busy", status=429, headers={"Retry-After": "0"})],
        "20": [chat_reply(quality_reply(9, 1, 1, 1, 1, 1)), chat_reply("I like it.")],
        "30": [chat_reply("{}")] * 9,
        "40": [
            Reply("", status=500),
            Hang(1.1),
            Reply("<html>"),
            Reply(chat_reply(whole).body, cut=9),
            chat_reply(whole[:-9]),
        ],
    }

    def answer(body: dict[str, Any], number: int) -> Reply | Hang:
        words = user_text(body).split("Report in ")[1].split()[0]
        if replies[words]:
            return replies[words].pop(0)
        return chat_reply(whole)

    with FaultServer(answer) as server:
        arguments = [
            "eval",
            "longbench-write",
            f"--data={data}",
            f"--output_dir={tmp_path / 'out'}",
            "--responses",
            f"a={path}",
            f"--judge.base_url={server.base_url}",
            "--judge.model=critic",
            "--judge.backoff_s=0.01",
            "--judge.timeout_s=1",
        ]
        assert main(arguments) == 0
        assert "1 calls failed" in capsys.readouterr().out
        results = json.loads((tmp_path / "out" / "results.json").read_text())
        quality = (5 * 100 + 50) / 6
        assert results["scores"]["a"]["quality"] == pytest.approx(quality)
        assert results["scores"]["a"]["length"] == pytest.approx((100 + 200 / 3 + 100 + 100) / 4)
        assert results["scores"]["a"]["items"]["2"][2] is None
        assert (server.bodies[0]["temperature"], server.bodies[0]["max_tokens"]) == (0.5, 1024)
        num_paid = len(server.bodies)
        replies["30"].clear()
        assert main(arguments) == 0
        # What could not be read is asked anew, and nothing else.
        assert len(server.bodies) == num_paid + 1
        results = json.loads((tmp_path / "out" / "results.json").read_text())
        assert results["scores"]["a"]["items"]["2"][2] == pytest.approx(quality)
        assert results["failures"] == []


def test_eval_command_killed_while_judging_pays_for_no_call_twice(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "l.jsonl", [longbench_record(n) for n in (10, 20, 30, 40)])
    answers = [{"index": i, "response": f"word {i}"} for i in range(4)]
    path = write_jsonl(tmp_path / "a.jsonl", answers)
    killed: list[Program] = []

    def answer(body: dict[str, Any], number: int) -> Reply | Hang:
        if number == 2:
            killed[0].kill()
            return Hang(0.1)
        return chat_reply(quality_reply(4, 4, 4, 4, 4, 4))

    with FaultServer(answer) as server:
        command = [
            "eval",
            "longbench-write",
            f"--data={data}",
            f"--output_dir={tmp_path / 'out'}",
            "--responses",
            f"a={path}",
        ]
        command += [f"--judge.base_url={server.base_url}", "--judge.model=critic"]
        command += ["--judge.concurrency=1"]
        killed.append(Program("lwz_trainer", command))
        assert killed[0].wait(timeout=120) == -signal.SIGKILL
        assert not (tmp_path / "out" / "report.html").exists()
        assert main(command) == 0
    texts = [user_text(body) for body in server.bodies]
    assert len(texts) == 5  # four answers, and the one that was under way
    assert texts[2] in texts[3:]
    assert len(set(texts)) == 4
    [overall] = read_csv(tmp_path / "out" / "tables" / "overall.csv")
    assert (overall["S_q"], overall["missing"]) == ("75.0", "0")


def test_eval_command_that_is_interrupted_ends_in_one_line_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    # A worker that pytest starts ignores it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    data = write_jsonl(tmp_path / "l.jsonl", [longbench_record(n) for n in (10, 20, 30)])
    answers = [{"index": i, "response": f"word {i}"} for i in range(3)]
    path = write_jsonl(tmp_path / "a.jsonl", answers)

    def answer(body: dict[str, Any], number: int) -> Reply | Hang:
        if number == 1:
            os.kill(os.getpid(), signal.SIGINT)
            return Hang(1)  # the signal comes before the answer
        return chat_reply(quality_reply(4, 4, 4, 4, 4, 4))

    with FaultServer(answer) as server:
        command = ["eval", "longbench-write", f"--data={data}", f"--output_dir={tmp_path / 'out'}"]
        command += ["--responses", f"a={path}", f"--judge.base_url={server.base_url}"]
        command += ["--judge.model=critic", "--judge.concurrency=1"]
        assert_refused(command, capsys, "error: interrupted; the same command goes on", code=1)
        assert main(command) == 0
        assert len(server.bodies) == 4  # the one that was under way again
    [overall] = read_csv(tmp_path / "out" / "tables" / "overall.csv")
    assert overall["missing"] == "0"


def tiny_generation(tmp_path: Path, **settings: Any) -> GenerateConfig:
    model = tmp_path / "tiny-llama"
    if not model.exists():
        make_tiny_model(tmp_path)
    defaults: dict[str, Any] = {
        "name": "tiny",
        "model": str(model),
        "dtype": "fp32",
        "max_tokens": 12,
        "max_num_seqs": 2,
        "template": str(Path(__file__).parent / "answer_only.txt"),
    }
    return GenerateConfig(**(defaults | settings))


def test_generation_by_the_engine_resumes_to_the_same_texts(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "l.jsonl", [longbench_record(n) for n in (10, 20, 30)])
    items = load_items("longbench-write", data)
    config = tiny_generation(tmp_path)
    sampling = resolve_sampling("longbench-write", config)
    assert (sampling.temperature, sampling.top_p, sampling.max_tokens) == (0.6, 0.95, 12)

    def generate(name: str, config: GenerateConfig = config, num_items: int = 3) -> dict[int, str]:
        responses, failures = generate_responses(
            config,
            resolve_sampling("longbench-write", config),
            items[:num_items],
            Journal(tmp_path / name),
            tmp_path / "cache",
            lambda done, total: None,
        )
        assert failures == []
        return responses

    whole = generate("whole.jsonl")
    assert sorted(whole) == [0, 1, 2]
    assert len(set(whole.values())) == 3
    assert all(text.startswith("<answer>") for text in whole.values())
    lines = (tmp_path / "whole.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "torn.jsonl").write_text(lines[0] + lines[1][:20])
    assert generate("torn.jsonl") == whole
    assert generate("whole.jsonl", num_items=1) == {0: whole[0]}
    assert json.loads(lines[0])["num_tokens"] <= 12
    with pytest.raises(UserError, match="written with other settings"):
        generate("whole.jsonl", tiny_generation(tmp_path, seed=1))
    make_tiny_model(tmp_path)  # weights written again in place
    with pytest.raises(UserError, match="other settings or weights"):
        generate("whole.jsonl")
    with pytest.raises(UserError, match=r"index 0: the prompt has .* lower generate\.max_tokens"):
        generate("long.jsonl", tiny_generation(tmp_path, max_tokens=512))


@pytest.mark.parametrize("template", ["chat", "direct"])
def test_generation_by_an_endpoint_sends_the_benchmarks_sampling(
    tmp_path: Path, template: str
) -> None:
    data = write_jsonl(tmp_path / "w.jsonl", [writing_record(4, "Law", ("Tone",))])

    def answer(body: dict[str, Any], number: int) -> Reply:
        if body["model"] == "critic":
            return chat_reply('{"score": 4}')
        if "messages" in body:
            return chat_reply("<think>x</think>Served.")
        return Reply(json.dumps({"choices": [{"text": "<answer>Served.", "index": 0}]}))

    with FaultServer(answer) as server:
        config = EvalConfig(
            data=str(data),
            output_dir=str(tmp_path / "out"),
            generate=GenerateConfig(
                name="served",
                template=template,
                chat_system="Be brief." if template == "chat" else "",
                endpoint=EndpointConfig(base_url=server.base_url, model="m"),
            ),
            judge=EndpointConfig(base_url=server.base_url, model="critic"),
        )
        run_evaluation("writingbench", config)
        run_evaluation("writingbench", config)
    body, question = server.bodies  # the second run asked nothing anew
    assert (question["model"], question["temperature"], question["top_p"]) == ("critic", 1.0, 0.95)
    assert "x</think>" not in user_text(question)
    assert "Served." in user_text(question)
    assert (body["temperature"], body["top_p"], body["top_k"], body["max_tokens"]) == (
        0.7,
        0.8,
        20,
        16_000,
    )
    if template == "chat":
        assert [message["role"] for message in body["messages"]] == ["system", "user"]
    else:
        assert body["stop"] == ["<|user|>", "<|endoftext|>", "</answer>"]
        assert "Write a report of 100 words on subject 4." in body["prompt"]
    [row] = read_csv(tmp_path / "out" / "tables" / "items.csv")
    assert (row["words"], row["score"]) == ("1", "4.0")


def test_answers_to_one_benchmark_are_never_taken_for_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "arena.jsonl", [arena_record(0)])
    write_jsonl(tmp_path / "english.jsonl", [longbench_record(100)])
    write_jsonl(tmp_path / "longer.jsonl", [longbench_record(100), longbench_record(200)])
    write_jsonl(tmp_path / "chinese.jsonl", [{**longbench_record(100), "prompt": "写一百字。"}])

    def answer(body: dict[str, Any], number: int) -> Reply:
        return chat_reply(f"Asked: {user_text(body)}")

    with FaultServer(answer) as server:

        def evaluate(benchmark: str, data: str, *other: str) -> int:
            model = [f"--generate.endpoint.base_url={server.base_url}", "--generate.template=chat"]
            model += ["--generate.endpoint.model=m", "--generate.name=m"]
            return main(["eval", benchmark, f"--data={data}.jsonl", *model, *other])

        assert evaluate("arena-write", "arena") == 0
        assert evaluate("longbench-write", "english") == 0
        assert len(server.bodies) == 2
        kept = Path("runs/eval/longbench-write/responses/m.jsonl")
        assert json.loads(kept.read_text())["response"] == "Asked: Report in 100 words."
        assert evaluate("longbench-write", "longer") == 0  # the first task is the same one
        assert len(server.bodies) == 3
        capsys.readouterr()
        assert evaluate("longbench-write", "chinese") == 2
        assert "answers another task 0 than this benchmark file" in capsys.readouterr().err
        folder = "--output_dir=runs/eval/arena-write"
        assert evaluate("longbench-write", "english", folder) == 2
        assert "results.json is a result of arena-write" in capsys.readouterr().err
        (tmp_path / "results.json").write_text("[]")
        assert evaluate("longbench-write", "english", "--output_dir=.") == 2
        assert "results.json is no result of an evaluation" in capsys.readouterr().err
        assert len(server.bodies) == 3


def test_monitor_judges_samples_of_a_run(tmp_path: Path) -> None:
    row = {"prompt": "Write.", "words_answer": 1, "redundancy": 0.5, "group": 0}
    for step in (1, 2):
        rows = [
            row
            | {
                "member": member,
                # Members with an even number score higher, and have a word of their own.
                "reward_writing": step / (10 if member % 2 == 0 else 20),
                "answer": ("sea tapestry" if member % 2 == 0 else "sea calm")
                + " later" * (step - 1),
            }
            for member in range(40)
        ]
        write_records(tmp_path / "run" / "samples" / f"step_{step:05d}.parquet", rows)
    config = writing_case(
        tmp_path,
        monitor=MonitorConfig(run=str(tmp_path / "run"), run_samples=1),
        judge=EndpointConfig(base_url="http://127.0.0.1:9/v1", model="unused"),
    )

    def reply(call: JudgeCall) -> str:
        if call.system.startswith("training step"):
            score = 5 - int(call.system[-1])
            return quality_reply(*[score] * 6)
        return by_criterion(call)

    judge = StubJudge(reply)
    run_evaluation("writingbench", config, judge=judge)
    out = Path(config.output_dir)
    rows_read = read_csv(out / "tables" / "training.csv")
    assert [(r["step"], r["samples"], r["reward model"], r["judge"]) for r in rows_read] == [
        ("1", "1", "0.1", "75.0"),
        ("2", "1", "0.2", "50.0"),
    ]
    assert "may be gaming the reward model" in (out / "report.md").read_text()
    results = json.loads((out / "results.json").read_text())
    assert results["scores"]["a"]["overall"] == 6.25
    assert results["training"] == {"over_samples": None, "over_steps": None}  # of two points
    assert sum(system.startswith("training step") for system, _, _ in judge.asked) == 2
    words = [(w["kind"], w["word"]) for w in read_csv(out / "tables" / "training_words.csv")]
    assert words == [("scored higher", "tapestry"), ("later steps", "later")]
    alone = dataclasses.replace(config, output_dir=str(tmp_path / "alone"), judge=EndpointConfig())
    run_evaluation("writingbench", alone)
    rows_read = read_csv(tmp_path / "alone" / "tables" / "training.csv")
    assert [(r["reward model"], r["judge"]) for r in rows_read] == [("0.1", ""), ("0.2", "")]
    assert "There is no judge" in (tmp_path / "alone" / "report.md").read_text()


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_evaluation_without_a_judge_measures_lengths_and_words(tmp_path: Path, kind: str) -> None:
    data = write_jsonl(tmp_path / "l.jsonl", [longbench_record(10)] * 40)
    answers = [{"index": i, "response": "calm sea tapestry"} for i in range(40)]
    path = write_jsonl(tmp_path / "a.jsonl", answers)
    baseline = tmp_path / f"baseline.{kind}"
    if kind == "txt":
        baseline.write_text("calm sea\n" * 40)
    else:
        write_jsonl(baseline, [{"response": "<think>tapestry</think>calm sea"}] * 40)
    config = EvalConfig(
        data=str(data),
        output_dir=str(tmp_path / "out"),
        responses=(f"a={path}",),
        monitor=MonitorConfig(baseline=str(baseline)),
    )
    run_evaluation("longbench-write", config)
    tables = tmp_path / "out" / "tables"
    [used] = read_csv(tables / "overused.csv")
    assert (used["word"], used["uses"], used["uses in baseline"]) == ("tapestry", "40", "0")
    [overall] = read_csv(tables / "overall.csv")
    assert (overall["S_l"], overall["S_q"], overall["missing"]) == ("0.0", "", "40")
    assert "There is no judge" in (tmp_path / "out" / "report.md").read_text()


def set_flag(name: str, value: str) -> Callable[[Path, list[str]], list[str]]:
    return lambda folder, arguments: [
        *(a for a in arguments if not a.startswith(f"--{name}=")),
        f"--{name}={value}",
    ]


def break_line(folder: Path, arguments: list[str]) -> list[str]:
    with (folder / "a.jsonl").open("a") as file:
        file.write("{broken\n")
    return arguments


@pytest.mark.parametrize(
    ("harm", "expected"),
    [
        (lambda folder, arguments: ["eval", "essays"], "expected writingbench, arena-write"),
        (lambda folder, arguments: ["eval"], "got nothing"),
        (set_flag("data", "no.jsonl"), "cannot read no.jsonl"),
        (set_flag("data", ""), "data is not set"),
        (break_line, "a.jsonl line 2 is not valid JSON"),
        (set_flag("limit", "-1"), "limit and page_items must be at least 0"),
        (set_flag("generate.name", "x"), "generate.name and a model belong together"),
        (set_flag("generate.model", "no/where/at/all"), "generate.name and a model"),
        (set_flag("generate.endpoint.temperature", "1"), "set generate.temperature instead"),
        (set_flag("judge.base_url", "ftp://x"), "endpoint.base_url must look like"),
        (set_flag("monitor.run", "run"), "run has no readable samples"),
        (set_flag("elo.virtual_ties", "-1"), "elo.virtual_ties"),
        (
            lambda folder, arguments: [*arguments, "--requirements", "length=a,b"],
            "requirements belong to writingbench",
        ),
        (
            lambda folder, arguments: [
                a if a != f"a={folder / 'a.jsonl'}" else "a" for a in arguments
            ],
            "responses: expected NAME=FILE, got 'a'",
        ),
        (
            lambda folder, arguments: [*arguments, "--generate.name=x", "--generate.model=no/m/x"],
            "no model at no/m/x",
        ),
        (
            lambda folder, arguments: [
                *arguments,
                "--generate.name=x",
                "--generate.endpoint.base_url=http://localhost:1/v1",
                "--generate.template=sonnet",
            ],
            "unknown template 'sonnet'",
        ),
    ],
)
def test_eval_refuses_bad_input_in_one_line_and_writes_nothing(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    harm: Callable[[Path, list[str]], list[str]],
    expected: str,
) -> None:
    data = write_jsonl(tmp_path / "l.jsonl", [longbench_record(10)])
    responses = write_jsonl(tmp_path / "a.jsonl", [{"index": 0, "response": "text"}])
    out = tmp_path / "out"
    arguments = ["eval", "longbench-write", f"--data={data}", f"--output_dir={out}"]
    arguments += ["--responses", f"a={responses}"]
    capsys.readouterr()
    assert main(harm(tmp_path, arguments)) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(errors) == 1, errors
    assert expected in errors[0]
    assert not out.exists()
