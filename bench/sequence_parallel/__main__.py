"""Every rank's share of an attention layer timed on one device, and a model of the exchange.

    python -m bench.sequence_parallel --csv OUT.csv                     # a GPU's sizes
    python -m bench.sequence_parallel --preset cpu --csv OUT.csv        # seconds on a CPU

Rows of kind `measured` are timed here, one for each rank that differs. Rows of kind `model` add the
exchange by the byte formulas and assumed link speeds (half, once and twice of them) and give the
speed-up over one rank: they are arithmetic, no measurement of several GPUs.
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from bench import report
from bench.sequence_parallel.cost import Heads, Links, exchange_ms, traffic_of
from bench.sequence_parallel.emulation import (
    Pack,
    RankWork,
    make_pack,
    rank_works,
    whole_attention,
)
from bench.sequence_parallel.mixes import packed_mixes
from lwz_kernels.sequence_parallel import SequenceLayout, make_layout
from lwz_trainer.config.parallel import ParallelConfig, plan_sequence

__all__ = ["main"]

COLUMNS = (
    *("kind", "mix", "tokens", "ranks", "scheme", "ulysses_ranks", "rank", "heads", "dtype"),
    *("pairs", "forward_ms", "backward_ms", "relayout_ms", "pairs_imbalance", "time_imbalance"),
    *("link_speed", "bytes_forward", "bytes_backward", "exchange_forward_ms"),
    *("exchange_backward_ms", "layer_ms", "speedup", "device", "torch", "commit"),
)


@dataclasses.dataclass(frozen=True)
class Preset:
    tokens: int
    ranks: tuple[int, ...]
    heads: Heads
    dtype: torch.dtype
    seconds: float


PRESETS = {
    "cpu": Preset(1024, (2, 4), Heads(4, 2, 16), torch.float32, 0.02),
    "gpu": Preset(65536, (2, 4, 8, 16, 32, 64), Heads(32, 8, 128), torch.bfloat16, 0.05),
}
# NVLink 4 and 400 Gb/s InfiniBand, nominal, of which 0.8 is assumed to be reached.
LINKS = Links(node_gb_per_s=0.8 * 450, network_gb_per_s=0.8 * 50, ranks_per_node=8)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="gpu")
    parser.add_argument("--mixes", nargs="*", help="of bench/sequence_parallel/mixes.py; all")
    parser.add_argument("--schemes", nargs="*", default=["auto", "gather_kv", "ring"])
    parser.add_argument("--csv", type=Path, help="file that gets the rows; else they are printed")
    options = parser.parse_args(argv)
    preset = PRESETS[options.preset]
    device = torch.device("cuda" if options.preset == "gpu" else "cpu")
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("no GPU here: use --preset cpu")
    rows = []
    for mix, lengths in packed_mixes(preset.tokens).items():
        if options.mixes and mix not in options.mixes:
            continue
        alone_ms = sum(_alone_ms(lengths, preset, device))
        for ranks in preset.ranks:
            for scheme in options.schemes:
                rows += list(_rows(mix, lengths, ranks, scheme, preset, device, alone_ms))
    report.write_csv(options.csv, COLUMNS, rows)


def _layout(lengths: list[int], ranks: int, scheme: str, heads: Heads) -> SequenceLayout:
    """What the trainer would choose under "auto", or the scheme that is named."""
    config = ParallelConfig(sequence=ranks, sequence_scheme=scheme)  # type: ignore[arg-type]
    plan = plan_sequence(
        config,
        heads=heads.query,
        kv_heads=heads.kv,
        num_ranks=ranks,
        ranks_per_node=min(ranks, LINKS.ranks_per_node),
    )
    name, ulysses_ranks = plan.schemes[ranks]
    return make_layout(lengths, ranks, name, ulysses_ranks=ulysses_ranks)


def _alone_ms(lengths: list[int], preset: Preset, device: torch.device) -> tuple[float, float]:
    """Forward and backward of one rank that has everything."""
    layout = make_layout(lengths, 1)
    (work,) = rank_works(layout, make_pack(layout, preset.heads, preset.dtype, device))
    return _median_ms(work.forward, preset, device), _median_ms(work.backward, preset, device)


def _rows(
    mix: str,
    lengths: list[int],
    ranks: int,
    scheme: str,
    preset: Preset,
    device: torch.device,
    alone_ms: float,
) -> Iterator[dict[str, Any]]:
    layout = _layout(lengths, ranks, scheme, preset.heads)
    pack = make_pack(layout, preset.heads, preset.dtype, device)
    works = rank_works(layout, pack)
    _check(works, pack)
    heads = preset.heads
    common = {
        "mix": mix,
        "tokens": layout.num_tokens,
        "ranks": ranks,
        "scheme": layout.scheme,
        "ulysses_ranks": layout.ulysses_ranks,
        "heads": f"H{heads.query} J{heads.kv} K{heads.size}",
        "dtype": str(preset.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else report.cpu_name(),
        "torch": torch.__version__,
        "commit": report.commit(),
    }
    timed = [
        [_median_ms(run, preset, device) for run in (work.forward, work.backward, work.relayout)]
        for work in works
    ]
    totals = [forward + backward for forward, backward, _ in timed]
    imbalances = {
        "pairs_imbalance": f"{_imbalance([work.pairs for work in works]):.4f}",
        "time_imbalance": f"{_imbalance(totals):.4f}",
    }
    for work, (forward, backward, relayout) in zip(works, timed, strict=True):
        yield (
            common
            | imbalances
            | {
                "kind": "measured",
                "rank": work.rank,
                "pairs": work.pairs,
                "forward_ms": f"{forward:.4f}",
                "backward_ms": f"{backward:.4f}",
                "relayout_ms": f"{relayout:.4f}",
            }
        )
    traffic = traffic_of(layout, heads, preset.dtype.itemsize)
    # A layer ends with its slowest rank; its backward relayouts as often as its forward.
    local_ms = max(totals) + 2 * max(relayout for *_, relayout in timed)
    for speed in (0.5, 1.0, 2.0):
        forward, backward = exchange_ms(layout, traffic, LINKS, speed=speed)
        layer_ms = local_ms + forward + backward
        yield common | {
            "kind": "model",
            "link_speed": speed,
            "bytes_forward": int(traffic.heads_forward + traffic.kv_forward),
            "bytes_backward": int(traffic.heads_backward + traffic.kv_backward),
            "exchange_forward_ms": f"{forward:.4f}",
            "exchange_backward_ms": f"{backward:.4f}",
            "layer_ms": f"{layer_ms:.4f}",
            "speedup": f"{alone_ms / layer_ms:.2f}",
        }


def _check(works: list[RankWork], pack: Pack) -> None:
    """Stops the benchmark if the ranks together do not compute the attention of one process."""
    truth = whole_attention(pack).double()
    tolerance = 1e-2 if pack.q.dtype == torch.bfloat16 else 1e-5
    for work in works:
        expected = truth[:, work.heads].index_select(0, work.tokens.to(truth.device))
        error = float((work.forward().double() - expected).norm() / expected.norm())
        if not error <= tolerance:
            sys.exit(f"rank {work.rank} is wrong: relative error {error:.1e} > {tolerance:.0e}")


def _imbalance(values: list[float] | list[int]) -> float:
    return max(values) * len(values) / sum(values)


def _median_ms(run: Callable[[], Any], preset: Preset, device: torch.device) -> float:
    """Median of calls for about `preset.seconds`, after one that is not counted."""
    samples: list[float] = []
    run()
    started = time.perf_counter()
    while len(samples) < 3 or time.perf_counter() - started < preset.seconds:
        if device.type == "cuda":
            torch.cuda.synchronize()
        before = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        samples.append((time.perf_counter() - before) * 1e3)
    return report.quantiles(samples)[1]


if __name__ == "__main__":
    main()
