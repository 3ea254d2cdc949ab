"""Scatter and line figures as inline SVG, which need neither a plotting library nor a script."""

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

__all__ = ["Series", "figure_svg"]

_WIDTH, _HEIGHT = 640, 380
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 30, 12, 46
_NUM_COLOURS = 8  # page.css has c0 to c7


@dataclass(frozen=True)
class Series:
    """Points of one colour, in order; `joined` draws the line through them."""

    name: str
    points: tuple[tuple[float, float], ...]
    joined: bool = False


def figure_svg(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str,
    is_log: bool = False,
    diagonal: bool = False,
) -> str:
    """One figure with its legend; "" if there is no finite point.

    Args:
        series: names may repeat a colour: the n-th series has the n-th colour.
        title: what it shows.
        x_label, y_label: of the axes, units included.
        is_log: both axes logarithmic; points at 0 are then drawn at 1.
        diagonal: draw y = x.
    """
    finite = [
        Series(s.name, tuple(p for p in s.points if all(map(math.isfinite, p))), s.joined)
        for s in series
    ]
    points = [point for s in finite for point in s.points]
    if not points:
        return ""
    xs, ys = [x for x, _ in points], [y for _, y in points]
    if diagonal:
        xs = ys = xs + ys
    x_of, x_ticks = _axis(xs, _LEFT, _WIDTH - _RIGHT, is_log)
    y_of, y_ticks = _axis(ys, _HEIGHT - _BOTTOM, _TOP, is_log)
    parts = [
        f'<figure class="chart"><figcaption><h3>{html.escape(title)}</h3></figcaption>',
        _legend(finite),
        f'<svg class="plot" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{html.escape(title)}"><g class="axes">',
    ]
    for tick in x_ticks:
        x = x_of(tick)
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/>')
        parts.append(_text(x, _HEIGHT - _BOTTOM + 17, _number(tick), "middle"))
    for tick in y_ticks:
        y = y_of(tick)
        parts.append(f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(_LEFT - 7, y + 4, _number(tick), "end"))
    parts.append(_text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 8, x_label, "middle"))
    parts.append(f'<g transform="translate(14 {_HEIGHT / 2 - 20}) rotate(-90)">')
    parts.append(_text(0, 0, y_label, "middle") + "</g></g>")
    if diagonal:
        low, high = min(x_ticks[0], y_ticks[0]), max(x_ticks[-1], y_ticks[-1])
        parts.append(
            f'<line class="diagonal" x1="{x_of(low):.1f}" y1="{y_of(low):.1f}" '
            f'x2="{x_of(high):.1f}" y2="{y_of(high):.1f}"/>'
        )
    for number, s in enumerate(finite):
        parts.append(_marks(s, number % _NUM_COLOURS, x_of, y_of))
    return "".join([*parts, "</svg></figure>"])


def _axis(
    values: list[float], start: float, end: float, is_log: bool
) -> tuple[Callable[[float], float], list[float]]:
    """From values to pixels, and ticks whose first and last bound the axis."""
    if is_log:
        values = [max(value, 1) for value in values]
        first = math.floor(math.log10(min(values)))
        last = max(first + 1, math.ceil(math.log10(max(values))))
        scale = (end - start) / (last - first)
        ticks = [10.0**power for power in range(first, last + 1)]
        return lambda value: start + (math.log10(max(value, 1)) - first) * scale, ticks
    spread = (max(values) - min(values)) or abs(max(values)) or 1.0
    raw = spread / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw)
    first, last = math.floor(min(values) / step), math.ceil(max(values) / step)
    last = max(last, first + 1)
    scale = (end - start) / ((last - first) * step)
    ticks = [number * step for number in range(first, last + 1)]
    return lambda value: start + (value - first * step) * scale, ticks


def _marks(
    series: Series, colour: int, x_of: Callable[[float], float], y_of: Callable[[float], float]
) -> str:
    style = f'style="--mark: var(--c{colour})"'
    places = [(f"{x_of(x):.1f}", f"{y_of(y):.1f}") for x, y in series.points]
    line = ""
    if series.joined and len(places) > 1:
        line = f'<polyline class="joined" points="{" ".join(f"{x},{y}" for x, y in places)}"/>'
    dots = "".join(f'<circle class="mark" cx="{x}" cy="{y}" r="3.2"/>' for x, y in places)
    return f"<g {style}>{line}{dots}</g>"


def _legend(series: Sequence[Series]) -> str:
    entries = "".join(
        f'<span class="legend-item"><span class="run-dot" '
        f'style="background: var(--c{number % _NUM_COLOURS})"></span>{html.escape(s.name)}</span>'
        for number, s in enumerate(series)
    )
    return f'<div class="legend">{entries}</div>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'


def _number(value: float) -> str:
    return f"{value:,.6g}"
