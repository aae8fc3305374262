"""Pathfinder pictures from a seed: are two dots the ends of the same dashed contour, or of two different ones?

The figures are those of Linsley et al. 2018 (https://arxiv.org/abs/1805.08315, generator at
https://github.com/drewlinsley/pathfinder) with the parameters of the Long Range Arena (Tay et al. 2020,
https://arxiv.org/abs/2011.04006): 32 x 32 is its Pathfinder, 128 x 128 its Path-X. Two contours of 14 dashes start near
each other. They grow in turn, one dash at a time, as random walks of bounded curvature that keep away from everything
drawn before. Short contours are put between them. One dot is at the start of one of the two contours, the other at the
end of the same contour (joined) or of the other one.

Two rules are stricter than in the published generator. Contours never touch or cross, so that every picture has one
right answer. The two possible places of the second dot are about equally far from the first dot and from the middle
(within a tenth of the side), so that the places of the dots tell almost nothing about the answer.

Many figures are made at once: N figures, R rows (pairs of contours that may become a figure), P points.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from waveletgpt.errors import UserError

STEPS = 14
"""Dashes of each of the two contours."""
SHORT = 4
"""Dashes of a distractor."""
TOLERANCE = 1 / 10
"""How much the distances to the two possible second dots may differ, as a share of the picture's side."""

_BLOCK = 512
"""Number of figures made at a time."""
_TOGETHER = 192
"""Number of attempts at figures made at a time."""
_PAIRS = 24
"""Number of pairs of contours that grow in an attempt. A copy of another pair replaces one that gets stuck."""
_TURNS = 6
"""Number of directions tried for a dash."""
_TRIES = 8
"""Number of times that a distractor is begun."""
_PLACES = 16
"""Number of places tried for its start each time."""
_FAR = np.float32(1e4)
"""Coordinate of points that do not exist yet."""


@dataclass(frozen=True)
class FigureSizes:
    """Measures of the figures of one size; lengths in pixels."""

    margins: tuple[int, ...]
    """Possible values of half the gap between two dashes of a contour; each figure has one of them."""
    dash: int
    """Length of a dash."""
    thickness: float
    dot: float
    """Radius of a dot."""
    seed_distance: int
    """Distance between the starts of the two contours; the first starts near the middle of the picture."""
    continuity: float
    """The probability of a turn by an angle a is proportional to cos(continuity a)^2, up to the first zero or 90
    degrees."""
    distractors: int
    """Number of distractors if all find room."""
    contrasts: tuple[float, float]
    """Brightness of contours and distractors where they cover a pixel. Dots have 1, which is also the maximum."""
    padding: int = 1
    """Distance in pixels that contours keep from the borders."""

    def step(self, margins: np.ndarray) -> np.ndarray:
        """Length of a dash with its gap, float32."""
        return (self.dash + 2 * margins).astype(np.float32)

    def clearance(self, margins: np.ndarray) -> np.ndarray:
        """Least distance between the middle lines of two contours.

        It puts dashes of different contours further apart than those of one, and leaves `margin` of black around a dot.
        """
        return np.maximum(2 * margins + self.thickness, self.dot + margins + self.thickness / 2)


# Numbers of the Long Range Arena's own data set builder. Thin lines are brightened, most of all distractors.
LAYOUTS = {
    32: FigureSizes((1,), 2, 0.5, 1.5, 7, 1.0, 5, (1.5, 2.0)),
    64: FigureSizes((1,), 5, 1.0, 2.5, 12, 1.8, 5, (0.8, 0.8)),
    128: FigureSizes((2, 3), 5, 1.5, 3.0, 20, 1.8, 8, (0.9, 0.9)),
    256: FigureSizes((3,), 5, 2.0, 5.0, 27, 1.8, 7, (1.0, 1.0), padding=22),
}
"""Side of the picture -> what is in it."""


