"""Fits against laws that are known, and multipliers and retention of curves worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from waveletgpt.report.scaling import (
    Law,
    Point,
    can_fit,
    estimate,
    fit_law,
    fit_tokens,
    multiplier,
    retention,
    trend,
)

TRUE = Law(E=1.1, A=18.0, a=0.25, B=260.0, b=0.34)
SIZES = {"0.3M": 0.3e6, "1.2M": 1.2e6, "5M": 5e6}
TOKENS = (5e6, 15e6, 50e6)


def ladder(noise: float = 0.0, seeds: int = 1, gain: float = 1.0, drop: tuple[str, ...] = ()) -> list[Point]:
    """Losses of `TRUE`, and of an arm that is as good as `TRUE` with `gain` times the tokens."""
    random = np.random.default_rng(0)

    def around(loss: float) -> float:
        return float(loss * math.exp(random.normal(0, noise)))

    return [
        Point(
            size, n, d, 6 * n * d,
            {
                "none": {seed: around(TRUE.loss(n, d)) for seed in range(seeds)},
                "fixed": {seed: around(TRUE.loss(n, gain * d)) for seed in range(seeds)},
            },
        )
        for size, n in SIZES.items() if size not in drop
        for d in TOKENS
    ]  # fmt: skip


def test_a_known_law_is_recovered_exactly() -> None:
    law = fit_law(ladder(), "none")
    for name in ("E", "A", "a", "B", "b"):
        assert getattr(law, name) == pytest.approx(getattr(TRUE, name), rel=1e-3), name


@settings(max_examples=8, deadline=None)
@given(st.floats(0.3, 2), st.floats(0.15, 0.5), st.floats(0.15, 0.5), st.floats(0.2, 1.0), st.floats(0.2, 1.0))
def test_any_law_predicts_rungs_that_were_not_trained(
    E: float, a: float, b: float, n_part: float, d_part: float
) -> None:
    """Whatever the parts: three times the tokens and the parameters of the top rung."""
    true = Law(E, n_part * 1.2e6**a, a, d_part * 15e6**b, b)
    points = [Point(size, n, d, 6 * n * d, {"x": {0: true.loss(n, d)}}) for size, n in SIZES.items() for d in TOKENS]
    assert fit_law(points, "x").loss(15e6, 150e6) == pytest.approx(true.loss(15e6, 150e6), rel=0.02)


def test_one_bad_run_does_not_bend_the_law() -> None:
    """What the Huber loss is for: one loss 5 % off, the law 0.5 % at the most."""
    points = ladder()
    points[4].losses["none"][0] *= 1.05  # type: ignore[index]
    law = fit_law(points, "none")
    assert all(
        law.loss(p.parameters, p.tokens) == pytest.approx(TRUE.loss(p.parameters, p.tokens), rel=5e-3) for p in points
    )


def test_a_law_of_tokens_alone_holds_at_its_size() -> None:
    own = [point for point in ladder() if point.size == "1.2M"]
    law = fit_tokens(own, "none")
    assert law.A == 0
    assert pytest.approx(TRUE.E + 18 * 1.2e6**-0.25, rel=1e-3) == law.E
    assert law.loss(1.2e6, 150e6) == pytest.approx(TRUE.loss(1.2e6, 150e6), rel=1e-4)


def test_what_can_be_fitted() -> None:
    points = ladder()
    assert can_fit(points, "none")
    assert not can_fit(points, "other")
    assert not can_fit(ladder(drop=("5M",)), "none")  # two sizes
    assert not can_fit([p for p in points if p.tokens < 50e6], "none")  # two numbers of tokens
    # Three of each, but the largest size shares no number of tokens with the others: how much of its loss is size?
    apart = [p for p in points if (p.size == "5M") == (p.tokens == 50e6)]
    assert len(apart) == 5
    assert not can_fit(apart, "none")


def test_tokens_invert_the_loss() -> None:
    assert TRUE.tokens_for(1.2e6, TRUE.loss(1.2e6, 7e6)) == pytest.approx(7e6)
    assert TRUE.tokens_for(1.2e6, TRUE.E + 18 * 1.2e6**-0.25) == math.inf


@pytest.mark.parametrize("gain", [1.0, 1.4, 2.0])
def test_an_arm_worth_more_tokens_is_worth_that(gain: float) -> None:
    """By construction: `gain` times the tokens at every rung, whatever the law's form makes of the losses."""
    points = [Point(**{**vars(p), "throughput": {"fixed": 0.9}}) for p in ladder(gain=gain)]
    found = estimate(points, "none", replicates=0)
    for index in range(len(points)):
        assert found["tokens", "fixed", str(index)]["value"] == pytest.approx(gain, rel=0.01)
        assert found["compute", "fixed", str(index)]["value"] == pytest.approx(0.9 * gain, rel=0.01)
    assert found["trend", "fixed", "compute"]["value"] == pytest.approx(1, abs=0.01)


