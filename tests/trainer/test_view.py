"""The run viewer: what the page embeds, what it refuses, and what a browser makes of it."""

import json
import math
import random
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from lwz_trainer.__main__ import main
from lwz_trainer.errors import UserError
from lwz_trainer.view import page as page_module
from lwz_trainer.view.metrics import learned_changes, read_metrics
from lwz_trainer.view.page import write_page
from lwz_trainer.view.samples import find_sample_files, read_sample_step
from lwz_trainer.view.steps import format_steps, spread_steps

HOSTILE = '</script><b id="injected">&amp;<!--'
CHINESE = "夜里下了一场雨，巷口的灯笼在风里轻轻摇晃，老人把收音机的声音调小了些。"
ENGLISH = [
    "The ferry left before dawn, and nobody on the pier said aloud what they were thinking.",
    "She kept the ledger in a biscuit tin, each entry dated in her careful, slanting hand.",
    "By the second winter the orchard had learned the shape of the wind.",
    "What the committee called progress, the valley called noise, and both were right.",
    "He counted the steps from memory, and was wrong by one, as he had been for years.",
]
PROMPTS = [
    ("Write a short story about a lighthouse keeper who receives letters from the future.", "en"),
    ("请写一篇关于江南小镇雨夜的散文，要求细节真实、语言克制。", "zh"),
]


def make_metrics(step: int, num_steps: int, rng: random.Random) -> dict[str, Any]:
    """One step of a run that learns: the tags first, then the length, then the writing."""
    progress = step / num_steps
    learned = 1 - math.exp(-4 * progress)
    rollout, reward, update = (
        40 + 25 * learned + rng.random() * 6,
        3 + rng.random(),
        28 + 9 * learned,
    )
    record: dict[str, Any] = {
        "step": step,
        "loss": rng.gauss(0.01, 0.03),
        "grad_norm": abs(rng.gauss(0.5, 0.2)),
        "lr": 1e-6 * min(1, step / 10),
        "policy_version": step,
        "entropy": 1.6 - 0.7 * learned + rng.gauss(0, 0.04),
        "kl": 0.08 * learned + abs(rng.gauss(0, 0.003)),
        "clip_frac_low": abs(rng.gauss(0.004, 0.002)),
        "clip_frac_high": abs(rng.gauss(0.009, 0.003)),
        "ratio_mean": rng.gauss(1, 0.002),
        "ratio_max": 1.2 + abs(rng.gauss(0, 0.8)),
        "words/answer_mean": 300 + 1400 * learned + rng.gauss(0, 80),
        "words/think_mean": 120 + 800 * learned + rng.gauss(0, 60),
        "tokens/completion_mean": 700 + 3000 * learned + rng.gauss(0, 150),
        "tokens/completion_max": 2000 + 5000 * learned + rng.gauss(0, 500),
        "tokens/completion_mean_untruncated": 650 + 2800 * learned + rng.gauss(0, 150),
        "truncated_frac": max(0, 0.3 - 0.28 * learned + rng.gauss(0, 0.02)),
        "zero_spread_frac": max(0, rng.gauss(0.04, 0.03)),
        "distinct_frac": min(1, rng.gauss(0.98, 0.01)),
        "sampler/logprob_diff_mean": abs(rng.gauss(0.006, 0.001)),
        "sampler/logprob_diff_max": abs(rng.gauss(0.4, 0.2)),
        "sampler/prob_diff_mean": abs(rng.gauss(0.002, 0.0004)),
        "sampler/ess_frac": min(1, rng.gauss(0.97, 0.01)),
        "time/rollout_s": rollout,
        "time/reward_s": reward,
        "time/update_s": update,
        "time/step_s": rollout + reward + update + 1.5,
        "rollout/tokens_per_s": 2100 + 300 * rng.random(),
        "rollout/longest_tokens_per_s": 61 + 5 * rng.random(),
        "rollout/rows_in_flight": 30 + 8 * rng.random(),
        "rollout/bandwidth_frac": 0.6 + 0.1 * rng.random(),
        "update/tokens_per_s": 5200 + 300 * rng.random(),
        "rollout/kv_used_frac": 0.4 + 0.4 * learned,
        "rollout/prefill_tokens": 2048,
        "rollout/preemptions": max(0, round(rng.gauss(1, 2))),
        "memory/peak_gb": 61 + 9 * learned,
        "reward/structure": min(1, 0.2 + 0.8 * learned),
        "reward/strict_frac": min(1, 0.1 + 0.85 * learned),
        "reward/worker_failures": float(step == 7),
        "reward/redundancy": max(0, 0.25 - 0.2 * learned + rng.gauss(0, 0.02)),
    }
    for name, top in (("length", 0.92), ("writing", 0.7), ("format", 0.97)):
        record[f"reward/{name}"] = 0.1 + (top - 0.1) * learned + rng.gauss(0, 0.02)
        record[f"reward/{name}_std"] = 0.2 - 0.12 * learned
        record[f"reward/{name}_failed_frac"] = 0.125 if name == "writing" else 0.0
    return record


