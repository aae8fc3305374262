"""Labelled examples before they are in an example store: collected, divided into splits and limited in number.

The tasks of the Long Range Arena and labelled recordings share this module.
"""

from __future__ import annotations

import itertools
import struct
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from waveletgpt.classify.settings import TaskSettings
from waveletgpt.data.splits import point_of
from waveletgpt.data.store import SPLITS
from waveletgpt.errors import UserError

HELD_OUT = 0.1
"""Share of the training split that becomes validation. Of data without splits, this share becomes validation, and the
same share becomes test."""


class Item(NamedTuple):
    """One example as it is read."""

    inputs: tuple[bytes, ...]
    """8-bit values."""
    label: int
    point: float
    """`point_of` the whole example before it is cut; it identifies the example."""
    name: str
    split: str | None
    """The official split; None if the data has no splits."""


class Pool:
    """All examples of a source: the inputs in a temporary file; labels, points and splits in memory."""

    def __init__(self, path: Path, n_inputs: int) -> None:
        self._file = path.open("w+b")
        self._n_inputs = n_inputs
        self._ends = array("Q", [0])
        self._labels, self._points, self._given = array("q"), array("d"), array("b")
        self.names: list[str] = []

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __len__(self) -> int:
        return len(self.names)

    def add(self, item: Item) -> None:
        """Keep an example."""
        for values in item.inputs:
            self._file.write(values)
            self._ends.append(self._ends[-1] + len(values))
        self._labels.append(item.label)
        self._points.append(item.point)
        self._given.append(-1 if item.split is None else SPLITS.index(item.split))
        self.names.append(item.name)

    def columns(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Label, point and number of the official split (-1: none) of each example."""
        return np.array(self._labels), np.array(self._points), np.array(self._given)

    def inputs(self, index: int) -> list[bytes]:
        """The inputs of one example."""
        first = index * self._n_inputs
        bounds = self._ends[first : first + self._n_inputs + 1]
        self._file.seek(bounds[0])
        return [self._file.read(end - start) for start, end in itertools.pairwise(bounds)]


def divide(
    labels: np.ndarray, points: np.ndarray, given: np.ndarray, settings: TaskSettings
) -> tuple[dict[str, np.ndarray], str]:
    """The indices of the examples of each split, and how they were found: "given", "held out" or "hash".

    `given` (n,) holds the numbers of official splits, or -1 for examples that are divided by their `points`, (n,).
    Without an official validation split, HELD_OUT of the training examples (more if the settings ask for more) become
    validation. Copies have the same point; they stay only in the first of test, validation and training.
    """
    from waveletgpt.classify.examples import balanced

    parts = {split: np.flatnonzero(given == code) for code, split in enumerate(SPLITS)}
    free = np.flatnonzero(given < 0)
    free = free[balanced(labels[free], points[free])]
    division = "hash" if len(free) else "given"
    test = round(HELD_OUT * len(free))
    parts["test"] = np.concatenate([parts["test"], free[:test]])
    parts["train"] = np.concatenate([parts["train"], free[test:]])
    parts["train"] = _without(parts["train"], parts["test"], points)
    if not len(parts["validation"]):
        division = "held out" if division == "given" else division
        order = parts["train"][balanced(labels[parts["train"]], points[parts["train"]])]
        wanted = settings.validation_examples or 1
        held = max(test or round(HELD_OUT * len(order)), wanted)
        if settings.validation_examples and len(order) <= wanted:
            raise UserError(f"validation_examples is {wanted}, but there are {len(order)} to train on: give fewer")
        parts["validation"], parts["train"] = order[:held], order[held:]
    parts["validation"] = _without(parts["validation"], parts["test"], points)
    parts["train"] = _without(parts["train"], parts["validation"], points)
    return parts, division


def check_classes(classes: Sequence[str], name: str, multi_label: bool = False) -> None:
    """Raises UserError if classes have the same name, or if there are fewer than two without `multi_label`."""
    twice = next((label for i, label in enumerate(classes) if label in classes[:i]), None)
    if twice is not None:
        raise UserError(f"{name} has two classes called {twice}: give each its own name")
    if len(classes) < 2 and not multi_label:
        there = f"one class, {classes[0]}" if classes else "no classes"
        raise UserError(f"{name} has {there}: give two or more")


def _without(indices: np.ndarray, others: np.ndarray, points: np.ndarray) -> np.ndarray:
    return indices[~np.isin(points[indices], points[others])]


def limit(
    indices: np.ndarray, labels: np.ndarray, points: np.ndarray, settings: TaskSettings, split: str, name: str
) -> np.ndarray:
    """As many of a split's examples as `settings` ask for, with classes in their shares. Larger numbers add examples.

    Raises UserError if there are fewer.
    """
    from waveletgpt.classify.examples import balanced

    wanted = settings.wanted(split)
    if wanted is not None and wanted > len(indices):
        raise UserError(f"{split}_examples is {wanted}, but {name} has {len(indices):,} for {split}: give at most that")
    drawn = np.array([point_of(struct.pack("<Qd", settings.data_seed, point)) for point in points[indices]])
    return indices[balanced(labels[indices], drawn)][:wanted]
