"""Small hand-made SVG charts for the report, and heat maps as PNG.

Charts take their colours from CSS variables of the page (`--s0` ... `--s7`, `--ink`, `--muted`, `--rule`, `--card`), so
one drawing works on light and dark screens and in print. Arms differ by colour, dash pattern and marker, never by
colour alone. All text is escaped here.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

Point = tuple[float, float]

STYLES = 8
_DASHES = ("", "", "7 3", "2 3", "9 3 2 3", "12 4", "4 2", "1 4")
WIDE, NARROW, HALF = 1000, 360, 440


@dataclass(frozen=True)
class Line:
    """A curve, with its label at the right end.

    `kind`: "mean" (bold, a marker now and then), "seed" (thin), "broken" (thin, ends in a cross: a run that stopped),
    "plain" (bold, no markers), "fine" (lighter, with markers), "taps" (lighter, a marker at each point) or "points"
    (only markers).
    """

    points: Sequence[Point]
    style: int
    label: str = ""
    kind: str = "mean"


@dataclass(frozen=True)
class Drop:
    """A vertical line at `x` from the reference level down to the axis, with a label at its lower end."""

    x: float
    style: int
    label: str


@dataclass(frozen=True)
class Axis:
    """Range, ticks [(value, text), ...] and title of an axis; `ticks=None` chooses round numbers."""

    title: str
    low: float
    high: float
    ticks: Sequence[tuple[float, str]] | None = None


@dataclass
class Frame:
    """Pixel geometry of a plot: data coordinates -> pixels."""

    x: Axis
    y: Axis
    left: float
    top: float
    width: float
    height: float
    band: float = 0.0  # free pixels above the x axis, for the labels of drops
    parts: list[str] = field(default_factory=list)

    def px(self, x: float) -> float:
        return self.left + (x - self.x.low) / ((self.x.high - self.x.low) or 1) * self.width

    def py(self, y: float) -> float:
        return self.top + (self.y.high - y) / ((self.y.high - self.y.low) or 1) * (self.height - self.band)

    @property
    def bottom(self) -> float:
        return self.top + self.height


def style_class(style: int) -> str:
    return f"s{style % STYLES}" if style < STYLES else f"s{1 + (style - 1) % (STYLES - 1)}"


def _dash(style: int) -> str:
    # After the last colour the palette starts again, with the next dash pattern.
    dash = _DASHES[style] if style < STYLES else _DASHES[2 + (style + 1) % (STYLES - 2)]
    return f' stroke-dasharray="{dash}"' if dash else ""


def marker(style: int, x: float, y: float, size: float = 3.6) -> str:
    """The marker of a style (circle, square, triangle, diamond, ...) at a pixel."""
    shapes = ("circle", "square", "up", "diamond", "down")
    shape = shapes[style % len(shapes)]
    if shape == "circle":
        return f'<circle class="mark" cx="{x:.1f}" cy="{y:.1f}" r="{size:.1f}"/>'
    s = size * 1.15
    corners = {
        "square": ((-s, -s), (s, -s), (s, s), (-s, s)),
        "up": ((0, -s * 1.2), (s * 1.1, s), (-s * 1.1, s)),
        "down": ((0, s * 1.2), (s * 1.1, -s), (-s * 1.1, -s)),
        "diamond": ((0, -s * 1.35), (s * 1.35, 0), (0, s * 1.35), (-s * 1.35, 0)),
    }[shape]
    points = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners)
    return f'<polygon class="mark" points="{points}"/>'


def swatch(style: int) -> str:
    """The key of an arm: a short piece of its line with its marker."""
    return (
        f'<svg class="swatch {style_class(style)}" viewBox="0 0 30 12" width="30" height="12" aria-hidden="true">'
        f'<line class="mean" x1="1" y1="6" x2="29" y2="6"{_dash(style)}/>{marker(style, 15, 6, 3.2)}</svg>'
    )


def round_ticks(low: float, high: float, count: int) -> list[tuple[float, str]]:
    """About `count` round numbers within [low, high], each with its text."""
    span = high - low
    if not math.isfinite(span) or span <= 0:
        return [(low, f"{low:g}")] if math.isfinite(low) else []
    raw = span / max(1, count)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    decimals = max(0, -math.floor(math.log10(step))) + (1 if abs(step / 10 ** math.floor(math.log10(step)) - 2.5) < 0.01
                                                        and step < 10 else 0)  # fmt: skip
    first = math.ceil(low / step - 1e-9)
    values = [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]
    return [(v, f"{v:,.{decimals}f}".replace("-", "−") if abs(v) > step / 1e6 else "0") for v in values]


def push_apart(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move positions at least `gap` apart in the same order, within [low, high] if there is room."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed = list(wanted)
    for rank, i in enumerate(order):
        floor = low if rank == 0 else placed[order[rank - 1]] + gap
        placed[i] = max(wanted[i], floor)
    ceiling = high
    for i in reversed(order):
        placed[i] = min(placed[i], ceiling)
        ceiling = placed[i] - gap
    return placed


def text_width(text: str, size: float = 12.5) -> float:
    """Width in pixels of a bold sans-serif text. It is a generous estimate, as the reader's font is not known."""
    return 0.68 * size * len(text)