@dataclass(frozen=True)
class Figures:
    """N figures before they are painted. Places are (x, y) in pixels; (0, 0) is the middle of the first pixel."""

    size: int
    margins: np.ndarray
    """(N,): half the gap between two dashes."""
    contours: np.ndarray
    """(N, 2, STEPS + 1, 2): corners of the two contours. A dash is in the middle between one corner and the next."""
    distractors: np.ndarray
    """(N, distractors, SHORT + 1, 2): corners of the distractors; NaN for those without room."""
    dots: np.ndarray
    """(N, 2, 2): places of the dots."""
    labels: np.ndarray
    """(N,): 1 if the dots are the ends of the first contour, 0 if the second dot is the end of the other contour."""


def generate_pathfinder(seed: int, count: int, size: int = 32) -> Iterator[tuple[np.ndarray, int]]:
    """`count` pictures, (size, size) uint8, and their labels: 1 if the dots are joined, else 0, equally likely.

    Picture i depends only on `seed`, `size` and i. Raises UserError for a size that is not in `LAYOUTS`.
    """
    for start in range(0, count, _BLOCK):
        figures = draw(seed, np.arange(start, min(count, start + _BLOCK)), size)
        yield from zip(paint(figures), figures.labels.tolist(), strict=True)


def draw(seed: int, indices: np.ndarray, size: int = 32) -> Figures:
    """The figures with these indices (N,). A figure does not depend on the other indices.

    Raises UserError for a size that is not in `LAYOUTS`.
    """
    if size not in LAYOUTS:
        raise UserError(f"pathfinder: size is {size}: give {', '.join(map(str, LAYOUTS))}")
    layout = LAYOUTS[size]
    keys = _mix(_mix(np.array(seed % (1 << 64), np.uint64)) + np.asarray(indices).astype(np.uint64))
    count = len(keys)
    margins = np.array(layout.margins)[_number(keys, 0, len(layout.margins))]
    contours = np.full((count, 2, STEPS + 1, 2), np.nan, np.float32)
    attempts = np.zeros(count, np.uint64)
    while len(missing := np.flatnonzero(np.isnan(contours[:, 0, 0, 0]))):
        # The first successful attempt is the figure, however many attempts are made at a time.
        now = missing[:_TOGETHER]
        times = _TOGETHER // len(now)
        rows = np.repeat(now, times)
        numbers = attempts[rows] + np.tile(np.arange(times, dtype=np.uint64), len(now))
        corners = _pair(_mix(keys[rows] ^ _mix(numbers)), margins[rows], layout, size)
        good = np.flatnonzero(~np.isnan(corners[:, 0, 0, 0]))
        done, first = np.unique(rows[good], return_index=True)
        contours[done] = corners[good[first]]
        attempts[now] += np.uint64(times)
    labels = _number(keys, 1, 2)
    tips = _tips(contours, margins)
    dots = np.stack([tips[:, 0, 0], tips[np.arange(count), 1 - labels, 1]], axis=1)
    return Figures(size, margins, contours, _distractors(keys, contours, margins, layout, size), dots, labels)


