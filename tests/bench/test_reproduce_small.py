"""The data of the small reproduction: shortened requests, plays, answers, and its stages."""

import json
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest

from bench.reproduce_small import __main__ as reproduce
from bench.reproduce_small.requests import scaled_request, scaled_words, write_scaled_requests
from bench.reproduce_small.texts import play_text, speech_answers
from lwz_trainer.config.evaluation import EvalConfig
from lwz_trainer.config.pretrain import PretrainConfig
from lwz_trainer.config.reading import parse_command_line
from lwz_trainer.config.reward_model import RewardModelConfig
from lwz_trainer.config.train import TrainConfig
from lwz_trainer.data.templates import load_template


def test_scaled_words_goes_from_shortest_to_longest() -> None:
    words = [scaled_words(length, 100, 6000) for length in (100, 200, 800, 3000, 6000)]
    assert words == [30, 40, 70, 90, 100]


@pytest.mark.parametrize(
    ("prompt", "length", "expected"),
    [
        ("Write a 1000-word essay.", 1000, "Write a 50-word essay."),
        ("An essay of 1,000 words, in 1,000,000", 1000, "An essay of 50 words, in 1,000,000"),
        ("Write on tides.", 300, "Write on tides. Write about 50 words."),
        ("Write 2000 words in 3000 words.", 3000, None),
    ],
)
def test_scaled_request_names_one_length(prompt: str, length: int, expected: str | None) -> None:
    assert scaled_request(prompt, length, 50) == expected


def test_write_scaled_requests_keeps_the_benchmarks_format(tmp_path: Path) -> None:
    rows = [
        {"prompt": "Write 100 words.", "type": "A", "length": 100},
        {"prompt": "Write 6000 words on tides.", "type": "B", "length": 6000},
        {"prompt": "Write 2000 words in 3000 words.", "type": "B", "length": 3000},
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    assert write_scaled_requests(tmp_path / "in.jsonl", tmp_path / "out.jsonl") == (2, 1)
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert written == [
        {"prompt": "Write 30 words.", "type": "A", "length": 30},
        {"prompt": "Write 100 words on tides.", "type": "B", "length": 100},
    ]


def test_play_text_starts_at_the_first_scene_with_a_speech_a_line() -> None:
    raw = "HENRY V\r\n\r\nPERSONS\r\n\r\nSCENE: England\r\n\r\nKING.\r\n\r\nO for a\r\nMuse!\r\n"
    assert play_text(raw) == ": England\nKING.\nO for a Muse!"


def test_speech_answers_have_every_length_as_often() -> None:
    speeches = [f"{'word ' * n}of {n}." for n in range(20, 110) for _ in range(3)]
    rows = speech_answers(speeches, 16)
    lengths = Counter(int(row["prompt"].split()[-2]) for row in rows)
    assert lengths == dict.fromkeys(range(30, 101, 10), 2)
    for row in rows:
        assert abs(len(row["answer"].split()) - int(row["prompt"].split()[-2])) <= 5
        assert "“word word word word”" in row["prompt"]
    assert rows == speech_answers(speeches, 16)


@pytest.mark.parametrize("sizes", [reproduce.Sizes(), reproduce.QUICK])
def test_stages_are_valid_commands_that_make_their_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: reproduce.Sizes
) -> None:
    ran: list[list[str]] = []
    monkeypatch.setattr(reproduce, "_run", ran.append)
    monkeypatch.chdir(reproduce.ROOT)
    made = {stage.name: stage for stage in reproduce._stages(tmp_path, tmp_path, "model", sizes)}
    systems = reproduce._systems(tmp_path)
    for name, stage in made.items():
        if name in ("texts", "requests", "answers"):
            continue
        if name == "pairs":
            (tmp_path / "pairs.partial").touch()
        stage.make()
        command = ran.pop()
        assert find_spec(command[1]) is not None
        if name == "pairs":
            assert command[:2] == ["-m", "bench.reward_pairs"]
            assert stage.result.exists()
            continue
        classes = {
            "pretrain": PretrainConfig,
            "train": TrainConfig,
            "reward-model": RewardModelConfig,
        }
        first = 4 if command[2] == "eval" else 3
        config = parse_command_line(classes.get(command[2], EvalConfig), command[first:], prog=name)
        result = "report.md" if command[2] == "eval" else "final"
        assert Path(config.output_dir) / result == stage.result
        if command[2] == "train":
            assert config.model.path == str(made["pretrain"].result)
            assert config.data.template == systems[name][1]
        if name == "table":
            assert [answers.partition("=")[0] for answers in config.responses] == list(systems)


def test_a_stage_without_its_result_stops_and_keeps_its_seconds(tmp_path: Path) -> None:
    times = tmp_path / "seconds.json"
    times.write_text('{"slow": 1000.0}')
    stopped = reproduce.Stage("slow", tmp_path / "final", lambda: None)
    assert reproduce._make(stopped, times) == 1
    assert json.loads(times.read_text())["slow"] >= 1000
    (tmp_path / "final").touch()
    assert reproduce._make(stopped, times) == 0


def test_another_size_does_not_go_on_with_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "requests.jsonl").touch()
    monkeypatch.setattr(reproduce, "_stages", lambda *_: [])
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "report.md").touch()
    monkeypatch.chdir(tmp_path)
    options = ["--longbench", "requests.jsonl", "--out", "."]
    assert reproduce.main([*options, "--quick"]) == 0
    monkeypatch.chdir(tmp_path)
    assert reproduce.main(options) == 2
    assert "holds a run with other settings" in capsys.readouterr().err


def test_direct_template_opens_the_answer() -> None:
    template = load_template(str(reproduce.DIRECT))
    assert (template.opened, template.kind) == ("<answer>", "direct")


def test_a_missing_benchmark_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert reproduce.main(["--longbench", "/nowhere.jsonl"]) == 2
    assert "error: no file /nowhere.jsonl" in capsys.readouterr().err