def make_samples(step: int, num_groups: int, group_size: int, rng: random.Random) -> pa.Table:
    """One step's samples, with a Chinese group, a repeated passage, and a failed reward."""
    rows = []
    for group in range(num_groups):
        prompt, language = PROMPTS[group % len(PROMPTS)]
        advantages = np.array([rng.gauss(0, 1) for _ in range(group_size)])
        advantages -= advantages.mean()
        for member in range(group_size):
            paragraphs = [" ".join(rng.sample(ENGLISH, 4)) for _ in range(4)]
            if language == "zh":
                paragraphs = [CHINESE * 3, "屋檐的水" * 12 + "。", CHINESE]
            repeated = paragraphs[-1]
            answer = "\n\n".join(["𠮷 " + paragraphs[0], *paragraphs[1:], repeated])
            think = (
                f"Plan for member {member}: open with the harbour, close with the letter. {HOSTILE}"
            )
            is_truncated = member == 1
            num_tokens = rng.randint(150, 260)
            logprobs = [-abs(rng.gauss(0, 1.1)) for _ in range(num_tokens)]
            closing = "" if is_truncated else "</answer>"
            writing = float("nan") if member == 2 else rng.random()
            rows.append(
                {
                    "step": step,
                    "group": group,
                    "member": member,
                    "prompt_row": 17 + group,
                    "prompt": prompt,
                    "length_range": None if group == 2 else [600, 1200],
                    "language": language,
                    "prompt_text": f"A conversation.\n<|user|>: {prompt} <|assistant|>:",
                    "completion": f"<think>{think}</think>\n<answer>{answer}{closing}",
                    "think": think,
                    "answer": answer,
                    "num_prompt_tokens": 64,
                    "num_completion_tokens": num_tokens,
                    "finish_reason": "length" if is_truncated else "stop",
                    "stop_string": None if is_truncated else "</answer>",
                    "truncated": is_truncated,
                    "words_think": 12,
                    "words_answer": rng.randint(350, 1500),
                    "structure": 0.0 if is_truncated else 1.0,
                    "redundancy": 0.2,
                    "repeated_spans": [[len(answer) - len(repeated), len(answer)]],
                    "reward_length": rng.random(),
                    "reward_format": 0.0 if is_truncated else 0.8,
                    "reward_writing": writing,
                    "normalized_length": rng.gauss(0, 1),
                    "normalized_format": rng.gauss(0, 1),
                    "normalized_writing": 0.0 if math.isnan(writing) else rng.gauss(0, 1),
                    "weighted_length": rng.gauss(0, 0.33),
                    "weighted_format": rng.gauss(0, 0.33),
                    "weighted_writing": 0.0 if math.isnan(writing) else rng.gauss(0, 0.33),
                    "advantage": float(advantages[member]),
                    "logprob_mean": float(np.mean(logprobs)),
                    "logprob_min": min(logprobs),
                    "prompt_ids": [1, 2, 3],
                    "completion_ids": [rng.randint(0, 49151) for _ in range(num_tokens)],
                    "sampling_logprobs": logprobs,
                    "policy_version": step,
                }
            )
    return pa.Table.from_pylist(rows)


