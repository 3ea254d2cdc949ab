"""Rewards from servers, judges and functions: what is asked, what comes back, and what fails."""

import json
import logging
import math
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lwz_trainer.config.endpoint import EndpointConfig
from lwz_trainer.config.rewards import RewardsConfig, WritingRewardConfig
from lwz_trainer.errors import UserError
from lwz_trainer.rewards.answer import Answer
from lwz_trainer.rewards.encoding import AnswerEncoder
from lwz_trainer.rewards.parking import ParkedModel
from lwz_trainer.rewards.score import RewardSample, Scorer
from lwz_trainer.rewards.shared_source import RewardSource
from lwz_trainer.rewards.sources import make_source
from tests.trainer.fault_server import FaultServer, Hang, Reply, Reset, chat_reply, user_text
from tests.trainer.tiny import make_tiny_tokenizer

ANSWERS = [Answer("Write about the sea.", text) for text in ("Calm.", "A storm came.", "Waves!")]


def source_for(
    server: FaultServer, source: str, cache_path: Path | None = None, **settings: Any
) -> RewardSource:
    patience = {"timeout_s": 5.0, "max_attempts": 2, "backoff_s": 0.01}
    if source not in ("classify", "pooling", "score"):
        patience["max_answers"] = 2
    endpoint = EndpointConfig(
        base_url=server.base_url, model="rm", **(patience | settings.pop("endpoint", {}))
    )
    config = WritingRewardConfig(weight=1.0, source=source, endpoint=endpoint, **settings)
    config.check("rewards.writing")
    return make_source("rewards.writing", config, "cpu", cache_path)


def raw_reply(route: str, value: Any) -> Reply:
    row = {"classify": {"probs": [value]}, "pooling": {"data": [value]}, "score": {"score": value}}
    return Reply(json.dumps({"data": [{"index": 0, **row[route]}]}))


def text_of(body: dict[str, Any]) -> str:
    return body.get("text_2") or body["messages"][1]["content"]


@pytest.mark.parametrize("route", ["classify", "pooling", "score"])
def test_served_model_gives_its_raw_score(route: str) -> None:
    def answer(body: dict[str, Any], number: int) -> Reply:
        return raw_reply(route, -1.5 * len(text_of(body)))

    with FaultServer(answer) as server:
        extra = {"extra_body": '{"truncate_prompt_tokens": 100}'}
        result = source_for(server, route, endpoint=extra).score(ANSWERS)
    assert result.scores == [-1.5 * len(a.text) for a in ANSWERS]
    assert result.failures == []
    assert result.is_applicable == [True] * 3
    assert set(server.paths) == {f"/{route}"}
    for body in server.bodies:
        assert body["use_activation"] is False
        assert body["truncate_prompt_tokens"] == 100
        assert body.get("task") == ("classify" if route == "pooling" else None)


@pytest.mark.parametrize("route", ["classify", "pooling"])
def test_served_model_is_sent_the_tokens_of_training(tmp_path: Path, route: str) -> None:
    tokenizer = make_tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    answers = [*ANSWERS, Answer("Write.", "The ship went north. " * 20 + "<|im_end|>")]
    with FaultServer(lambda body, number: raw_reply(route, float(len(body["input"])))) as server:
        source = source_for(server, route, model=str(tmp_path), max_tokens=64)
        result = source.score(answers)
    encoder = AnswerEncoder(tokenizer, 64)
    expected = [encoder.encode(a.prompt, a.text).input_ids for a in answers]
    assert sorted(body["input"] for body in server.bodies) == sorted(expected)
    assert result.scores == [float(len(ids)) for ids in expected]
    assert result.is_truncated == [False, False, False, True]


def test_judge_gives_the_mean_of_its_criteria() -> None:
    with FaultServer(lambda body, n: chat_reply('Well: {"scores": [1, 10, 4.6]}')) as server:
        source = source_for(server, "judge", criteria=("wit", "form", "depth"))
        result = source.score([*ANSWERS[:1], Answer("Write.", "")])
    assert result.scores == pytest.approx([(15.6 / 3 - 1) / 9, 0.0])
    (body,) = server.bodies  # nothing is asked about an answer that is not there
    question = user_text(body)
    for text in ("1. wit", "3. depth", "Write about the sea.", "Calm."):
        assert text in question