def _mix(keys: np.ndarray) -> np.ndarray:
    """Random 64-bit numbers from counters: the output function of SplitMix64 (Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        keys = keys + np.uint64(0x9E3779B97F4A7C15)
        keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return keys ^ (keys >> np.uint64(31))


def _number(keys: np.ndarray, draw: int, limit: int) -> np.ndarray:
    """Random number `draw` of each key: an integer in 0 .. limit - 1, for limits up to 2^31."""
    with np.errstate(over="ignore"):
        mixed = _mix(keys + np.uint64((draw + 1) * 0xD1342543DE82EF95 % (1 << 64)))
    return (mixed >> np.uint64(33)).astype(np.int64) * limit >> 31


# Directions are whole degrees and cosines are rounded, so that their sums are exact and the same on every machine.
_ANGLES = np.deg2rad(np.arange(360))
_UNIT = (np.round(np.stack([np.cos(_ANGLES), np.sin(_ANGLES)]) * 1024) / 1024).astype(np.float32)


def _turns(continuity: float) -> np.ndarray:
    """4096 turns in degrees, each as often as its probability says."""
    degrees = np.arange(-90, 91)
    weights = np.cos(np.minimum(np.abs(np.deg2rad(degrees)) * continuity, math.pi / 2)) ** 2
    share = np.cumsum(weights) / weights.sum()
    return degrees[np.searchsorted(share, (np.arange(4096) + 0.5) / 4096)]


class _Crowd:
    """The points in R rows: starts of contours, and the middle and end of every step; x and y are (P, R).

    Only these points are compared, not the lines between them. Two steps of length s are at least D apart everywhere
    if their middles and ends are sqrt(D^2 + (s/4)^2) apart.
    """

    def __init__(self, margins: np.ndarray, layout: FigureSizes, size: int, points: int) -> None:
        self.x, self.y = (np.full((points, len(margins)), _FAR) for _ in range(2))
        self.step = layout.step(margins)
        self.near = (layout.clearance(margins) ** 2 + (self.step / 4) ** 2).astype(np.float32)
        self.low = (layout.padding + margins).astype(np.float32)
        self.high = size - 1 - self.low
        self.turns = _turns(layout.continuity)

    def free(self, rows: np.ndarray, points: list[tuple[np.ndarray, np.ndarray]], others: list[slice]) -> np.ndarray:
        """For each of these rows, whether all of `points` are inside the picture and far enough from `others`."""
        low, high = self.low[rows], self.high[rows]
        good = np.ones(len(rows), bool)
        for x, y in points:
            good &= (x >= low) & (x <= high) & (y >= low) & (y <= high)
        inside = np.flatnonzero(good)
        rows = rows[inside]
        nearest = np.full(len(rows), np.inf, np.float32)
        for part in others:
            if part.stop > part.start:
                there_x, there_y = self.x[part].take(rows, axis=1), self.y[part].take(rows, axis=1)
                for x, y in points:
                    dx, dy = there_x - x[inside], there_y - y[inside]
                    dx *= dx
                    dy *= dy
                    dx += dy
                    np.minimum(nearest, dx.min(axis=0), out=nearest)
        good[inside] = nearest >= self.near[rows]
        return good

    def walk(
        self, rows: np.ndarray, keys: np.ndarray, draw: int, heading: np.ndarray, first: bool,
        last: int, here: int, others: list[slice],
    ) -> np.ndarray:  # fmt: skip
        """Go a step from point `last`, which adds points `here` and `here + 1`. Returns those rows that had room.

        Random numbers from `draw` on give the direction: a turn from the heading (R,), which is updated; at `first`,
        any direction.
        """
        went = []
        for trial in range(_TURNS):
            if not len(rows):
                break
            number = _number(keys[rows], draw + trial, 360 if first else 4096)
            ahead = number if first else (heading[rows] + self.turns[number]) % 360
            x, y = self.x[last, rows], self.y[last, rows]
            dx, dy = _UNIT[0, ahead] * self.step[rows], _UNIT[1, ahead] * self.step[rows]
            points = [(x + dx / 2, y + dy / 2), (x + dx, y + dy)]
            good = self.free(rows, points, others)
            for point, (x, y) in enumerate(points):
                self.x[here + point, rows[good]], self.y[here + point, rows[good]] = x[good], y[good]
            heading[rows[good]] = ahead[good]
            went.append(rows[good])
            rows = rows[~good]
        return np.sort(np.concatenate([*went, rows[:0]]))


def _pair(keys: np.ndarray, margins: np.ndarray, layout: FigureSizes, size: int) -> np.ndarray:
    """For each of N keys, the corners (N, 2, STEPS + 1, 2) of two contours, or NaN.

    Few walks find room until their end. So several grow for each key, and copies of others replace those that get
    stuck.
    """
    count = len(keys)
    keys = _mix(np.repeat(keys, _PAIRS) + np.tile(np.arange(_PAIRS, dtype=np.uint64), count))
    margins = np.repeat(margins, _PAIRS)
    crowd = _Crowd(margins, layout, size, 2 + 4 * STEPS)
    border = layout.seed_distance + max(layout.seed_distance / 2, layout.padding + max(layout.margins))
    away = _number(keys, 0, 360)
    for axis, points in enumerate((crowd.x, crowd.y)):
        points[0] = border + _number(keys, 1 + axis, int((size - 1 - 2 * border) * 64) + 1) / np.float32(64)
        points[1] = points[0] + _UNIT[axis, away] * np.float32(layout.seed_distance)
    headings = np.zeros((2, len(keys)), np.int64)
    rows = np.arange(len(keys))
    for turn in range(2 * STEPS):
        contour, here = turn % 2, 2 + 2 * turn
        # This step starts at the contour's own last step and keeps away from all other points.
        last, others = here - 3, [slice(0, here - 4), slice(here - 2, here)]
        if turn < 2:
            last, others = contour, [slice(1 - contour, 2 - contour), slice(2, here)]
        draw = 4 + turn * (_TURNS + 1)
        rows = crowd.walk(rows, keys, draw, headings[contour], turn < 2, last, here, others)
        if contour:
            going = np.zeros(len(keys), bool)
            going[rows] = True
            rows = _replace(going, keys, draw + _TURNS, crowd, headings, here + 2)
    points = np.stack([crowd.x, crowd.y], axis=-1)
    corners = np.stack([points[[i, *range(3 + 2 * i, 2 + 4 * STEPS, 4)]] for i in range(2)])
    corners = corners.transpose(2, 0, 1, 3)
    good = np.zeros(len(keys), bool)
    good[rows] = _alike(corners[rows], margins[rows], layout, size)
    corners[~good] = np.nan
    return corners[np.arange(count) * _PAIRS + good.reshape(count, _PAIRS).argmax(axis=1)]


def _replace(
    going: np.ndarray, keys: np.ndarray, draw: int, crowd: _Crowd, headings: np.ndarray, points: int
) -> np.ndarray:
    """Replace rows that got stuck by copies of other rows of the same key.

    Returns the indices of all rows that continue."""
    alive = going.reshape(-1, _PAIRS)
    number = alive.sum(axis=1)
    stuck = np.flatnonzero(~going & np.repeat(number > 0, _PAIRS))
    group = stuck // _PAIRS
    ordered = np.argsort(~alive, axis=1, kind="stable")
    model = group * _PAIRS + ordered[group, _number(keys[stuck], draw, 1 << 20) % number[group]]
    for values in (crowd.x[:points], crowd.y[:points], headings):
        values[:, stuck] = values[:, model]
    return np.flatnonzero(np.repeat(number > 0, _PAIRS))


def _tips(corners: np.ndarray, margins: np.ndarray) -> np.ndarray:
    """(N, 2, 2, 2): the start of the first dash and the end of the last dash of each contour."""
    first, last = corners[:, :, 1] - corners[:, :, 0], corners[:, :, -1] - corners[:, :, -2]
    gap = margins[:, None, None].astype(np.float32)
    first_length, last_length = (np.sqrt((way**2).sum(axis=2, keepdims=True)) for way in (first, last))
    return np.stack([corners[:, :, 0] + first * gap / first_length, corners[:, :, -1] - last * gap / last_length], 2)


def _alike(corners: np.ndarray, margins: np.ndarray, layout: FigureSizes, size: int) -> np.ndarray:
    """(R,): whether the ends of both contours are about equally far from the first one's start and from the middle."""
    tips = _tips(corners, margins)
    ends, start, middle = tips[:, :, 1], tips[:, :1, 0], np.float32((size - 1) / 2)
    away, out = (np.sqrt(((ends - place) ** 2).sum(axis=2)) for place in (start, middle))
    alike = [np.abs(far[:, 0] - far[:, 1]) <= TOLERANCE * size for far in (away, out)]
    return alike[0] & alike[1] & (away.min(axis=1) >= 2 * layout.dot + margins)  # dots don't touch


