"""Training a reward model: what it computes, what it writes, and that it resumes bit for bit."""

import json
import math
import shutil
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lwz_kernels.attention import SegmentTable
from lwz_trainer.__main__ import main
from lwz_trainer.config.rewards import WritingRewardConfig
from lwz_trainer.model.loading import load_decoder, load_tokenizer
from lwz_trainer.reward_model.batches import EncodedPair, encode_pairs, pack_pairs
from lwz_trainer.reward_model.model import RewardModel
from lwz_trainer.reward_model.pairs import Pair, load_pairs
from lwz_trainer.reward_model.update import bradley_terry_loss
from lwz_trainer.rewards.encoding import AnswerEncoder
from lwz_trainer.rewards.writing import WritingReward
from lwz_trainer.update.work import PackedAttend
from tests.trainer.tiny import make_tiny_model
from tests.trainer.train_case import read_metrics

WORDS = ["calm", "sea", "slow", "ship", "north", "one", "long", "letter", "find", "day", "the"]


def write_pairs(path: Path, num_pairs: int = 20) -> Path:
    """The rejected answer is as long as the chosen one and says nothing."""
    rows = []
    for n in range(num_pairs):
        words = [WORDS[(n + 5 * i) % len(WORDS)] for i in range(6 + n % 5)]
        row = {"prompt": f"Write about ship {n}.", "chosen": " ".join(words) + "."}
        row["rejected"] = " ".join(["no"] * len(words)) + "."
        rows.append({**row, "source": "odd" if n % 2 else "even", "margin": 0.5 * (n % 3)})
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def make_args(
    tmp_path: Path, name: str = "run", family: str = "llama", **settings: Any
) -> list[str]:
    model = tmp_path / f"tiny-{family}"
    if not model.exists():
        make_tiny_model(tmp_path, family)
    defaults = {
        "output_dir": tmp_path / name,
        "num_threads": 1,
        "model.path": model,
        "model.dtype": "fp32",
        "data.pairs": write_pairs(tmp_path / "pairs.jsonl"),
        "data.heldout_frac": 0.25,
        "update.pairs_per_step": 6,
        "update.num_epochs": 2,
        "update.microbatch_tokens": 256,
        "update.eval_every": 2,
        "optim.lr": 1e-3,
        "checkpoint.every": 2,
    }
    return ["reward-model", *(f"--{key}={value}" for key, value in (defaults | settings).items())]


def encoded_pairs(model_dir: Path, max_tokens: int = 400) -> list[EncodedPair]:
    texts = [
        ("Write.", "One two three.", "One two, and then some more."),
        ("A letter, please.", "Dear friend,\nhello.", "No."),
        ("海", "大海很平静。", "大海很平静。大海很平静。"),
    ]
    pairs = [Pair(*row, margin=0.0, source="") for row in texts]
    return encode_pairs(pairs, AnswerEncoder(load_tokenizer(model_dir), max_tokens))


