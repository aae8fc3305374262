"""Figures are what they are said to be, by an independent measure; labels cannot be guessed from simple figures."""

from __future__ import annotations

import itertools
import time
import zlib

import numpy as np
import pytest

from waveletgpt.data import pathfinder
from waveletgpt.data.pathfinder import LAYOUTS, SHORT, STEPS, TOLERANCE, Figures, draw, generate_pathfinder, paint
from waveletgpt.errors import UserError

SIZES = sorted(LAYOUTS)


@pytest.fixture(scope="module")
def drawn() -> dict[int, Figures]:
    """Some figures of every size."""
    return {size: draw(5, np.arange(40), size) for size in SIZES}


def ways(figures: Figures, index: int) -> list[np.ndarray]:
    """The corners (., 2) of each contour of one figure, the two long ones first."""
    found = [*figures.contours[index], *figures.distractors[index]]
    return [way.astype(np.float64) for way in found if not np.isnan(way).any()]


def dashes(figures: Figures, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Ends (D, 2, 2) of all dashes of one figure, and which contour each belongs to."""
    margin = figures.margins[index]
    ends, owner = [], []
    for number, way in enumerate(ways(figures, index)):
        for start, end in itertools.pairwise(way):
            along = (end - start) / np.hypot(*(end - start))
            ends.append((start + margin * along, end - margin * along))
            owner.append(number)
    return np.array(ends), np.array(owner)


def distance(first: np.ndarray, second: np.ndarray) -> float:
    """Between two ways, from points every 20th of a pixel: right to a 40th of one."""

    def dense(way: np.ndarray) -> np.ndarray:
        pieces = [
            np.linspace(start, end, 2 + int(20 * np.hypot(*(end - start)))) for start, end in itertools.pairwise(way)
        ]
        return np.concatenate(pieces)

    a, b = dense(first), dense(second)
    return min(
        float(np.hypot(*(part[:, None] - b).transpose(2, 0, 1)).min())
        for part in np.array_split(a, len(a) // 200 + 1)
    )


# --- figures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_contours_are_as_published(size: int, drawn: dict[int, Figures]) -> None:
    """Equally long, of steps as long as a dash and its gap, turning no further than the published law allows."""
    figures, layout = drawn[size], LAYOUTS[size]
    assert figures.contours.shape == (40, 2, STEPS + 1, 2)
    assert set(figures.margins) == set(layout.margins)
    limit = min(90, 90 / layout.continuity) + 0.5
    turns = []
    for index in range(40):
        assert len(ways(figures, index)) <= 2 + layout.distractors
        low = layout.padding + figures.margins[index]
        for number, way in enumerate(ways(figures, index)):
            assert len(way) == (STEPS if number < 2 else SHORT) + 1
            assert way.min() >= low
            assert way.max() <= size - 1 - low
            steps = np.diff(way, axis=0)
            np.testing.assert_allclose(np.hypot(*steps.T), layout.dash + 2 * figures.margins[index], atol=0.01)
            angles = np.rad2deg(np.unwrap(np.arctan2(steps[:, 1], steps[:, 0])))
            turns.extend(np.abs(np.diff(angles)))
    assert max(turns) <= limit
    # What finds no room is drawn again, which makes turns larger than the law alone.
    law = np.cos(np.deg2rad(np.arange(0, limit, 0.1)) * layout.continuity) ** 2
    expected = float((law * np.arange(0, limit, 0.1)).sum() / law.sum())
    assert expected * 0.95 < np.mean(turns) < expected * 1.35
    starts = figures.contours[:, 1, 0] - figures.contours[:, 0, 0]
    np.testing.assert_allclose(np.hypot(*starts.T), layout.seed_distance, atol=0.05)


@pytest.mark.parametrize("size", SIZES)
def test_contours_keep_their_distance(size: int, drawn: dict[int, Figures]) -> None:
    """From each other, and from what of themselves is more than a step away: so none touch or cross."""
    figures = drawn[size]
    for index in range(15):
        clearance = float(LAYOUTS[size].clearance(figures.margins[index]))
        found = ways(figures, index)
        for first, second in itertools.combinations(found, 2):
            assert distance(first, second) >= clearance - 1e-3
        for way in found:
            for step in range(2, len(way) - 1):
                assert distance(way[:step], way[step : step + 2]) >= clearance - 1e-3


@pytest.mark.parametrize("size", SIZES)
def test_joined_is_what_following_the_dashes_finds(size: int, drawn: dict[int, Figures]) -> None:
    """From dot to dot over ends that are no further apart than the widest gap of a contour: only if joined."""
    figures = drawn[size]
    for index in range(40):
        ends, owner = dashes(figures, index)
        gap = 2 * figures.margins[index] + 0.05
        apart = np.hypot(*(ends[:, None, :, None] - ends[None, :, None, :]).transpose(4, 0, 1, 2, 3)).min(axis=(2, 3))
        linked = apart <= gap
        near = [np.hypot(*(ends - dot).transpose(2, 0, 1)).min(axis=1) for dot in figures.dots[index]]
        reached = near[0] < 0.05
        assert reached.sum() == 1
        for _ in range(len(ends)):
            reached = reached | linked[reached].any(axis=0)
        assert set(owner[reached]) == {0}
        assert bool(reached[near[1].argmin()]) == bool(figures.labels[index])
        assert near[1].min() < 0.05


@pytest.mark.parametrize("size", SIZES)
def test_both_ends_are_equally_far(size: int, drawn: dict[int, Figures]) -> None:
    figures, layout = drawn[size], LAYOUTS[size]
    for index in range(40):
        ends, _ = dashes(figures, index)
        start, own, other = ends[0, 0], ends[STEPS - 1, 1], ends[2 * STEPS - 1, 1]
        np.testing.assert_allclose(figures.dots[index, 0], start, atol=0.01)
        np.testing.assert_allclose(figures.dots[index, 1], own if figures.labels[index] else other, atol=0.01)
        away = [float(np.hypot(*(end - start))) for end in (own, other)]
        assert abs(away[0] - away[1]) <= TOLERANCE * size + 0.01
        assert min(away) >= 2 * layout.dot + figures.margins[index] - 0.01


# --- pictures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_pictures_show_the_figures(size: int, drawn: dict[int, Figures]) -> None:
    """Compared with how much of each pixel, cut into 8 x 8 parts, lies on a dash or a dot."""
    figures, layout = drawn[size], LAYOUTS[size]
    pictures = paint(figures)
    assert pictures.shape == (40, size, size)
    assert pictures.dtype == np.uint8
    places = (np.arange(8 * size) - 3.5) / 8
    for index in range(4):
        ends, owner = dashes(figures, index)
        expected = np.zeros((size, size))
        lines = [(a, b, layout.thickness, layout.contrasts[int(k > 1)]) for (a, b), k in zip(ends, owner, strict=True)]
        lines += [(dot, dot + 1e-3, 2 * layout.dot, 1.0) for dot in figures.dots[index]]
        for start, end, thickness, contrast in lines:
            way = end - start
            x, y = places[None, :] - start[0], places[:, None] - start[1]
            along = np.clip((x * way[0] + y * way[1]) / (way @ way), 0, 1)
            on = np.hypot(x - along * way[0], y - along * way[1]) <= thickness / 2
            cover = on.reshape(size, 8, size, 8).mean(axis=(1, 3))
            expected = np.maximum(expected, np.minimum(cover * contrast, 1))
        off = np.abs(pictures[index] / 255 - expected)
        assert off.mean() < 0.1 * expected.mean()
        assert np.corrcoef(pictures[index].ravel(), expected.ravel())[0, 1] > 0.98


@pytest.mark.parametrize(("size", "brightness"), [(32, 20.1), (128, 8.0)])
def test_brightness_is_that_of_the_published_pictures(size: int, brightness: float) -> None:
    """The mean of 64 and 16 pictures that the published generator made with the Long Range Arena's parameters."""
    pictures = [picture for picture, _ in generate_pathfinder(1, 200, size)]
    assert np.mean(pictures) == pytest.approx(brightness, rel=0.1)
    assert np.max(pictures) == 255
    assert np.mean([picture[:2].max() + picture[-2:].max() for picture in pictures]) < 255


def joins_at(picture: np.ndarray, dots: np.ndarray) -> float:
    """The least distance such that one gets from dot to dot along pixels no further than that from a lit one."""
    size = len(picture)
    y, x = np.nonzero(picture > 90)
    grid_y, grid_x = np.mgrid[:size, :size]
    away = np.hypot(grid_y[..., None] - y, grid_x[..., None] - x).min(axis=-1)
    (start_x, start_y), (end_x, end_y) = np.round(dots).astype(int)
    for radius in np.unique(away):
        open_ = np.pad(away <= radius, 1)
        reached = np.zeros_like(open_)
        reached[start_y + 1, start_x + 1] = True
        while True:
            wider = reached.copy()
            for axis, by in itertools.product((0, 1), (-1, 1)):
                wider |= np.roll(reached, by, axis)
            wider &= open_
            if (wider == reached).all():
                break
            reached = wider
        if reached[end_y + 1, end_x + 1]:
            return float(radius)
    raise AssertionError("nothing is connected")


@pytest.mark.parametrize("size", [32, 128])
def test_the_answer_can_be_read_off_the_picture(size: int, drawn: dict[int, Figures]) -> None:
    """Who bridges gaps up to some width gets from dot to dot in the joined ones, with few errors by rounding."""
    figures = drawn[size]
    few = np.arange(40)
    pictures = paint(figures)
    wide = np.array([joins_at(pictures[i], figures.dots[i]) / figures.margins[i] for i in few])
    labels = figures.labels[few]
    best = max(((wide <= threshold) == labels).mean() for threshold in np.unique(wide))
    print(size, best, wide[labels == 1], wide[labels == 0])
    assert best >= 0.85
