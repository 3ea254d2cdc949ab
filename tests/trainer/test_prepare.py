"""The `prepare` command from conversations to requests, against a judge that misbehaves."""

import json
import os
import re
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lwz_trainer.__main__ import main
from lwz_trainer.config.prepare import LocalJudgeConfig
from lwz_trainer.data.prompts import load_prompts
from lwz_trainer.prepare.local_judge import LocalJudge
from lwz_trainer.prepare.questions import Question
from tests.processes import Program
from tests.trainer.fault_server import FaultServer, Hang, Reply, Reset, chat_reply, user_text
from tests.trainer.tiny import make_tiny_model

TOPICS = [
    "the history of a bridge in a small town",
    "a lighthouse keeper who learns to sing",
    "two brothers who inherit a bakery",
    "why rivers bend and what that means for farmers",
    "the first winter on a new planet",
    "an old teacher and her last lesson",
]
REQUESTS = [f"Please write about {topic}." for topic in TOPICS]


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def conversation(text: str, **fields: Any) -> dict[str, Any]:
    turns = [{"role": "user", "content": text}, {"role": "assistant", "content": "Well."}]
    return {"conversation": turns, **fields}


def question_of(body: dict[str, Any]) -> tuple[str, str]:
    """("quality" or "range", the request)."""
    text = user_text(body)
    match = re.search(r"<request>\n(.*)\n</request>", text, re.DOTALL)
    assert match is not None
    return "quality" if '"keep"' in text else "range", match[1]


def good_judge(body: dict[str, Any], number: int) -> Reply:
    kind, request = question_of(body)
    low = 100 * (5 + len(request) % 7)
    reply = {"keep": True} if kind == "quality" else {"range": [low, low + 400]}
    return chat_reply(f"<think>Let me see.</think>{json.dumps(reply)}")


def make_args(tmp_path: Path, server: FaultServer | None, **settings: Any) -> list[str]:
    defaults: dict[str, Any] = {"output": tmp_path / "out.jsonl", "progress": False}
    if server is not None:
        defaults |= {
            "endpoint.base_url": server.base_url,
            "endpoint.model": "judge",
            "endpoint.backoff_s": 0.001,
            "endpoint.timeout_s": 20,
        }
    args = ["prepare", "--inputs", str(tmp_path / "in.jsonl")]
    return args + [f"--{name}={value}" for name, value in (defaults | settings).items()]


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_report(tmp_path: Path) -> dict[str, Any]:
    report = json.loads((tmp_path / "out.report.json").read_text())
    dropped = sum(row["rows"] for row in report["dropped"])
    assert sum(report["rows_read"].values()) == dropped + report["kept"]
    return report


def dropped_of(report: dict[str, Any]) -> dict[tuple[str, str], int]:
    return {(row["stage"], row["reason"]): row["rows"] for row in report["dropped"]}