def test_encode_pairs_share_what_both_inputs_begin_with(tmp_path: Path) -> None:
    model_dir = make_tiny_model(tmp_path)
    tokenizer = load_tokenizer(model_dir)
    for encoded in encoded_pairs(model_dir):
        for ids, answer in (
            (encoded.chosen_ids, encoded.pair.chosen),
            (encoded.rejected_ids, encoded.pair.rejected),
        ):
            messages = [
                {"role": "user", "content": encoded.pair.prompt},
                {"role": "assistant", "content": answer},
            ]
            whole = tokenizer.apply_chat_template(messages, return_dict=False)
            assert encoded.prefix_ids + ids == whole
        assert encoded.chosen_ids[0] != encoded.rejected_ids[0]
        assert not encoded.is_truncated
    (first, *_) = encoded_pairs(model_dir, max_tokens=24)
    assert first.is_truncated
    assert len(first.prefix_ids + first.chosen_ids) == 24


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("share_prompts", [True, False])
@pytest.mark.parametrize("budget_tokens", [1, 10_000])
def test_packed_scores_are_those_of_single_sequences(
    tmp_path: Path, family: str, share_prompts: bool, budget_tokens: int
) -> None:
    model_dir = make_tiny_model(tmp_path, family, tie_word_embeddings=family != "qwen3")
    model = RewardModel(load_decoder(model_dir, dtype=torch.float32, device="cpu"))
    torch.nn.init.normal_(model.score)
    peer = AutoModelForSequenceClassification.from_pretrained(
        model_dir, num_labels=1, dtype=torch.float32
    )
    peer.score.weight.data.copy_(model.score.data)
    pairs = encoded_pairs(model_dir)
    batches = pack_pairs(pairs, budget_tokens=budget_tokens, share_prompts=share_prompts)
    assert len(batches) == (3 if budget_tokens == 1 else 1)
    assert sorted(index for batch in batches for index in batch.pairs) == [0, 1, 2]
    for batch in batches:
        packed = batch.packed
        table = SegmentTable.from_cu_seqlens(packed.cu_seqlens, packed.prefix_of)
        scores = model(
            packed.input_ids_T,
            packed.position_ids_T,
            batch.last_index_N,
            PackedAttend(table, "auto"),
        )
        expected = [
            peer(torch.tensor([pairs[index].prefix_ids + ids])).logits.item()
            for index in batch.pairs
            for ids in (pairs[index].chosen_ids, pairs[index].rejected_ids)
        ]
        assert scores.tolist() == pytest.approx(expected, abs=1e-4)
        assert len({round(score, 3) for score in expected}) == len(expected)


def test_bradley_terry_loss_is_the_negative_log_of_the_preference() -> None:
    chosen, rejected = torch.tensor([2.0, 0.0, 1.0]), torch.tensor([1.0, 0.0, 3.0])
    loss = bradley_terry_loss(chosen, rejected, torch.tensor([0.0, 0.0, 0.5]))
    expected = [-math.log(1 / (1 + math.exp(-x))) for x in (1.0, 0.0, -2.5)]
    assert loss.tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_reward_model_run_writes_what_transformers_and_the_trainer_load(
    tmp_path: Path, family: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(make_args(tmp_path, family=family)) == 0
    run_dir = tmp_path / "run"
    metrics = read_metrics(run_dir)
    assert metrics[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert metrics[0]["accuracy"] == 0.5
    assert metrics[-1]["heldout/accuracy"] == 1
    assert ["heldout/loss" in record for record in metrics] == [
        record["step"] % 2 == 0 or record is metrics[-1] for record in metrics
    ]
    report = json.loads((run_dir / "report.json").read_text())
    assert report["accuracy"] == 1
    assert report["accuracy_matched_length"] == 1
    assert report["longer_is_better_accuracy"] == 0.5
    assert {row["source"] for row in report["sources"]} <= {"odd", "even"}
    assert sum(row["num_pairs"] for row in report["calibration"]) == report["num_pairs"]
    assert "accuracy at matched length" in (run_dir / "report.md").read_text()
    assert "<html" in (run_dir / "report.html").read_text()
    assert list((run_dir / "tensorboard").glob("events.*"))
    assert "held out: accuracy 1.000" in capsys.readouterr().out

    final = run_dir / "final"
    config = json.loads((final / "config.json").read_text())
    prefix = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[family]
    assert config["architectures"] == [f"{prefix}ForSequenceClassification"]
    assert config["pad_token_id"] is not None
    model, info = AutoModelForSequenceClassification.from_pretrained(
        final, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    tokenizer = AutoTokenizer.from_pretrained(final)
    pairs = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    texts = [(pair["prompt"], pair["chosen"]) for pair in pairs[:3]]
    inputs = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}],
            return_dict=False,
        )
        for prompt, answer in texts
    ]
    longest = max(map(len, inputs))
    padded = [ids + [config["pad_token_id"]] * (longest - len(ids)) for ids in inputs]
    mask = [[1] * len(ids) + [0] * (longest - len(ids)) for ids in inputs]
    logits = model(torch.tensor(padded), attention_mask=torch.tensor(mask)).logits
    reward = WritingReward(WritingRewardConfig(weight=1.0, model=str(final)), "cpu")
    scores = reward.score(*map(list, zip(*texts, strict=True))).scores
    assert scores == pytest.approx(logits.squeeze(-1).tolist(), abs=1e-3)
    bad = reward.score([pair["prompt"] for pair in pairs[:3]], [p["rejected"] for p in pairs[:3]])
    assert all(good > worse for good, worse in zip(scores, bad.scores, strict=True))