def make_run(
    run_dir: Path,
    *,
    num_steps: int = 12,
    sample_steps: list[int] | None = None,
    num_groups: int = 2,
    group_size: int = 4,
    seed: int = 0,
) -> Path:
    """A synthetic run directory as the trainer writes it."""
    rng = random.Random(seed)
    (run_dir / "samples").mkdir(parents=True)
    records = [make_metrics(step, num_steps, rng) for step in range(1, num_steps + 1)]
    records[-1]["warnings"] = [f"group 1: all rewards are equal {HOSTILE}"]
    if num_steps > 4:
        records[3]["grad_norm"] = float("nan")
        del records[4]["entropy"]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    config = {
        "model": {"path": "smollm2-135m-instruct", "dtype": "auto"},
        "rollout": {"group_size": group_size, "temperature": 0.8, "top_p": 1.0},
        "loss": {"loss_type": "grpo", "clip_ratio_low": 0.2, "clip_ratio_high": 0.2},
        "optim": {"lr": 1e-6},
        "seed": seed,
    }
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    for step in sample_steps if sample_steps is not None else [1, num_steps]:
        table = make_samples(step, num_groups, group_size, rng)
        pq.write_table(table, run_dir / "samples" / f"step_{step:06d}.parquet")
    return run_dir


def embedded_data(page: Path) -> dict[str, Any]:
    """Every JSON block of a page by its element id, found as a browser would: up to `</script`."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r'<script type="application/json" id="([^"]+)">(.*?)</script', text, re.S)
    return {element_id: json.loads(body) for element_id, body in blocks}


def append_line(run_dir: Path, line: bytes) -> None:
    """Adds raw bytes to a run's metrics."""
    with (run_dir / "metrics.jsonl").open("ab") as file:
        file.write(line)


# ---- the page -----------------------------------------------------------------------------------


def test_write_page_embeds_curves_and_samples(tmp_path):
    run = make_run(tmp_path / "run-a", sample_steps=[1, 6, 12])
    page = write_page([run])
    assert page == run / "report.html"
    data = embedded_data(page)
    assert set(data) == {"curves", "samples-0-1", "samples-0-6", "samples-0-12"}
    (curves,) = data["curves"]["runs"]
    assert curves["name"] == "run-a"
    assert curves["steps"] == list(range(1, 13))
    assert curves["settings"]["rollout.group_size"] == "4"
    assert curves["sample_steps"] == [1, 6, 12]
    first = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert curves["series"]["reward/length"][0] == pytest.approx(first["reward/length"], rel=1e-5)
    assert list(curves["warnings"]) == ["12"]


def test_write_page_keeps_text_from_ending_a_script(tmp_path):
    page = write_page([make_run(tmp_path / "run")])
    text = page.read_text(encoding="utf-8")
    assert 'id="injected"' not in text.replace('id=\\"injected\\"', "")
    assert "</script><b" not in text
    member = embedded_data(page)["samples-0-1"]["groups"][0]["members"][0]
    assert HOSTILE in member["think"]


def test_write_page_loads_nothing_from_elsewhere(tmp_path):
    text = write_page([make_run(tmp_path / "run")]).read_text(encoding="utf-8")
    assert "default-src 'none'" in text
    assert "<!-- insert" not in text
    outside = re.sub(r'<script type="application/json".*?</script>', "", text, flags=re.S)
    assert re.findall(r"https?://(?!www\.w3\.org/2000/svg)", outside) == []
    assert not re.search(r"\bsrc=|<link|@import|url\(|innerHTML|\beval\(", outside)


def test_write_page_keeps_an_insert_marker_in_a_text(tmp_path):
    run = make_run(tmp_path / "run")
    append_line(run, b'{"step": 13, "warnings": ["<!-- insert style -->"]}\n')
    curves = embedded_data(write_page([run]))["curves"]["runs"][0]
    assert curves["warnings"]["13"] == ["<!-- insert style -->"]