def test_prepare_accounts_for_every_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long_request = "Write a long report on " + ", ".join(f"topic {n}" for n in range(30))
    rows = [
        conversation(REQUESTS[0], language="English"),
        conversation(REQUESTS[0].upper() + "!"),
        conversation(REQUESTS[1], toxic=True),
        conversation("Escribe un cuento largo sobre el mar", language="Spanish"),
        conversation("hi"),
        conversation("Write a Python script that sorts my letters"),
        {"conversation": []},
        conversation("Write a 2,000-word essay on the tides of the North Sea"),
        conversation("Write a 50,000-word novel about a whale and a ship"),
        conversation("Describe your kitchen in no more than 80 words"),
        conversation("请写一篇不少于八百字的关于春天的文章"),
        conversation("What is the capital of France, in a word?"),
        conversation("Proofread the attached file for me please"),
        conversation("Write a very short note to a neighbour"),
        conversation(long_request),
        conversation(long_request.replace("topic 7,", "matter 7,")),
        {"prompt": "A request with its own range", "length_range": [700, 900]},
    ]

    def answer(body: dict[str, Any], number: int) -> Reply:
        kind, request = question_of(body)
        if kind == "quality":
            return chat_reply(json.dumps({"keep": "capital" not in request}))
        special = {"Proofread": [0, 0], "Write a very short": [0, 300]}
        for start, bounds in special.items():
            if request.startswith(start):
                return chat_reply(json.dumps({"range": bounds}))
        return good_judge(body, number)

    write_jsonl(tmp_path / "in.jsonl", rows)
    with FaultServer(answer) as server:
        assert main(make_args(tmp_path, server, **{"endpoint.temperature": 0.5})) == 0
        asked = Counter(question_of(body) for body in server.bodies)
        assert all(body["temperature"] == 0.5 for body in server.bodies)
    assert max(asked.values()) == 1
    asked_for_range = {request for kind, request in asked if kind == "range"}
    assert not any("2,000-word" in request or "own range" in request for request in asked_for_range)
    assert not any("50,000" in request or "80 words" in request for _, request in asked)

    report = read_report(tmp_path)
    assert dropped_of(report) == {
        ("rules", "flagged as toxic or redacted"): 1,
        ("rules", "another language"): 1,
        ("rules", "too short"): 1,
        ("rules", "program code"): 1,
        ("rules", "empty"): 1,
        ("duplicates", "same words"): 1,
        ("duplicates", "near duplicate"): 1,
        ("explicit counts", "cannot be fulfilled"): 1,
        ("explicit counts", "below min_range"): 1,
        ("quality", "no long writing"): 1,
        ("range", "cannot be fulfilled"): 1,
        ("range", "below min_range"): 1,
    }
    stages = ["rules", "duplicates", "explicit counts", "quality", "range"]
    assert list(dict.fromkeys(row["stage"] for row in report["dropped"])) == stages
    assert report["kept_by_language"] == {"en": 4, "zh": 1}
    assert report["range_from"] == {"judge": 2, "rules": 2, "data": 1}
    assert sum(bucket["rows"] for bucket in report["ranges_by_middle"]) == 5
    assert report["judge_usage_of_this_run"]["num_calls"] == len(server.bodies)

    prompts = load_prompts(str(tmp_path / "out.jsonl"))
    assert [(prompt.prompt, prompt.length_range, prompt.language) for prompt in prompts] == [
        (
            REQUESTS[0],
            (500 + 100 * (len(REQUESTS[0]) % 7), 900 + 100 * (len(REQUESTS[0]) % 7)),
            "en",
        ),
        ("Write a 2,000-word essay on the tides of the North Sea", (1800, 2200), "en"),
        ("请写一篇不少于八百字的关于春天的文章", (800, 880), "zh"),
        (
            long_request,
            (500 + 100 * (len(long_request) % 7), 900 + 100 * (len(long_request) % 7)),
            "en",
        ),
        ("A request with its own range", (700, 900), "en"),
    ]
    assert "请写一篇" in (tmp_path / "out.jsonl").read_text(encoding="utf-8")
    table = capsys.readouterr().out
    assert table.startswith((tmp_path / "out.report.md").read_text())
    assert "| rules | program code | -1 | 5.9% |" in table


FAULTS: list[Reply | Hang | Reset] = [
    Reply("", status=500),
    Reply("", status=429, headers={"Retry-After": "0"}),
    Reset(),
    Hang(0),
    Reply("<html>"),
    Reply('{"choices": []}'),
    Reply(chat_reply("x").body, cut=9),
    chat_reply("I would say about a thousand words."),
    chat_reply('{"range": [450, 800], "keep": 3}'),
    chat_reply('{"range": [100, 20000], "keep": "yes"}'),
]


def test_prepare_gets_its_answers_from_a_server_full_of_faults(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "in.jsonl", [conversation(request) for request in REQUESTS])
    num_asked: Counter[tuple[str, str]] = Counter()

    def answer(body: dict[str, Any], number: int) -> Reply | Hang | Reset:
        question = question_of(body)
        num_asked[question] += 1
        if num_asked[question] <= 2:
            return FAULTS[number % len(FAULTS)]
        return good_judge(body, number)

    with FaultServer(answer) as server:
        assert main(make_args(tmp_path, server)) == 0
    assert len(num_asked) == 2 * len(REQUESTS)
    assert [row["prompt"] for row in read_jsonl(tmp_path / "out.jsonl")] == REQUESTS
    assert read_report(tmp_path)["dropped"] == []


