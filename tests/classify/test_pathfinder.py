"""Figures are what they are said to be, by an independent measure; labels cannot be guessed from simple figures."""

from __future__ import annotations

import itertools
import time
import zlib

import numpy as np
import pytest

from waveletgpt.classify import pathfinder
from waveletgpt.classify.pathfinder import LAYOUTS, SHORT, STEPS, TOLERANCE, Figures, draw, generate_pathfinder, paint
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
    """Between two ways: 0 if they cross, else from one's corners to the other's steps."""

    def side(start: np.ndarray, end: np.ndarray, point: np.ndarray) -> np.ndarray:
        way, to = end - start, point - start
        return way[..., 0] * to[..., 1] - way[..., 1] * to[..., 0]

    a, b = (first[:-1, None], first[1:, None]), (second[None, :-1], second[None, 1:])
    between = [side(*x, y[0]) * side(*x, y[1]) < 0 for x, y in ((a, b), (b, a))]
    if (between[0] & between[1]).any():
        return 0.0
    nearest = []
    for (start, end), points in ((b, first[:, None]), (a, second[None])):
        share = np.clip(((points - start) * (end - start)).sum(-1) / ((end - start) ** 2).sum(-1), 0, 1)
        nearest.append(np.hypot(*np.moveaxis(points - start - share[..., None] * (end - start), -1, 0)).min())
    return float(min(nearest))


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
def test_both_ends_are_about_as_far(size: int, drawn: dict[int, Figures]) -> None:
    figures, layout = drawn[size], LAYOUTS[size]
    for index in range(40):
        ends, _ = dashes(figures, index)
        start, own, other = ends[0, 0], ends[STEPS - 1, 1], ends[2 * STEPS - 1, 1]
        np.testing.assert_allclose(figures.dots[index, 0], start, atol=0.01)
        np.testing.assert_allclose(figures.dots[index, 1], own if figures.labels[index] else other, atol=0.01)
        away, out = ([float(np.hypot(*(end - place))) for end in (own, other)] for place in (start, (size - 1) / 2))
        assert abs(away[0] - away[1]) <= TOLERANCE * size + 0.01
        assert abs(out[0] - out[1]) <= TOLERANCE * size + 0.01
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
            low = np.maximum(np.minimum(start, end) - thickness / 2 - 1, 0).astype(int)
            high = np.minimum(np.maximum(start, end) + thickness / 2 + 2, size).astype(int)
            (left, top), (right, bottom) = low, high
            way = end - start
            x, y = places[None, 8 * left : 8 * right] - start[0], places[8 * top : 8 * bottom, None] - start[1]
            along = np.clip((x * way[0] + y * way[1]) / (way @ way), 0, 1)
            on = np.hypot(x - along * way[0], y - along * way[1]) <= thickness / 2
            cover = on.reshape(bottom - top, 8, right - left, 8).mean(axis=(1, 3))
            part = expected[top:bottom, left:right]
            np.maximum(part, np.minimum(cover * contrast, 1), out=part)
        assert np.abs(pictures[index] / 255 - expected).mean() < 0.25 * expected.mean()
        assert np.corrcoef(pictures[index].ravel(), expected.ravel())[0, 1] > 0.97


@pytest.mark.parametrize(("size", "brightness"), [(32, 20.1), (128, 8.0)])
def test_brightness_is_that_of_the_published_pictures(size: int, brightness: float) -> None:
    """The mean of 64 and 16 pictures that the published generator made with the Long Range Arena's parameters."""
    pictures = [picture for picture, _ in generate_pathfinder(1, 200, size)]
    assert np.mean(pictures) == pytest.approx(brightness, rel=0.1)
    assert np.max(pictures) == 255
    assert np.mean([picture[:2].max() + picture[-2:].max() for picture in pictures]) < 255


def connected(picture: np.ndarray, dots: np.ndarray, radius: float) -> bool:
    """Whether one gets from dot to dot along pixels that are no further than that from a lit one."""
    size = len(picture)
    y, x = np.nonzero(picture > 115)
    grid_y, grid_x = np.mgrid[:size, :size]
    open_ = np.zeros((size + 2, size + 2), bool)
    away = np.full((size, size), np.inf)
    for part in range(0, len(x), 64):
        square = (grid_y[..., None] - y[part : part + 64]) ** 2 + (grid_x[..., None] - x[part : part + 64]) ** 2
        away = np.minimum(away, square.min(axis=-1))
    open_[1:-1, 1:-1] = away <= radius**2
    (start_x, start_y), (end_x, end_y) = np.round(dots).astype(int) + 1
    reached = np.zeros_like(open_)
    reached[start_y, start_x] = True
    count = 0
    while (found := int(reached.sum())) > count:
        count = found
        for axis, by in itertools.product((0, 1), (-1, 1)):
            reached |= np.roll(reached, by, axis) & open_
    return bool(reached[end_y, end_x])


def test_the_answer_can_be_read_off_the_picture(drawn: dict[int, Figures]) -> None:
    """In the larger pictures: who bridges gaps as wide as a contour's own gets it right, but for rounding to pixels."""
    figures = drawn[128]
    pictures = paint(figures)
    found = [connected(pictures[i], figures.dots[i], figures.margins[i]) for i in range(40)]
    assert (found == figures.labels).mean() > 0.75