def test_write_page_escapes_the_run_name_in_the_title(tmp_path):
    page = write_page([make_run(tmp_path / "a<b>&c")])
    assert "<title>a&lt;b&gt;&amp;c · training run</title>" in page.read_text(encoding="utf-8")


def test_write_page_overlays_runs_and_tells_their_names_apart(tmp_path):
    runs = [make_run(tmp_path / f"seed{i}" / "run", seed=i, sample_steps=[2]) for i in (1, 2)]
    out = tmp_path / "pages" / "both.html"
    assert write_page(runs, out) == out
    data = embedded_data(out)
    assert [run["name"] for run in data["curves"]["runs"]] == ["seed1/run", "seed2/run"]
    assert [run["settings"]["seed"] for run in data["curves"]["runs"]] == ["1", "2"]
    assert set(data) == {"curves", "samples-0-2", "samples-1-2"}
    assert data["samples-0-2"] != data["samples-1-2"]


def test_write_page_embeds_first_last_and_spread_steps(tmp_path):
    run = make_run(tmp_path / "run", sample_steps=list(range(1, 12)), num_groups=1, group_size=2)
    data = embedded_data(write_page([run], max_sample_steps=3))
    curves = data["curves"]["runs"][0]
    assert curves["sample_steps"] == [1, 6, 11]
    assert set(data) == {"curves", "samples-0-1", "samples-0-6", "samples-0-11"}
    left_out = "left out: steps 2–5, 7–10."
    assert f"Samples of 3 of 11 steps are in this page; {left_out}" in curves["notes"]


def test_write_page_without_samples_or_config_shows_the_curves(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    (curves,) = embedded_data(write_page([tmp_path]))["curves"]["runs"]
    assert (curves["settings"], curves["sample_steps"], curves["notes"]) == ({}, [], [])
    assert curves["series"] == {"loss": [0.5]}


@pytest.mark.parametrize(
    ("limit", "value"), [("MAX_SAMPLES_WITH_TOKENS", 7), ("MAX_EMBEDDED_TOKENS", 100)]
)
def test_write_page_leaves_token_ids_out_of_big_pages(tmp_path, monkeypatch, limit, value):
    run = make_run(tmp_path / "run", sample_steps=[1], num_groups=2, group_size=4)
    small = embedded_data(write_page([run]))
    assert "ids" in small["samples-0-1"]["groups"][0]["members"][0]
    monkeypatch.setattr(page_module, limit, value)
    big = embedded_data(write_page([run]))
    member = big["samples-0-1"]["groups"][0]["members"][0]
    assert "ids" not in member
    assert "logprobs" not in member
    assert len(member["least_likely"]) == 6
    assert any("Token ids are left out" in note for note in big["curves"]["runs"][0]["notes"])


def test_write_page_leaves_no_partial_file(tmp_path):
    run = make_run(tmp_path / "run")
    out = tmp_path / "out"
    write_page([run], out / "page.html")
    write_page([run], out / "page.html")
    assert [path.name for path in out.iterdir()] == ["page.html"]


def test_write_page_refuses_bad_arguments(tmp_path):
    run = make_run(tmp_path / "run", sample_steps=[])
    with pytest.raises(UserError, match="at least one run directory, got none"):
        write_page([])
    with pytest.raises(UserError, match="max_sample_steps must be 0 or more, got -1"):
        write_page([run], max_sample_steps=-1)
    with pytest.raises(UserError, match="given twice"):
        write_page([run, tmp_path / "run" / ".." / "run"])
    with pytest.raises(UserError, match=r"cannot write .*page\.html"):
        write_page([run], run / "metrics.jsonl" / "page.html")


def test_view_command_refuses_bad_runs_in_one_line(tmp_path, capsys):
    run = make_run(tmp_path / "run", sample_steps=[])
    append_line(run, b"[13]\n{}\n")
    for path, reason in ((run, "metrics.jsonl line 13 is broken"), (tmp_path, "not a run")):
        assert main(["view", str(path)]) == 2
        (error,) = capsys.readouterr().err.splitlines()
        assert error.startswith("error: ")
        assert reason in error
        assert not (path / "report.html").exists()


# ---- metrics ------------------------------------------------------------------------------------


def test_read_metrics_refuses_a_directory_without_metrics(tmp_path):
    with pytest.raises(UserError, match=r"not a run directory: expected metrics\.jsonl"):
        read_metrics(tmp_path)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"step": 13, "loss": }\n', "line 13 is broken"),
        (b'{"step": 13, "warnings": ["\xe5\xa4"]}\n', "line 13 is broken"),
        (b"[13]\n", "line 13 is broken: expected one JSON object, got list"),
        (b'{"step": "13"}\n', "line 13: step must be an integer, got '13'"),
        (b'{"step": true}\n', "line 13: step must be an integer, got True"),
    ],
)
def test_read_metrics_names_a_broken_line(tmp_path, line, reason):
    run = make_run(tmp_path / "run", sample_steps=[])
    append_line(run, line + b'{"step": 14, "loss": 0.1}\n')
    with pytest.raises(UserError, match=reason):
        read_metrics(run)