def test_prepare_counts_failures_and_asks_again_for_what_had_no_answer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_jsonl(tmp_path / "in.jsonl", [conversation(request) for request in REQUESTS])
    is_back = False

    def answer(body: dict[str, Any], number: int) -> Reply:
        kind, request = question_of(body)
        if request == REQUESTS[1] and kind == "range":
            return chat_reply("no idea")
        if request == REQUESTS[2]:
            return Reply("content filter", status=400)
        if request == REQUESTS[3] and not is_back:
            return Reply("", status=500)
        return good_judge(body, number)

    with FaultServer(answer) as server:
        args = make_args(tmp_path, server, **{"endpoint.max_attempts": 2})
        assert main(args) == 0
        assert dropped_of(read_report(tmp_path)) == {
            ("quality", "refused by the judge"): 1,
            ("quality", "no answer from the judge"): 1,
            ("range", "no readable answer"): 1,
        }
        assert "1 requests got no answer; the same command asks" in capsys.readouterr().out
        num_asked = len(server.bodies)
        is_back = True
        assert main(args) == 0
        # The refused one again, quality and range of the one that had no answer, and three times
        # the one whose answers could not be read.
        assert len(server.bodies) - num_asked == 6
    report = read_report(tmp_path)
    assert ("quality", "no answer from the judge") not in dropped_of(report)
    assert report["kept"] == len(REQUESTS) - 2


@pytest.mark.parametrize("kill_at", [0, 3, 8])
def test_prepare_goes_on_after_a_kill_without_repeating_a_call(
    tmp_path: Path, kill_at: int
) -> None:
    write_jsonl(tmp_path / "in.jsonl", [conversation(request) for request in REQUESTS])
    process: Program | None = None

    def answer(body: dict[str, Any], number: int) -> Reply | Hang:
        if number == kill_at:
            assert process is not None
            os.kill(process.pid, signal.SIGKILL)
            return Hang(0)
        return good_judge(body, number)

    with FaultServer(answer) as server:
        # One request at a time: then the server knows which answers had arrived before the kill.
        args = make_args(tmp_path, server, **{"endpoint.concurrency": 1})
        process = Program("lwz_trainer", args, {"NO_PROXY": "127.0.0.1"})
        process.communicate(timeout=200)
        assert process.returncode == -signal.SIGKILL
        assert len(server.bodies) == kill_at + 1
        assert not (tmp_path / "out.jsonl").exists()
        assert main(args) == 0
        asked = Counter(question_of(body) for body in server.bodies)
        assert asked.pop(question_of(server.bodies[kill_at])) == 2, "it never had an answer"
        assert set(asked.values()) == {1}
        num_asked = len(server.bodies)
        assert num_asked == 2 * len(REQUESTS) + 1
        resumed = (tmp_path / "out.jsonl").read_bytes()
        (tmp_path / "out.jsonl").unlink()
        assert main(args) == 0
        assert len(server.bodies) == num_asked, "everything is on disk"
        assert (tmp_path / "out.jsonl").read_bytes() == resumed
    with FaultServer(good_judge) as server:
        fresh = make_args(tmp_path, server, output=tmp_path / "fresh.jsonl")
        assert main(fresh) == 0
    assert (tmp_path / "fresh.jsonl").read_bytes() == resumed