def test_reward_model_drops_the_language_models_head(tmp_path: Path) -> None:
    make_tiny_model(tmp_path, tie_word_embeddings=False)
    assert main(make_args(tmp_path, **{"update.num_epochs": 0.5})) == 0
    tensors = load_file(tmp_path / "run" / "final" / "model.safetensors")
    assert "lm_head.weight" not in tensors
    assert tensors["score.weight"].shape == (1, 64)
    assert tensors["score.weight"].abs().max() > 0


def test_reward_model_step_does_not_depend_on_packing(tmp_path: Path) -> None:
    settings = {"update.num_epochs": 1, "checkpoint.every": 0}
    packings = {
        "whole": {},
        "single": {"update.microbatch_tokens": 1},
        "apart": {"update.share_prompts": False, "model.checkpoint_layers": False},
    }
    weights = {}
    for name, packing in packings.items():
        assert main(make_args(tmp_path, name, **settings, **packing)) == 0
        weights[name] = load_file(tmp_path / name / "final" / "model.safetensors")
    for name in ("single", "apart"):
        for key, value in weights["whole"].items():
            torch.testing.assert_close(weights[name][key], value, rtol=0, atol=1e-4)


def test_reward_model_asks_for_the_margin(tmp_path: Path) -> None:
    settings = {"update.num_epochs": 0.5, "checkpoint.every": 0}
    assert main(make_args(tmp_path, "plain", **settings)) == 0
    assert main(make_args(tmp_path, "margin", **settings, **{"update.use_margin": True})) == 0
    plain, margin = (read_metrics(tmp_path / name)[0]["loss"] for name in ("plain", "margin"))
    assert plain == pytest.approx(math.log(2), abs=1e-6)
    assert margin > plain + 0.05