def shorten(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def thin_out(points: Sequence[Point], most: int = 400) -> list[Point]:
    """About `most` points or fewer, evenly chosen, with the first and the last: enough for a picture."""
    if len(points) <= most:
        return list(points)
    every = math.ceil(len(points) / most)
    return [*points[:-1:every], points[-1]]


def responsive(draw: Callable[[int], str], css: str = "") -> str:
    """A chart drawn twice, for wide pages and for phones; the page's style sheet shows one of them."""
    return f'<div class="wide {css}">{draw(WIDE)}</div><div class="narrow {css}">{draw(NARROW)}</div>'


def chart(
    lines: Sequence[Line],
    width: int,
    x: Axis,
    y: Axis,
    *,
    name: str,
    height: int | None = None,
    level: tuple[float, str] | None = None,
    drops: Sequence[Drop] = (),
) -> str:
    """One line chart as SVG text.

    Args:
        width: width of the drawing, in pixels. Below 500 the lines have no labels; the page's legend names them.
        name: text for screen readers.
        level: a horizontal reference line and its label.
        drops: vertical lines from that level to the x axis.
    """
    small = width < 500
    labels = [] if small else [line for line in lines if line.label and line.points and not _stops_early(line, x)]
    right = 14.0 if not labels else 22 + max(text_width(shorten(line.label, 24)) for line in labels)
    y_ticks = y.ticks if y.ticks is not None else round_ticks(y.low, y.high, 5)
    x_ticks = x.ticks if x.ticks is not None else round_ticks(x.low, x.high, 4 if small else 8)
    left = 10 + max([text_width(text, 11.5) for _, text in y_ticks], default=20)
    band = 17 * len(drops) + (8 if drops else 0)
    height = (height or (260 if small else 350)) + band
    frame = Frame(x, y, left, 26, width - left - right, height - 26 - 44, band)
    frame.parts.append(f'<text class="axis-title" x="0" y="12">{escape(y.title)}</text>')
    for value, text in y_ticks:
        at = frame.py(value)
        if frame.top - 1 <= at <= frame.bottom + 1:
            frame.parts.append(f'<line class="grid" x1="{left:.1f}" x2="{left + frame.width:.1f}" y1="{at:.1f}" '
                               f'y2="{at:.1f}"/><text class="tick" x="{left - 6:.1f}" y="{at + 4:.1f}" '
                               f'text-anchor="end">{escape(text)}</text>')  # fmt: skip
    frame.parts.append(f'<line class="base" x1="{left:.1f}" x2="{left + frame.width:.1f}" y1="{frame.bottom:.1f}" '
                       f'y2="{frame.bottom:.1f}"/>')  # fmt: skip
    for value, text in x_ticks:
        frame.parts.append(f'<text class="tick" x="{frame.px(value):.1f}" y="{frame.bottom + 17:.1f}" '
                           f'text-anchor="middle">{escape(text)}</text>')  # fmt: skip
    frame.parts.append(f'<text class="axis-title" x="{left + frame.width:.1f}" y="{frame.bottom + 36:.1f}" '
                       f'text-anchor="end">{escape(x.title)}</text>')  # fmt: skip
    if level is not None:
        at = frame.py(level[0])
        frame.parts.append(f'<line class="level" x1="{left:.1f}" x2="{left + frame.width:.1f}" y1="{at:.1f}" '
                           f'y2="{at:.1f}"/>')  # fmt: skip
    frame.parts += [_curve(frame, line) for line in sorted(lines, key=lambda line: line.kind == "mean")]
    if level is not None and level[1]:
        frame.parts.append(f'<text class="note halo" x="{left + 5:.1f}" y="{frame.py(level[0]) - 6:.1f}">'
                           f"{escape(level[1])}</text>")  # fmt: skip
    frame.parts += _drops(frame, drops, level[0] if level else y.low)
    frame.parts += _end_labels(frame, labels)
    return (
        f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(name, quote=True)}">'
        f"{''.join(frame.parts)}</svg>"
    )


