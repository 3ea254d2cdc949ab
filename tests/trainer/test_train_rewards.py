"""A run whose rewards come from a judge, a function and references, with constraints."""

import json
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from lwz_trainer.__main__ import main
from tests.trainer.fault_server import FaultServer, Reply, chat_reply, user_text
from tests.trainer.train_case import IN_PHASES, make_run_args, read_metrics

FUNCTION = """
def vowels(answers):
    return [sum(letter in "aeiou" for letter in answer.text) for answer in answers]


def group(answers):
    return [answer.group for answer in answers]
"""


OUTAGE = """
seen = 0
def words(answers):
    global seen
    seen += len(answers)
    if 16 < seen <= 24:
        raise OSError("the server is gone")
    return [len(answer.text) for answer in answers]
"""


def judge(body: dict[str, Any], number: int) -> Reply:
    """Scores by length, finds every reference worse, and fails for one answer in eight."""
    question = user_text(body)
    if "begin piece A" in question:
        first = question.split("begin piece A ===\n")[1].split("\n===")[0]
        return chat_reply(json.dumps({"winner": "B" if first.startswith("ref") else "A"}))
    piece = question.split("--- the piece\n")[1].split("\n--- end")[0]
    if len(piece) % 8 == 0:
        return Reply("", 413)
    return chat_reply(json.dumps({"scores": [1 + len(piece) % 10, 5]}))


def write_config(tmp_path: Path, base_url: str) -> Path:
    endpoint = f"{{base_url: '{base_url}', model: judge, max_attempts: 1}}"
    path = tmp_path / "rewards.yaml"
    path.write_text(
        "rewards:\n"
        f"  writing: {{weight: 1, source: judge, criteria: [wit, form], endpoint: {endpoint}}}\n"
        "  others:\n"
        "    vowels: {weight: 0.5, source: function, function: 'lwz_vowels:vowels'}\n"
        "    group: {weight: 0.1, source: function, function: 'lwz_vowels:group'}\n"
        f"    rivals: {{weight: 1, source: references, endpoint: {endpoint}}}\n"
        "  constraints: {rewards: [format], minimum: 0.9, gap: 0.05}\n"
    )
    prompts = [
        {"prompt": f"Write {n} words on the sea.", "length_range": [n, n + 20]}
        | ({"references": ["ref poor", "ref good"]} if n % 2 else {})
        for n in range(3, 7)
    ]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    return path


@pytest.mark.parametrize(
    "settings",
    [{}, IN_PHASES | {"update.schedule": "interleaved", "update.deterministic": True}],
    ids=["sequential", "interleaved in phases"],
)
def test_train_saves_and_stops_when_a_reward_is_gone_and_goes_on(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    settings: dict[str, Any],
) -> None:
    (tmp_path / "lwz_outage.py").write_text(OUTAGE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "lwz_outage", raising=False)
    settings = settings | {"num_steps": 3, "checkpoint.every": 0, "log.tensorboard": False}
    settings |= {"rewards.writing.source": "function", "rewards.writing.weight": 1}
    arguments = make_run_args(
        tmp_path, **settings, **{"rewards.writing.function": "lwz_outage:words"}
    )
    assert main(arguments) == 1
    assert "reward 'writing' failed for 100% of 8 completions" in capsys.readouterr().err
    checkpoints = tmp_path / "run" / "checkpoints"
    assert (checkpoints / "latest").read_text() == "step_000002"
    assert main(arguments) == 0
    assert "resumed from" in capsys.readouterr().out
    assert [record["step"] for record in read_metrics(tmp_path / "run")] == [1, 2, 3]


def test_train_with_rewards_from_servers_and_functions_resumes_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lwz_vowels.py").write_text(FUNCTION)
    monkeypatch.chdir(tmp_path)
    with FaultServer(judge) as server:
        config = write_config(tmp_path, server.base_url)

        def arguments(name: str, num_steps: int) -> list[str]:
            command, *flags = make_run_args(tmp_path, name, num_steps=num_steps)
            return [command, str(config), *flags]

        assert main(arguments("whole", 4)) == 0
        assert main(arguments("halves", 2)) == 0
        num_requests = len(server.bodies)
        assert main(arguments("halves", 4)) == 0
        assert len(server.bodies) > num_requests
        # A step that is done again pays for nothing: its answers are on disk.
        num_requests = len(server.bodies)
        (tmp_path / "halves" / "checkpoints" / "latest").write_text("step_000002")
        assert main(arguments("halves", 4)) == 0
        num_failing = len(server.bodies) - num_requests
    assert all(body["messages"] for body in server.bodies)
    both = [read_metrics(tmp_path / name, without_clocks=True) for name in ("whole", "halves")]
    assert both[0] == both[1]
    assert both[0][-1]["reward/reference_level"] > 0
    assert all(metrics["reward/rivals_failed_frac"] == 0 for metrics in both[0])
    assert sum(metrics["reward/writing_failed_frac"] for metrics in both[0]) > 0
    samples = [
        row
        for step in range(1, 5)
        for row in pq.read_table(
            tmp_path / "whole" / "samples" / f"step_{step:06d}.parquet"
        ).to_pylist()
    ]
    assert {"reward_vowels", "reward_rivals", "reward_writing"} <= samples[0].keys()
    assert all(row["reward_group"] == row["group"] for row in samples)
    failed = [row for row in samples if row["answer"] and len(row["answer"]) % 8 == 0]
    assert all(row["reward_writing"] != row["reward_writing"] for row in failed)
    assert num_failing <= len(failed)
    broken = [row for row in samples if row["reward_format"] < 0.9]
    assert broken
    assert all(row["advantage"] <= -0.05 + 1e-9 for row in broken)