def test_reward_model_resumes_bit_for_bit(tmp_path: Path) -> None:
    assert main(make_args(tmp_path, "whole")) == 0
    assert main(make_args(tmp_path, "halves")) == 0
    # As a kill after step 3 leaves it: the checkpoint of step 2, a later line, a torn one.
    halves = tmp_path / "halves"
    for number in (3, 4, 5):
        shutil.rmtree(halves / "checkpoints" / f"step_{number:06d}", ignore_errors=True)
    assert main(make_args(tmp_path, "start", **{"checkpoint.keep": 9})) == 0
    shutil.copytree(
        tmp_path / "start" / "checkpoints" / "step_000002",
        halves / "checkpoints" / "step_000002",
        dirs_exist_ok=True,
    )
    (halves / "checkpoints" / "latest").write_text("step_000002")
    lines = (halves / "metrics.jsonl").read_text().splitlines(keepends=True)
    (halves / "metrics.jsonl").write_text("".join(lines[:3]) + '{"step": 4, "lo')
    (halves / "final" / "model.safetensors").write_bytes(b"of a step that is taken again")
    assert main(make_args(tmp_path, "halves")) == 0
    both = [read_metrics(tmp_path / name, without_clocks=True) for name in ("whole", "halves")]
    assert both[0] == both[1]
    weights = [
        load_file(tmp_path / name / "final" / "model.safetensors") for name in ("whole", "halves")
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    reports = [(tmp_path / name / "report.json").read_text() for name in ("whole", "halves")]
    assert reports[0] == reports[1]


def test_reward_model_refuses_to_go_on_with_other_pairs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(make_args(tmp_path, **{"update.num_epochs": 0.5})) == 0
    arguments = make_args(tmp_path)
    path = tmp_path / "pairs.jsonl"
    path.write_text(path.read_text().replace("ship", "boat"))
    assert main(arguments) == 2
    assert "is of another run (held-out pairs, pairs to train on differ)" in capsys.readouterr().err
    assert main(make_args(tmp_path, seed=1)) == 2
    assert "seed differ" in capsys.readouterr().err


def test_reward_model_trains_in_bf16(tmp_path: Path) -> None:
    assert main(make_args(tmp_path, **{"model.dtype": "bf16", "checkpoint.every": 0})) == 0
    metrics = read_metrics(tmp_path / "run")
    assert metrics[-1]["heldout/accuracy"] == 1
    tensors = load_file(tmp_path / "run" / "final" / "model.safetensors")
    assert tensors["score.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("[1]", "line 2 holds a list"),
        ("{", "line 2 is not valid JSON"),
        ({"chosen": "a", "rejected": "b"}, "line 2 has no `prompt`"),
        ({"prompt": "p", "chosen": 3, "rejected": "b"}, "line 2: chosen must be a string, got int"),
        ({"prompt": "p", "chosen": " ", "rejected": "b"}, "line 2: chosen is empty"),
        (
            {"prompt": "p", "chosen": "a", "rejected": "a"},
            "line 2: chosen and rejected are the same",
        ),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "margin": "x"}, "finite number, got 'x'"),
        (
            {"prompt": "p", "chosen": "a", "rejected": "b", "margin": -1},
            "must be at least 0, got -1",
        ),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "source": 1}, "source must be a string"),
    ],
)
def test_reward_model_refuses_a_bad_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], row: Any, message: str
) -> None:
    path = tmp_path / "bad.jsonl"
    good = json.dumps({"prompt": "p", "chosen": "a", "rejected": "b"})
    path.write_text(f"{good}\n{row if isinstance(row, str) else json.dumps(row)}\n")
    arguments = ["reward-model", f"--data.pairs={path}", f"--output_dir={tmp_path / 'run'}"]
    assert main(arguments) == 2
    (error,) = (line for line in capsys.readouterr().err.splitlines() if "error" in line)
    assert message in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data.pairs": "nowhere.jsonl"}, "cannot read nowhere.jsonl"),
        ({"update.pairs_per_step": 1000}, "less than one step"),
        ({"optim.warmup_steps": 50}, "must be below the number of steps"),
        ({"data.heldout_frac": 1.0}, r"must be in (0, 1)"),
        ({"update.num_epochs": 0}, "update.num_epochs must be above 0"),
        ({"model.path": "no/such/directory"}, "no model at"),
        ({"parallel.sequence": 2}, "got parallel.sequence 2: leave it out"),
    ],
)
def test_reward_model_refuses_bad_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: dict[str, Any], message: str
) -> None:
    assert main(make_args(tmp_path, **settings)) == 2
    (error,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error"))
    assert message in error
    assert not (tmp_path / "run").exists()


def test_reward_model_dry_run_prints_config_and_forecast(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*make_args(tmp_path), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "pairs_per_step: 6" in out
    assert "program and libraries" in out
    assert "KV cache" not in out
    encoded = encode_pairs(
        load_pairs(tmp_path / "pairs.jsonl"),
        AnswerEncoder(load_tokenizer(tmp_path / "tiny-llama"), 512),
    )
    mean = fmean(pair.num_packed(share_prompts=True) for pair in encoded)
    assert f"A step of 6 pairs of {mean:,.0f} tokens takes about" in out
    assert not (tmp_path / "run").exists()


def test_reward_model_refuses_prompts_on_both_sides(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = make_args(tmp_path)
    assert main([*arguments, f"--data.heldout={tmp_path / 'pairs.jsonl'}"]) == 2
    assert "20 prompts stand in data.pairs and in data.heldout" in capsys.readouterr().err