def test_checklist_is_the_prompts_own() -> None:
    answers = [
        Answer("Write.", "Calm.", checklist=("names the sea", "rhymes")),
        Answer("Write.", "", checklist=("names the sea",)),
        Answer("Write.", "Calm."),
    ]
    with FaultServer(lambda body, number: chat_reply('{"met": [1, 0.5]}')) as server:
        result = source_for(server, "checklist").score(answers)
    assert result.scores[:2] == [0.75, 0.0]
    assert math.isnan(result.scores[2])
    assert result.is_applicable == [True, True, False]
    assert result.failures == []
    assert "2. rhymes" in user_text(server.bodies[0])


def judge_by(value: Callable[[str], float]) -> Callable[[dict[str, Any], int], Reply]:
    """Prefers the piece with the larger value, wherever it stands."""

    def answer(body: dict[str, Any], number: int) -> Reply:
        question = user_text(body)
        first, second = (
            value(question.split(f"begin piece {place} ===\n")[1].split("\n===")[0])
            for place in "AB"
        )
        winner = "A" if first > second else "B" if second > first else "tie"
        return chat_reply(json.dumps({"winner": winner, "reason": ""}))

    return answer


def test_pairwise_compares_with_one_of_the_group() -> None:
    groups = {f"prompt {n}": ["a" * k for k in (4, 1, 3, 2)] for n in range(6)}
    answers = [Answer(prompt, text) for prompt, texts in groups.items() for text in texts]
    with FaultServer(judge_by(len)) as server:
        result = source_for(server, "pairwise").score([*answers, Answer("prompt 0", "")])
        again = source_for(server, "pairwise").score(answers[::-1])
    assert result.scores[-1] == -1
    drawn = set()
    for number in range(6):
        scores = result.scores[4 * number : 4 * number + 4]
        assert scores.count(0) == 1
        rival = 4 - [scores[i] for i in (0, 2, 3, 1)].index(0)
        drawn.add(rival)
        assert scores == [float((k > rival) - (k < rival)) for k in (4, 1, 3, 2)]
    assert len(drawn) > 1
    assert again.scores[::-1] == result.scores[:-1]


def test_pairwise_does_not_mix_groups_of_one_prompt() -> None:
    texts = (["a" * k for k in (1, 2, 3)], ["a" * k for k in (4, 5, 6)])
    answers = [[Answer("Write.", text, group=n) for text in texts[n]] for n in (0, 1)]
    with FaultServer(judge_by(len)) as server:
        together = source_for(server, "pairwise").score(answers[0] + answers[1])
        apart = [source_for(server, "pairwise").score(group) for group in answers]
    assert together.scores == apart[0].scores + apart[1].scores
    assert [scores.scores.count(0) for scores in apart] == [1, 1]


def test_pairwise_lets_no_place_win() -> None:
    answers = [Answer(f"prompt {n}", "a" * k) for n in range(40) for k in (1, 2)]
    with FaultServer(lambda body, number: chat_reply('{"winner": "A"}')) as server:
        scores = source_for(server, "pairwise").score(answers).scores
    wins = sum(score == 1 for score in scores)
    assert sum(score == 0 for score in scores) == 40
    assert 8 <= wins <= 32


def test_pairwise_needs_two_answers() -> None:
    with FaultServer(lambda body, number: Reply("", 500)) as server:
        result = source_for(server, "pairwise").score([ANSWERS[0], Answer("Other.", "")])
    assert result.is_applicable == [False, False]
    assert server.bodies == []


def test_references_give_one_half_for_a_tie() -> None:
    answers = [Answer("Write.", "a" * k, reference="aa") for k in (1, 2, 3)]
    answers += [Answer("Write.", "", reference="aa"), Answer("Write.", "aaa")]
    with FaultServer(judge_by(len)) as server:
        result = source_for(server, "references").score(answers)
    assert result.scores[:4] == [0.0, 0.5, 1.0, 0.0]
    assert result.is_applicable == [True] * 4 + [False]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (Reply("slow down", 429), "HTTP 429"),
        (Reply("oops", 500), "HTTP 500"),
        (Hang(1.5), "no answer within"),
        (Reset(), "failed in 2 attempts"),
        (Reply('{"choices": [', 200), "no JSON"),
        (Reply('{"choices": []}'), "another form"),
        (Reply(chat_reply('{"scores": [5]}').body, cut=20), "RemoteProtocolError"),
        (Reply("too long", 413), "refuses the request"),
        (chat_reply("no idea"), "expected a JSON object"),
        (chat_reply('{"scores": [11]}'), "must be from 1 to 10, got 11"),
        (chat_reply('{"scores": [NaN]}'), "must be from 1 to 10, got nan"),
        (chat_reply('{"scores": [5, 5]}'), "list of 1 numbers"),
        (chat_reply('{"scores": ["5"]}'), "must hold numbers"),
        (chat_reply('{"score": 5}'), "list of 1 numbers, got None"),
        (chat_reply(None), "expected a JSON object"),
    ],
)
def test_judge_failures_are_missing_scores_with_a_reason(bad: Any, reason: str) -> None:
    def answer(body: dict[str, Any], number: int) -> Any:
        return bad if "A storm" in user_text(body) else chat_reply('{"scores": [10]}')

    with FaultServer(answer) as server:
        source = source_for(server, "judge", criteria=("wit",), endpoint={"timeout_s": 0.5})
        result = source.score(ANSWERS)
    assert [result.scores[0], result.scores[2]] == [1.0, 1.0]
    assert math.isnan(result.scores[1])
    (failure,) = result.failures
    assert reason in failure
    assert "\n" not in failure


