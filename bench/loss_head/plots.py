"""Time and memory of every provider as bars, a row of panels a case; needs matplotlib."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["plot"]

PANEL_WIDTH_IN, BAR_HEIGHT_IN, PANEL_MARGIN_IN = 5.5, 0.24, 1.1
OURS_COLOR, FLOOR_COLOR, PEER_COLOR = "tab:blue", "0.25", "0.7"
GIB_IN_MIB = 1024


def plot(rows: Sequence[dict[str, Any]], out: Path) -> None:
    """Draws the rows with a time; the suffix of `out` decides the format."""
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("--plot needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        if row["status"] == "ok":
            keys = ("op", "mode", "dtype", "tokens", "width", "vocab")
            groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    if not groups:
        raise SystemExit(f"nothing to draw in {out}: no row has a time")
    heights = [PANEL_MARGIN_IN + BAR_HEIGHT_IN * len(group) for group in groups.values()]
    figure, axes = pyplot.subplots(
        len(groups),
        2,
        figsize=(2 * PANEL_WIDTH_IN, sum(heights)),
        gridspec_kw={"height_ratios": heights},
        squeeze=False,
        layout="constrained",
    )
    for (time_axis, memory_axis), (key, group) in zip(axes, groups.items(), strict=True):
        _draw(time_axis, memory_axis, key, group)
    figure.suptitle(_origin(rows), fontsize=8)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out)
    pyplot.close(figure)


def _draw(time_axis: Any, memory_axis: Any, key: tuple[str, ...], rows: list[dict]) -> None:
    op, mode, dtype, tokens, width, vocab = key
    rows = sorted(rows, key=lambda row: float(row["median_ms"]), reverse=True)
    names = [row["provider"] for row in rows]
    colors = [_color(name) for name in names]
    medians = [float(row["median_ms"]) for row in rows]
    spread = [
        [median - float(row["p20_ms"]) for median, row in zip(medians, rows, strict=True)],
        [float(row["p80_ms"]) - median for median, row in zip(medians, rows, strict=True)],
    ]
    time_axis.barh(names, medians, xerr=spread, color=colors)
    time_axis.set_title(f"{op} {mode}, {dtype}, T={tokens} D={width} V={vocab}", fontsize=9)
    time_axis.set_xlabel("ms, median and p20-p80", fontsize=8)
    memory = [float(row["extra_mib"] or 0) / GIB_IN_MIB for row in rows]
    memory_axis.barh(names, memory, color=colors)
    memory_axis.set_xlabel("GiB, peak of one call over its inputs", fontsize=8)
    for axis in (time_axis, memory_axis):
        axis.tick_params(labelsize=8)
        axis.locator_params(axis="x", nbins=6)


def _color(name: str) -> str:
    if name == "floor":
        return FLOOR_COLOR
    return OURS_COLOR if name.startswith("lwz") else PEER_COLOR


def _origin(rows: Sequence[dict[str, Any]]) -> str:
    """Every combination of machine, versions and commit that the rows come from."""
    keys = ("device", "driver", "torch", "triton", "commit")
    origins = {", ".join(f"{key} {row[key]}" for key in keys if row[key]) for row in rows}
    return "\n".join(sorted(origins))