@pytest.mark.parametrize("tail", [b'{"step": 13, "lo', b'{"step": 13, "warnings": ["\xe5\xa4'])
def test_read_metrics_drops_a_torn_last_line_with_a_note(tmp_path, tail):
    run = make_run(tmp_path / "run", sample_steps=[])
    append_line(run, tail)
    metrics = read_metrics(run)
    assert metrics.steps[-1] == 12
    assert metrics.notes == ["The last line of metrics.jsonl (line 13) is torn; it was left out."]


def test_read_metrics_shows_the_latest_of_a_repeated_step(tmp_path):
    run = make_run(tmp_path / "run", sample_steps=[])
    append_line(run, b'{"step": 11, "loss": 7.0}\n{"step": 12, "loss": 8.0}\n')
    metrics = read_metrics(run)
    assert metrics.steps == list(range(1, 13))
    assert metrics.series["loss"][-2:] == [7.0, 8.0]
    assert metrics.series["reward/length"][-2:] == [None, None]
    assert len(metrics.notes) == 1
    assert "steps 11–12" in metrics.notes[0]


def test_read_metrics_tells_missing_from_not_finite(tmp_path):
    run = make_run(tmp_path / "run", sample_steps=[])
    append_line(run, b'{"step": 13, "loss": Infinity, "lr": -Infinity, "kl": null}\n')
    series = embedded_data(write_page([run]))["curves"]["runs"][0]["series"]
    assert series["grad_norm"][3] == "NaN"
    assert series["entropy"][4] is None
    assert series["entropy"][12] is None
    assert (series["loss"][12], series["lr"][12], series["kl"][12]) == ("inf", "-inf", "NaN")


def test_read_metrics_counts_steps_that_are_not_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"loss": 1}\n\n{"loss": 2}\n{"step": 9}\n{"loss": 3}')
    metrics = read_metrics(tmp_path)
    assert metrics.steps == [1, 2, 9, 10]
    assert metrics.series["loss"] == [1.0, 2.0, None, 3.0]