def _distractors(
    keys: np.ndarray, contours: np.ndarray, margins: np.ndarray, layout: FigureSizes, size: int
) -> np.ndarray:
    """Corners (N, distractors, SHORT + 1, 2) of short contours that keep away from all others; NaN without room."""
    count, fixed, each = len(keys), 2 * (1 + 2 * STEPS), 1 + 2 * SHORT
    crowd = _Crowd(margins, layout, size, fixed + each * layout.distractors)
    middles = (contours[:, :, 1:] + contours[:, :, :-1]) / 2
    points = np.concatenate([contours, middles], axis=2).reshape(count, fixed, 2)
    crowd.x[:fixed], crowd.y[:fixed] = points[..., 0].T, points[..., 1].T
    heading = np.zeros(count, np.int64)
    draw = 2
    for start in range(fixed, len(crowd.x), each):
        missing = np.arange(count)
        for _ in range(_TRIES):
            searching, found = missing, []
            for _ in range(_PLACES):
                x, y = (_number(keys[searching], draw + axis, size * 64) / np.float32(64) for axis in range(2))
                draw += 2
                good = crowd.free(searching, [(x, y)], [slice(0, start)])
                crowd.x[start, searching[good]], crowd.y[start, searching[good]] = x[good], y[good]
                found.append(searching[good])
                searching = searching[~good]
            rows = np.concatenate(found)
            for here in range(start + 1, start + each, 2):
                # This step starts at the distractor's own last step and keeps away from all other points.
                others = [slice(0, max(start, here - 2))]
                rows = crowd.walk(rows, keys, draw, heading, here == start + 1, here - 1, here, others)
                draw += _TURNS
            missing = np.setdiff1d(missing, rows, assume_unique=True)
            crowd.x[start : start + each, missing] = crowd.y[start : start + each, missing] = _FAR
    corners = np.stack([crowd.x[fixed:], crowd.y[fixed:]], axis=-1).reshape(layout.distractors, each, count, 2)
    corners = corners[:, ::2].transpose(2, 0, 1, 3)
    return np.where(corners == _FAR, np.float32(np.nan), corners)