@pytest.mark.parametrize("value", ["NaN", "Infinity", '"3"', "null", "true", "[1, 2]"])
def test_served_model_failures_are_missing_scores(value: str) -> None:
    reply = Reply('{"data": [{"index": 0, "probs": [' + value.strip("[]") + "]}]}")
    with FaultServer(lambda body, number: reply) as server:
        result = source_for(server, "classify").score(ANSWERS[:1])
    assert math.isnan(result.scores[0])
    assert "another form" in result.failures[0]


def test_a_busy_server_is_asked_again() -> None:
    def answer(body: dict[str, Any], number: int) -> Reply:
        return Reply("", 429) if number == 0 else raw_reply("classify", 2.0)

    with FaultServer(answer) as server:
        assert source_for(server, "classify").score(ANSWERS[:1]).scores == [2.0]
    assert len(server.bodies) == 2


def test_a_dead_server_is_left_alone() -> None:
    answers = [Answer("Write.", f"Answer {n}.") for n in range(30)]
    limits = {"breaker_failures": 2, "concurrency": 2, "breaker_rest_s": 60.0}
    with FaultServer(lambda body, number: Reply("", 500)) as server:
        source = source_for(server, "classify", endpoint=limits)
        result = source.score(answers)
        assert len(server.bodies) < 20
        # A request that was given up may reach the server's list late: tell them by their text.
        again = source.score([Answer("Again.", answer.text) for answer in answers])
        assert "Again." not in str(server.bodies)
    for scores in (result, again):
        assert all(map(math.isnan, scores.scores))
        assert len(scores.failures) == 30
    assert "is down" in again.failures[0]


def test_renewed_source_does_not_wait_for_a_server_that_hangs() -> None:
    def answer(body: dict[str, Any], number: int) -> Any:
        return Hang(1.0) if number == 0 else raw_reply("classify", 2.0)

    with FaultServer(answer) as server:
        source = source_for(server, "classify")
        hanging = threading.Thread(target=source.score, args=(ANSWERS[:1],))
        hanging.start()
        while not server.bodies:
            time.sleep(0.01)
        other = source.renewed()
        assert other.score(ANSWERS[1:]).scores == [2.0, 2.0]
        assert hanging.is_alive()
        hanging.join()
        for opened in (source, other):
            opened.close()


def test_answers_of_servers_are_paid_for_once(tmp_path: Path) -> None:
    with FaultServer(lambda body, number: raw_reply("classify", 2.0)) as server:
        for _ in range(2):
            source = source_for(server, "classify", cache_path=tmp_path / "answers.sqlite")
            assert source.score(ANSWERS).scores == [2.0] * 3
    assert len(server.bodies) == 3


def test_a_missing_key_is_found_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LWZ_TEST_KEY", raising=False)
    with (
        FaultServer(lambda body, number: Reply("")) as server,
        pytest.raises(UserError, match="LWZ_TEST_KEY"),
    ):
        source_for(server, "judge", endpoint={"api_key_env": "LWZ_TEST_KEY"})


FUNCTIONS = """
import math

NO_FUNCTION = 3

def words(answers):
    return [len(answer.text.split()) + len(answer.checklist) for answer in answers]

def raises(answers):
    raise KeyError("what")

def too_few(answers):
    return [1.0]

def infinite(answers):
    return [1, math.inf, None] if answers[0].text == "none" else [1, math.inf, 3]
"""


@pytest.fixture
def functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lwz_test_rewards.py").write_text(FUNCTIONS)
    monkeypatch.chdir(tmp_path)


def function_source(name: str) -> RewardSource:
    config = WritingRewardConfig(weight=1.0, source="function", function=f"lwz_test_rewards:{name}")
    return make_source("rewards.others.taste", config, "cpu", None)


