"""Cross-entropy of packed windows against transformers' own loss, token for token."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from lwz_trainer.config.model import ModelSection
from lwz_trainer.config.parallel import SequencePlan
from lwz_trainer.config.pretrain import PretrainUpdateConfig
from lwz_trainer.config.sections import OptimConfig
from lwz_trainer.errors import TrainingStopped
from lwz_trainer.model.decoder import Decoder
from lwz_trainer.model.loading import load_decoder
from lwz_trainer.model.parameter_names import checkpoint_slices
from lwz_trainer.parallel import Ranks, Teams
from lwz_trainer.pretrain.update import CrossEntropyUpdate
from lwz_trainer.pretrain.windows import Window
from lwz_trainer.update.optimizer import FlatAdamW
from tests.trainer.tiny import VOCAB_SIZE, make_tiny_model

CPU = torch.device("cpu")
# (source, tokens, given): documents, a window of one predicted token, replies to prompts.
SHAPES = [(0, 40, 1), (1, 17, 1), (0, 2, 1), (1, 90, 30), (2, 33, 32), (0, 64, 1)]


def make_windows(seed: int = 0) -> list[Window]:
    rng = np.random.default_rng(seed)
    return [
        Window(source, f"row {row}", rng.integers(0, VOCAB_SIZE, size).astype(np.int32), given)
        for row, (source, size, given) in enumerate(SHAPES)
    ]


def make_update(
    model: Decoder, *, microbatch_tokens: int = 4096, section: ModelSection | None = None
) -> tuple[CrossEntropyUpdate, FlatAdamW]:
    optimizer = FlatAdamW(model, OptimConfig(max_grad_norm=0))
    ranks = Ranks(rank=0, world_size=1, device=CPU, group=None)
    update = CrossEntropyUpdate(
        model,
        optimizer,
        ranks,
        Teams(SequencePlan(1, 1, {})),
        PretrainUpdateConfig(microbatch_tokens=microbatch_tokens),
        section or ModelSection(checkpoint_layers=False),
    )
    return update, optimizer


def hf_loss_and_grads(model_dir: Path, windows: list[Window]) -> tuple[float, dict[str, Tensor]]:
    """transformers' loss of each window alone, weighted by its tokens, and the gradients."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    total = sum(window.num_loss_tokens for window in windows)
    loss = torch.zeros(())
    for window in windows:
        ids = torch.from_numpy(window.ids.astype(np.int64))[None]
        labels = ids.clone()
        labels[:, : window.num_given] = -100
        mean = model(input_ids=ids, labels=labels).loss
        loss = loss + mean * window.num_loss_tokens / total
    loss.backward()
    return float(loss.detach()), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("checkpoint_layers", [False, True])
def test_update_matches_transformers(tmp_path: Path, family: str, checkpoint_layers: bool) -> None:
    model_dir = make_tiny_model(tmp_path, family, tie_word_embeddings=family == "llama")
    windows = make_windows()
    expected_loss, expected = hf_loss_and_grads(model_dir, windows)
    model = load_decoder(model_dir, dtype=torch.float32, device=CPU)
    section = ModelSection(checkpoint_layers=checkpoint_layers)
    update, optimizer = make_update(model, section=section)
    step = update.run(windows, lr=0.0)
    assert step.losses.mean == pytest.approx(expected_loss, abs=1e-5)
    parameters = dict(model.named_parameters())
    for piece in checkpoint_slices(model.config):
        grad = parameters[piece.parameter].grad
        assert grad is not None
        torch.testing.assert_close(
            grad[piece.start : piece.stop], expected[piece.name], rtol=1e-5, atol=1e-5
        )
    assert step.grad_norm == pytest.approx(float(optimizer.grad_norm()))


