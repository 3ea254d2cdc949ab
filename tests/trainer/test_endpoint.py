"""The endpoint client against a server that fails in every way that servers do."""

import asyncio
import email.utils
import itertools
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lwz_trainer.config.endpoint import EndpointConfig
from lwz_trainer.endpoint import (
    AnswerCache,
    AnswerError,
    BlockingEndpoint,
    Endpoint,
    EndpointDown,
    EndpointError,
    RequestRefused,
)
from lwz_trainer.endpoint.breaker import CircuitBreaker
from lwz_trainer.errors import TrainingStopped, UserError
from tests.trainer.fault_server import FaultServer, Hang, Reply, Reset, chat_reply, user_text


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def make_config(server: FaultServer, **settings: Any) -> EndpointConfig:
    defaults: dict[str, Any] = {
        "base_url": server.base_url,
        "model": "judge",
        "backoff_s": 0.001,
        "timeout_s": 20,
    }
    return EndpointConfig(**(defaults | settings))


def ask(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def as_score(text: str) -> int:
    score = json.loads(text)["score"]
    if not 1 <= score <= 10:
        raise ValueError(f"expected a score from 1 to 10, got {score}")
    return score


def echo(body: dict[str, Any], number: int) -> Reply:
    return chat_reply(f"echo {user_text(body)}")


def first_then_echo(*first: Reply | Hang | Reset) -> Callable[[dict[str, Any], int], Any]:
    return lambda body, number: first[number] if number < len(first) else echo(body, number)


TRANSIENT = {
    "500": Reply("broken", status=500),
    "503 with a page": Reply("<html>down</html>", status=503),
    "408": Reply("", status=408),
    "429": Reply("slow down", status=429),
    "reset": Reset(),
    "no answer": Hang(0),
    "half an answer": Reply(chat_reply("hello").body, cut=20),
    "no JSON": Reply("<html>gateway</html>"),
    "half of a JSON text": Reply(chat_reply("hello").body[:40]),
    "no choices": Reply('{"choices": []}'),
    "another schema": Reply('{"error": {"message": "overloaded"}}'),
    "a list": Reply("[1, 2]"),
    "a message that is no object": Reply('{"choices": [{"message": "hello"}]}'),
    "content that is no text": Reply('{"choices": [{"message": {"content": 3}}]}'),
}


@pytest.mark.parametrize("fault", TRANSIENT.values(), ids=TRANSIENT.keys())
def test_chat_survives_two_transient_faults(fault: Reply | Hang | Reset) -> None:
    with (
        FaultServer(first_then_echo(fault, fault)) as server,
        BlockingEndpoint(make_config(server)) as endpoint,
    ):
        assert endpoint.chat(ask("a"), parse=str) == "echo a"
        assert len(server.bodies) == 3
        assert endpoint.usage.num_retries == 2
        assert endpoint.usage.num_calls == 1


@pytest.mark.parametrize("fault", TRANSIENT.values(), ids=TRANSIENT.keys())
def test_chat_gives_up_after_max_attempts_in_one_line(fault: Reply | Hang | Reset) -> None:
    with (
        FaultServer(lambda body, number: fault) as server,
        BlockingEndpoint(make_config(server, max_attempts=3)) as endpoint,
    ):
        with pytest.raises(EndpointError, match="failed in 3 attempts; the last: ") as caught:
            endpoint.chat(ask("a"), parse=str)
        assert len(str(caught.value).splitlines()) == 1
        assert len(server.bodies) == 3


def test_a_hanging_server_is_left_after_the_time_limit() -> None:
    with (
        FaultServer(first_then_echo(Hang(30))) as server,
        BlockingEndpoint(make_config(server, timeout_s=0.5)) as endpoint,
    ):
        started = time.monotonic()
        assert endpoint.chat(ask("a"), parse=str) == "echo a"
        assert 0.5 <= time.monotonic() - started < 15


@pytest.mark.parametrize("status", [400, 403, 413, 422, 302])
def test_a_refused_request_is_not_sent_again(status: int) -> None:
    with (
        FaultServer(lambda body, number: Reply("too\nlong", status=status)) as server,
        BlockingEndpoint(make_config(server)) as endpoint,
    ):
        with pytest.raises(RequestRefused, match=rf"HTTP {status}: too long"):
            endpoint.chat(ask("a"), parse=str)
        assert len(server.bodies) == 1


@pytest.mark.parametrize("status", [401, 402, 404])
def test_a_wrong_key_or_model_stops_all_requests_at_once(status: int) -> None:
    with (
        FaultServer(lambda body, number: Reply("no", status=status)) as server,
        BlockingEndpoint(make_config(server)) as endpoint,
    ):
        for _ in range(3):
            with pytest.raises(EndpointDown, match=f"HTTP {status}"):
                endpoint.chat(ask("a"), parse=str)
        assert len(server.bodies) == 1
        assert issubclass(EndpointDown, TrainingStopped)


@pytest.mark.parametrize("as_date", [False, True], ids=["seconds", "date"])
def test_retry_after_is_kept_by_all_requests(as_date: bool) -> None:
    def answer(body: dict[str, Any], number: int) -> Reply:
        if number > 0:
            return echo(body, number)
        after = email.utils.formatdate(time.time() + 3, usegmt=True) if as_date else "1"
        return Reply("slow down", status=429, headers={"Retry-After": after})

    with (
        FaultServer(answer) as server,
        BlockingEndpoint(make_config(server, concurrency=1)) as endpoint,
    ):
        results = dict(endpoint.map(["a", "b"], lambda e, text: e.chat(ask(text), parse=str)))
        assert results == {"a": "echo a", "b": "echo b"}
        assert server.times[1] - server.times[0] >= 0.9
        assert len(server.bodies) == 3


def test_no_more_requests_than_the_limit_are_under_way() -> None:
    everyone_is_here = threading.Barrier(3, timeout=20)

    def answer(body: dict[str, Any], number: int) -> Reply:
        everyone_is_here.wait()
        return echo(body, number)

    with (
        FaultServer(answer) as server,
        BlockingEndpoint(make_config(server, concurrency=3)) as endpoint,
    ):
        texts = [str(number) for number in range(12)]
        results = dict(endpoint.map(texts, lambda e, text: e.chat(ask(text), parse=str)))
        assert results == {text: f"echo {text}" for text in texts}
        assert server.most_at_once == 3


def test_an_answer_that_cannot_be_read_is_asked_for_again() -> None:
    answers = ["nothing", '{"score": 11}', '{"score": 7}']
    with (
        FaultServer(lambda body, number: chat_reply(answers[number])) as server,
        BlockingEndpoint(make_config(server, max_answers=3)) as endpoint,
    ):
        assert endpoint.chat(ask("a"), parse=as_score) == 7
        assert endpoint.usage.num_calls == 3


def test_answers_that_cannot_be_read_end_in_an_error(tmp_path: Path) -> None:
    with FaultServer(lambda body, number: chat_reply('{"score": 11}')) as server:
        for number in (1, 2):
            with BlockingEndpoint(make_config(server, max_answers=2), tmp_path / "a") as endpoint:
                calls = endpoint.map("aaa", lambda e, text: e.chat(ask(text), parse=as_score))
                errors = [str(error) for _, error in calls]
                with pytest.raises(AnswerError, match=r"none of 2 answers .* 1 to 10, got 11"):
                    endpoint.chat(ask("a"), parse=as_score)
            assert len(errors) == 3
            assert len(set(errors)) == 1
            # Equal questions share their answers; who asks in another run gets others.
            assert len(server.bodies) == 2 * number


def test_the_cache_forgets_at_the_end_and_not_when_it_is_killed(tmp_path: Path) -> None:
    killed = AnswerCache(tmp_path / "a")
    killed.put({"question": 1}, "nothing")
    killed.forget({"question": 1})
    resumed = AnswerCache(tmp_path / "a")
    assert resumed.get({"question": 1}) == "nothing"
    resumed.forget({"question": 1})
    resumed.close()
    assert AnswerCache(tmp_path / "a").get({"question": 1}) is None


def test_an_unreadable_answer_before_a_readable_or_missing_one_is_kept(tmp_path: Path) -> None:
    replies = [chat_reply("nothing"), Reply("", status=400), chat_reply('{"score": 7}')]
    with FaultServer(lambda body, number: replies[number]) as server:

        def score() -> int:
            with BlockingEndpoint(make_config(server, max_answers=2), tmp_path / "a") as endpoint:
                return endpoint.chat(ask("a"), parse=as_score)

        with pytest.raises(RequestRefused):
            score()
        assert [score(), score()] == [7, 7]
        assert len(server.bodies) == 3


def test_a_model_that_only_thought_has_an_empty_answer() -> None:
    with (
        FaultServer(lambda body, number: chat_reply(None)) as server,
        BlockingEndpoint(make_config(server)) as endpoint,
    ):
        assert endpoint.chat(ask("a"), parse=str) == ""


def test_the_cache_is_keyed_by_the_whole_request(tmp_path: Path) -> None:
    cache = tmp_path / "new" / "answers.sqlite"
    with FaultServer(echo) as server:
        settings: list[dict[str, Any]] = [
            {},
            {"temperature": 0.5},
            {"top_p": 0.9},
            {"max_tokens": 9},
            {"model": "other"},
            {"extra_body": '{"top_k": 20}'},
            {"base_url": server.base_url + "/"},  # the same address
        ]
        for number, setting in enumerate(settings * 2):
            with BlockingEndpoint(make_config(server, **setting), cache) as endpoint:
                assert endpoint.chat(ask("你好"), parse=str) == "echo 你好"
                is_new = number < len(settings) - 1
                assert endpoint.usage.num_calls == int(is_new)
                assert endpoint.usage.num_cache_hits == int(not is_new)
        assert [body.get("top_k") for body in server.bodies].count(20) == 1
        with BlockingEndpoint(make_config(server), cache) as endpoint:
            assert endpoint.chat(ask("你好!"), parse=str) == "echo 你好!"
            assert endpoint.usage.num_calls == 1


def test_failures_are_not_kept(tmp_path: Path) -> None:
    faults = [Reply("", status=500), Reply("", status=500), Reply("", status=400)]
    with FaultServer(first_then_echo(*faults)) as server:
        for expected in (EndpointError, RequestRefused):
            with (
                BlockingEndpoint(make_config(server, max_attempts=2), tmp_path / "a") as endpoint,
                pytest.raises(expected),
            ):
                endpoint.chat(ask("a"), parse=str)
        with BlockingEndpoint(make_config(server), tmp_path / "a") as endpoint:
            assert endpoint.chat(ask("a"), parse=str) == "echo a"


def test_equal_requests_under_way_are_sent_once(tmp_path: Path) -> None:
    with (
        FaultServer(echo) as server,
        BlockingEndpoint(make_config(server), tmp_path / "a") as endpoint,
    ):
        results = list(endpoint.map(["a"] * 9, lambda e, text: e.chat(ask(text), parse=str)))
        assert results == [("a", "echo a")] * 9
        assert len(server.bodies) == 1


def test_a_file_that_is_no_cache_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no database " * 1000)
    with pytest.raises(UserError, match="cannot open the answer cache"):
        AnswerCache(tmp_path / "text")
    with pytest.raises(UserError, match="cannot open the answer cache"):
        AnswerCache(tmp_path / "text" / "below").get({})
    AnswerCache(tmp_path / "new" / "answers").close()
    assert not (tmp_path / "new").exists()


def test_a_dead_server_fails_a_thousand_requests_with_one_error() -> None:
    with FaultServer(echo) as server:
        base_url = server.base_url
    config = EndpointConfig(
        base_url=base_url, model="m", backoff_s=0.001, max_attempts=2, concurrency=2
    )
    with BlockingEndpoint(config) as endpoint:
        answers = endpoint.map(range(1000), lambda e, n: e.chat(ask(str(n)), parse=str))
        # Four failures in a row open it; requests under way by then may add theirs.
        for _, answer in itertools.islice(answers, 4):
            assert isinstance(answer, EndpointError)
        with pytest.raises(EndpointDown, match=r"the endpoint is down: .*ConnectError"):
            list(answers)


@pytest.mark.parametrize("is_left_inside", [True, False])
def test_a_loop_over_answers_may_be_left_early(is_left_inside: bool) -> None:
    with FaultServer(first_then_echo(chat_reply("0"), *[Hang(30)] * 9)) as server:
        started = time.monotonic()
        with BlockingEndpoint(make_config(server, concurrency=4)) as endpoint:
            answers = endpoint.map(range(1000), lambda e, n: e.chat(ask(str(n)), parse=str))
            next(answers)
            if is_left_inside:
                answers.close()
        answers.close()
        assert time.monotonic() - started < 25, "what was under way is not waited for"


def test_a_server_that_comes_back_is_found_again() -> None:
    with (
        FaultServer(first_then_echo(*[Reply("", status=500)] * 3)) as server,
        BlockingEndpoint(
            make_config(server, max_attempts=1, breaker_failures=2, breaker_rest_s=0.5)
        ) as endpoint,
    ):
        for error in (EndpointError, EndpointError, EndpointDown, EndpointDown):
            with pytest.raises(error) as caught:
                endpoint.chat(ask("a"), parse=str)
            assert caught.type is error
        assert len(server.bodies) == 2
        time.sleep(0.5)
        with pytest.raises(EndpointError, match="HTTP 500"):  # the probe
            endpoint.chat(ask("a"), parse=str)
        with pytest.raises(EndpointDown):
            endpoint.chat(ask("a"), parse=str)
        time.sleep(0.5)
        assert endpoint.chat(ask("a"), parse=str) == "echo a"
        assert endpoint.chat(ask("b"), parse=str) == "echo b"
        assert len(server.bodies) == 5


def test_refusals_open_the_breaker_only_before_anything_worked() -> None:
    def answer(body: dict[str, Any], number: int) -> Reply:
        if user_text(body) == "bad":
            return Reply("no such parameter", status=400)
        return echo(body, number)

    with FaultServer(answer) as server:
        with BlockingEndpoint(make_config(server, breaker_failures=2)) as endpoint:
            assert endpoint.chat(ask("good"), parse=str) == "echo good"
            for _ in range(5):
                with pytest.raises(RequestRefused):
                    endpoint.chat(ask("bad"), parse=str)
        with BlockingEndpoint(make_config(server, breaker_failures=2)) as endpoint:
            for _ in range(2):
                with pytest.raises(RequestRefused):
                    endpoint.chat(ask("bad"), parse=str)
            with pytest.raises(EndpointDown, match="check the settings"):
                endpoint.chat(ask("good"), parse=str)


def test_breaker_admits_one_probe_per_rest() -> None:
    now = [0.0]
    breaker = CircuitBreaker(2, 10.0, lambda: now[0])
    breaker.record_failure("x")
    breaker.record_success()
    breaker.record_failure("x")
    assert breaker.admits()
    assert not breaker.reason
    breaker.record_failure("y")
    assert breaker.reason == "y"
    assert not breaker.admits()
    now[0] = 10.0
    assert [breaker.admits() for _ in range(3)] == [True, False, False]
    now[0] = 20.0
    assert breaker.admits()
    breaker.record_success()
    assert [breaker.admits() for _ in range(3)] == [True, True, True]


def test_the_api_key_is_sent_and_never_kept_or_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    key = "sk-very-secret-0123456789"
    monkeypatch.setenv("TEST_KEY", f"{key}\n")
    caplog.set_level("DEBUG")

    def answer(body: dict[str, Any], number: int) -> Reply:
        if number == 1:
            return Reply(f"the key {key} is not allowed to do this", status=400)
        return chat_reply(f"your key is {key}")

    with FaultServer(answer) as server:
        config = make_config(server, api_key_env="TEST_KEY")
        with BlockingEndpoint(config, tmp_path / "answers.sqlite") as endpoint:
            assert endpoint.chat(ask("a"), parse=str) == "your key is ***"
            with pytest.raises(RequestRefused, match=r"the key \*\*\* is not allowed"):
                endpoint.chat(ask("b"), parse=str)
            kept = b"".join(path.read_bytes() for path in tmp_path.iterdir())
        assert server.authorizations == [f"Bearer {key}"] * 2
    assert b"your key is" in kept
    assert key.encode() not in kept
    assert key not in repr(config)
    assert key not in caplog.text


def test_a_key_that_is_not_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TEST_KEY", raising=False)
    config = EndpointConfig(base_url="http://localhost:1/v1", model="m", api_key_env="TEST_KEY")
    with pytest.raises(UserError, match=r"environment variable TEST_KEY .* is not set"):
        Endpoint(config)
    monkeypatch.setenv("TEST_KEY", "schlüssel")
    with pytest.raises(UserError, match="the key in TEST_KEY has characters") as caught:
        Endpoint(config)
    assert "schlüssel" not in str(caught.value)
    with pytest.raises(UserError, match=r"set endpoint\.base_url"):
        Endpoint(EndpointConfig())


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"concurrency": 0}, "endpoint.concurrency must be at least 1, got 0"),
        ({"timeout_s": 0}, "endpoint.timeout_s must be above 0"),
        ({"temperature": -1}, "endpoint.temperature"),
        ({"top_p": 0}, "endpoint.top_p"),
        ({"max_tokens": 0}, "endpoint.max_tokens"),
        ({"breaker_rest_s": -1}, "endpoint.breaker_rest_s"),
        ({"base_url": "localhost:8000"}, "must look like http://host:8000/v1"),
        ({"base_url": "https://me:pass@host/v1"}, "must hold no user, password"),
        ({"extra_body": "{"}, "not valid JSON"),
        ({"extra_body": "[1]"}, "must be a JSON object, got a list"),
        ({"extra_body": '{"model": "x"}'}, "holds 'model'"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError, match=expected) as caught:
        EndpointConfig(**settings)
    assert "pass@" not in str(caught.value)


def test_complete_and_reward_speak_to_their_addresses(tmp_path: Path) -> None:
    def answer(body: dict[str, Any], number: int) -> Reply:
        if "prompt" in body:
            return Reply(json.dumps({"choices": [{"text": body["prompt"] + " and on"}]}))
        row = {"index": 0, "probs": [-2.5]}
        return Reply(json.dumps({"data": [row] * body.get("input", 1)}))

    async def run(config: EndpointConfig) -> None:
        async with Endpoint(config, tmp_path / "answers.sqlite") as endpoint:
            assert await endpoint.complete("once", parse=str) == "once and on"
            assert await endpoint.reward("classify", input=1) == -2.5
            with pytest.raises(EndpointError, match="too many values"):
                await endpoint.reward("classify", input=2)

    with FaultServer(answer) as server:
        asyncio.run(run(make_config(server, max_attempts=1, temperature=0.5)))
        assert server.paths == ["/v1/completions", "/classify", "/classify"]
        assert server.bodies[0] == {"model": "judge", "prompt": "once", "temperature": 0.5}
        assert server.bodies[1] == {"model": "judge", "use_activation": False, "input": 1}