def test_read_metrics_of_a_run_that_just_started_has_a_note(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    metrics = read_metrics(tmp_path)
    assert metrics.steps == []
    assert metrics.notes == ["No step has been recorded yet."]


def write_series(run_dir: Path, key: str, values: list[float]) -> Path:
    """A run with one metric."""
    lines = [json.dumps({"step": i, key: value}) + "\n" for i, value in enumerate(values)]
    (run_dir / "metrics.jsonl").write_text("".join(lines))
    return run_dir


def test_learned_changes_averages_five_steps_at_each_end(tmp_path):
    values = [0.0, 0.1, 0.2, 0.1, 0.1, 9.0, 9.0, 0.9, 0.8, 0.9, 1.0, 0.9]
    (change,) = learned_changes(read_metrics(write_series(tmp_path, "reward/length", values)))
    assert change["first"] == pytest.approx(0.1)
    assert change["last"] == pytest.approx(0.9)
    assert (change["direction"], change["good"], change["window"]) == ("up", "up", 5)
    # Both windows have the sample variance 0.005: sqrt((0.005 + 0.005) / 5).
    assert change["standard_error"] == pytest.approx(math.sqrt(0.002), rel=1e-4)


def test_learned_changes_calls_noise_unclear(tmp_path):
    values = [0.5, 0.1, 0.9, 0.3, 0.7, 0.6, 0.1, 0.9, 0.4, 0.7]
    (change,) = learned_changes(read_metrics(write_series(tmp_path, "reward/length", values)))
    assert change["direction"] == "unclear"


@pytest.mark.parametrize(("values", "direction"), [([0.1, 0.9], "unclear"), ([0.0] * 4, "same")])
def test_learned_changes_claims_nothing_from_single_or_equal_steps(tmp_path, values, direction):
    (change,) = learned_changes(read_metrics(write_series(tmp_path, "reward/format", values)))
    assert change["direction"] == direction


def test_learned_changes_windows_do_not_overlap(tmp_path):
    values = [1.0, 2.0, 30.0, float("nan"), 4.0, 5.0]
    (change,) = learned_changes(read_metrics(write_series(tmp_path, "reward/writing", values)))
    assert (change["first"], change["last"], change["window"]) == (1.5, 4.5, 2)
    one_step = write_series(tmp_path, "reward/writing", [1.0])
    assert learned_changes(read_metrics(one_step)) == []


def test_learned_changes_knows_what_should_fall(tmp_path):
    run = make_run(tmp_path / "run", num_steps=40, sample_steps=[])
    changes = {change["key"]: change for change in learned_changes(read_metrics(run))}
    assert changes["reward/redundancy"]["direction"] == "down"
    assert changes["reward/redundancy"]["good"] == "down"
    assert changes["words/answer_mean"]["good"] is None
    assert "reward/length_std" not in changes
    assert "reward/writing_failed_frac" not in changes
    assert "reward/worker_failures" not in changes


# ---- settings and steps -------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["a: [1,\nb: }", "- a\n- b\n", "just words"])
def test_write_page_refuses_a_broken_config(tmp_path, text):
    run = make_run(tmp_path / "run", sample_steps=[])
    (run / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=r"config\.yaml is broken: expected"):
        write_page([run])


@pytest.mark.parametrize(
    ("count", "expected"),
    [(0, []), (1, [9]), (2, [0, 9]), (4, [0, 3, 6, 9]), (10, list(range(10)))],
)
def test_spread_steps_keeps_both_ends(count, expected):
    assert spread_steps(list(range(10)), count) == expected


def test_format_steps_joins_neighbours():
    assert format_steps([4]) == "step 4"
    assert format_steps([1, 2, 3, 7, 9, 10]) == "steps 1–3, 7, 9–10"


# ---- samples ------------------------------------------------------------------------------------


def read_first_step(run: Path, *, with_tokens: bool = True) -> dict[str, Any]:
    """The first sample step of a run, as the page gets it."""
    files, _ = find_sample_files(run)
    return read_sample_step(files[0], with_tokens=with_tokens)


def test_read_sample_step_groups_members_and_stores_a_prompt_once(tmp_path):
    step = read_first_step(make_run(tmp_path / "run", num_groups=2, group_size=3))
    assert [group["group"] for group in step["groups"]] == [0, 1]
    assert [m["member"] for m in step["groups"][1]["members"]] == [0, 1, 2]
    assert step["groups"][1]["prompt"] == PROMPTS[1][0]
    assert step["groups"][1]["length_range"] == [600, 1200]
    assert CHINESE in step["groups"][1]["members"][0]["answer"]
    assert "prompt" not in step["groups"][1]["members"][0]


def test_read_sample_step_gives_null_for_a_failed_reward(tmp_path):
    members = read_first_step(make_run(tmp_path / "run"))["groups"][0]["members"]
    assert members[2]["rewards"]["writing"]["raw"] is None
    assert members[0]["rewards"]["writing"]["raw"] is not None
    assert set(members[0]["rewards"]["length"]) == {"raw", "normalized", "weighted"}


def test_read_sample_step_counts_repeated_spans_in_utf16(tmp_path):
    member = read_first_step(make_run(tmp_path / "run"))["groups"][0]["members"][0]
    ((start, end),) = member["repeated_spans"]
    units = member["answer"].encode("utf-16-le")  # as JavaScript slices
    repeated = units[2 * start : 2 * end].decode("utf-16-le")
    assert repeated == member["answer"].split("\n\n")[-1]
    assert end == len(member["answer"]) + 1  # 𠮷 is two units


def test_read_sample_step_keeps_what_stands_outside_of_the_texts(tmp_path):
    members = read_first_step(make_run(tmp_path / "run"))["groups"][0]["members"]
    assert members[0]["outline"] == "<think>[thinking]</think>\n<answer>[answer]</answer>"
    assert members[1]["outline"] == "<think>[thinking]</think>\n<answer>[answer]"


def test_read_sample_step_names_the_least_likely_tokens(tmp_path):
    run = make_run(tmp_path / "run")
    member = read_first_step(run)["groups"][0]["members"][0]
    place, token_id, logprob = member["least_likely"][0]
    row = pq.read_table(run / "samples" / "step_000001.parquet").to_pylist()[0]
    assert place == int(np.argmin(row["sampling_logprobs"]))
    assert token_id == row["completion_ids"][place]
    assert logprob == pytest.approx(member["logprob_min"], rel=1e-4)
    assert len(member["logprob_profile"]) == 64
    assert np.mean(member["logprob_profile"]) == pytest.approx(member["logprob_mean"], abs=0.05)


def test_read_sample_step_shows_old_runs_with_few_columns(tmp_path):
    run = make_run(tmp_path / "run", sample_steps=[])
    table = pa.table({"answer": ["a", None], "sampling_logprobs": [[], [-1.0]]})
    pq.write_table(table, run / "samples" / "step_000003.parquet")
    (group,) = read_first_step(run)["groups"]
    assert group["group"] == 0
    first, second = group["members"]
    assert first == {"member": 0, "answer": "a", "rewards": {}}
    assert second["least_likely"] == [[0, None, -1.0]]
    write_page([run])


def test_find_sample_files_notes_a_torn_file(tmp_path):
    run = make_run(tmp_path / "run", sample_steps=[1, 2])
    torn = run / "samples" / "step_000002.parquet"
    torn.write_bytes(torn.read_bytes()[:200])
    (run / "samples" / "step_x.parquet").write_bytes(b"not ours")
    sample_files, notes = find_sample_files(run)
    assert [file.step for file in sample_files] == [1]
    assert len(notes) == 1
    assert "samples/step_000002.parquet cannot be read" in notes[0]


def test_find_sample_files_counts_samples_and_tokens(tmp_path):
    run = make_run(tmp_path / "run", sample_steps=[1], num_groups=2, group_size=3)
    (file,), _ = find_sample_files(run)
    rows = pq.read_table(file.path).to_pylist()
    assert file.num_samples == 6
    assert file.num_tokens == sum(len(row["completion_ids"]) for row in rows)


# ---- in a browser -------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium on PATH")
def test_page_draws_charts_and_cards_in_a_browser(tmp_path):
    runs = [make_run(tmp_path / f"seed{i}", seed=i, group_size=3) for i in (1, 2)]
    page = write_page(runs, tmp_path / "page.html")
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
        "--disable-background-networking --disable-component-update --virtual-time-budget=4000"
    )
    result = subprocess.run(
        [
            "chromium",
            *flags.split(),
            f"--user-data-dir={tmp_path / 'profile'}",
            "--dump-dom",
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    dom = re.sub(r"<script.*?</script>", "", result.stdout, flags=re.S)
    assert dom.count('<figure class="chart">') == 32
    assert dom.count('class="line ') >= 2 * 20
    assert dom.count('<article class="card"') == 3
    assert "Length reward" in dom
    assert "Failed reward workers" in dom
    assert 'class="repeated"' in dom
    assert ">failed</span>" in dom
    assert '<b id="injected"' not in dom
