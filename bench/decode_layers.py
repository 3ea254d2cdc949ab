"""Times a decode step of SmolLM2 on a CPU: all layers in one native call, or operator by operator.

    python -m bench.decode_layers --csv bench/results/cpu/decode_layers.csv --threads 2

Both use the same native linear layers and paged attention; `decoder` is the model's own forward
pass. Embedding and final norm are part of both, head and sampling of neither. A shape is timed only
if native is as near to the decoder in fp32 as the decoder of the same type is, within a half.
"""

import argparse
import itertools
import sys
from pathlib import Path

import torch
from torch import Tensor

from bench import report
from bench.timing import time_interleaved
from lwz_kernels import native
from lwz_trainer.model.decoder import Decoder
from lwz_trainer.model.loading import load_pretrained
from lwz_trainer.model.source import BUILTIN_MODEL
from lwz_trainer.rollout.attend import DecodeAttend
from lwz_trainer.rollout.decode_pass import decode_pass
from lwz_trainer.rollout.kv_cache import PagedKVCache

__all__ = ["main"]

COLUMNS = (
    "provider",
    "dtype",
    "batch",
    "context",
    "median_ms",
    "min_ms",
    "p20_ms",
    "p80_ms",
    "decoder_ratio",
    *report.MACHINE_COLUMNS["cpu"],
    "commit",
)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BATCHES, CONTEXTS, PAGE_SIZE = (1, 8, 32), (16, 272, 1040), 16
FLOOR = 1e-4


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.decode_layers", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--csv", type=Path, help="file for the rows; else standard output")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=5.0, help="timed per shape and dtype")
    parser.add_argument("--dtypes", nargs="+", choices=tuple(DTYPES), default=list(DTYPES))
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--contexts", nargs="+", type=int, default=list(CONTEXTS))
    options = parser.parse_args(arguments)
    if not native.is_available():
        sys.exit(f"nothing to compare: {native.unavailable_reason()}")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    rows = []
    exact_model, _ = load_pretrained(BUILTIN_MODEL, dtype=torch.float32, device="cpu")
    for name in options.dtypes:
        model, _ = load_pretrained(BUILTIN_MODEL, dtype=DTYPES[name], device="cpu")
        for shape in itertools.product(options.batches, options.contexts):
            rows += _rows(model, exact_model, name, *shape, options)
    report.write_csv(options.csv, COLUMNS, rows)


@torch.inference_mode()
def _rows(
    model: Decoder,
    exact_model: Decoder,
    dtype: str,
    batch: int,
    context: int,
    options: argparse.Namespace,
) -> list[dict[str, object]]:
    attend = _attend(model, batch, context)
    ids_B = torch.randint(model.config.vocab_size, (batch,))
    positions_B = torch.full((batch,), context - 1)
    runs = {
        "native": lambda: decode_pass(model, ids_B, positions_B, attend),
        "decoder": lambda: model(ids_B, positions_B, attend),
    }
    truth_BD = exact_model(ids_B, positions_B, _wide(attend))
    _check(runs["native"](), runs["decoder"](), truth_BD)
    times_ms = time_interleaved(runs, options.seconds, "cpu")
    quantiles = {name: report.quantiles(samples) for name, samples in times_ms.items()}
    decoder_ms = quantiles["decoder"][1]
    rows: list[dict[str, object]] = []
    for name, (p20, median, p80) in quantiles.items():
        rows.append(
            {
                "provider": name,
                "dtype": dtype,
                "batch": batch,
                "context": context,
                "median_ms": f"{median:.2f}",
                "min_ms": f"{min(times_ms[name]):.2f}",
                "p20_ms": f"{p20:.2f}",
                "p80_ms": f"{p80:.2f}",
                "decoder_ratio": f"{decoder_ms / median:.2f}",
                **report.machine("cpu", options.threads),
                "commit": report.commit(),
            }
        )
        print(
            f"{dtype} batch {batch:3} context {context:5} {name:8} {median:8.2f} ms "
            f"{decoder_ms / median:5.2f}x",
            file=sys.stderr,
            flush=True,
        )
    return rows


def _attend(model: Decoder, batch: int, context: int) -> DecodeAttend:
    """Rows of one length that have grown together, so that their pages alternate."""
    config, pages_each = model.config, -(-context // PAGE_SIZE)
    shape = (2, config.layers, batch * pages_each, PAGE_SIZE, config.kv_heads, config.head_dim)
    page_table = torch.arange(batch * pages_each, dtype=torch.int32).view(pages_each, batch).t()
    last = context - 1
    return DecodeAttend(
        PagedKVCache(torch.randn(shape).mul_(0.1).to(model.embed.dtype)),
        page_table.contiguous(),
        torch.full((batch,), context, dtype=torch.int32),
        page_table[:, last // PAGE_SIZE].long() * PAGE_SIZE + last % PAGE_SIZE,
    )


def _wide(attend: DecodeAttend) -> DecodeAttend:
    cache = PagedKVCache(torch.stack((attend.cache.keys, attend.cache.values)).float())
    return DecodeAttend(cache, attend.page_table_BP, attend.context_lens_B, attend.slots_B)


def _check(found: Tensor, same_type: Tensor, truth: Tensor) -> None:
    """Stops the benchmark if the native layers lose more than the decoder in the same type."""
    error, allowed = (float((x.float() - truth).norm() / truth.norm()) for x in (found, same_type))
    if not error <= 1.5 * allowed + FLOOR:
        sys.exit(f"native is off by {error:.1e}, the decoder by {allowed:.1e}: not timed")


if __name__ == "__main__":
    main()
