"""Charts of a report as inline SVG, drawn here so that a page needs no script, no font and no plotting library."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape

COLOURS = ("#1f5fa8", "#c0501a", "#2f7d4f", "#8a3f8f", "#8a6d1f", "#4a5560", "#4aa3b5", "#d98aa5")

_WIDTH, _HEIGHT = 640, 340
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 16, 16, 44


@dataclasses.dataclass(frozen=True)
class Point:
    """A model in the accuracy-latency plot: milliseconds, AP (0..1), its interval, and its name."""

    name: str
    latency_ms: float
    ap: float
    ap_low: float
    ap_high: float


@dataclasses.dataclass(frozen=True)
class Level:
    """A published AP (0..1), whose latency on this machine nobody knows: a line across the plot."""

    name: str
    ap: float


def colours_of(names: Iterable[str]) -> dict[str, str]:
    """A colour for each of the names, in the order of their first appearance."""
    return {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(dict.fromkeys(names))}


def accuracy_latency(points: Sequence[Point], colours: Mapping[str, str], levels: Sequence[Level] = ()) -> str:
    """AP over latency, one dot for each model with its 95 % interval; published APs as dashed lines. Empty for none.

    colours: of every name.
    """
    if not points:
        return ""
    slowest = max(point.latency_ms for point in points) * 1.12
    aps = [value for p in points for value in (p.ap_low, p.ap_high)] + [level.ap for level in levels]
    low, high = _padded(min(aps), max(aps))
    x_ticks, y_ticks = _ticks(0, slowest), _ticks(low, high)
    parts = [_axes(x_ticks, y_ticks, (0, slowest), (low, high), "milliseconds per image (median)", "AP")]
    right = _WIDTH - _RIGHT
    for level in levels:
        y = _y(level.ap, low, high)
        parts.append(f'<line x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" class="published"/>')
        parts.append(f'<text x="{right}" y="{y - 3:.1f}" class="small end">{escape(level.name)}</text>')
    legend = []
    for point in points:
        colour = colours[point.name]
        x, y = _x(point.latency_ms, 0, slowest), _y(point.ap, low, high)
        ends = _y(point.ap_low, low, high), _y(point.ap_high, low, high)
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{ends[0]:.1f}" y2="{ends[1]:.1f}" stroke="{colour}"/>')
        parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{colour}"><title>{escape(point.name)}</title></circle>'
        )
        legend.append((point.name, colour))
    return _svg("AP over latency of the models", parts, legend)


def score_histogram(
    bins: Sequence[float], series: Sequence[tuple[str, Sequence[int]]], colours: Mapping[str, str]
) -> str:
    """Shares of matched detections by score difference, a group of bars for each bin and a bar for each model.

    colours: of every name.
    """
    series = [(name, counts) for name, counts in series if sum(counts)]
    if not series:
        return ""
    names = [f"≤ {value:.0e}" for value in bins] + [f"> {bins[-1]:.0e}"]
    parts = [_axes([], _ticks(0, 1), (0, 1), (0, 1), "difference of a score to the reference's", "share of detections")]
    group = (_WIDTH - _LEFT - _RIGHT) / len(names)
    bar = group * 0.8 / len(series)
    floor = _y(0, 0, 1)
    for place, label in enumerate(names):
        middle = _LEFT + group * (place + 0.5)
        parts.append(f'<text x="{middle:.1f}" y="{floor + 14:.1f}" class="small middle">{escape(label)}</text>')
        for index, (name, counts) in enumerate(series):
            top = _y(counts[place] / sum(counts), 0, 1)
            left = middle - group * 0.4 + index * bar
            title = f"{name}: {counts[place]} of {sum(counts)}"
            parts.append(
                f'<rect x="{left:.1f}" y="{top:.1f}" width="{bar:.1f}" height="{floor - top:.1f}"'
                f' fill="{colours[name]}"><title>{escape(title)}</title></rect>'
            )
    legend = [(name, colours[name]) for name, _ in series]
    return _svg("Score differences", parts, legend)


def stage_bars(rows: Sequence[tuple[str, dict[str, float]]]) -> str:
    """Milliseconds of each stage, one bar of stacked stages for each model."""
    rows = [(name, stages) for name, stages in rows if stages]
    if not rows:
        return ""
    colours = colours_of(stage for _, stages in rows for stage in stages)
    slowest = max(sum(stages.values()) for _, stages in rows) or 1.0
    height = 26 * len(rows)
    parts = []
    for place, (name, stages) in enumerate(rows):
        top, left = 26 * place, 200.0
        parts.append(f'<text x="192" y="{top + 15}" class="small end">{escape(name)}</text>')
        for stage, value in stages.items():
            width = value / slowest * (_WIDTH - 200 - 64)
            title = f"{stage}: {value:.2f} ms"
            parts.append(
                f'<rect x="{left:.1f}" y="{top + 3}" width="{width:.1f}" height="18" fill="{colours[stage]}">'
                f"<title>{escape(title)}</title></rect>"
            )
            left += width
        parts.append(f'<text x="{left + 5:.1f}" y="{top + 16}" class="small">{sum(stages.values()):.1f} ms</text>')
    return _svg("Latency by stage", parts, list(colours.items()), height)


def _svg(title: str, parts: Sequence[str], legend: Sequence[tuple[str, str]], height: int = _HEIGHT) -> str:
    """The picture with a line of the legend for each entry below it."""
    lines = [
        f'<rect x="{_LEFT}" y="{height + 8 + 20 * index}" width="11" height="11" fill="{colour}"/>'
        f'<text x="{_LEFT + 18}" y="{height + 18 + 20 * index}" class="small">{escape(name)}</text>'
        for index, (name, colour) in enumerate(legend)
    ]
    total = height + 12 + 20 * len(legend)
    return (
        f'<svg viewBox="0 0 {_WIDTH} {total}" role="img" aria-label="{escape(title)}" class="chart">'
        f"{''.join([*parts, *lines])}</svg>"
    )


def _axes(
    x_ticks: Sequence[float],
    y_ticks: Sequence[float],
    x_range: tuple[float, float],
    y_range: tuple[float, float],
    x_title: str,
    y_title: str,
) -> str:
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    parts = []
    for value in y_ticks:
        y = _y(value, *y_range)
        parts.append(f'<line x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" class="small end">{value:g}</text>')
    for value in x_ticks:
        x = _x(value, *x_range)
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}" class="axis"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 17}" class="small middle">{value:g}</text>')
    parts.append(f'<path d="M{_LEFT} {_TOP}V{bottom}H{right}" class="axis" fill="none"/>')
    middle = (_LEFT + right) / 2
    parts.append(f'<text x="{middle:.0f}" y="{_HEIGHT - 8}" class="small middle">{escape(x_title)}</text>')
    parts.append(f'<text x="{_LEFT - 44}" y="{_TOP - 4}" class="small">{escape(y_title)}</text>')
    return "".join(parts)


def _x(value: float, low: float, high: float) -> float:
    return _LEFT + (value - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT)


def _y(value: float, low: float, high: float) -> float:
    return _HEIGHT - _BOTTOM - (value - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)


def _padded(low: float, high: float) -> tuple[float, float]:
    """A range around the values, at least two points of AP high, within 0..1."""
    room = max(0.01, (high - low) * 0.15)
    return max(0.0, low - room), min(1.0, high + room) if high < 1 else 1.0 + room


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers within the range."""
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step *= min((1, 2, 5, 10), key=lambda factor: abs((high - low) / (factor * step) - 5))
    first = math.ceil(low / step - 1e-9)
    return [round(step * number, 10) for number in range(first, math.floor(high / step + 1e-9) + 1)]
