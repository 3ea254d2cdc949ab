"""What a judge is told, and how its replies are read."""

import pytest

from lwz_trainer.prepare.questions import quality_question, range_question


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ('{"range": [800, 1200]}', (800, 1200)),
        ('{"range": [0, 100]}', (0, 100)),
        ('{"range": [9000, 12000]}', (9000, 12000)),
        ('{"range": [0, 0]}', (0, 0)),
        ('```json\n{"range": [400, 800]}\n```', (400, 800)),
        ('Here it is: {"range":[400,800]}.', (400, 800)),
        ('<think>{"range": [100, 200]}? No.</think>{"range": [400, 800]}', (400, 800)),
        ('No open tag {"range": [1, 2]}</think>\n{"range": [400, 800]}', (400, 800)),
        ('{"range": [100, 200]} or rather {"range": [400, 800]}', (400, 800)),
        ('{a} {"reason": {"x": 1}} {"range": [400, 800]} {', (400, 800)),
    ],
)
def test_range_replies_that_are_read(reply: str, expected: tuple[int, int]) -> None:
    assert range_question().parse(reply) == expected


@pytest.mark.parametrize(
    ("reply", "problem"),
    [
        ("", "expected a JSON object"),
        ("about 500 words", "expected a JSON object"),
        ('{"range": [400, 8', "expected a JSON object"),
        ('{"words": [400, 800]}', "expected a JSON object"),
        ('<think>{"range": [400, 800]}', "before its thinking does"),
        ('<think>a</think>Or <think>{"range": [400, 800]}', "before its thinking does"),
        ('{"range": [400, 8, "other": {"range": [400, 800]}', "expected a JSON object"),
        ('{"range": 400}', "two integers"),
        ('{"range": [400]}', "two integers"),
        ('{"range": [400, 600, 800]}', "two integers"),
        ('{"range": ["400", "800"]}', "two integers"),
        ('{"range": [400.0, 800.0]}', "two integers"),
        ('{"range": [false, true]}', "two integers"),
        ('{"range": [450, 800]}', "multiples of 100"),
        ('{"range": [400, 850]}', "multiples of 100"),
        ('{"range": [800, 400]}', "0 <= low < high"),
        ('{"range": [400, 400]}', "0 <= low < high"),
        ('{"range": [-100, 400]}', "0 <= low < high"),
        ('{"range": [10000, 12100]}', "0 <= low < high"),
        ('{"range": [1000, 4100]}', "3000 apart"),
    ],
)
def test_range_replies_that_are_refused(reply: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        range_question().parse(reply)


def test_quality_replies() -> None:
    parse = quality_question().parse
    assert parse('<think>Hm.</think> {"keep": true}') is True
    assert parse('{"keep": false}') is False
    for reply in ('{"keep": "yes"}', '{"keep": 1}', '{"keep": null}', "true"):
        with pytest.raises(ValueError, match="keep"):
            parse(reply)


def test_the_request_is_put_in_as_it_is() -> None:
    request = 'Braces {request} {0} {"range": [1, 2]} and \\n <request>'
    for question in (quality_question(), range_question()):
        text = question.text(request)
        assert f"<request>\n{request}\n</request>" in text
        assert text.count("do not answer it") == 1


def test_the_range_rules_of_the_method_are_told() -> None:
    rules = range_question().instructions
    for fact in (
        "thesis needs 400 to 800 words",
        "most extreme tenth",
        "multiples of 100",
        "at least 0, the upper one at most 12000",
        "at most 3000 apart",
        '"2000 words" is 1800 to 2200',
        '"no more than 2000 words" is 1800 to 2000',
        '"at least 2000 words" is 2000 to 2200',
        "attachment",
        "both bounds are 0",
        '{"range": [lower, upper]}',
    ):
        assert fact in rules, fact
