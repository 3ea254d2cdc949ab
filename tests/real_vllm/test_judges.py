"""Whoever judges through an endpoint, against vLLM serving SmolLM2.

A model of this size rarely gives the JSON that it is asked for. What must hold is that calls go
through, that failures are recorded as missing, and that nothing is asked twice, but by another run
what could not be read: a question of which that is true is asked `max_answers` times, or until a
reply can be read.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest

from lwz_trainer.__main__ import main
from lwz_trainer.config.endpoint import EndpointConfig
from lwz_trainer.config.rewards import WritingRewardConfig
from lwz_trainer.model.source import BUILTIN_MODEL, resolve_model_dir
from lwz_trainer.rewards.answer import Answer
from lwz_trainer.rewards.sources import make_source
from tests.real_vllm.serving import START_S, num_requests_done, served
from tests.trainer.evaluation_case import longbench_record, write_jsonl

pytest.importorskip("vllm", reason="`make test-vllm` makes an environment with vLLM")

pytestmark = pytest.mark.timeout(START_S + 600)
# Two answers a question at most, and short ones: each takes seconds on a CPU.
PATIENCE = {"max_answers": 2, "max_tokens": 40, "concurrency": 4}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("vllm")
    model_dir = resolve_model_dir(BUILTIN_MODEL)
    options = ["--served-model-name", "judge", "--dtype", "float32", "--max-model-len", "2048"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_PROXY", "127.0.0.1")
        with served(model_dir, folder / "server.log", *options) as url:
            yield url


def flags(section: str, url: str) -> list[str]:
    settings = {"base_url": f"{url}/v1", "model": "judge", **PATIENCE}
    return [f"--{section}.{name}={value}" for name, value in settings.items()]


def test_an_evaluation_asks_again_only_what_could_not_be_read(url: str, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "l.jsonl", [longbench_record(n) for n in (20, 30, 40)])
    mine = [{"index": i, "response": f"The sea was calm on day {i}."} for i in range(3)]
    path = write_jsonl(tmp_path / "mine.jsonl", mine)
    out = tmp_path / "out"
    command = ["eval", "longbench-write", f"--data={data}", f"--output_dir={out}"]
    command += ["--responses", f"mine={path}", "--generate.name=served", "--generate.max_tokens=32"]
    command += ["--generate.template=chat", f"--generate.endpoint.base_url={url}/v1"]
    command += ["--generate.endpoint.model=judge", *flags("judge", url)]
    before = num_requests_done(url)
    assert main(command) == 0
    asked = num_requests_done(url) - before
    responses = [json.loads(line) for line in (out / "responses" / "served.jsonl").open()]
    assert sorted(record["index"] for record in responses) == [0, 1, 2]
    assert all(record["response"].strip() for record in responses)
    results = json.loads((out / "results.json").read_text())
    journal = out / "judgments.jsonl"
    judged = [json.loads(line) for line in journal.open()] if journal.exists() else []
    # Six answers to judge: each has a judgment or a failure in words.
    assert len(judged) + len(results["failures"]) == 6
    assert all("could be read" in failure for failure in results["failures"])
    assert all(1 <= record["judgment"]["relevance"] <= 5 for record in judged)
    # Three answers, a judgment at least once each, an unreadable one once more.
    assert 3 + 6 + len(results["failures"]) <= asked <= 3 + 12
    assert main(command) == 0
    unread = len(results["failures"])
    still_unread = len(json.loads((out / "results.json").read_text())["failures"])
    asked_again = num_requests_done(url) - before - asked
    assert unread + still_unread <= asked_again <= 2 * unread
    if journal.exists():
        again = [json.loads(line) for line in journal.open()]
        assert again[: len(judged)] == judged
        assert len(again) + still_unread == 6


def test_preparing_requests_drops_what_no_answer_could_be_read_for(
    url: str, tmp_path: Path
) -> None:
    rows = [
        {"prompt": "Write an essay of 900 words on why rivers bend and what farmers do then"},
        {"prompt": "Please write about a lighthouse keeper who learns to sing"},
        {"prompt": "Tell the story of two brothers who inherit a bakery"},
    ]
    inputs = write_jsonl(tmp_path / "in.jsonl", rows)
    command = ["prepare", "--inputs", str(inputs), f"--output={tmp_path / 'out.jsonl'}"]
    command += ["--ask_quality=False", *flags("endpoint", url)]
    before = num_requests_done(url)
    assert main(command) == 0
    asked = num_requests_done(url) - before
    report = json.loads((tmp_path / "out.report.json").read_text())
    dropped = {row["reason"]: row["rows"] for row in report["dropped"]}
    assert report["kept"] + sum(dropped.values()) == 3
    assert report["range_from"]["rules"] == 1
    unread = dropped.get("no readable answer", 0)
    assert 2 + unread <= asked <= 4
    assert main(command) == 0
    report = json.loads((tmp_path / "out.report.json").read_text())
    dropped = {row["reason"]: row["rows"] for row in report["dropped"]}
    asked_again = num_requests_done(url) - before - asked
    assert unread + dropped.get("no readable answer", 0) <= asked_again <= 2 * unread


@pytest.mark.parametrize("source", ["judge", "pairwise"])
def test_a_rewards_judge_gives_a_score_or_says_why_not(
    url: str, tmp_path: Path, source: str
) -> None:
    config = WritingRewardConfig(
        weight=1.0,
        source=source,
        endpoint=EndpointConfig(base_url=f"{url}/v1", model="judge", **PATIENCE),
    )
    answers = [
        Answer(prompt="Describe the sea.", text=text)
        for text in ("The sea lay calm and grey.", "Sea sea sea.")
    ]
    before = num_requests_done(url)
    made = make_source("rewards.writing", config, "cpu", tmp_path / "answers.sqlite")
    first = made.score(answers)
    asked = num_requests_done(url) - before
    again = made.score(answers)
    made.close()
    low = -1.0 if source == "pairwise" else 0.0
    missing = [score for score in first.scores if math.isnan(score)]
    assert all(low <= score <= 1 for score in first.scores if not math.isnan(score))
    assert len(missing) == len(first.failures)
    assert asked > 0
    assert num_requests_done(url) - before == asked
    assert str(again.scores) == str(first.scores)  # NaN is not equal to itself