def _stops_early(line: Line, axis: Axis) -> bool:
    """Whether a run stopped so early that its label belongs beside its cross, not at the right edge."""
    return line.kind == "broken" and line.points[-1][0] < axis.low + 0.6 * (axis.high - axis.low)


def _curve(frame: Frame, line: Line) -> str:
    """One line, clipped at the frame by a nested svg, with gaps where the value is not finite."""
    pieces: list[list[str]] = [[]]
    shown: list[Point] = []
    for x, y in thin_out(line.points):
        if math.isfinite(x) and math.isfinite(y):
            # Limit points far outside the frame: nobody sees them, and their numbers are long.
            at = (frame.px(x), min(max(frame.py(y), -2000.0), 4000.0))
            pieces[-1].append(f"{at[0] - frame.left:.1f},{at[1] - frame.top:.1f}")
            if frame.top - 1 <= at[1] <= frame.bottom + 1:
                shown.append(at)
        else:
            pieces.append([])
    css = style_class(line.style)
    out = []
    shape = {"mean": "mean", "plain": "mean", "fine": "fine", "taps": "fine"}.get(line.kind, "seed")
    path = "".join(
        f'<polyline class="{shape}" points="{" ".join(piece)}"{_dash(line.style)}/>'
        for piece in pieces
        if piece and line.kind != "points"
    )
    out.append(
        f'<svg x="{frame.left:.1f}" y="{frame.top:.1f}" width="{frame.width:.1f}" height="{frame.height:.1f}">'
        f"{path}</svg>"
    )
    if line.kind in ("taps", "points"):
        out += [marker(line.style, *at, 3 if line.kind == "taps" else 4) for at in shown]
    if line.kind in ("mean", "fine") and shown:
        # Markers at even distances, shifted by style so that markers of close curves do not hide each other.
        gap = frame.width / 6
        due = frame.left + gap * (0.5 + 0.13 * line.style)
        for x, y in shown[:-1]:
            if x >= due and x < frame.left + frame.width - 12:
                out.append(marker(line.style, x, y))
                due = x + gap
        out.append(marker(line.style, *shown[-1]))
    if line.kind == "broken" and shown:
        x, y = shown[-1]
        out.append(f'<path class="cross" d="M{x - 4:.1f},{y - 4:.1f}l8,8m0,-8l-8,8"/>')
        if line.label and _stops_early(line, frame.x):
            out.append(f'<text class="label halo" x="{x + 8:.1f}" y="{y + 4:.1f}">{escape(line.label)}</text>')
    return f'<g class="{css}">{"".join(out)}</g>'


