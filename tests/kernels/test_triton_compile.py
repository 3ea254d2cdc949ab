"""Every Triton kernel, compiled as it is launched for GPUs that are not there.

The table in `bench/results/triton/resources.csv` is what the kernels take; it is compared with a
fresh compile by the same version of Triton, and its limits hold for any version.
"""

import csv
import io
import os
import subprocess
import sys

import pytest

from bench.triton_targets import CAPABILITIES, SHARED_MEMORY_LIMIT
from tests.trainer.train_case import ROOT

TABLE = ROOT / "bench" / "results" / "triton" / "resources.csv"
PRODUCT = "linear_logprobs_fwd_kernel"
ATTENTION = ("attention_fwd_kernel", "attention_bwd_dkv_kernel", "attention_bwd_dq_kernel")
MATRIX_UNITS = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma"}
# A few minutes of compiling, all of it in the first test that asks for it.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

Row = dict[str, str]


@pytest.fixture(scope="module")
def compiled() -> list[Row]:
    """Compiles in a process of its own: this one may interpret."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-m", "bench.triton_resources"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=environment,
    )
    assert result.returncode == 0, result.stderr
    return list(csv.DictReader(io.StringIO(result.stdout)))


def of(rows: list[Row], kernel: str, variant: str = "") -> list[Row]:
    """Rows of one kernel whose variant holds `variant`; never none."""
    found = [row for row in rows if row["kernel"] == kernel and variant in row["variant"]]
    assert found, (kernel, variant)
    return found


def test_kernels_compile_for_every_target(compiled: list[Row]) -> None:
    kernels = {(row["kernel"], row["target"]) for row in compiled}
    names = {
        "row_statistics_kernel",
        "write_dlogits_kernel",
        "policy_loss_rows_kernel",
        "merge_splits_kernel",
        PRODUCT,
        "paged_attention_split_kernel",
        "paged_attention_merge_kernel",
        "store_kv_kernel",
        "adamw_kernel",
        "qkv_rope_fwd_kernel",
        "qkv_rope_bwd_kernel",
        *ATTENTION,
    }
    targets = {f"sm_{capability}" for capability in CAPABILITIES}
    assert kernels == {(name, target) for name in names for target in targets}


def test_kernels_do_not_spill(compiled: list[Row]) -> None:
    assert [row for row in compiled if row["stack_bytes"] != "0"] == []


def test_kernels_fit_shared_memory(compiled: list[Row]) -> None:
    limits = {f"sm_{capability}": SHARED_MEMORY_LIMIT[capability] for capability in CAPABILITIES}
    assert [row for row in compiled if int(row["shared_bytes"]) > limits[row["target"]]] == []


def test_kernels_hold_no_double_precision(compiled: list[Row]) -> None:
    assert [row for row in compiled if row["fp64"] != "False"] == []


def test_bf16_product_uses_the_matrix_units_of_its_target(compiled: list[Row]) -> None:
    for row in of(compiled, PRODUCT, "bf16"):
        assert row["matrix_instruction"] == MATRIX_UNITS[row["target"]], row


@pytest.mark.parametrize("kernel", ATTENTION)
def test_attention_uses_the_matrix_units_of_its_target(compiled: list[Row], kernel: str) -> None:
    """At both head sizes, with a window, and where keys are rows of two ranges."""
    for variant in ("K=64", "K=128", "window", "prefixes"):
        for row in of(compiled, kernel, variant):
            assert row["matrix_instruction"] == MATRIX_UNITS[row["target"]], row


def test_bf16_product_loads_ahead(compiled: list[Row]) -> None:
    """TMA from sm_90 on, cp.async before; rows off 16-byte boundaries allow neither."""
    for row in of(compiled, PRODUCT, "bf16"):
        is_odd = "odd" in row["variant"]
        expected = "" if is_odd else "cp.async" if row["target"] == "sm_80" else "tma"
        assert row["async_copy"] == expected, row


def test_row_kernels_have_a_program_for_each_row_in_the_first_dimension(
    compiled: list[Row],
) -> None:
    """The other two dimensions of a grid end at 65,535; the table compiles for 70,000 rows."""
    for kernel in ("row_statistics_kernel", "write_dlogits_kernel", "policy_loss_rows_kernel"):
        assert {row["grid"] for row in of(compiled, kernel)} == {"70000"}


def test_decode_products_use_matrix_units_in_two_bytes_and_not_in_fp32(
    compiled: list[Row],
) -> None:
    """A group below 64 queries is too short for wgmma; exact fp32 has no matrix instruction."""
    rows = of(compiled, "paged_attention_split_kernel")
    for row in rows:
        assert (row["matrix_instruction"] == "") == ("fp32" in row["variant"]), row
        assert row["async_copy"] == "cp.async", row
    small = of(rows, "paged_attention_split_kernel", "bf16 H28")
    assert {row["matrix_instruction"] for row in small} == {"mma.sync"}


def test_decode_leaves_room_for_several_programs_of_a_multiprocessor(compiled: list[Row]) -> None:
    """Loads of other programs run under the products of one: half of the memory is the limit."""
    for row in of(compiled, "paged_attention_split_kernel", "bf16 H28"):
        capability = int(row["target"].removeprefix("sm_"))
        assert 2 * int(row["shared_bytes"]) <= SHARED_MEMORY_LIMIT[capability], row


def test_token_kernels_have_a_program_for_each_token_in_the_first_dimension(
    compiled: list[Row],
) -> None:
    for kernel in ("store_kv_kernel", "qkv_rope_fwd_kernel", "qkv_rope_bwd_kernel"):
        assert {row["grid"].partition("x")[0] for row in of(compiled, kernel)} == {"70000"}


def test_stores_of_bf16_over_fp32_wait_at_a_barrier(compiled: list[Row]) -> None:
    """Where another thread may still have to read the bytes that a thread writes."""
    aliased = [*of(compiled, "write_dlogits_kernel", "to bf16")]
    aliased += of(compiled, "policy_loss_rows_kernel")
    assert [row for row in aliased if row["stores_behind_barrier"] != "True"] == []
    # At equal width no barrier is needed, and there is none: the check can fail.
    equal = of(compiled, "write_dlogits_kernel", "to fp32")
    assert {row["stores_behind_barrier"] for row in equal} == {"False"}


def test_committed_table_is_a_fresh_compile(compiled: list[Row]) -> None:
    with TABLE.open(newline="") as file:
        committed = list(csv.DictReader(file))
    if committed[0]["triton"] == compiled[0]["triton"]:
        assert committed == compiled
    keys = [(row["kernel"], row["variant"], row["target"]) for row in compiled]
    assert [(row["kernel"], row["variant"], row["target"]) for row in committed] == keys