# --- chance ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def many() -> tuple[Figures, np.ndarray]:
    """2,000 figures of 32 x 32, and their pictures."""
    figures = draw(3, np.arange(2000))
    return figures, paint(figures)


def test_classes_are_equally_likely(many: tuple[Figures, np.ndarray]) -> None:
    """Within three standard deviations of a fair coin; and no class follows from the one before."""
    labels = many[0].labels
    deviation = 0.5 / np.sqrt(len(labels))
    assert abs(labels.mean() - 0.5) < 3 * deviation
    assert abs((labels[1:] == labels[:-1]).mean() - 0.5) < 3 * deviation


def logistic(features: np.ndarray, labels: np.ndarray) -> float:
    """Accuracy on held-out thirds of a logistic regression on features and their products, by Newton's method."""
    features = (features - features.mean(axis=0)) / (features.std(axis=0) + 1e-9)
    pairs = itertools.combinations_with_replacement(range(features.shape[1]), 2)
    features = np.stack([np.ones(len(features)), *features.T, *(features[:, a] * features[:, b] for a, b in pairs)], 1)
    right = []
    for fold in range(3):
        held_out = np.arange(len(labels)) % 3 == fold
        inputs, targets = features[~held_out], labels[~held_out]
        weights = np.zeros(features.shape[1])
        for _ in range(15):
            found = 1 / (1 + np.exp(-inputs @ weights))
            curvature = (inputs * (found * (1 - found))[:, None]).T @ inputs + np.eye(len(weights))
            weights += np.linalg.solve(curvature, inputs.T @ (targets - found) - weights)
        right.append((features[held_out] @ weights > 0) == labels[held_out])
    return float(np.concatenate(right).mean())


def test_simple_figures_do_not_tell_the_label(many: tuple[Figures, np.ndarray]) -> None:
    figures, pictures = many
    middle = (figures.size - 1) / 2
    dots = figures.dots - middle
    apart = np.hypot(*(dots[:, 1] - dots[:, 0]).T)
    radii = np.hypot(dots[..., 0], dots[..., 1])
    angle = (dots[:, 0] * dots[:, 1]).sum(axis=1) / radii.prod(axis=1)
    halves = [pictures[:, :16].mean(axis=(1, 2)), pictures[:, :, :16].mean(axis=(1, 2))]
    clues = {
        "light": np.stack([(pictures > 0).sum((1, 2)), (pictures > 127).sum((1, 2)), pictures.sum((1, 2)), *halves], 1),
        "distance of the dots": apart[:, None],
        "places of the dots": dots.reshape(-1, 4),
        "their distances and angle": np.stack([apart, *radii.T, angle], axis=1),
    }
    for name, features in clues.items():
        assert logistic(features, figures.labels) < 0.55, name  # of 8,000 figures 52 % can be guessed so
    # What would tell is found by the same means.
    ends = figures.contours[:, 0, -1] - middle
    assert logistic(np.abs(ends - dots[:, 1]), figures.labels) > 0.95


# --- the same everywhere --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_a_picture_depends_on_seed_and_index_only(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever else is asked for, and however many are made at a time."""
    first = list(generate_pathfinder(11, 6, size))
    for block, together in ((4, 16), (7, 40)):
        monkeypatch.setattr(pathfinder, "_BLOCK", block)
        monkeypatch.setattr(pathfinder, "_TOGETHER", together)
        again = list(generate_pathfinder(11, 8, size))
        assert len(again) == 8
        for (picture, label), (other, other_label) in zip(first, again, strict=False):
            assert np.array_equal(picture, other)
            assert label == other_label
    some = draw(11, np.array([5, 2]), size)
    assert np.array_equal(paint(some), [first[5][0], first[2][0]])
    assert some.labels.tolist() == [first[5][1], first[2][1]]
    others = [picture for seed in (12, 11 + 2**64 - 1) for picture, _ in generate_pathfinder(seed, 6, size)]
    everything = [picture.tobytes() for picture in (*(picture for picture, _ in first), *others)]
    assert len(set(everything)) == 18
    assert np.array_equal(next(generate_pathfinder(11 + 2**64, 1, size))[0], first[0][0])


@pytest.mark.parametrize(("size", "expected"), [(32, 1677177318), (128, 999051223)])
def test_pictures_stay_what_they_are(size: int, expected: int) -> None:
    """Results name a seed: a change of this number changes the data of every one of them."""
    pictures, labels = zip(*generate_pathfinder(0, 8, size), strict=True)
    assert zlib.crc32(np.array(pictures).tobytes() + bytes(labels)) == expected


def test_none_and_one() -> None:
    assert list(generate_pathfinder(0, 0)) == []
    ((picture, label),) = generate_pathfinder(0, 1, 128)
    assert picture.shape == (128, 128)
    assert label in (0, 1)


def test_other_sizes() -> None:
    with pytest.raises(UserError, match="pathfinder: size is 48: give 32, 64, 128, 256"):
        next(generate_pathfinder(0, 1, 48))


def test_speed() -> None:
    """500 a second are asked for on two cores; a fifth of that on one, as other work may be going on."""
    start = time.process_time()
    assert sum(1 for _ in generate_pathfinder(4, 512)) == 512
    assert 512 / (time.process_time() - start) > 100