def _drops(frame: Frame, drops: Sequence[Drop], level: float) -> list[str]:
    """The same-performance lines, then their labels, one in a row, on top of the lines."""
    lines, labels = [], []
    for row, drop in enumerate(sorted(drops, key=lambda d: d.x)):
        x, y = frame.px(drop.x), frame.bottom - frame.band + 8 + 17 * row + 9
        fits = x + 6 + text_width(drop.label) < frame.left + frame.width
        css = style_class(drop.style)
        lines.append(
            f'<g class="{css}"><line class="drop" x1="{x:.1f}" x2="{x:.1f}" y1="{frame.py(level):.1f}" '
            f'y2="{frame.bottom:.1f}"/>{marker(drop.style, x, frame.py(level), 4.2)}</g>'
        )
        labels.append(
            f'<text class="label halo {css}" x="{x + 6 if fits else x - 6:.1f}" y="{y:.1f}" '
            f'text-anchor="{"start" if fits else "end"}">{escape(drop.label)}</text>'
        )
    return lines + labels


def _end_labels(frame: Frame, lines: Sequence[Line]) -> list[str]:
    ends = []
    for line in lines:
        finite = [p for p in line.points if math.isfinite(p[1])]
        if finite:
            ends.append((line, frame.px(finite[-1][0]), min(max(frame.py(finite[-1][1]), frame.top), frame.bottom)))
    out = []
    places = push_apart([y for _, _, y in ends], 16, frame.top + 4, frame.bottom - 4)
    edge = frame.left + frame.width
    for (line, x, y), place in zip(ends, places, strict=True):
        out.append(
            f'<g class="{style_class(line.style)}"><line class="leader" x1="{x + 5:.1f}" y1="{y:.1f}" '
            f'x2="{edge + 14:.1f}" y2="{place:.1f}"/><text class="label" x="{edge + 18:.1f}" y="{place + 4:.1f}">'
            f"{escape(shorten(line.label, 24))}<title>{escape(line.label)}</title></text></g>"
        )
    return out


def heat_map_png(values: np.ndarray, limit: float) -> str:
    """Rows x columns -> `data:` URL of a PNG with one pixel per value: blue below 0, red above, full at `limit`."""
    import numpy as np
    from matplotlib import colormaps
    from PIL import Image

    scaled = np.nan_to_num(np.clip(values / (limit or 1.0), -1, 1) * 0.5 + 0.5)
    image = Image.fromarray((scaled * 255).round().astype(np.uint8), "P")
    palette = (colormaps["RdBu_r"](np.linspace(0, 1, 256))[:, :3] * 255).round().astype(np.uint8)
    image.putpalette(palette.tobytes())
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def heat_map(
    png: str,
    rows: int,
    columns: int,
    bands: Sequence[tuple[int, int, str]],
    *,
    title: str,
    name: str,
    across: str = "token",
) -> str:
    """A heat map. `bands` are named at the right edge: (first row, last row + 1, label).

    Columns are numbered; `across` says what they are.
    """
    width, height, top, right = 410.0, 290.0, 24.0, 58.0
    plot_width = width - right - 2
    parts = [
        f'<text class="axis-title" x="0" y="13">{escape(title)}</text>',
        f'<image href="{png}" x="0" y="{top}" width="{plot_width}" height="{height}" preserveAspectRatio="none"/>',
        f'<text class="tick" x="0" y="{top + height + 16}">0</text>',
        f'<text class="tick" x="{plot_width}" y="{top + height + 16}" text-anchor="end">{columns - 1}</text>',
        f'<text class="tick" x="{plot_width / 2}" y="{top + height + 16}" text-anchor="middle">{escape(across)}</text>',
    ]
    middles = [top + (first + last) / 2 / rows * height for first, last, _ in bands]
    for (first, last, label), place in zip(bands, push_apart(middles, 13, top + 6, top + height - 4), strict=True):
        a, b = top + first / rows * height, top + last / rows * height
        parts.append(
            f'<path class="bracket" d="M{plot_width + 3},{a + 1:.1f}h4V{b - 1:.1f}h-4"/>'
            f'<text class="tick" x="{plot_width + 11}" y="{place + 4:.1f}">{escape(label)}</text>'
        )
    return (
        f'<svg class="chart heat" viewBox="0 0 {width:.0f} {top + height + 20:.0f}" role="img" '
        f'aria-label="{escape(name, quote=True)}">{"".join(parts)}</svg>'
    )
