"""The whole program with engine `vllm`, alone and as two ranks that torchrun started."""

from pathlib import Path

import pytest

from tests.real_vllm.case import load_model
from tests.trainer.train_case import make_run_args, read_metrics, run_cli

pytest.importorskip("vllm", reason="`make test-vllm` makes an environment with vLLM")


@pytest.mark.timeout(900)
@pytest.mark.parametrize("processes", [1, 2])
def test_training_samples_from_each_new_version(tmp_path: Path, processes: int) -> None:
    load_model(tmp_path)
    settings = {
        "num_steps": 2,
        "rollout.engine": "vllm",
        "rollout.vllm_eager": True,
        "rollout.kv_cache_tokens": 8192,
    }
    result = run_cli(make_run_args(tmp_path, **settings), processes=processes, timeout=800)
    assert result.returncode == 0, result.stderr[-3000:]
    records = read_metrics(tmp_path / "run")
    assert [record["policy_version"] for record in records] == [1, 2]
    assert all(record["sampler/prob_diff_mean"] < 1e-4 for record in records)