def test_prepare_that_is_interrupted_ends_in_one_line(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "in.jsonl", [conversation(request) for request in REQUESTS])
    process: Program | None = None

    def answer(body: dict[str, Any], number: int) -> Reply:
        if number == 3:
            assert process is not None
            process.send_signal(signal.SIGINT)
            time.sleep(3)  # the signal comes before the answer
        return good_judge(body, number)

    with FaultServer(answer) as server:
        args = make_args(tmp_path, server, **{"endpoint.concurrency": 1})
        process = Program("lwz_trainer", args, {"NO_PROXY": "127.0.0.1"})
        _, errors = process.communicate(timeout=200)
        assert process.returncode == 1
        assert errors == "error: interrupted; the same command goes on\n"
        assert not (tmp_path / "out.jsonl").exists()
        assert main(args) == 0
    assert [row["prompt"] for row in read_jsonl(tmp_path / "out.jsonl")] == REQUESTS


def test_prepare_ends_with_one_error_when_the_server_is_dead(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    numbers = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    requests = [
        f"Write about {first} cats and {second} dogs in a {first} storey {second} house"
        for first in numbers
        for second in numbers
    ]
    write_jsonl(tmp_path / "in.jsonl", [conversation(request) for request in requests])
    with FaultServer(lambda body, number: Reply("", status=503)) as server:
        settings = {"endpoint.max_attempts": 2, "endpoint.concurrency": 2}
        assert main(make_args(tmp_path, server, **settings)) == 1
        assert len(server.bodies) < 20
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert errors[0].startswith("error: the endpoint is down")
    assert "HTTP 503" in errors[0]
    assert not (tmp_path / "out.jsonl").exists()
    assert not (tmp_path / "out.report.json").exists()


def test_prepare_never_writes_the_api_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    key = "sk-very-secret-0123456789"
    monkeypatch.setenv("JUDGE_KEY", key)
    write_jsonl(tmp_path / "in.jsonl", [conversation(request) for request in REQUESTS])
    with FaultServer(good_judge) as server:
        assert main(make_args(tmp_path, server, **{"endpoint.api_key_env": "JUDGE_KEY"})) == 0
        assert set(server.authorizations) == {f"Bearer {key}"}
    files = [path for path in tmp_path.iterdir() if path.is_file()]
    assert len(files) >= 5
    assert not any(key.encode() in path.read_bytes() for path in files)
    output = capsys.readouterr()
    assert key not in output.out + output.err


def test_prepare_without_a_judge_keeps_explicit_counts(tmp_path: Path) -> None:
    rows = [
        conversation(f"{request[:-1]} in {600 + 100 * number} words")
        for number, request in enumerate(REQUESTS)
    ]
    write_jsonl(tmp_path / "in.jsonl", [*rows, conversation(REQUESTS[0])])
    args = make_args(tmp_path, None, judge="none", max_requests=4, seed=3)
    assert main(args) == 0
    report = read_report(tmp_path)
    assert dropped_of(report) == {
        ("explicit counts", "none given, and no judge"): 1,
        ("draw", "not drawn"): 2,
    }
    first = read_jsonl(tmp_path / "out.jsonl")
    assert [row["source"] for row in first] == sorted(row["source"] for row in first)
    assert main(args) == 0
    assert read_jsonl(tmp_path / "out.jsonl") == first
    assert main([*args, "--seed=4"]) == 0
    assert read_jsonl(tmp_path / "out.jsonl") != first
    assert not (tmp_path / "out.answers.sqlite").exists()


def test_prepare_takes_one_language_of_an_input(tmp_path: Path) -> None:
    write_jsonl(
        tmp_path / "in.jsonl",
        [
            conversation("写一篇八百字的作文，谈谈春天"),
            conversation("An essay on tea of 800 words"),
        ],
    )
    (tmp_path / "more.jsonl").write_bytes((tmp_path / "in.jsonl").read_bytes())
    for suffixes, languages in [(":en", ["en"]), (":zh", ["zh"]), ("", ["zh", "en"])]:
        args = ["prepare", "--inputs", f"{tmp_path / 'in.jsonl'}{suffixes}", "--judge=none"]
        assert main([*args, f"--output={tmp_path / 'out.jsonl'}"]) == 0
        assert [row["language"] for row in read_jsonl(tmp_path / "out.jsonl")] == languages
    inputs = [f"{tmp_path / 'in.jsonl'}:zh", f"{tmp_path / 'more.jsonl'}:en"]
    args = ["prepare", "--inputs", *inputs, "--judge=none", f"--output={tmp_path / 'out.jsonl'}"]
    assert main(args) == 0
    rows = read_jsonl(tmp_path / "out.jsonl")
    assert [row["language"] for row in rows] == ["zh", "en"]
    assert rows[1]["source"] == f"{tmp_path / 'more.jsonl'} line 2"
    assert read_report(tmp_path)["rows_read"] == dict.fromkeys(inputs, 2)


def test_a_local_judge_samples_each_answer_once(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path, max_position_embeddings=128)
    config = LocalJudgeConfig(
        path=str(model), dtype="fp32", device="cpu", max_completion_tokens=8, max_num_seqs=2
    )
    requests = ["one", "two", "three", "x" * 200]

    def parse_never(text: str) -> str:
        raise ValueError("not this one")

    def ask(
        name: str, parse: Callable[[str], str], requests: list[str] = requests
    ) -> tuple[dict[int, str], dict[str, int]]:
        judge = LocalJudge(config, 5, tmp_path / name)
        try:
            answers = dict(judge.ask(Question("test", "{request}", parse), requests))
            return {index: str(answer) for index, answer in answers.items()}, judge.usage()
        finally:
            judge.close()

    answers, usage = ask("answers", str)
    assert set(answers) == {0, 1, 2, 3}
    assert answers[3] == "the question is longer than the model's context"
    assert usage == {"num_answers": 3, "num_cache_hits": 0}
    again, usage = ask("answers", str)
    assert again == answers
    assert usage == {"num_answers": 0, "num_cache_hits": 3}
    # Not which requests are asked beside it, but the request itself decides its random numbers.
    alone, _ = ask("other", str, requests=["three"])
    assert alone[0] == answers[2]
    failed, usage = ask("answers", parse_never)
    assert failed[0] == "no answer could be read; the last: not this one"
    assert usage == {"num_answers": 6, "num_cache_hits": 3}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"output": "out.txt"}, "output must end in .jsonl"),
        ({"min_range": -1}, "min_range must be at least 0"),
        ({"judge": "local"}, "local.path is empty"),
        ({"rules.min_words": 0}, "rules.min_words"),
        ({"duplicates.threshold": 0.3}, "duplicates.threshold must be in [0.5, 1]"),
        ({"local.top_p": 2}, "local.top_p"),
        ({"endpoint.timeout_s": 0}, "endpoint.timeout_s"),
        ({}, "set endpoint.base_url"),
        ({"judge": "local", "local.path": "/nowhere"}, "no model at /nowhere"),
    ],
)
def test_prepare_refuses_impossible_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: dict[str, Any], expected: str
) -> None:
    write_jsonl(tmp_path / "in.jsonl", [conversation(REQUESTS[0])])
    assert main(make_args(tmp_path, None, **settings)) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert expected in errors[0]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'{"prompt": "a long enough request here"}\n{"prompt": 3}\n', "line 2: prompt must be"),
        (b"not json\n", "line 1 is not valid JSON"),
        (b"", "no request is left of 0 rows"),
        (b'{"prompt": "hi"}\n', "no request is left of 1 rows"),
    ],
)
def test_prepare_refuses_bad_input_before_any_call(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, expected: str
) -> None:
    (tmp_path / "in.jsonl").write_bytes(content)
    with FaultServer(good_judge) as server:
        assert main(make_args(tmp_path, server)) == 2
        assert server.bodies == []
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert expected in errors[0]
    assert not (tmp_path / "out.jsonl").exists()
    # Only where rows were read without a fault is there something to say about them.
    names = {path.name for path in tmp_path.iterdir()} - {"in.jsonl"}
    assert names == ({"out.report.json", "out.report.md"} if "no request" in expected else set())


def test_prepare_needs_an_input(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", "--judge=none"]) == 2
    assert "no inputs" in capsys.readouterr().err
    assert main(["prepare", "--judge=none", "--inputs", "/nowhere.jsonl"]) == 2
    assert "no input at /nowhere.jsonl" in capsys.readouterr().err