def test_update_does_not_depend_on_packing(tmp_path: Path) -> None:
    model_dir = make_tiny_model(tmp_path)
    windows = make_windows()
    results = []
    for budget in (16, 100, 4096):
        model = load_decoder(model_dir, dtype=torch.float32, device=CPU)
        update, optimizer = make_update(model, microbatch_tokens=budget)
        step = update.run(windows, lr=0.0)
        results.append((step.losses.sums, [grad.clone() for grad in optimizer.grads]))
    for sums, grads in results[1:]:
        assert sums == pytest.approx(results[0][0], rel=1e-6)
        for grad, first in zip(grads, results[0][1], strict=True):
            torch.testing.assert_close(grad, first, rtol=1e-5, atol=1e-6)


def test_update_keeps_documents_apart(tmp_path: Path) -> None:
    """In one pack: changing a document leaves the losses of all others as they were."""
    model = load_decoder(make_tiny_model(tmp_path), dtype=torch.float32, device=CPU)
    update, _ = make_update(model)
    windows = [Window(n, "", w.ids, w.num_given) for n, w in enumerate(make_windows())]
    before = update.measure(windows)
    changed = list(windows)
    changed[3] = Window(3, "", windows[3].ids[::-1].copy(), windows[3].num_given)
    after = update.measure(changed)
    for source in (0, 1, 2, 4, 5):
        assert after.sums[source] == before.sums[source]
    assert after.sums[3] != before.sums[3]
    assert before.counts == [39, 16, 1, 60, 1, 63]


def test_measure_is_the_loss_of_a_step_and_changes_nothing(tmp_path: Path) -> None:
    model = load_decoder(make_tiny_model(tmp_path), dtype=torch.float32, device=CPU)
    update, _ = make_update(model)
    windows = make_windows()
    measured = update.measure(windows)
    assert update.run(windows, lr=0.0).losses.sums == pytest.approx(measured.sums, rel=1e-6)
    assert update.measure(windows).sums == measured.sums
    named = measured.by_source(["a", "b", "c"])
    assert named["c"] == measured.sums[2] / 1


def test_update_learns_a_batch_by_heart_in_bf16(tmp_path: Path) -> None:
    model = load_decoder(make_tiny_model(tmp_path), dtype=torch.bfloat16, device=CPU)
    update, _ = make_update(model)
    windows = make_windows()[:3]
    first = update.run(windows, lr=3e-3).losses.mean
    for _ in range(30):
        last = update.run(windows, lr=3e-3).losses.mean
    assert last < first / 3


def test_update_names_the_rows_of_a_loss_that_is_not_finite(tmp_path: Path) -> None:
    model = load_decoder(make_tiny_model(tmp_path), dtype=torch.float32, device=CPU)
    update, _ = make_update(model, microbatch_tokens=16)
    windows = make_windows()
    token = int(windows[4].ids[5])
    with torch.no_grad():
        model.embed[token, 0] = float("nan")
    before = model.layers[0].o_proj.detach().clone()
    with pytest.raises(TrainingStopped, match="row 4"):
        update.run([windows[4]], lr=1.0)
    assert torch.equal(model.layers[0].o_proj, before)


def test_update_gives_the_loss_that_trl_gives(tmp_path: Path) -> None:
    collators = pytest.importorskip("trl.trainer.sft_trainer")
    model_dir = make_tiny_model(tmp_path)
    windows = make_windows()
    examples = [
        {
            "input_ids": window.ids.tolist(),
            "labels": [-100] * window.num_given + window.ids[window.num_given :].tolist(),
        }
        for window in windows
    ]
    batch = collators.DataCollatorForLanguageModeling(pad_token_id=2)(examples)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    num_items = sum(window.num_loss_tokens for window in windows)
    theirs = model(**batch, num_items_in_batch=num_items).loss
    decoder = load_decoder(model_dir, dtype=torch.float32, device=CPU)
    ours = make_update(decoder)[0].measure(windows).mean
    assert ours == pytest.approx(float(theirs.detach()), abs=1e-5)
