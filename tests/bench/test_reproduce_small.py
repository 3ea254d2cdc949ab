"""The data of the small reproduction: shortened requests, plays, answers, and its stages."""

import json
from pathlib import Path

import pytest

from bench.reproduce_small import __main__ as reproduce
from bench.reproduce_small.requests import scaled_request, scaled_words, write_scaled_requests
from bench.reproduce_small.texts import play_text, write_answers
from lwz_trainer.config.pretrain import PretrainConfig
from lwz_trainer.config.reading import parse_command_line
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


def test_write_answers_names_the_length_of_the_better_text(tmp_path: Path) -> None:
    pair = {"prompt": "Write a speech.", "chosen": "word " * 34, "rejected": "x"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(pair))
    assert write_answers(tmp_path / "pairs.jsonl", tmp_path / "answers.jsonl") == 1
    row = json.loads((tmp_path / "answers.jsonl").read_text())
    assert row == {"prompt": "Write a speech. Write about 30 words.", "answer": pair["chosen"]}


@pytest.mark.parametrize("sizes", [reproduce.Sizes(), reproduce.QUICK])
def test_training_stages_are_valid_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: reproduce.Sizes
) -> None:
    ran: list[list[str]] = []
    monkeypatch.setattr(reproduce, "_run", ran.append)
    monkeypatch.chdir(tmp_path)
    made = {stage.name: stage for stage in reproduce._stages(tmp_path, tmp_path, "model", sizes)}
    for name in ("pretrain", "sft", "rl_think", "rl_direct"):
        made[name].make()
        command = ran.pop()
        assert command[:2] == ["-m", "lwz_trainer"]
        config_class = PretrainConfig if command[2] == "pretrain" else TrainConfig
        config = parse_command_line(config_class, command[3:], prog=name)
        assert Path(config.output_dir) / "final" == made[name].result
        if name != "pretrain":
            assert config.model.path == str(made["pretrain"].result)


def test_direct_template_opens_the_answer() -> None:
    template = load_template(str(reproduce.DIRECT))
    assert (template.opened, template.kind) == ("<answer>", "direct")


def test_a_missing_benchmark_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert reproduce.main(["--longbench", "/nowhere.jsonl"]) == 2
    assert "error: no file /nowhere.jsonl" in capsys.readouterr().err
