"""However labelled examples are divided, splits share nothing and the test split is what it is."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from waveletgpt.classify.labelled import check_classes, divide
from waveletgpt.classify.settings import TaskSettings
from waveletgpt.data import SPLITS
from waveletgpt.errors import UserError


@hypothesis_settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_however_it_is_divided(data: st.DataObject) -> None:
    """Splits share no point, official ones keep to themselves, and the test split is the same for every validation."""
    count = data.draw(st.integers(30, 120))
    labels = data.draw(hnp.arrays(np.int64, count, elements=st.integers(0, 2)))
    points = np.random.default_rng(data.draw(st.integers(0, 99))).random(count)
    for copy, original in data.draw(st.lists(st.tuples(*[st.integers(0, count - 1)] * 2), max_size=5)):
        points[copy] = points[original]
    official = data.draw(st.sampled_from([[-1], [0, 2], [0, 1, 2]]))
    split_of = data.draw(hnp.arrays(np.int64, count, elements=st.sampled_from(official)))
    wanted = data.draw(st.integers(1, 5))
    assume(len(set(points[split_of < 1]) - set(points[split_of > 0])) > 2 * wanted + 5)
    parts, division = divide(labels, points, split_of, TaskSettings())
    more, _ = divide(labels, points, split_of, TaskSettings(validation_examples=wanted))
    for found in (parts, more):
        for a, b in itertools.combinations(SPLITS, 2):
            assert not set(points[found[a]]) & set(points[found[b]])
        for number, split in enumerate(SPLITS):
            assert len(set(found[split].tolist())) == len(found[split])
            if split != "validation":
                assert set(split_of[found[split]].tolist()) <= {number, -1}
    assert parts["test"].tolist() == more["test"].tolist()
    if official != [-1]:
        assert parts["test"].tolist() == np.flatnonzero(split_of == 2).tolist()
    # Nothing is lost but copies of what is in another split.
    kept = {point for found in parts.values() for point in points[found]}
    assert kept == set(points)
    assert division == ("hash" if official == [-1] else "given" if 1 in split_of else "held out")


@pytest.mark.parametrize(
    ("classes", "multi_label", "message"),
    [
        ((), False, "birds has no classes: give two or more"),
        (("wren",), False, "birds has one class, wren: give two or more"),
        (("wren", "owl", "wren"), True, "birds has two classes called wren"),
    ],
)
def test_classes_that_cannot_be_told_apart(classes: tuple[str, ...], multi_label: bool, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_classes(classes, "birds", multi_label)
    check_classes(("wren",), "birds", multi_label=True)
    check_classes(("wren", "owl"), "birds")
