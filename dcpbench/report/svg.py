"""Plots as SVG text, each 360 units wide so that it is as easy to read on a phone as beside others. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["Bar", "Point", "bars", "lines", "scatter", "stacks"]

_WIDTH = 360
_LABELS = 96
_RIGHT = 84
_LINE = 22
_TOP = 10
_BOTTOM = 26
_LEFT = 48
_HEIGHT = 210
_INSIDE = _WIDTH - _LABELS - _RIGHT


@dataclass(frozen=True)
class Bar:
    """A bar with an interval.

    Attributes:
        label: to its left.
        series: what gives it its colour.
        value, low, high: in the unit of the axis.
        text: to its right.
        is_pale: it is shown, and not to be relied on.
    """

    label: str
    series: str
    value: float
    low: float
    high: float
    text: str
    is_pale: bool = False


@dataclass(frozen=True)
class Point:
    """A point; ``text`` is shown when the pointer rests on it."""

    x: float
    y: float
    series: str
    text: str


def bars(given: Sequence[Bar], colours: Mapping[str, str], title: str) -> str:
    """Returns horizontal bars, one below the other; ``title`` is for those who cannot see them."""
    top = max((max(bar.high, bar.value) for bar in given), default=0.0) or 1.0
    height = _TOP + _LINE * len(given) + 4
    parts = []
    for number, bar in enumerate(given):
        y = _TOP + number * _LINE
        end, low, high = (_LABELS + value / top * _INSIDE for value in (bar.value, bar.low, bar.high))
        parts.append(_text(_LABELS - 6, y + 11, bar.label, "end"))
        paint = f'fill="{colours[bar.series]}" fill-opacity="{0.35 if bar.is_pale else 1}"'
        hint = f"<title>{escape(f'{bar.label}: {bar.text}')}</title>"
        shape = f'x="{_LABELS}" y="{y}" width="{max(1.0, end - _LABELS):.1f}" height="14" rx="2"'
        parts.append(f"<rect {shape} {paint}>{hint}</rect>")
        parts.append(
            f'<path class="whisker" d="M{low:.1f} {y + 7}H{high:.1f}M{low:.1f} {y + 3}v8M{high:.1f} {y + 3}v8"/>'
        )
        parts.append(_text(max(end, high) + 5, y + 11, bar.text, "start"))
    return _svg(height, title, parts)


def stacks(given: Mapping[str, Sequence[float | None]], colours: Sequence[str], title: str, unit: str) -> str:
    """Returns a bar per entry, made of the parts of a sum; an entry whose parts are None says that it shows none."""
    totals = {label: sum(part or 0.0 for part in parts) for label, parts in given.items()}
    top = max(totals.values(), default=0.0) or 1.0
    shown = []
    for number, (label, values) in enumerate(given.items()):
        y = _TOP + number * _LINE
        shown.append(_text(_LABELS - 6, y + 11, label, "end"))
        if any(value is None for value in values):
            shown.append(_text(_LABELS + 4, y + 11, "not to be seen from outside", "start", "muted"))
            continue
        x = float(_LABELS)
        for value, colour in zip(values, colours, strict=True):
            width = (value or 0.0) / top * _INSIDE
            shown.append(f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="14" fill="{colour}"/>')
            x += width
        shown.append(_text(x + 5, y + 11, f"{totals[label]:.3g} {unit}", "start"))
    return _svg(_TOP + _LINE * len(given) + 4, title, shown)


def scatter(points: Sequence[Point], colours: Mapping[str, str], title: str, axes: tuple[str, str]) -> str:
    """Returns points over two axes that begin at zero; ``axes`` are their titles."""
    return _plane(points, colours, title, axes, connects=False)


def lines(points: Sequence[Point], colours: Mapping[str, str], title: str, axes: tuple[str, str]) -> str:
    """Returns the points of each series, connected in the order of x."""
    return _plane(points, colours, title, axes, connects=True)


def _plane(
    points: Sequence[Point], colours: Mapping[str, str], title: str, axes: tuple[str, str], *, connects: bool
) -> str:
    xs, ys = [point.x for point in points], [point.y for point in points]
    right, top = _nice(max(xs, default=1.0)), _nice(max(ys, default=1.0))
    width, height = _WIDTH - _LEFT - 14, _HEIGHT - _TOP - _BOTTOM - 12

    def place(x: float, y: float) -> tuple[float, float]:
        return _LEFT + x / right * width, _TOP + 12 + height - y / top * height

    parts = list(_axes(right, top, axes, place))
    for series in dict.fromkeys(point.series for point in points):
        own = sorted((point for point in points if point.series == series), key=lambda point: point.x)
        if connects and len(own) > 1:
            path = "L".join(f"{x:.1f} {y:.1f}" for x, y in (place(point.x, point.y) for point in own))
            parts.append(f'<path d="M{path}" fill="none" stroke="{colours[series]}" stroke-width="2"/>')
        for point in own:
            x, y = place(point.x, point.y)
            parts.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colours[series]}" fill-opacity=".85">'
                f"<title>{escape(point.text)}</title></circle>"
            )
    return _svg(_HEIGHT, title, parts)


def _axes(right: float, top: float, axes: tuple[str, str], place: object) -> Iterator[str]:
    assert callable(place)
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        x, y = place(right * share, top * share)
        left, bottom = place(0.0, 0.0)
        end, ceiling = place(right, top)
        yield f'<path class="grid" d="M{left:.1f} {y:.1f}H{end:.1f}M{x:.1f} {bottom:.1f}V{ceiling:.1f}"/>'
        yield _text(left - 5, y + 4, f"{top * share:.3g}", "end", "muted")
        yield _text(x, bottom + 14, f"{right * share:.3g}", "middle", "muted")
    yield _text(_LEFT - 40, 12, axes[1], "start", "muted")
    yield _text(_WIDTH - 14, _HEIGHT - 2, axes[0], "end", "muted")


def _nice(value: float) -> float:
    """Returns a round number of at least ``value``."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 4, 5, 8, 10) if step * power >= value * 0.9999)


def _text(x: float, y: float, text: str, anchor: str, kind: str = "") -> str:
    marked = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{marked}>{escape(text)}</text>'


def _svg(height: float, title: str, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {_WIDTH} {height:.0f}" role="img" aria-label="{escape(title, quote=True)}">'
        f"{''.join(parts)}</svg>"
    )