def paint(figures: Figures) -> np.ndarray:
    """The pictures, (N, size, size) uint8: antialiased dashes and filled dots on black."""
    layout, count, size = LAYOUTS[figures.size], len(figures.contours), figures.size
    canvas = _Canvas(count, size, border=layout.dash + math.ceil(layout.dot) + 3)
    share = (layout.dash / 2 / layout.step(figures.margins))[:, None]
    for corners, contrast in zip((figures.contours, figures.distractors), layout.contrasts, strict=True):
        for contour in range(corners.shape[1]):
            there = np.flatnonzero(~np.isnan(corners[:, contour, 0, 0]))
            for step in range(corners.shape[2] - 1):
                start, end = corners[there, contour, step], corners[there, contour, step + 1]
                canvas.line(there, (start + end) / 2, (end - start) * share[there], layout.thickness, contrast)
    for dot in range(2):
        canvas.line(np.arange(count), figures.dots[:, dot], np.zeros((count, 2), np.float32), 2 * layout.dot, 1.0)
    return np.round(np.minimum(canvas.inside(), 1) * 255).astype(np.uint8)


class _Canvas:
    """N pictures with a border around them, so that shapes may cross the edge."""

    def __init__(self, count: int, size: int, border: int) -> None:
        self.border = border
        self.light = np.zeros((count, size + 2 * border, size + 2 * border), np.float32)

    def inside(self) -> np.ndarray:
        return self.light[:, self.border : -self.border, self.border : -self.border]

    def line(self, rows: np.ndarray, middle: np.ndarray, half: np.ndarray, thickness: float, contrast: float) -> None:
        """Draw a line from `middle - half` to `middle + half` (R, 2) in each of these pictures; brighter pixels stay.

        A pixel's brightness is the part of the line's width that lies within half a pixel of its middle.
        """
        if not len(rows):
            return
        reach = math.ceil(float(np.abs(half).max()) + thickness / 2 + 0.5)
        corner = np.floor(middle).astype(np.int64) - reach
        span = np.arange(2 * reach + 2)
        dx = (corner[:, 0, None] + span - middle[:, 0, None]).astype(np.float32)[:, None, :]
        dy = (corner[:, 1, None] + span - middle[:, 1, None]).astype(np.float32)[:, :, None]
        hx, hy = half[:, 0, None, None], half[:, 1, None, None]
        along = np.clip((dx * hx + dy * hy) / np.maximum(hx * hx + hy * hy, np.float32(1e-6)), -1, 1)
        away = np.sqrt((dx - along * hx) ** 2 + (dy - along * hy) ** 2)
        covered = np.clip(np.float32(thickness / 2 + 0.5) - away, 0, np.float32(min(1.0, thickness)))
        x, y = corner[:, 0, None] + span + self.border, corner[:, 1, None] + span + self.border
        where = (rows[:, None, None], y[:, :, None], x[:, None, :])
        self.light[where] = np.maximum(self.light[where], covered * np.float32(contrast))