@pytest.mark.usefixtures("functions")
def test_function_gets_the_batch_and_gives_as_many_numbers() -> None:
    answers = [*ANSWERS, Answer("Write.", "One two.", checklist=("rhymes",))]
    assert function_source("words").score(answers).scores == [1.0, 3.0, 1.0, 3.0]


@pytest.mark.usefixtures("functions")
@pytest.mark.parametrize(
    ("name", "num_missing", "reason"),
    [
        ("raises", 3, "lwz_test_rewards:raises raised KeyError: 'what'"),
        ("too_few", 3, "raised ValueError: 1 scores for 3 answers"),
        ("infinite", 1, "gave no finite score"),
    ],
)
def test_function_failures_are_missing_scores(name: str, num_missing: int, reason: str) -> None:
    result = function_source(name).score(ANSWERS)
    assert sum(map(math.isnan, result.scores)) == num_missing
    assert len(result.failures) == num_missing
    assert reason in result.failures[0]


@pytest.mark.usefixtures("functions")
@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("lwz_test_rewards:missing", "cannot import .* has no attribute 'missing'"),
        ("lwz_no_such_module:f", "cannot import .*No module named"),
        ("lwz_test_rewards:NO_FUNCTION", "is no function"),
    ],
)
def test_function_that_is_not_there_is_refused(function: str, message: str) -> None:
    config = WritingRewardConfig(weight=1.0, source="function", function=function)
    with pytest.raises(UserError, match=f"rewards.others.taste.function: .*{message}"):
        make_source("rewards.others.taste", config, "cpu", None)


@pytest.mark.usefixtures("functions")
def test_scorer_takes_further_rewards_and_logs_what_failed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def section(name: str) -> WritingRewardConfig:
        return WritingRewardConfig(
            weight=1.0, source="function", function=f"lwz_test_rewards:{name}"
        )

    scorer = Scorer(
        RewardsConfig(writing=section("raises"), others={"taste": section("words")}), "direct"
    )
    sample = RewardSample(
        "Write.", None, "<answer>One two three.</answer>", False, checklist=("rhymes",)
    )
    with caplog.at_level(logging.WARNING):
        (parts,) = scorer.score_samples([sample])
    assert parts.rewards["taste"] == 4
    assert math.isnan(parts.rewards["writing"])
    assert parts.not_applicable == {"length"}
    assert "reward 'writing' failed for 1 completions: lwz_test_rewards:raises" in caplog.text


def test_parked_model_is_on_the_device_only_while_it_is_used() -> None:
    model = torch.nn.BatchNorm1d(4)
    model.weight.data.uniform_()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    addresses = [tensor.data_ptr() for tensor in model.state_dict().values()]
    copies: list[torch.Tensor] = []

    def to_device(host: torch.Tensor) -> torch.Tensor:
        copies.append(host + 1)
        return copies[-1]

    parked = ParkedModel(model, torch.device("cpu"), to_device)
    with parked.on_device():
        assert torch.equal(model.weight, before["weight"] + 1)
        assert torch.equal(model.running_mean, before["running_mean"] + 1)
    assert len(copies) == len(before)
    assert [tensor.data_ptr() for tensor in model.state_dict().values()] == addresses
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_parked_model_is_used_by_one_thread_at_a_time() -> None:
    model = torch.nn.Linear(2, 2)
    host = model.weight.data_ptr()
    parked = ParkedModel(model, torch.device("cpu"), torch.clone)
    is_inside, found = threading.Event(), []

    def use(hold_s: float) -> None:
        with parked.on_device():
            is_inside.set()
            time.sleep(hold_s)
            found.append(model.weight.data_ptr() != host)

    first = threading.Thread(target=use, args=(0.1,))
    first.start()
    assert is_inside.wait(10)
    second = threading.Thread(target=use, args=(0.2,))
    second.start()
    for thread in (first, second):
        thread.join(10)
    assert found == [True, True]
    assert model.weight.data_ptr() == host


@pytest.mark.gpu
def test_parked_model_leaves_the_gpu() -> None:
    model = torch.nn.Linear(512, 512, bias=False)
    weight = model.weight.detach().clone()
    parked = ParkedModel(model, torch.device("cuda"))
    before = torch.cuda.memory_allocated()
    with parked.on_device():
        assert torch.cuda.memory_allocated() >= before + weight.nbytes
        assert model(torch.eye(512, device="cuda")).device.type == "cuda"
    assert torch.cuda.memory_allocated() < before + weight.nbytes
    assert model.weight.is_pinned()
    assert torch.equal(model.weight, weight)