def test_the_baseline_is_worth_itself_though_the_law_does_not_fit_it() -> None:
    point = Point("x", 1e6, 1e7, 1.0, {"none": {0: 9.0, 1: 8.0}, "same": {0: 9.0, 1: 8.0}})
    assert multiplier(TRUE, point, "same", "none") == pytest.approx(1)


def test_a_loss_out_of_reach_is_worth_infinitely_much() -> None:
    loss = TRUE.loss(1.2e6, 15e6)
    point = Point("x", 1.2e6, 15e6, 1.0, {"none": {0: loss}, "arm": {0: 0.5}})
    assert multiplier(TRUE, point, "arm", "none") == math.inf


def gaps(rows: list[tuple[str, float, float]]) -> list[Point]:
    return [Point(size, 1e6, d, 1e6 * d, {"none": {0: 3.0}, "arm": {0: 3.0 - gap}}) for size, d, gap in rows]


def test_retention_by_hand() -> None:
    """0.08 -> 0.04 in tenfold data is one half; a size with gaps twice as large and the same slope changes nothing."""
    assert retention(gaps([("s", 1e6, 0.08), ("s", 1e7, 0.04)]), "arm", "none") == pytest.approx(0.5)
    # Half for threefold data is 0.5^(1/log10 3) for tenfold.
    assert retention(gaps([("s", 1e6, 0.08), ("s", 3e6, 0.04)]), "arm", "none") == pytest.approx(
        0.5 ** (1 / math.log10(3))
    )
    two = [("s", 1e6, 0.08), ("s", 1e7, 0.04), ("m", 1e7, 0.16), ("m", 1e8, 0.08)]
    assert retention(gaps(two), "arm", "none") == pytest.approx(0.5)


def test_no_retention_without_a_lead_or_with_one_number_of_tokens() -> None:
    assert retention(gaps([("s", 1e6, 0.08), ("s", 1e7, -0.001)]), "arm", "none") is None
    assert retention(gaps([("s", 1e6, 0.08), ("m", 1e7, 0.04)]), "arm", "none") is None
    assert retention([], "arm", "none") is None


def test_a_trend_by_hand() -> None:
    """Worth 2 at one compute and 1.5 at ten times as much: a quarter less per tenfold."""
    base = Law(1.0, 0.0, 0.0, 100.0, 0.3)
    points = []
    for d, worth in ((1e6, 2.0), (1e7, 1.5), (1e8, 1.125)):
        points.append(Point("s", 1e6, d, 6e6 * d, {"none": {0: base.loss(1, d)}, "arm": {0: base.loss(1, worth * d)}}))
    found = estimate(points, "none", replicates=0)
    assert found["trend", "arm", "tokens"]["value"] == pytest.approx(0.75, rel=1e-3)
    assert found["trend", "arm", "compute"]["value"] == pytest.approx(0.75, rel=1e-3)
    assert found["trend", "arm", "parameters"]["value"] is None
    assert ("law", "none", "E") not in found  # one size


def test_a_trend_along_tokens_is_not_hidden_by_larger_models() -> None:
    """Half for tenfold tokens, the same for every size: over compute alone it would look like more than half."""
    rows = [(n, d, 4.0 * (d / 1e6) ** math.log10(0.5)) for n in (1e5, 1e6, 1e7) for d in (1e6, 1e7)]
    found = trend(rows)
    assert found["tokens"] == pytest.approx(0.5)
    assert found["parameters"] == pytest.approx(1)
    assert found["compute"] == pytest.approx(math.sqrt(0.5))
    # Sizes and tokens that grow together tell neither apart, and an infinite multiplier tells nothing.
    for bad in ([(1e5, 1e6, 2.0), (1e6, 1e7, 1.5), (1e7, 1e8, 1.2)], [*rows, (1e8, 1e7, math.inf)], []):
        assert set(trend(bad).values()) == {None}


def test_intervals_hold_the_truth_and_narrow_with_less_noise() -> None:
    wide, narrow = (estimate(ladder(noise, 3, 1.5), "none", replicates=24) for noise in (0.004, 0.0004))
    for key, true in ((("tokens", "fixed", "8"), 1.5), (("law", "none", "b"), TRUE.b), (("law", "none", "E"), TRUE.E)):
        low, high = wide[key]["ci95"]
        assert low <= true <= high, key
        assert narrow[key]["ci95"][1] - narrow[key]["ci95"][0] < high - low


def test_what_one_seed_does_not_tell_has_no_interval() -> None:
    found = estimate(ladder(0.002, 1, 1.5, drop=("5M",)), "none", replicates=24)
    assert found["tokens", "fixed", "0"]["value"] is not None
    assert all(entry["ci95"] is None for entry in found.values())
    whole = estimate(ladder(0.002, 1, 1.5), "none", replicates=24)
    assert whole["gap", "fixed", "0"]["ci95"] is None
    assert whole["compute", "fixed", "0"]["ci95"] is not None
